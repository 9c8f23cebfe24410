//! Reconcilers and their runs. A run that has not ended is the lease of the process that runs it: one per reconciler, by
//! the database's clock.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::types::Json;

use super::session::{Session, Tx};

/// What shall be run.
#[derive(Debug, Clone)]
pub struct NewRun<'a> {
    /// Name of the reconciler.
    pub name: &'a str,
    /// `scheduled` or `demand`.
    pub cause: &'a str,
    /// `report` or `repair`.
    pub mode: &'a str,
    /// `new`, `full` or `keys`; `new` becomes `full` when a full sweep is due.
    pub scope: &'a str,
    /// The process that runs it.
    pub holder: &'a str,
    /// How often a scheduled run is due after one that succeeded.
    pub interval: Duration,
    /// How often a full sweep is due, if it is scheduled.
    pub full_every: Option<Duration>,
    /// How long the run counts as alive without a sign of life.
    pub ttl: Duration,
}

/// What came of the wish to run.
#[derive(Debug)]
pub enum Begun {
    /// It begins now.
    Run(RunRow),
    /// Another process runs it since so many seconds.
    Busy {
        /// The other process.
        holder: String,
        /// For how many seconds it has run.
        seconds: f64,
    },
    /// It succeeded so many seconds ago, and is due in so many.
    NotDue {
        /// How many seconds ago it succeeded.
        seconds: f64,
        /// In how many seconds it is due.
        due_in: f64,
    },
    /// It failed last, and may be tried again in so many seconds.
    TooSoon {
        /// How many runs in a row have failed.
        failures: i32,
        /// In how many seconds it may be tried again.
        due_in: f64,
    },
    /// Runs of dead processes were closed as failed; now it has to wait as after any failure.
    Closed {
        /// How many runs in a row have failed, those of the dead processes counted.
        failures: i32,
    },
}

/// A run that has begun.
#[derive(Debug, Clone)]
pub struct RunRow {
    /// The run's id.
    pub id: i64,
    /// `new`, `full` or `keys`: what it looks at.
    pub scope: String,
    /// Where the run before it stopped; `{}` for the beginning.
    pub position: Value,
    /// Failures in a row before it.
    pub failures: i32,
}

/// What a run has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Items that were looked at.
    pub scanned: i64,
    /// Differences that were found.
    pub found: i64,
    /// Differences that were repaired, or whose repair was queued.
    pub repaired: i64,
    /// Items that failed.
    pub failed: i64,
}

/// How a run ended.
#[derive(Debug, Default)]
pub struct Ending<'a> {
    /// `ok`, `failed` or `stopped`.
    pub result: &'a str,
    /// Why it failed; none when it did not.
    pub error: Option<&'a str>,
    /// What it has done.
    pub counts: Counts,
    /// Where the next run goes on; none to leave that as it was saved.
    pub position: Option<&'a Value>,
    /// More about the run for its row; none for nothing.
    pub detail: Option<&'a Value>,
    /// Whether it counts as a success of the schedule.
    pub(crate) counts_as_success: bool,
    /// Whether it counts as a failure, and how long to wait then.
    pub retry_after: Option<Duration>,
    /// Everything committed before this time is accounted for; none when the run says nothing of that.
    pub reconciled_up_to: Option<DateTime<Utc>>,
    /// The run with which a sweep over everything began that has now ended.
    pub swept_since: Option<i64>,
}

/// In how many seconds a scheduled run is due; zero or less when it is. A success in the future was written before the
/// database's clock went back, and counts for nothing; so does a retry later than the interval would have it.
pub(crate) async fn due_in(session: &mut Session, name: &str, interval: Duration) -> Result<f64, sqlx::Error> {
    let due: Option<Option<f64>> = sqlx::query_scalar(
        "select (extract(epoch from greatest(
                    case when last_success_at <= clock_timestamp() then last_success_at + make_interval(secs => $2) end,
                    case when retry_at <= clock_timestamp() + make_interval(secs => $2) then retry_at end))
                    - extract(epoch from clock_timestamp()))::float8
           from aftercommit.reconciler where name = $1",
    )
    .bind(name)
    .bind(interval.as_secs_f64())
    .fetch_optional(session)
    .await?;
    Ok(due.flatten().unwrap_or(0.0))
}

/// Begins a run, if it is due and nobody else runs it. `wait` is how long a failed run has to wait after so many
/// failures.
pub async fn begin(
    session: &mut Session,
    new: &NewRun<'_>,
    wait: impl Fn(i32) -> Duration,
) -> Result<Begun, sqlx::Error> {
    let mut tx = session.begin().await?;
    let begun = begin_in(&mut tx, new, wait).await?;
    tx.commit().await?;
    Ok(begun)
}

async fn begin_in(tx: &mut Tx<'_>, new: &NewRun<'_>, wait: impl Fn(i32) -> Duration) -> Result<Begun, sqlx::Error> {
    let scheduled = new.cause == "scheduled";
    let state = lock(tx, new).await?;
    let dead = close_dead(tx, new.name, new.ttl).await?;
    let failures = state.failures + dead;
    if dead > 0 {
        fail(tx, new.name, dead, wait(failures)).await?;
        if scheduled {
            return Ok(Begun::Closed { failures });
        }
    }
    // Runs for single keys may go beside others: each item has a transaction of its own.
    if new.scope != "keys"
        && let Some((holder, seconds)) = running(tx, new.name).await?
    {
        return Ok(Begun::Busy { holder, seconds });
    }
    // What lies further in the future than anybody writes it was written before the database's clock went back.
    let interval = new.interval.as_secs_f64();
    if scheduled
        && let Some(due_in) = state.retry_in
        && due_in > 0.0
        && due_in <= interval
    {
        return Ok(Begun::TooSoon { failures, due_in });
    }
    if scheduled
        && let Some(seconds) = state.since_success
        && (0.0..interval).contains(&seconds)
    {
        return Ok(Begun::NotDue { seconds, due_in: interval - seconds });
    }
    let full_is_due =
        new.full_every.is_some_and(|every| state.since_full.is_none_or(|s| !(0.0..every.as_secs_f64()).contains(&s)));
    let scope = if new.scope == "new" && full_is_due { "full" } else { new.scope };
    let id = insert(tx, new, scope).await?;
    Ok(Begun::Run(RunRow { id, scope: scope.into(), position: state.position, failures }))
}

#[derive(sqlx::FromRow)]
struct State {
    failures: i32,
    position: Value,
    since_success: Option<f64>,
    since_full: Option<f64>,
    retry_in: Option<f64>,
}

/// Locks the reconciler's row until the transaction ends.
async fn lock(tx: &mut Tx<'_>, new: &NewRun<'_>) -> Result<State, sqlx::Error> {
    sqlx::query("insert into aftercommit.reconciler (name) values ($1) on conflict do nothing")
        .bind(new.name)
        .execute(&mut *tx)
        .await?;
    sqlx::query_as(
        "select failures, position,
                (extract(epoch from clock_timestamp()) - extract(epoch from last_success_at))::float8 as since_success,
                (extract(epoch from clock_timestamp()) - extract(epoch from full_sweep_at))::float8 as since_full,
                (extract(epoch from retry_at) - extract(epoch from clock_timestamp()))::float8 as retry_in
           from aftercommit.reconciler where name = $1 for update",
    )
    .bind(new.name)
    .fetch_one(tx)
    .await
}

/// Closes runs whose process gives no sign of life any more, and returns how many of them were not for single keys. One
/// that is to be alive longer than anybody writes it gave its sign before the database's clock went back.
async fn close_dead(tx: &mut Tx<'_>, name: &str, ttl: Duration) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar(
        "with dead as (
            update aftercommit.reconcile_run
               set ended_at = clock_timestamp(), result = 'failed',
                   error = 'its process died, or lost the database: ' || holder
             where name = $1 and ended_at is null
               and (alive_until < clock_timestamp() or alive_until > clock_timestamp() + make_interval(secs => 2 * $2))
            returning scope)
         select count(*) filter (where scope <> 'keys')::int from dead",
    )
    .bind(name)
    .bind(ttl.as_secs_f64())
    .fetch_one(tx)
    .await
}

async fn fail(tx: &mut Tx<'_>, name: &str, times: i32, wait: Duration) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.reconciler
            set failures = failures + $2, retry_at = clock_timestamp() + make_interval(secs => $3) where name = $1",
    )
    .bind(name)
    .bind(times)
    .bind(wait.as_secs_f64())
    .execute(tx)
    .await
    .map(drop)
}

async fn running(tx: &mut Tx<'_>, name: &str) -> Result<Option<(String, f64)>, sqlx::Error> {
    sqlx::query_as(
        "select holder, (extract(epoch from clock_timestamp()) - extract(epoch from started_at))::float8 from aftercommit.reconcile_run
          where name = $1 and ended_at is null and scope <> 'keys' limit 1",
    )
    .bind(name)
    .fetch_optional(tx)
    .await
}

async fn insert(tx: &mut Tx<'_>, new: &NewRun<'_>, scope: &str) -> Result<i64, sqlx::Error> {
    if scope != "keys" {
        sqlx::query("update aftercommit.reconciler set last_attempt_at = clock_timestamp() where name = $1")
            .bind(new.name)
            .execute(&mut *tx)
            .await?;
    }
    sqlx::query_scalar(
        "insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until)
         values ($1, $2, $3, $4, $5, clock_timestamp() + make_interval(secs => $6)) returning id",
    )
    .bind(new.name)
    .bind(new.cause)
    .bind(new.mode)
    .bind(scope)
    .bind(new.holder)
    .bind(new.ttl.as_secs_f64())
    .fetch_one(tx)
    .await
}

/// A sign of life, with what is done so far. False when the run was closed by another process.
pub async fn keep_alive(session: &mut Session, run: i64, counts: Counts, ttl: Duration) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "update aftercommit.reconcile_run
            set alive_until = clock_timestamp() + make_interval(secs => $2),
                scanned = $3, found = $4, repaired = $5, failed = $6
          where id = $1 and ended_at is null",
    )
    .bind(run)
    .bind(ttl.as_secs_f64())
    .bind(counts.scanned)
    .bind(counts.found)
    .bind(counts.repaired)
    .bind(counts.failed)
    .execute(session)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Keeps where the next page or run goes on. False when the run was closed by another process; then nothing is kept.
pub async fn save_position(
    session: &mut Session,
    name: &str,
    run: i64,
    position: &Value,
    counts: Counts,
) -> Result<bool, sqlx::Error> {
    let mut tx = session.begin().await?;
    // The reconciler's row first, then the run's: so does whoever begins or ends a run.
    sqlx::query("update aftercommit.reconciler set position = $2 where name = $1")
        .bind(name)
        .bind(Json(position))
        .execute(&mut tx)
        .await?;
    let done = sqlx::query(
        "update aftercommit.reconcile_run set scanned = $2, found = $3, repaired = $4, failed = $5
          where id = $1 and ended_at is null",
    )
    .bind(run)
    .bind(counts.scanned)
    .bind(counts.found)
    .bind(counts.repaired)
    .bind(counts.failed)
    .execute(&mut tx)
    .await?;
    if done.rows_affected() == 0 {
        tx.rollback().await?;
        return Ok(false);
    }
    tx.commit().await?;
    Ok(true)
}

/// Ends a run. False when it was closed by another process; then nothing changes.
pub async fn end(session: &mut Session, name: &str, run: i64, ending: &Ending<'_>) -> Result<bool, sqlx::Error> {
    let mut tx = session.begin().await?;
    sqlx::query("select from aftercommit.reconciler where name = $1 for update").bind(name).execute(&mut tx).await?;
    if !close(&mut tx, run, ending).await? {
        tx.rollback().await?;
        return Ok(false);
    }
    if let Some(wait) = ending.retry_after {
        fail(&mut tx, name, 1, wait).await?;
    }
    sqlx::query(
        "update aftercommit.reconciler
            set repaired_total = repaired_total + $2,
                reconciled_up_to = greatest(reconciled_up_to, $3),
                full_sweep_at = case when $4 then clock_timestamp() else full_sweep_at end,
                last_success_at = case when $5 then clock_timestamp() else last_success_at end,
                failures = case when $5 then 0 else failures end,
                retry_at = case when $5 then null else retry_at end,
                position = coalesce($6, position)
          where name = $1",
    )
    .bind(name)
    .bind(ending.counts.repaired)
    .bind(ending.reconciled_up_to)
    .bind(ending.swept_since.is_some())
    .bind(ending.counts_as_success)
    .bind(ending.position.map(Json))
    .execute(&mut tx)
    .await?;
    if let Some(since) = ending.swept_since {
        super::finding::settle_gone(&mut tx, name, since).await?;
    }
    tx.commit().await?;
    Ok(true)
}

async fn close(tx: &mut Tx<'_>, run: i64, ending: &Ending<'_>) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "update aftercommit.reconcile_run
            set ended_at = clock_timestamp(), result = $2, error = $3,
                scanned = $4, found = $5, repaired = $6, failed = $7, detail = coalesce($8, detail)
          where id = $1 and ended_at is null",
    )
    .bind(run)
    .bind(ending.result)
    .bind(ending.error)
    .bind(ending.counts.scanned)
    .bind(ending.counts.found)
    .bind(ending.counts.repaired)
    .bind(ending.counts.failed)
    .bind(ending.detail.map(Json))
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Deletes runs that ended longer than `age` ago, all but the last of their reconciler, at most `limit` of them.
pub async fn prune(session: &mut Session, age: Duration, limit: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.reconcile_run where id = any(array(
            select id from aftercommit.reconcile_run r
             where ended_at < clock_timestamp() - make_interval(secs => $1)
               and id < (select max(id) from aftercommit.reconcile_run latest where latest.name = r.name)
             order by id limit $2))",
    )
    .bind(age.as_secs_f64())
    .bind(limit)
    .execute(session)
    .await?;
    Ok(done.rows_affected())
}
