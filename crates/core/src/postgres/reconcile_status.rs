//! How reconcilers are doing.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::maybe::Maybe;
use super::session::Session;
use super::time;

/// A reconciler as its health shows it.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct ReconcilerRow {
    /// Name of the reconciler.
    pub name: String,
    /// How long ago it last succeeded.
    pub(crate) since_success: Option<f64>,
    /// How many runs in a row have failed.
    pub failures: i32,
    /// Everything committed before this time is accounted for; none when no run has said so.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub reconciled_up_to: Option<DateTime<Utc>>,
    /// What the last failed run said, if the last run that ended failed.
    pub error: Option<String>,
}

/// What is known of these reconcilers.
pub async fn state(session: &mut Session, names: &[&str]) -> Result<Vec<ReconcilerRow>, sqlx::Error> {
    sqlx::query_as(
        "select name, (extract(epoch from clock_timestamp()) - extract(epoch from last_success_at))::float8 as since_success,
                failures, reconciled_up_to,
                (select run.error from aftercommit.reconcile_run run
                  where run.name = r.name and run.scope <> 'keys' and run.result = 'failed' and r.failures > 0
                  order by run.id desc limit 1) as error
           from aftercommit.reconciler r where name = any($1) order by name",
    )
    .bind(names)
    .fetch_all(session)
    .await
}

/// A run of a reconciler.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct ReconcileRun {
    /// Its number.
    pub id: i64,
    /// Whose it is.
    #[sqlx(rename = "name")]
    pub reconciler: String,
    /// `scheduled` or `demand`.
    pub cause: String,
    /// `report` or `repair`.
    pub mode: String,
    /// `new`, `full` or `keys`.
    pub scope: String,
    /// When it began, by the database's clock.
    #[sqlx(try_from = "time::Time")]
    pub started_at: DateTime<Utc>,
    /// When it ended; none when it runs, or its process died and no other run has noticed yet.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub ended_at: Option<DateTime<Utc>>,
    /// `ok`, `failed` or `stopped`.
    pub result: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many items it has looked at so far.
    pub scanned: i64,
    /// How many differences it found.
    pub found: i64,
    /// How many of them it repaired, or queued the repair of.
    pub repaired: i64,
    /// How many items failed.
    pub failed: i64,
}

/// The last `limit` runs, of one reconciler or of all, the oldest first.
pub async fn runs(
    session: &mut Session,
    reconciler: Option<&str>,
    limit: i64,
) -> Result<Vec<ReconcileRun>, sqlx::Error> {
    sqlx::query_as(
        "select * from (
            select id, name, cause, mode, scope, started_at, ended_at, result, error, scanned, found, repaired, failed
              from aftercommit.reconcile_run where $1::text is null or name = $1 order by id desc limit $2) as last
          order by id",
    )
    .bind(reconciler)
    .bind(limit)
    .fetch_all(session)
    .await
}
