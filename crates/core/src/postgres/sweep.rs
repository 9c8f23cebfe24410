//! What pruning has done, by category.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::maybe::Maybe;
use super::session::{Session, Tx};
use super::time;

/// How a sweep of a category ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SweepResult {
    /// Nothing old is left, but for what others had locked.
    Done,
    /// The budget of one sweep is spent, and more may be old. The next one goes on there.
    Budget,
    /// The process stopped.
    Stopped,
    /// Others were in the way, such as a transaction that locks the rows.
    Busy,
    /// It failed.
    Failed,
}

impl SweepResult {
    /// As the table has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Budget => "budget",
            Self::Stopped => "stopped",
            Self::Busy => "busy",
            Self::Failed => "failed",
        }
    }
}

/// A category as it is on record.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct SweepStatus {
    /// Its name, such as `outbox`, `inbox:mails` or the name of a spec.
    pub category: String,
    /// Which process swept last: host, process and a random part.
    pub swept_by: String,
    /// How long rows are kept, in seconds; none when it is not by age.
    pub period_seconds: Option<f64>,
    /// When the last sweep began.
    #[sqlx(try_from = "time::Time")]
    pub started_at: DateTime<Utc>,
    /// When a sweep last came to its end, whatever its result; none when none did.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub last_swept_at: Option<DateTime<Utc>>,
    /// `done`, `budget`, `stopped`, `busy` or `failed`; none while it runs, and when its process died.
    pub result: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// Rows that the last sweep removed.
    pub removed: i64,
    /// Rows that all sweeps removed.
    pub removed_total: i64,
    /// Where the next one goes on; none at the start.
    pub place: Option<String>,
}

/// Writes down that a sweep begins, and returns the place where it goes on.
pub async fn begin(
    session: &mut Session,
    category: &str,
    by: &str,
    period: Option<Duration>,
) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "insert into aftercommit.sweep as s (category, swept_by, period) values ($1, $2, make_interval(secs => $3))
         on conflict (category) do update
            set swept_by = excluded.swept_by, period = excluded.period, started_at = excluded.started_at, removed = 0,
                result = null, error = null
         returning place",
    )
    .bind(category)
    .bind(by)
    .bind(period.map(|period| period.as_secs_f64()))
    .fetch_one(session)
    .await
}

/// Writes down what a batch removed and where the next one goes on, in the transaction of the batch.
pub async fn progress(tx: &mut Tx<'_>, category: &str, removed: u64, place: Option<&str>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.sweep set removed = removed + $2, removed_total = removed_total + $2, place = $3
          where category = $1",
    )
    .bind(category)
    .bind(removed.cast_signed())
    .bind(place)
    .execute(tx)
    .await
    .map(drop)
}

/// Writes down how a sweep ended; `removed` is what no [`progress`] has counted yet.
pub async fn end(
    session: &mut Session,
    category: &str,
    removed: u64,
    result: SweepResult,
    error: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.sweep
            set removed = removed + $2, removed_total = removed_total + $2, result = $3, error = $4,
                last_swept_at = clock_timestamp()
          where category = $1",
    )
    .bind(category)
    .bind(removed.cast_signed())
    .bind(result.name())
    .bind(error)
    .execute(session)
    .await
    .map(drop)
}

/// All categories, by name.
pub async fn list(session: &mut Session) -> Result<Vec<SweepStatus>, sqlx::Error> {
    sqlx::query_as(
        "select category, swept_by, extract(epoch from period)::float8 as period_seconds, started_at, last_swept_at, result,
                error, removed, removed_total, place
           from aftercommit.sweep order by category",
    )
    .fetch_all(session)
    .await
}

/// The database's clock, by which ages are measured.
pub async fn now(session: &mut Session) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(session).await
}

/// Deletes up to `limit` entries of the audit trail that are older than `age`, the oldest first, and leaves an entry that says so.
pub async fn audit(session: &mut Session, age: Duration, limit: u32) -> Result<u64, sqlx::Error> {
    let removed: i64 = sqlx::query_scalar("select aftercommit.prune_audit(make_interval(secs => $1), $2)")
        .bind(age.as_secs_f64())
        .bind(limit.cast_signed())
        .fetch_one(session)
        .await?;
    Ok(removed.unsigned_abs())
}

/// Deletes up to `limit` leases that ran out more than `age` ago, see the function.
pub async fn leases(session: &mut Session, age: Duration, limit: u32) -> Result<u64, sqlx::Error> {
    let removed: i64 = sqlx::query_scalar("select aftercommit.prune_leases(make_interval(secs => $1), $2)")
        .bind(age.as_secs_f64())
        .bind(limit.cast_signed())
        .fetch_one(session)
        .await?;
    Ok(removed.unsigned_abs())
}
