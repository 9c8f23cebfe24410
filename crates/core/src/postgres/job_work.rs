//! What a participant has done of a job, in its own database. The statements run in transactions of the work, so they name the schema
//! of the process.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::job::{Counts, ours};
use super::maybe::Maybe;
use super::time;

/// What a participant has done of a job so far.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct JobWork {
    /// Which time it was asked.
    pub round: i32,
    /// The newest round that was answered as failed; 0 when none was.
    pub failed: i32,
    /// Why.
    pub error: Option<String>,
    /// When it began; none when it was cancelled before.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub started_at: Option<DateTime<Utc>>,
    /// Where the next step begins; none at the beginning.
    pub position: Option<Value>,
    /// What it did.
    #[sqlx(json)]
    pub counts: Counts,
    /// What else there is to say of it.
    #[sqlx(json)]
    pub notes: Vec<String>,
    /// When it ended.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub ended_at: Option<DateTime<Utc>>,
}

/// Begins the work of a round, or goes on with it; the row is locked. What an earlier round has done still counts; a new one goes on
/// where that was, or `over` from the beginning.
pub async fn begin(
    connection: &mut PgConnection,
    job: Uuid,
    participant: &str,
    round: i32,
    over: bool,
) -> Result<JobWork, sqlx::Error> {
    sqlx::query_as(ours(
        "insert into aftercommit.job_work as w (job, participant, round, started_at) values ($1, $2, $3, clock_timestamp())
         on conflict (job, participant) do update
            set position = case when not ($4 and excluded.round > w.round) then w.position end,
                round = greatest(w.round, excluded.round)
         returning round, failed, error, started_at, position, counts, notes, ended_at",
    ))
    .bind(job)
    .bind(participant)
    .bind(round)
    .bind(over)
    .persistent(false)
    .fetch_one(connection)
    .await
}

/// Writes down what a step did, in the transaction of the step.
pub async fn save(
    connection: &mut PgConnection,
    job: Uuid,
    participant: &str,
    work: &JobWork,
    ended: bool,
) -> Result<(), sqlx::Error> {
    sqlx::query(ours(
        "update aftercommit.job_work
            set position = $3, counts = $4, ended_at = case when $5 then clock_timestamp() end, notes = $6,
                error = case when not $5 then error end
          where job = $1 and participant = $2",
    ))
    .bind(job)
    .bind(participant)
    .bind(work.position.as_ref().map(Json))
    .bind(Json(&work.counts))
    .bind(ended)
    .bind(Json(&work.notes))
    .persistent(false)
    .execute(connection)
    .await
    .map(drop)
}

/// Writes down that a round is answered as failed, so that its request changes nothing when it comes again.
pub async fn fail(
    connection: &mut PgConnection,
    job: Uuid,
    participant: &str,
    round: i32,
    error: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(ours(
        "update aftercommit.job_work set failed = greatest(failed, $3), error = $4 where job = $1 and participant = $2",
    ))
    .bind(job)
    .bind(participant)
    .bind(round)
    .bind(error)
    .persistent(false)
    .execute(connection)
    .await
    .map(drop)
}

/// Writes down that a job is cancelled for a participant that has not begun. False when it has.
pub async fn cancel(
    connection: &mut PgConnection,
    job: Uuid,
    participant: &str,
    round: i32,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(ours(
        "insert into aftercommit.job_work (job, participant, round, ended_at) values ($1, $2, $3, clock_timestamp())
         on conflict (job, participant) do nothing",
    ))
    .bind(job)
    .bind(participant)
    .bind(round)
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Writes down whose data this database was asked to erase. False when that is on record.
pub async fn erase_subject(
    connection: &mut PgConnection,
    kind: &str,
    id: &str,
    job: Uuid,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(ours(
        "insert into aftercommit.erased_subject (kind, id, job) values ($1, $2, $3) on conflict do nothing",
    ))
    .bind(kind)
    .bind(id)
    .bind(job)
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}
