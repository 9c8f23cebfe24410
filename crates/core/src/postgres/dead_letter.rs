//! Events that a subscriber gave up on.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::types::Json;
use sqlx::{FromRow, PgExecutor, Postgres, Row};
use uuid::Uuid;

use crate::envelope::Envelope;

use super::lease::Tenure;
use super::session::{Session, Tx};
use super::time;
use aftercommit_outbox::event::EventId;

/// A dead letter to be written.
pub struct NewDeadLetter<'a> {
    /// Name of the subscriber that gives up.
    pub subscriber: &'a str,
    /// Name of the stream that the event came from.
    pub stream: &'a str,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
    /// The event, with its payload.
    pub event: &'a Envelope,
    /// Why it cannot be handled.
    pub reason: &'a str,
    /// Whether it was a failed run that decided, which then counts as an attempt.
    pub attempted: bool,
}

/// Writes the dead letter, the inbox row that says so, and ends the counting of attempts and the redrive, all in one
/// statement. False when the tenure is over: nothing was written. An event that is done already stays
/// as it is.
pub async fn insert(
    connection: &mut Session,
    tenure: &Tenure,
    letter: &NewDeadLetter<'_>,
) -> Result<bool, sqlx::Error> {
    let event = letter.event;
    sqlx::query_scalar(
        "with tenure as (
            select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3),
         done as (
            insert into aftercommit.inbox (subscriber, event_id, stream_seq, sequence, outcome)
            select $4, $5, $6, $12, 'dead' where exists (select from tenure)
            on conflict do nothing
            returning event_id),
         redriven as (
            delete from aftercommit.redrive
             where subscriber = $4 and event_id = $5 and exists (select from tenure)),
         failed as (
            delete from aftercommit.attempt
             where subscriber = $4 and event_id = $5 and exists (select from done)
            returning attempts, first_failed_at),
         letter as (
            insert into aftercommit.dead_letter
                (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                 stream, stream_seq, attempts, reason, first_failed_at)
            select $4, $5, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $6,
                   coalesce((select attempts from failed), 0) + $18::int, $17,
                   coalesce((select first_failed_at from failed), clock_timestamp())
              from done
            on conflict (subscriber, event_id) do update
               set attempts = excluded.attempts, reason = excluded.reason, dead_at = excluded.dead_at)
         select exists (select from tenure)",
    )
    .bind(&tenure.name)
    .bind(&tenure.holder)
    .bind(tenure.epoch)
    .bind(letter.subscriber)
    .bind(event.id.as_uuid())
    .bind(letter.stream_seq)
    .bind(storable(&event.event_type))
    .bind(i32::try_from(event.version).unwrap_or(i32::MAX))
    .bind(event.key.as_deref().map(storable))
    .bind(storable(&event.source))
    .bind(event.time)
    .bind((event.sequence > 0).then_some(event.sequence))
    .bind(Json(storable_headers(&event.headers)))
    .bind(event.payload.as_ref())
    .bind(storable(&event.content_type))
    .bind(letter.stream)
    .bind(storable(letter.reason))
    .bind(i32::from(letter.attempted))
    .fetch_one(connection)
    .await
}

/// PostgreSQL's text has no zero character; a foreign publisher's attribute or header may.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

pub(super) fn storable_headers(headers: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    headers.iter().map(|(name, value)| (storable(name), storable(value))).collect()
}

/// Which letters are meant. What is none does not matter; the bounds are fixed when an action begins, so that a letter
/// that comes back while it runs is not taken again.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Letters with these ids.
    pub ids: Option<Vec<i64>>,
    /// Letters of these events.
    pub events: Option<Vec<Uuid>>,
    /// Letters of this subscriber.
    pub subscriber: Option<String>,
    /// Letters of events of this type.
    pub event_type: Option<String>,
    /// Letters of events with this key.
    pub key: Option<String>,
    /// A part of the reason.
    pub error: Option<String>,
    /// Letters that came at or before this time.
    pub dead_before: Option<DateTime<Utc>>,
    /// Letters that came after this time.
    pub dead_after: Option<DateTime<Utc>>,
    /// Letters with ids up to this one.
    pub newest_id: i64,
}

/// The condition that a [`Selection`] makes, with its nine parameters.
macro_rules! selected {
    () => {
        "id <= $1
         and ($2::bigint[] is null or id = any($2)) and ($3::uuid[] is null or event_id = any($3))
         and ($4::text is null or subscriber = $4) and ($5::text is null or type = $5)
         and ($6::text is null or key = $6) and ($7::text is null or strpos(reason, $7) > 0)
         and ($8::timestamptz is null or dead_at <= $8) and ($9::timestamptz is null or dead_at > $9)"
    };
}

/// The head of a statement that takes up to `$10` of the selected letters, in the order in which they would run again:
/// `gone` has them.
macro_rules! taken {
    () => {
        concat!(
            "with picked as (
                select id from aftercommit.dead_letter where ",
            selected!(),
            " order by stream_seq, id limit $10 for update),
             gone as (
                delete from aftercommit.dead_letter d using picked where d.id = picked.id returning d.*)"
        )
    };
}

/// A part of a statement that changes or removes letters: what the table's triggers write into the audit trail of it. The
/// statement must read from `told`.
macro_rules! told {
    ($action:literal, $who:literal) => {
        concat!("told as materialized (select aftercommit.tell('", $action, "', ", $who, "::text))")
    };
}

/// The columns of a letter, as it is read from them.
macro_rules! columns {
    () => {
        "id, subscriber, event_id, type, version, key, source, time, sequence, content_type,
         octet_length(payload) as payload_bytes, stream, stream_seq, attempts, reason, first_failed_at, dead_at"
    };
}

impl Selection {
    fn bind<'q>(&self, query: Query<'q, Postgres, PgArguments>) -> Query<'q, Postgres, PgArguments> {
        query
            .bind(self.newest_id)
            .bind(self.ids.clone())
            .bind(self.events.clone())
            .bind(self.subscriber.clone())
            .bind(self.event_type.clone())
            .bind(self.key.clone())
            .bind(self.error.clone())
            .bind(self.dead_before)
            .bind(self.dead_after)
    }
}

/// The newest letter's id, 0 without one, and the database's time.
pub async fn bounds(connection: &mut Session) -> Result<(i64, DateTime<Utc>), sqlx::Error> {
    sqlx::query_as("select coalesce(max(id), 0), clock_timestamp() from aftercommit.dead_letter")
        .fetch_one(connection)
        .await
}

/// A dead letter without what its event held.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct DeadLetter {
    /// Its number in the subscriber's database.
    pub id: i64,
    /// Who gave up.
    pub subscriber: String,
    /// The event's identity.
    #[sqlx(try_from = "Uuid")]
    pub event_id: EventId,
    /// The event's type.
    #[serde(rename = "type")]
    #[sqlx(rename = "type")]
    pub event_type: String,
    /// The version of the payload's shape.
    pub version: i32,
    /// The event's ordering key.
    pub key: Option<String>,
    /// The outbox that it came from.
    pub source: String,
    /// When the event was written.
    #[sqlx(try_from = "time::Time")]
    pub time: DateTime<Utc>,
    /// Its id in that outbox; none when it did not come from one.
    #[sqlx(rename = "sequence")]
    pub outbox_id: Option<i64>,
    /// The payload's media type.
    pub content_type: String,
    /// The payload's length.
    pub payload_bytes: i32,
    /// The stream that delivered it.
    pub stream: String,
    /// Its sequence in that stream.
    #[sqlx(rename = "stream_seq")]
    pub stream_sequence: i64,
    /// Attempts until the subscriber gave up.
    pub attempts: i32,
    /// Why it gave up.
    pub reason: String,
    /// When the first attempt failed.
    #[sqlx(try_from = "time::Time")]
    pub first_failed_at: DateTime<Utc>,
    /// When it gave up.
    #[sqlx(try_from = "time::Time")]
    pub dead_at: DateTime<Utc>,
}

/// Up to `limit` of the selected letters, in the order in which they would run again.
pub async fn list(connection: &mut Session, selection: &Selection, limit: i64) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let query = sqlx::query(concat!(
        "select ",
        columns!(),
        " from aftercommit.dead_letter where ",
        selected!(),
        " order by stream_seq, id limit $10"
    ));
    selection.bind(query).bind(limit).fetch_all(connection).await?.iter().map(DeadLetter::from_row).collect()
}

/// How many letters are selected.
pub async fn count(connection: &mut Session, selection: &Selection) -> Result<i64, sqlx::Error> {
    let query = sqlx::query(concat!("select count(*) from aftercommit.dead_letter where ", selected!()));
    selection.bind(query).fetch_one(connection).await?.try_get("count")
}

/// Letters with the same subscriber, type and reason.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Group {
    /// Name of the subscriber.
    pub subscriber: String,
    /// The type of the events.
    #[sqlx(rename = "type")]
    pub event_type: String,
    /// Why the subscriber gave up.
    pub reason: String,
    /// How many letters there are.
    pub letters: i64,
    /// When the oldest of them came.
    #[sqlx(try_from = "time::Time")]
    pub oldest: DateTime<Utc>,
    /// When the newest of them came.
    #[sqlx(try_from = "time::Time")]
    pub newest: DateTime<Utc>,
}

/// The selected letters in groups, the largest first.
pub async fn groups(connection: &mut Session, selection: &Selection, limit: i64) -> Result<Vec<Group>, sqlx::Error> {
    let query = sqlx::query(concat!(
        "select subscriber, type, reason, count(*) as letters, min(dead_at) as oldest,
                max(dead_at) as newest from aftercommit.dead_letter where ",
        selected!(),
        " group by subscriber, type, reason order by count(*) desc, subscriber, type, reason limit $10"
    ));
    selection.bind(query).bind(limit).fetch_all(connection).await?.iter().map(Group::from_row).collect()
}

/// What the event of a letter held.
#[derive(FromRow)]
pub struct Content {
    /// Its headers.
    #[sqlx(json)]
    pub headers: BTreeMap<String, String>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// One letter with what its event held.
pub async fn one(connection: &mut Session, id: i64) -> Result<Option<(DeadLetter, Content)>, sqlx::Error> {
    let found =
        sqlx::query(concat!("select ", columns!(), ", headers, payload from aftercommit.dead_letter where id = $1"))
            .bind(id)
            .fetch_optional(connection)
            .await?;
    let Some(found) = found else { return Ok(None) };
    Ok(Some((DeadLetter::from_row(&found)?, Content::from_row(&found)?)))
}

/// Sends up to `limit` of the selected letters back to their subscribers, in the order of the stream, and returns their
/// ids. Of several who do that at once each letter goes to one, and nobody overtakes another within a key: they wait
/// for each other's rows in the same order.
pub async fn retry(
    executor: impl PgExecutor<'_>,
    selection: &Selection,
    who: &str,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let query = sqlx::query(concat!(
        taken!(),
        ",
         open as (
            delete from aftercommit.inbox i using gone
             where i.subscriber = gone.subscriber and i.event_id = gone.event_id and i.outcome = 'dead'),
         queued as (
            insert into aftercommit.redrive
                (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                 stream, stream_seq, requested_by)
            select subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                   stream, stream_seq, $11
              from gone order by stream_seq, id
            on conflict (subscriber, event_id) do update
               set headers = excluded.headers, payload = excluded.payload, requested_by = excluded.requested_by),
         ",
        told!("dead retry", "$11"),
        " select id from gone, told order by stream_seq, id"
    ));
    let rows = selection.bind(query).bind(limit).bind(who).fetch_all(executor).await?;
    rows.iter().map(|row| row.try_get("id")).collect()
}

/// Gives up to `limit` of the selected letters up for good and returns their ids. The audit trail keeps the whole event.
pub async fn discard(
    connection: &mut Session,
    selection: &Selection,
    who: &str,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let query = sqlx::query(concat!(
        taken!(),
        ",
         closed as (
            insert into aftercommit.inbox as i (subscriber, event_id, stream_seq, sequence, outcome)
            select subscriber, event_id, stream_seq, sequence, 'discarded' from gone order by subscriber, event_id
            on conflict (subscriber, event_id) do update
               set outcome = 'discarded', handled_at = clock_timestamp() where i.outcome = 'dead'),
         ",
        told!("dead discard", "$11"),
        " select id from gone, told order by stream_seq, id"
    ));
    let rows = selection.bind(query).bind(limit).bind(who).fetch_all(connection).await?;
    rows.iter().map(|row| row.try_get("id")).collect()
}

/// What is to be changed in a letter.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// The new payload; none to keep the old one.
    pub payload: Option<&'a [u8]>,
    /// Headers that are added, or get another value.
    pub set_headers: &'a BTreeMap<String, String>,
    /// Headers that are removed.
    pub remove_headers: &'a [String],
}

/// What an edit has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// All headers before and after.
    pub headers: (BTreeMap<String, String>, BTreeMap<String, String>),
    /// The bytes of the payload before and after.
    pub payload_bytes: (i32, i32),
    /// The SHA-256 of the payload before and after, in hex.
    pub payload_sha256: (String, String),
}

/// Changes one letter; none when it is no more. The audit trail keeps headers and payload as they were.
pub async fn edit(tx: &mut Tx<'_>, id: i64, change: Change<'_>, who: &str) -> Result<Option<Changed>, sqlx::Error> {
    #[derive(FromRow)]
    struct Edited {
        #[sqlx(json)]
        headers: BTreeMap<String, String>,
        #[sqlx(json)]
        new_headers: BTreeMap<String, String>,
        bytes: i32,
        new_bytes: i32,
        sha256: String,
        new_sha256: String,
    }
    let edited: Option<Edited> = sqlx::query_as(concat!(
        "with old as (
            select *, (headers - $3::text[]) || $4::jsonb as new_headers, coalesce($2::bytea, payload) as new_payload
              from aftercommit.dead_letter where id = $1 for update),
         changed as (
            update aftercommit.dead_letter d set headers = old.new_headers, payload = old.new_payload
              from old where d.id = old.id),
         ",
        told!("dead edit", "$5"),
        " select headers, new_headers, octet_length(payload) as bytes, octet_length(new_payload) as new_bytes,
                 encode(sha256(payload), 'hex') as sha256, encode(sha256(new_payload), 'hex') as new_sha256 from old, told"
    ))
    .bind(id)
    .bind(change.payload)
    .bind(change.remove_headers)
    .bind(Json(change.set_headers))
    .bind(who)
    .fetch_optional(tx)
    .await?;
    Ok(edited.map(|edited| Changed {
        headers: (edited.headers, edited.new_headers),
        payload_bytes: (edited.bytes, edited.new_bytes),
        payload_sha256: (edited.sha256, edited.new_sha256),
    }))
}
