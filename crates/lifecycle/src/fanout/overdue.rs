//! Who asks again those that do not answer.

use std::marker::PhantomData;
use std::time::Duration;

use aftercommit_core::postgres::job;
use aftercommit_core::runner::{Drift, ItemError, JOBS, Reconciler};
use chrono::Utc;
use sqlx::PgTransaction;
use uuid::Uuid;

use super::kind::Kind;
use super::request::{JobId, ask, locked};

/// A reconciler in the requester's database: participants that were asked longer ago than `patience` and have not answered are asked once
/// more. Whoever has done it answers again and does nothing twice. Who has registered since is asked, too, by jobs for
/// [`Participants::Registered`](super::Participants::Registered).
#[derive(Debug)]
pub struct Overdue<K> {
    name: String,
    patience: Duration,
    kind: PhantomData<fn() -> K>,
}

impl<K: Kind> Overdue<K> {
    /// For the jobs of a kind; `tenant.deletion` makes the reconciler `job-tenant-deletion`.
    pub fn new(patience: Duration) -> Self {
        let kind = K::NAME.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "-");
        Self { name: format!("{JOBS}{kind}"), patience, kind: PhantomData }
    }
}

impl<K: Kind> Reconciler for Overdue<K> {
    fn name(&self) -> &str {
        &self.name
    }

    fn interval(&self) -> Duration {
        (self.patience / 2).max(Duration::from_secs(1))
    }

    async fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<String>, ItemError> {
        let after = after.and_then(|after| Uuid::parse_str(after).ok());
        let jobs = job::waiting(tx, K::REQUESTED, self.patience.as_secs_f64(), after, limit).await?;
        Ok(jobs.iter().map(Uuid::to_string).collect())
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, item: &str) -> Result<Drift, ItemError> {
        let id = Uuid::parse_str(item).map_err(|_| sqlx::Error::RowNotFound)?;
        let found = locked::<K>(tx, JobId(id)).await?;
        let open = job::participants(tx, id).await?.iter().any(|participant| participant.status == "asked");
        let age = (Utc::now() - found.requested_at).to_std().unwrap_or_default();
        let asks = serde_json::from_value(found.request.clone()).is_ok_and(|request| K::asks_again(&request, age));
        if found.status != "running" || !open || !asks {
            return Ok(Drift::of(0));
        }
        let late = job::overdue(tx, id, self.patience.as_secs_f64()).await?;
        let new = if found.joinable { job::join(tx, id, None).await? } else { Vec::new() };
        let names =
            |asked: &[(String, i32)]| asked.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        if !late.is_empty() {
            tracing::warn!(job = %id, kind = found.kind, participants = names(&late), "no answer yet: asked once more");
        }
        if !new.is_empty() {
            tracing::info!(job = %id, kind = found.kind, participants = names(&new), "registered since: asked, too");
        }
        let asked = [late, new].concat();
        if asked.is_empty() {
            return Ok(Drift::of(0));
        }
        let asked = ask(tx, found, asked, false).await?;
        Ok(Drift::of(asked.len() as u64))
    }
}
