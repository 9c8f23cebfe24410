//! What is on record of events that are not done: failed attempts, sessions and servers that ended while they ran, and
//! how long they have to wait. The row goes with the transaction in which the event is done.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row, query, query_as, query_scalar};
use uuid::Uuid;

use super::lease::Tenure;
use super::pins::Server;
use super::session::Session;

/// The most records that a successor reads.
const MAX_KNOWN: i64 = 100_000;

/// What is on record of one event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Failed attempts.
    pub attempts: u32,
    /// How often the worker's process died while it ran.
    pub crashes: u32,
    /// How many of these times nothing else ran in the process.
    pub crashes_alone: u32,
    /// How often the server crashed while it ran.
    pub database_crashes: u32,
    /// How often its session ended while it ran.
    pub sessions_lost: u32,
    /// Why the last attempt failed; a short text for operators.
    pub last_error: String,
}

/// What an event waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// The next attempt, after one that failed.
    Retry,
    /// The time that its handler asked to be run at.
    Snooze,
    /// A service that its handler needs, and that is not available.
    Unavailable,
}

impl Waits {
    fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Snooze => "snooze",
            Self::Unavailable => "unavailable",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Retry, Self::Snooze, Self::Unavailable].into_iter().find(|waits| waits.name() == name)
    }
}

/// A record that a predecessor left, with the rest of the wait.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// What is on record of it.
    pub record: Record,
    /// What it waits for and how long it still has to; none when it may run at once.
    pub wait: Option<(Waits, Duration)>,
}

/// A session that ended while events ran.
pub struct Lost<'a> {
    /// Name of the subscriber.
    pub subscriber: &'a str,
    /// Where the batch was marked as running.
    pub lane: i64,
    /// The ids of the events that ran in it.
    pub events: &'a [Uuid],
    /// Whether the event was the only one of its batch.
    pub alone: bool,
    /// The server that the session was on.
    pub server: &'a Server,
    /// Why the session ended, as far as that is known.
    pub reason: &'a str,
    /// How long the event waits when the loss counts as an attempt.
    pub wait: Duration,
}

/// What a lost session means for one event.
#[derive(Debug, PartialEq, Eq)]
pub enum Judged {
    /// It is done: only the answer to the commit was lost.
    Done,
    /// The server was stopped in an orderly way. No event can do that.
    Spared,
    /// It is under suspicion, and nothing counted yet.
    Suspect(Record),
    /// It was, and ran alone: the loss counts as an attempt.
    Failed(Record),
}

impl FromRow<'_, PgRow> for Record {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let number = |column: &str| row.try_get::<i32, _>(column).map(i32::unsigned_abs);
        Ok(Self {
            attempts: number("attempts")?,
            crashes: number("crashes")?,
            crashes_alone: number("crashes_alone")?,
            database_crashes: number("database_crashes")?,
            sessions_lost: number("sessions_lost")?,
            last_error: row.try_get("last_error")?,
        })
    }
}

/// What is on record of some events.
pub async fn records(
    connection: &mut Session,
    subscriber: &str,
    events: &[Uuid],
) -> Result<Vec<(Uuid, Record)>, sqlx::Error> {
    let rows = query(
        "select event_id, attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error
           from aftercommit.attempt where subscriber = $1 and event_id = any($2)",
    )
    .bind(subscriber)
    .bind(events)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok((row.try_get("event_id")?, Record::from_row(row)?))).collect()
}

/// All that is on record of a subscriber's events.
pub async fn on_record(connection: &mut Session, subscriber: &str) -> Result<Vec<(Uuid, Left)>, sqlx::Error> {
    let rows = query(
        "select event_id, attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error, waits_for,
                extract(epoch from not_before - clock_timestamp())::float8 as rest
           from aftercommit.attempt where subscriber = $1 order by last_failed_at desc limit $2",
    )
    .bind(subscriber)
    .bind(MAX_KNOWN)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let waits = row.try_get::<Option<String>, _>("waits_for")?.and_then(|name| Waits::named(&name));
            let rest = row.try_get::<Option<f64>, _>("rest")?.and_then(|rest| Duration::try_from_secs_f64(rest).ok());
            Ok((row.try_get("event_id")?, Left { record: Record::from_row(row)?, wait: waits.zip(rest) }))
        })
        .collect()
}

/// Counts a failed attempt and returns how many there are now; none when the tenure is over, and nothing is counted.
pub async fn count_failure(
    connection: &mut Session,
    tenure: &Tenure,
    subscriber: &str,
    event: Uuid,
    error: &str,
    wait: Duration,
) -> Result<Option<i32>, sqlx::Error> {
    query_scalar(
        "insert into aftercommit.attempt as attempt (subscriber, event_id, attempts, last_error, not_before, waits_for)
         select $4, $5, 1, $6, clock_timestamp() + make_interval(secs => $7), 'retry'
          where exists (select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3)
         on conflict (subscriber, event_id) do update
            set attempts = attempt.attempts + 1, last_error = excluded.last_error, last_failed_at = clock_timestamp(),
                not_before = excluded.not_before, waits_for = excluded.waits_for
         returning attempts",
    )
    .bind(&tenure.name)
    .bind(&tenure.holder)
    .bind(tenure.epoch)
    .bind(subscriber)
    .bind(event)
    .bind(error)
    .bind(wait.as_secs_f64())
    .fetch_optional(connection)
    .await
}

/// Writes down how long an event waits without an attempt, so that a successor waits as long. False when the tenure is
/// over.
pub async fn postpone(
    connection: &mut Session,
    tenure: &Tenure,
    subscriber: &str,
    event: Uuid,
    (waits, wait): (Waits, Duration),
    why: &str,
) -> Result<bool, sqlx::Error> {
    let done = query(
        "insert into aftercommit.attempt as attempt (subscriber, event_id, last_error, not_before, waits_for)
         select $4, $5, $6, clock_timestamp() + make_interval(secs => $7), $8
          where exists (select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3)
         on conflict (subscriber, event_id) do update
            set not_before = excluded.not_before, waits_for = excluded.waits_for,
                last_error = case when attempt.attempts > 0 then attempt.last_error else excluded.last_error end",
    )
    .bind(&tenure.name)
    .bind(&tenure.holder)
    .bind(tenure.epoch)
    .bind(subscriber)
    .bind(event)
    .bind(why)
    .bind(wait.as_secs_f64())
    .bind(waits.name())
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Puts an event under suspicion that broke its transaction in a way in which the world around it can, too. None when
/// the tenure is over.
pub async fn suspect(
    connection: &mut Session,
    tenure: &Tenure,
    subscriber: &str,
    event: Uuid,
    reason: &str,
) -> Result<Option<Record>, sqlx::Error> {
    query_as(
        "insert into aftercommit.attempt as attempt (subscriber, event_id, sessions_lost, last_error)
         select $4, $5, 1, $6
          where exists (select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3)
         on conflict (subscriber, event_id) do update
            set sessions_lost = attempt.sessions_lost + 1, last_error = excluded.last_error,
                last_failed_at = clock_timestamp()
         returning attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error",
    )
    .bind(&tenure.name)
    .bind(&tenure.holder)
    .bind(tenure.epoch)
    .bind(subscriber)
    .bind(event)
    .bind(reason)
    .fetch_optional(connection)
    .await
}

/// Judges the events that ran when a session ended, over another session: that it can is the proof that the database
/// answers. None when the tenure is over.
///
/// A crash of the server empties the table of markers, which is not logged; so it is known by the marker that is gone. A
/// server that was started anew and still has the marker was stopped in an orderly way.
pub async fn judge(
    connection: &mut Session,
    tenure: &Tenure,
    lost: &Lost<'_>,
) -> Result<Option<Vec<(Uuid, Judged)>>, sqlx::Error> {
    let restarted = connection.server() != lost.server;
    let rows = query(
        "with tenure as (
            select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3),
         look as (
            select exists (select from aftercommit.running
                            where subscriber = $4 and epoch = $3 and lane = $5) as marked),
         ran as (
            select e.event_id from unnest($6::uuid[]) as e(event_id)
             where not exists (select from aftercommit.inbox as done
                                where done.subscriber = $4 and done.event_id = e.event_id)),
         counted as (
            insert into aftercommit.attempt as attempt (subscriber, event_id, sessions_lost, database_crashes, last_error)
            select $4, event_id, marked::int, (not marked)::int, $9 from ran, look
             where exists (select from tenure) and not (marked and $7) order by event_id
            on conflict (subscriber, event_id) do update
               set sessions_lost = attempt.sessions_lost + excluded.sessions_lost,
                   database_crashes = attempt.database_crashes + excluded.database_crashes,
                   attempts = attempt.attempts
                            + ($8 and excluded.sessions_lost > 0 and attempt.sessions_lost > 0)::int,
                   not_before = case when $8 and excluded.sessions_lost > 0 and attempt.sessions_lost > 0
                                     then clock_timestamp() + make_interval(secs => $10) end,
                   waits_for = 'retry', last_error = excluded.last_error, last_failed_at = clock_timestamp()
            returning event_id, attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error)
         select exists (select from tenure) as held, e.event_id, ran.event_id is not null as ran,
                (select marked from look) as marked,
                counted.attempts, counted.crashes, counted.crashes_alone, counted.database_crashes, counted.sessions_lost,
                counted.last_error
           from unnest($6::uuid[]) as e(event_id)
           left join ran on ran.event_id = e.event_id left join counted on counted.event_id = e.event_id",
    )
    .bind(&tenure.name)
    .bind(&tenure.holder)
    .bind(tenure.epoch)
    .bind(lost.subscriber)
    .bind(lost.lane)
    .bind(lost.events)
    .bind(restarted)
    .bind(lost.alone)
    .bind(lost.reason)
    .bind(lost.wait.as_secs_f64())
    .fetch_all(connection)
    .await?;
    let mut judged = Vec::with_capacity(rows.len());
    for row in &rows {
        if !row.try_get::<bool, _>("held")? {
            return Ok(None);
        }
        let marked: bool = row.try_get("marked")?;
        let verdict = match (row.try_get("ran")?, row.try_get::<Option<i32>, _>("attempts")?) {
            (false, _) => Judged::Done,
            (true, None) => Judged::Spared,
            (true, Some(_)) => {
                let record = Record::from_row(row)?;
                // The first loss is free, and a loss in company is nobody's.
                match lost.alone && marked && record.sessions_lost > 1 {
                    true => Judged::Failed(record),
                    false => Judged::Suspect(record),
                }
            }
        };
        judged.push((row.try_get("event_id")?, verdict));
    }
    Ok(Some(judged))
}
