//! How reconcilers are doing.

use chrono::{DateTime, Utc};
use sqlx::Row;

use super::session::Session;
use super::time;

/// A reconciler as its health shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct ReconcilerRow {
    pub name: String,
    /// How long ago it last succeeded.
    pub(crate) since_success: Option<f64>,
    pub failures: i32,
    pub reconciled_up_to: Option<DateTime<Utc>>,
    /// What the last failed run said, if the last run that ended failed.
    pub error: Option<String>,
}

/// What is known of these reconcilers.
pub async fn state(session: &mut Session, names: &[&str]) -> Result<Vec<ReconcilerRow>, sqlx::Error> {
    let rows = sqlx::query(
        "select name, (extract(epoch from clock_timestamp()) - extract(epoch from last_success_at))::float8, failures, reconciled_up_to,
                (select run.error from aftercommit.reconcile_run run
                  where run.name = r.name and run.scope <> 'keys' and run.result = 'failed' and r.failures > 0
                  order by run.id desc limit 1)
           from aftercommit.reconciler r where name = any($1) order by name",
    )
    .bind(names)
    .fetch_all(session)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(ReconcilerRow {
                name: row.try_get(0)?,
                since_success: row.try_get(1)?,
                failures: row.try_get(2)?,
                reconciled_up_to: time::maybe_at(row, 3)?,
                error: row.try_get(4)?,
            })
        })
        .collect()
}

/// A run as people look at it.
#[derive(Debug, Clone, PartialEq)]
pub struct RunEntry {
    pub id: i64,
    pub reconciler: String,
    pub cause: String,
    pub mode: String,
    pub scope: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    pub result: Option<String>,
    pub error: Option<String>,
    pub scanned: i64,
    pub found: i64,
    pub repaired: i64,
    pub failed: i64,
}

/// The last `limit` runs, of one reconciler or of all, the oldest first.
pub async fn runs(session: &mut Session, reconciler: Option<&str>, limit: i64) -> Result<Vec<RunEntry>, sqlx::Error> {
    let rows = sqlx::query(
        "select * from (
            select id, name, cause, mode, scope, started_at, ended_at, result, error, scanned, found, repaired, failed
              from aftercommit.reconcile_run where $1::text is null or name = $1 order by id desc limit $2) as last
          order by id",
    )
    .bind(reconciler)
    .bind(limit)
    .fetch_all(session)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(RunEntry {
                id: row.try_get(0)?,
                reconciler: row.try_get(1)?,
                cause: row.try_get(2)?,
                mode: row.try_get(3)?,
                scope: row.try_get(4)?,
                started_at: time::at(row, 5)?,
                ended_at: time::maybe_at(row, 6)?,
                result: row.try_get(7)?,
                error: row.try_get(8)?,
                scanned: row.try_get(9)?,
                found: row.try_get(10)?,
                repaired: row.try_get(11)?,
                failed: row.try_get(12)?,
            })
        })
        .collect()
}
