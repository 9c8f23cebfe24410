//! What a database knows of one event.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::maybe::Maybe;
use super::session::Session;
use super::time;

/// An event as the outbox has it, without its payload.
#[derive(Debug, Clone)]
pub struct Written {
    /// Its id in the outbox.
    pub id: i64,
    /// The id of the transaction that wrote it.
    pub xid: u64,
    /// The event's type.
    pub event_type: String,
    /// The version of the type, from 1.
    pub version: i32,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// The media type of the payload.
    pub content_type: String,
    /// The bytes of the payload.
    pub payload_bytes: i32,
    /// When it was written, by the database's clock.
    pub created_at: DateTime<Utc>,
}

impl FromRow<'_, PgRow> for Written {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            xid: row.try_get::<&str, _>("xid")?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
            event_type: row.try_get("type")?,
            version: row.try_get("version")?,
            key: row.try_get("key")?,
            content_type: row.try_get("content_type")?,
            payload_bytes: row.try_get("payload_bytes")?,
            created_at: time::at(row, "created_at")?,
        })
    }
}

/// The event's row in the outbox; none when it was never committed, or was removed.
pub async fn written(connection: &mut Session, event: Uuid) -> Result<Option<Written>, sqlx::Error> {
    sqlx::query_as(
        "select id, xid::text, type, version, key, content_type, octet_length(payload) as payload_bytes, created_at
           from aftercommit.outbox where event_id = $1",
    )
    .bind(event)
    .fetch_optional(connection)
    .await
}

/// The payload in the outbox.
pub async fn payload(connection: &mut Session, event: Uuid) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("select payload from aftercommit.outbox where event_id = $1")
        .bind(event)
        .fetch_optional(connection)
        .await
}

/// An event that was parked, whatever became of it.
#[derive(Debug, Clone, FromRow)]
pub struct Parked {
    /// Why it was parked.
    pub reason: String,
    /// `parked`, `released`, `published` or `discarded`.
    pub state: String,
    /// When it was parked.
    #[sqlx(try_from = "time::Time")]
    pub parked_at: DateTime<Utc>,
    /// When its state changed last.
    #[sqlx(try_from = "time::Time")]
    pub changed_at: DateTime<Utc>,
    /// Where it was published in the end.
    pub sequence: Option<i64>,
}

/// Whether the event was parked, and what became of that.
pub async fn parked(connection: &mut Session, event: Uuid) -> Result<Option<Parked>, sqlx::Error> {
    sqlx::query_as("select reason, state, parked_at, changed_at, sequence from aftercommit.parked where event_id = $1")
        .bind(event)
        .fetch_optional(connection)
        .await
}

/// An event that a reconciler found missing in the stream.
#[derive(Debug, Clone, FromRow)]
pub struct Repair {
    /// `queued`, `published` or `refused`.
    pub state: String,
    /// When the repair was queued.
    #[sqlx(try_from = "time::Time")]
    pub queued_at: DateTime<Utc>,
    /// When it was published again; none as long as it was not.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub published_at: Option<DateTime<Utc>>,
    /// Where it is in the stream now.
    pub sequence: Option<i64>,
    /// Why the stream does not take it.
    pub reason: Option<String>,
}

/// Whether the event was found missing in the stream, and what became of that.
pub async fn repair(connection: &mut Session, event: Uuid) -> Result<Option<Repair>, sqlx::Error> {
    sqlx::query_as(
        "select state, queued_at, published_at, sequence, reason from aftercommit.repair
          where outbox_id = (select id from aftercommit.outbox where event_id = $1)",
    )
    .bind(event)
    .fetch_optional(connection)
    .await
}

/// What subscribers have, or will run, of the event: their dead letters' and redriven rows' payloads.
pub async fn held_payloads(connection: &mut Session, event: Uuid) -> Result<Vec<(String, Vec<u8>)>, sqlx::Error> {
    sqlx::query_as(
        "select subscriber, payload from aftercommit.dead_letter where event_id = $1
         union all
         select subscriber, payload from aftercommit.redrive where event_id = $1",
    )
    .bind(event)
    .fetch_all(connection)
    .await
}

/// Where the relay's log says that an event lies in `stream`: behind the first sequence, and not behind the second one
/// once it is settled.
pub async fn bounds(
    connection: &mut Session,
    stream: &str,
    written: &Written,
) -> Result<(Option<i64>, Option<i64>), sqlx::Error> {
    sqlx::query_as(
        "with state as (
            select seq, base_sequence,
                   $2 <= settled_floor
                   or ($2 <= settled_id and pg_visible_in_snapshot($3::text::xid8, settled)) as settled
              from aftercommit.relay_log where stream = $1)
         select (select base_sequence from state where not settled order by seq desc limit 1),
                (select base_sequence from state where settled order by seq limit 1)",
    )
    .bind(stream)
    .bind(written.id)
    .bind(written.xid.to_string())
    .fetch_one(connection)
    .await
}

/// What a subscriber's database knows of the event at one subscriber.
#[derive(Debug, Clone)]
pub struct AtSubscriber {
    /// Name of the subscriber.
    pub subscriber: String,
    /// That it is done; none when it is not.
    pub done: Option<Done>,
    /// Its failed attempts; none when there are none, or it is done.
    pub failing: Option<Failing>,
    /// Its dead letter; none when there is none.
    pub letter: Option<Letter>,
    /// When an operator sent it back, and who; it has not run since.
    pub redrive: Option<(DateTime<Utc>, String)>,
    /// The active worker runs it at present.
    pub running: bool,
}

/// The subscriber is done with the event.
#[derive(Debug, Clone)]
pub struct Done {
    /// `handled`, `dead` or `discarded`.
    pub outcome: String,
    /// When it was done, by the database's clock.
    pub at: DateTime<Utc>,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
}

/// Attempts have failed, and there will be more.
#[derive(Debug, Clone)]
pub struct Failing {
    /// How many attempts have failed.
    pub attempts: i32,
    /// How often the worker's process died while it ran.
    pub crashes: i32,
    /// Why the last attempt failed.
    pub last_error: String,
    /// When the first attempt failed.
    pub first_failed_at: DateTime<Utc>,
    /// When the last attempt failed.
    pub last_failed_at: DateTime<Utc>,
    /// When the next attempt begins; none when that is not on record.
    pub retry_at: Option<DateTime<Utc>>,
}

/// The subscriber gave up.
#[derive(Debug, Clone)]
pub struct Letter {
    /// The letter's id, as `aftercommit dead` shows it.
    pub id: i64,
    /// Why the subscriber gave up.
    pub reason: String,
    /// How many attempts had failed by then.
    pub attempts: i32,
    /// When the first attempt failed.
    pub first_failed_at: DateTime<Utc>,
    /// When the event became a dead letter.
    pub dead_at: DateTime<Utc>,
    /// Name of the stream that the event came from.
    pub stream: String,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
}

impl FromRow<'_, PgRow> for AtSubscriber {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let done = match row.try_get("outcome")? {
            Some(outcome) => {
                Some(Done { outcome, at: time::at(row, "handled_at")?, stream_seq: row.try_get("stream_seq")? })
            }
            None => None,
        };
        let failing = match row.try_get("attempts")? {
            Some(attempts) => Some(Failing {
                attempts,
                crashes: row.try_get("crashes")?,
                last_error: row.try_get("last_error")?,
                first_failed_at: time::at(row, "first_failed_at")?,
                last_failed_at: time::at(row, "last_failed_at")?,
                retry_at: time::maybe_at(row, "retry_at")?,
            }),
            None => None,
        };
        let letter = match row.try_get("letter")? {
            Some(id) => Some(Letter {
                id,
                reason: row.try_get("reason")?,
                attempts: row.try_get("letter_attempts")?,
                first_failed_at: time::at(row, "letter_first_failed_at")?,
                dead_at: time::at(row, "dead_at")?,
                stream: row.try_get("stream")?,
                stream_seq: row.try_get("letter_stream_seq")?,
            }),
            None => None,
        };
        let redrive = match time::maybe_at(row, "requested_at")? {
            Some(at) => Some((at, row.try_get("requested_by")?)),
            None => None,
        };
        let (subscriber, running) = (row.try_get("subscriber")?, row.try_get("running")?);
        Ok(Self { subscriber, done, failing, letter, redrive, running })
    }
}

/// What this database knows of the event, by subscriber.
pub async fn at_subscribers(connection: &mut Session, event: Uuid) -> Result<Vec<AtSubscriber>, sqlx::Error> {
    sqlx::query_as(
        "with running as (
            select r.subscriber from aftercommit.running r
              join aftercommit.lease l on l.name = 'subscriber:' || r.subscriber and l.epoch = r.epoch
             where $1 = any(r.events) and l.expires_at > clock_timestamp()),
         attempt as (
            select * from aftercommit.attempt
             where event_id = $1 and attempts + crashes + sessions_lost + database_crashes > 0),
         name as (
            select subscriber from aftercommit.inbox where event_id = $1
             union select subscriber from attempt
             union select subscriber from aftercommit.dead_letter where event_id = $1
             union select subscriber from aftercommit.redrive where event_id = $1
             union select subscriber from running)
         select name.subscriber, i.outcome, i.handled_at, i.stream_seq,
                a.attempts, a.crashes, a.last_error, a.first_failed_at, a.last_failed_at,
                d.id as letter, d.reason, d.attempts as letter_attempts, d.first_failed_at as letter_first_failed_at,
                d.dead_at, d.stream, d.stream_seq as letter_stream_seq, r.requested_at, r.requested_by,
                exists (select from running where running.subscriber = name.subscriber) as running,
                (select f.retry_at from aftercommit.failure f
                  where f.subscriber = name.subscriber and f.event_id = $1 and f.attempt = a.attempts
                  order by f.at desc limit 1)
           from name
           left join aftercommit.inbox i on i.subscriber = name.subscriber and i.event_id = $1
           left join attempt a on a.subscriber = name.subscriber
           left join aftercommit.dead_letter d on d.subscriber = name.subscriber and d.event_id = $1
           left join aftercommit.redrive r on r.subscriber = name.subscriber and r.event_id = $1
          order by 1",
    )
    .bind(event)
    .fetch_all(connection)
    .await
}

/// What a subscriber's database knows of some events.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The subscriber is done with these.
    pub done: HashSet<Uuid>,
    /// Of these attempts have failed.
    pub failing: HashMap<Uuid, KnownFailing>,
}

/// What is known of an event whose attempts have failed.
#[derive(Debug, Clone)]
pub struct KnownFailing {
    /// How many attempts have failed.
    pub attempts: i32,
    /// Why the last attempt failed.
    pub last_error: String,
    /// When the next attempt begins; none when that is not on record.
    pub retry_at: Option<DateTime<Utc>>,
}

/// What a subscriber is done with of `events`, and what fails.
pub async fn known(connection: &mut Session, subscriber: &str, events: &[Uuid]) -> Result<Known, sqlx::Error> {
    let rows = sqlx::query(
        "select e.event_id, i.event_id is not null as done, a.attempts, a.last_error,
                (select f.retry_at from aftercommit.failure f
                  where f.subscriber = $1 and f.event_id = e.event_id and f.attempt = a.attempts
                  order by f.at desc limit 1)
           from unnest($2::uuid[]) as e(event_id)
           left join aftercommit.inbox i on i.subscriber = $1 and i.event_id = e.event_id
           left join aftercommit.attempt a on a.subscriber = $1 and a.event_id = e.event_id and a.attempts > 0",
    )
    .bind(subscriber)
    .bind(events)
    .fetch_all(connection)
    .await?;
    let mut known = Known::default();
    for row in &rows {
        let event = row.try_get("event_id")?;
        if row.try_get("done")? {
            known.done.insert(event);
        }
        if let (Some(attempts), Some(last_error)) = (row.try_get("attempts")?, row.try_get("last_error")?) {
            let retry_at = time::maybe_at(row, "retry_at")?;
            known.failing.insert(event, KnownFailing { attempts, last_error, retry_at });
        }
    }
    Ok(known)
}
