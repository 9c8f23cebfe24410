//! A spec that is swept by itself: how long its rows are kept, and whether at all.

use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::sweep;
use chrono::TimeDelta;

use crate::error::PruneError;
use crate::run::{Plan, Prune};
use crate::spec::Spec;
use crate::sweep::{Batch, BatchError, Category, in_users_session};

/// How long a batch waits for a lock that others have: children of rows that go may be locked, and parents are passed over.
const LOCK_TIMEOUT: &str = "; set local lock_timeout = '2s'";

/// Names of categories that are aftercommit's own.
const OWN: [&str; 6] = ["outbox", "parked", "repairs", "relay-log", "audit", "leases"];
/// What names of such categories begin with.
const OWN_PREFIXES: [&str; 2] = ["inbox:", "failures:"];

/// A spec with how long its rows are kept. The spec is code, the rest is for whoever runs it.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What is pruned.
    pub spec: Spec,
    /// Rows that were finished longer ago, by the spec's `before_column`, go. None: all finished rows go.
    pub period: Option<Duration>,
    /// Whether it is swept. Defaults to true.
    pub enabled: bool,
}

impl Policy {
    /// Keeps finished rows for `period`.
    pub fn new(spec: Spec, period: Option<Duration>) -> Self {
        Self { spec, period, enabled: true }
    }

    /// What can be said without the database.
    pub(crate) fn check(&self) -> Result<(), PruneError> {
        self.spec.check()?;
        let name = &self.spec.name;
        if OWN.contains(&name.as_str()) || OWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            return Err(PruneError::spec(format!(
                "the name {name:?} is that of a table of aftercommit: take another one"
            )));
        }
        match (self.period, &self.spec.before_column) {
            (Some(_), None) => Err(PruneError::spec(format!(
                "{name}: a period needs the column that says when a row was finished (before)"
            ))),
            (Some(period), _) if TimeDelta::from_std(period).is_err() || period > MAX_PERIOD => {
                Err(PruneError::spec(format!("{name}: a period must be at most 36500 days")))
            }
            _ => Ok(()),
        }
    }

    /// What the next sweep would do, with the limit of the spec.
    ///
    /// # Errors
    /// As [`Prune::plan`].
    pub(crate) async fn plan(&self, connections: &Connections) -> Result<Plan, BatchError> {
        in_users_session(connections, async |session| {
            let now = sweep::now(session).await?;
            let mut tx = session.begin_with("begin read only".into()).await?;
            let mut prune = Prune::of(&self.spec);
            if let Some(period) = self.period {
                prune = prune.before(now - period);
            }
            let plan = prune.plan(tx.for_others()).await;
            tx.rollback().await?;
            Ok(plan?)
        })
        .await
    }
}

/// A hundred years.
const MAX_PERIOD: Duration = Duration::from_hours(36_500 * 24);

/// A policy while it is swept.
#[derive(Debug)]
pub(crate) struct Swept<'a> {
    policy: &'a Policy,
    /// Where the next batch begins.
    place: Option<String>,
}

impl<'a> Swept<'a> {
    pub(crate) fn new(policy: &'a Policy) -> Self {
        Self { policy, place: None }
    }
}

impl Category for Swept<'_> {
    fn name(&self) -> &str {
        &self.policy.spec.name
    }

    fn period(&self) -> Option<Duration> {
        self.policy.period
    }

    fn shared(&self) -> bool {
        true
    }

    fn counts(&self) -> bool {
        true
    }

    fn begin(&mut self, place: Option<String>) {
        self.place = place;
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let Policy { spec, period, .. } = self.policy;
        let place = self.place.as_deref();
        let pruned = in_users_session(connections, async |session| {
            let now = sweep::now(session).await?;
            let mut tx = session.begin_with(format!("begin{LOCK_TIMEOUT}")).await?;
            let mut prune = Prune::of(spec).limit(limit).skip_locked();
            if let Some(period) = *period {
                prune = prune.before(now - period);
            }
            if let Some(place) = place {
                prune = prune.from(place);
            }
            let pruned = match prune.run(tx.for_others()).await {
                Ok(pruned) => pruned,
                Err(error) => {
                    tx.rollback().await?;
                    return Err(error.into());
                }
            };
            sweep::progress(&mut tx, &spec.name, pruned.count, pruned.next.as_deref()).await?;
            fault::point("prune-recorded");
            tx.commit().await?;
            fault::point("prune-committed");
            Ok(pruned)
        })
        .await?;
        // What lies before the place, because it was locked or has come since, is for a last look from the start.
        let more = pruned.more || place.is_some();
        self.place = pruned.next;
        Ok(Batch { removed: pruned.count, more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_our_own_tables_and_impossible_periods_are_refused() {
        let spec = Spec::new("t", "true");
        for (policy, told) in [
            (Policy::new(spec.clone().name("outbox"), None), "of aftercommit"),
            (Policy::new(spec.clone().name("inbox:mails"), None), "of aftercommit"),
            (Policy::new(spec.clone(), Some(Duration::from_secs(1))), "a period needs the column"),
            (Policy::new(spec.clone().before_column("at"), Some(Duration::MAX)), "36500 days"),
            (Policy::new(spec.clone().limit(0), None), "limit must be"),
            (Policy::new(Spec::new("t", "a) or (true"), None), "closes"),
        ] {
            let error = policy.check().unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        assert!(Policy::new(spec.before_column("at"), Some(Duration::from_secs(1))).check().is_ok());
    }
}
