//! Events that a subscriber gave up on.

use sqlx::Row;
use sqlx::types::Json;

use crate::envelope::Envelope;

use super::lease::Tenure;
use super::session::Session;

/// A dead letter to be written.
pub(crate) struct DeadLetter<'a> {
    pub(crate) subscriber: &'a str,
    pub(crate) stream: &'a str,
    pub(crate) stream_seq: i64,
    pub(crate) event: &'a Envelope,
    pub(crate) reason: &'a str,
    /// Whether it was a failed run that decided, which then counts as an attempt.
    pub(crate) attempted: bool,
}

/// Writes the dead letter, the inbox row that says so, and ends the counting of attempts, all in one statement. False when the tenure is over: nothing was written. An event that is done already stays
/// as it is.
pub(crate) async fn insert(
    connection: &mut Session,
    tenure: &Tenure,
    letter: &DeadLetter<'_>,
) -> Result<bool, sqlx::Error> {
    let event = letter.event;
    let row = sqlx::query(
        "with tenure as (
            select from aftercommit.lease where name = $1 and holder = $2 and epoch = $3),
         done as (
            insert into aftercommit.inbox (subscriber, event_id, stream_seq, sequence, outcome)
            select $4, $5, $6, $12, 'dead' where exists (select from tenure)
            on conflict do nothing
            returning event_id),
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
    .bind(Json(&event.headers))
    .bind(event.payload.as_ref())
    .bind(storable(&event.content_type))
    .bind(letter.stream)
    .bind(storable(letter.reason))
    .bind(i32::from(letter.attempted))
    .fetch_one(connection)
    .await?;
    row.try_get(0)
}

/// PostgreSQL's text has no zero character; a foreign publisher's attribute may.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
