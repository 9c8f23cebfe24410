//! A spec that is swept by itself: how long its rows are kept, and whether at all.

use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::sweep;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgTransaction;

use crate::error::PruneError;
use crate::run::{Plan, Prune, Pruned};
use crate::spec::Spec;
use crate::sweep::{Batch, BatchError, Category, in_users_session};

/// How long a batch waits for a lock that others have: children of rows that go may be locked, and parents are passed over.
const LOCK_TIMEOUT: &str = "; set local lock_timeout = '2s'";
/// Rows that a sweep passes over because they cannot go, until it gives up.
const MOST_BLOCKED: usize = 100;

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
    pub(crate) async fn plan(
        &self,
        connections: &Connections,
        search_path: &Option<String>,
    ) -> Result<Plan, BatchError> {
        undone(connections, "begin read only", search_path, async |tx, now| {
            self.prune(now).plan(tx).await.map_err(|error| error.of(&self.spec.name))
        })
        .await
    }

    /// What goes at this time of the database's clock.
    fn prune(&self, now: DateTime<Utc>) -> Prune<'_> {
        match self.period {
            Some(period) => Prune::of(&self.spec).before(now - period),
            None => Prune::of(&self.spec),
        }
    }
}

/// Lets names be looked up where the config says, for this transaction: nobody's functions but PostgreSQL's own unless it says so.
async fn pin(tx: &mut PgTransaction<'_>, search_path: &Option<String>) -> Result<(), PruneError> {
    let path = search_path.as_deref().unwrap_or("pg_catalog");
    sqlx::query("select pg_catalog.set_config('search_path', $1, true)")
        .bind(format!("{path}, pg_temp"))
        .persistent(false)
        .execute(&mut **tx)
        .await
        .map(drop)
        .map_err(|error| PruneError::spec(format!("the search_path {path:?} cannot be used: {error}")))
}

/// Does something in a transaction that is rolled back, at this time of the database's clock.
async fn undone<T>(
    connections: &Connections,
    begin: &str,
    search_path: &Option<String>,
    work: impl AsyncFnOnce(&mut PgTransaction<'_>, DateTime<Utc>) -> Result<T, PruneError>,
) -> Result<T, BatchError> {
    in_users_session(connections, async |session| {
        let now = sweep::now(session).await?;
        let mut tx = session.begin_with(format!("{begin}{LOCK_TIMEOUT}")).await?;
        let done = match pin(tx.for_others(), search_path).await {
            Ok(()) => work(tx.for_others(), now).await,
            Err(error) => Err(error),
        };
        tx.rollback().await?;
        Ok(done?)
    })
    .await
}

/// A hundred years.
const MAX_PERIOD: Duration = Duration::from_hours(36_500 * 24);

/// A policy while it is swept.
#[derive(Debug)]
pub(crate) struct PolicySweep<'a> {
    policy: &'a Policy,
    search_path: &'a Option<String>,
    /// Where the next batch begins.
    place: Option<String>,
    /// Rows in the next batch, while one that cannot go is looked for.
    narrowed: Option<u32>,
    /// Rows that cannot go.
    blocked: Vec<String>,
    /// Why the first of them cannot.
    why: Option<PruneError>,
}

impl<'a> PolicySweep<'a> {
    pub(crate) fn new(policy: &'a Policy, search_path: &'a Option<String>) -> Self {
        Self { policy, search_path, place: None, narrowed: None, blocked: Vec::new(), why: None }
    }

    /// One batch, in a transaction.
    async fn attempt(&self, connections: &Connections, limit: u32) -> Result<Pruned, BatchError> {
        let spec = &self.policy.spec;
        in_users_session(connections, async |session| {
            let now = sweep::now(session).await?;
            let mut tx = session.begin_with(format!("begin{LOCK_TIMEOUT}")).await?;
            let prune = self.next(now).limit(limit).skip_locked();
            let pruned = match pin(tx.for_others(), self.search_path).await {
                Ok(()) => prune.run(tx.for_others()).await,
                Err(error) => Err(error),
            };
            let pruned = match pruned {
                Ok(pruned) => pruned,
                Err(error) => {
                    tx.rollback().await?;
                    return Err(error.into());
                }
            };
            sweep::progress(&mut tx, &spec.name, pruned.count, pruned.next.as_deref()).await?;
            fault::point("prune-recorded");
            // What is checked at the commit only, such as a deferred foreign key, is about the table as well.
            tx.commit().await.map_err(|error| PruneError::database(&spec.table, error))?;
            fault::point("prune-committed");
            Ok(pruned)
        })
        .await
    }

    fn next(&self, now: DateTime<Utc>) -> Prune<'_> {
        let prune = self.policy.prune(now).without(&self.blocked);
        match &self.place {
            Some(place) => prune.from(place),
            None => prune,
        }
    }

    /// The id of the row that the next batch begins with.
    async fn first(&self, connections: &Connections) -> Result<Option<String>, BatchError> {
        undone(connections, "begin", self.search_path, async |tx, now| {
            self.next(now).limit(1).skip_locked().first(tx).await
        })
        .await
    }

    /// Looks for the row that a batch failed of: with half of the batch, and of a single row passes it over.
    async fn narrow(&mut self, connections: &Connections, limit: u32, error: PruneError) -> Result<Batch, BatchError> {
        if limit > 1 {
            self.narrowed = Some(limit / 2);
            return Ok(Batch::on_the_way());
        }
        let Some(id) = self.first(connections).await? else { return Err(error.of(&self.policy.spec.name).into()) };
        tracing::warn!(category = self.policy.spec.name, id, error = %error, "this row cannot go, and is passed over");
        self.blocked.push(id);
        self.narrowed = None;
        let first = self.why.get_or_insert(error);
        if self.blocked.len() < MOST_BLOCKED {
            return Ok(Batch::on_the_way());
        }
        let text = format!("{first}; a sweep passes over {MOST_BLOCKED} such rows, and there are more");
        Err(PruneError::new(first.kind(), text).of(&self.policy.spec.name).into())
    }

    /// At the end: what was passed over is a failure all the same.
    fn ended(&mut self) -> Result<Batch, BatchError> {
        let Some(why) = self.why.take() else { return Ok(Batch::of(0, false)) };
        let (count, first) = (self.blocked.len(), self.blocked.first().cloned().unwrap_or_default());
        let text = format!("{count} rows cannot go and were passed over, such as {first}: {why}");
        Err(PruneError::new(why.kind(), text).of(&self.policy.spec.name).into())
    }
}

impl Category for PolicySweep<'_> {
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
        let limit = self.narrowed.map_or(limit, |narrowed| narrowed.min(limit));
        let pruned = match self.attempt(connections, limit).await {
            Ok(pruned) => pruned,
            Err(BatchError::Prune(error)) if error.may_be_a_row() => {
                return self.narrow(connections, limit, error).await;
            }
            Err(BatchError::Prune(error)) => return Err(error.of(&self.policy.spec.name).into()),
            Err(error) => return Err(error),
        };
        // What lies before the place, because it was locked or has come since, is for a last look from the start.
        let more = pruned.more || self.place.is_some();
        self.place = pruned.next;
        if !more && pruned.count == 0 {
            return self.ended();
        }
        // With something passed over the end is told by a batch of its own.
        Ok(Batch::of(pruned.count, more || self.why.is_some()))
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
