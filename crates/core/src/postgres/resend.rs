//! The subscriber's side of its reconcilers: what is not handled, and sending that back to it.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use sqlx::types::Json;
use uuid::Uuid;

use super::dead_letter::{storable, storable_headers};
use super::finding::State;
use super::session::{Session, Tx};
use crate::envelope::Envelope;

/// What the inbox says of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It is neither done nor waits to be run again.
    Not,
    /// It is not done, and waits to be run again.
    Waits,
    /// It is there so many times, which the primary key does not allow.
    Times(i64),
}

/// Those of some events that are not in the inbox just once.
pub async fn unhandled(
    session: &mut Session,
    subscriber: &str,
    events: &[Uuid],
) -> Result<HashMap<Uuid, Known>, sqlx::Error> {
    let rows: Vec<(Uuid, i64, bool)> = sqlx::query_as(
        "select event_id, times, exists (select from aftercommit.redrive r
                                          where r.subscriber = $1 and r.event_id = looked_up.event_id)
           from (select event_id,
                        (select count(*) from aftercommit.inbox i
                          where i.subscriber = $1 and i.event_id = e.event_id) as times
                   from unnest($2::uuid[]) as e(event_id)) as looked_up
          where times <> 1",
    )
    .bind(subscriber)
    .bind(events)
    .fetch_all(session)
    .await?;
    let known = |(id, times, waits)| match (times, waits) {
        (0, true) => (id, Known::Waits),
        (0, false) => (id, Known::Not),
        (times, _) => (id, Known::Times(times)),
    };
    Ok(rows.into_iter().map(known).collect())
}

/// How many events of a part of the stream the inbox has, and the digest of their ids, as the outbox computes it.
pub async fn digest(session: &mut Session, subscriber: &str, behind: u64, to: u64) -> Result<(u64, u128), sqlx::Error> {
    let (count, sum): (i64, String) = sqlx::query_as(
        "select count(*), coalesce(sum(('x' || left(md5(uuid_send(event_id)), 15))::bit(60)::bigint), 0)::text
           from aftercommit.inbox where subscriber = $1 and stream_seq > $2 and stream_seq <= $3",
    )
    .bind(subscriber)
    .bind(behind.cast_signed())
    .bind(to.cast_signed())
    .fetch_one(session)
    .await?;
    Ok((count.unsigned_abs(), sum.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?))
}

/// An event that shall run at a subscriber.
#[derive(Debug)]
pub struct Event {
    /// The event, with its payload.
    pub event: Envelope,
    /// Where it is in the stream; 0 when it is not there any more.
    pub sequence: u64,
}

/// Whose events are redriven, and who does it.
#[derive(Debug, Clone)]
pub struct Order {
    /// Name of the subscriber.
    pub subscriber: String,
    /// Name of the stream that the events come from.
    pub stream: String,
    /// Who redrives them, for the audit trail.
    pub who: String,
    /// Whether events that are done run once more.
    pub again: bool,
}

/// Begins a transaction that may wait for a server between two statements.
pub async fn begin(session: &mut Session) -> Result<Tx<'_>, sqlx::Error> {
    session.begin_and("; set local idle_in_transaction_session_timeout = 0").await
}

/// Sends events back in this order, behind what waits already, and returns the ids of the rows that it wrote. What is
/// done stays done, unless it is to run again; what waits already stays where it is.
pub async fn send(tx: &mut Tx<'_>, order: &Order, events: &[Event]) -> Result<Vec<i64>, sqlx::Error> {
    fn each<T>(events: &[Event], field: impl Fn(&Event) -> T) -> Vec<T> {
        events.iter().map(field).collect()
    }
    if order.again {
        sqlx::query(
            "with gone as (
                delete from aftercommit.inbox
                 where subscriber = $1 and event_id = any($2) and outcome <> 'dead' returning event_id, outcome, handled_at)
             insert into aftercommit.audit (who, action, subscriber, event_id, detail)
             select $3, 'replay again', $1, event_id, jsonb_build_object('outcome', outcome, 'handled_at', handled_at)
               from gone",
        )
        .bind(&order.subscriber)
        .bind(each(events, |event| event.event.id.as_uuid()))
        .bind(&order.who)
        .execute(&mut *tx)
        .await?;
    }
    sqlx::query_scalar(
        "insert into aftercommit.redrive
                (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                 stream, stream_seq, requested_by)
         select $1, event_id, type, version, key, source, time, sequence, headers, payload, content_type, $2,
                stream_seq, $3
           from unnest($4::uuid[], $5::text[], $6::int[], $7::text[], $8::text[], $9::timestamptz[], $10::bigint[],
                       $11::jsonb[], $12::bytea[], $13::text[], $14::bigint[])
                with ordinality
                as e(event_id, type, version, key, source, time, sequence, headers, payload, content_type, stream_seq, n)
          where not exists (select from aftercommit.inbox i where i.subscriber = $1 and i.event_id = e.event_id)
          order by n
         on conflict do nothing
         returning id",
    )
    .bind(&order.subscriber)
    .bind(&order.stream)
    .bind(&order.who)
    .bind(each(events, |event| event.event.id.as_uuid()))
    .bind(each(events, |event| storable(&event.event.event_type)))
    .bind(each(events, |event| i32::try_from(event.event.version).unwrap_or(i32::MAX)))
    .bind(each(events, |event| event.event.key.as_deref().map(storable)))
    .bind(each(events, |event| storable(&event.event.source)))
    .bind(each(events, |event| event.event.time))
    .bind(each(events, |event| Some(event.event.sequence).filter(|sequence| *sequence > 0)))
    .bind(each(events, |event| Json(storable_headers(&event.event.headers))))
    .bind(each(events, |event| event.event.payload.to_vec()))
    .bind(each(events, |event| storable(&event.event.content_type)))
    .bind(each(events, |event| event.sequence.cast_signed()))
    .fetch_all(tx)
    .await
}

/// Brings the rows of each key that has new ones, from the row `first` on, into the order of the outbox.
pub async fn sort(tx: &mut Tx<'_>, subscriber: &str, first: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        // No joins: the rows are as new as the planner's idea of them is old, and a join over what it takes for one row grows
        // with the square of what there is.
        "with waiting as (
            select id, source, key, id >= $2 as is_new,
                   sequence < lag(sequence) over (partition by source, key order by id) as is_early
              from aftercommit.redrive
             where subscriber = $1 and hashtextextended(key, 0) = any(array(
                   select hashtextextended(key, 0) from aftercommit.redrive
                    where subscriber = $1 and id >= $2 and key is not null))),
         judged as (
            select id, bool_or(is_new) over same_key and bool_or(is_early) over same_key as moves
              from waiting window same_key as (partition by source, key)),
         moved as (
            delete from aftercommit.redrive where id = any(array(select id from judged where moves)) returning *)
         insert into aftercommit.redrive
                (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                 stream, stream_seq, requested_at, requested_by)
         select subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                stream, stream_seq, requested_at, requested_by
           from moved order by sequence nulls first, id",
    )
    .bind(subscriber)
    .bind(first)
    .execute(tx)
    .await?;
    Ok(done.rows_affected())
}

/// Writes down that it was done.
pub async fn log(tx: &mut Tx<'_>, order: &Order, action: &str, events: u64) -> Result<(), sqlx::Error> {
    let entry = super::audit::Entry {
        who: &order.who,
        action,
        subscriber: Some(&order.subscriber),
        event_id: None,
        detail: json!({ "events": events, "stream": order.stream, "again": order.again }),
    };
    super::audit::write(tx, &entry).await
}

/// Settles what earlier runs found and what is done now.
pub async fn settle_handled(
    session: &mut Session,
    name: &str,
    kind: &str,
    subscriber: &str,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "update aftercommit.finding f set state = $4, settled_at = clock_timestamp()
          where name = $1 and kind = $2 and state in ('open', 'repairing')
            and exists (select from aftercommit.inbox i where i.subscriber = $3 and i.event_id = f.event_id)",
    )
    .bind(name)
    .bind(kind)
    .bind(subscriber)
    .bind(State::Repaired.as_str())
    .execute(session)
    .await?;
    Ok(done.rows_affected())
}

/// Settles what the run that looked at everything behind a sequence did not find there again, and what lies before the
/// stream's first message: the stream does not hold these events any more.
pub async fn settle_lost(
    session: &mut Session,
    name: &str,
    kind: &str,
    run: i64,
    behind: u64,
    first: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.finding set state = $6, settled_at = clock_timestamp()
          where name = $1 and kind = $2 and state = 'open' and last_run < $3
            and (stream_seq > $4 or stream_seq < $5)",
    )
    .bind(name)
    .bind(kind)
    .bind(run)
    .bind(behind.cast_signed())
    .bind(first.cast_signed())
    .bind(State::Gone.as_str())
    .execute(session)
    .await
    .map(drop)
}

/// A finding about an event that nothing was done about.
#[derive(Debug, sqlx::FromRow)]
pub struct Open {
    /// The finding's id.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's key; none when it has none or it is not known.
    pub key: Option<String>,
    /// The event's id in the outbox; none when that is not known.
    pub outbox_id: Option<i64>,
    /// The event's sequence in the stream; none when that is not known.
    pub stream_seq: Option<i64>,
}

/// The next ones of a kind behind the finding `after`.
pub async fn open(
    session: &mut Session,
    name: &str,
    kind: &str,
    after: i64,
    limit: i64,
) -> Result<Vec<Open>, sqlx::Error> {
    sqlx::query_as(
        "select id, event_id, key, outbox_id, stream_seq from aftercommit.finding
          where name = $1 and kind = $2 and state = 'open' and event_id is not null and id > $3 order by id limit $4",
    )
    .bind(name)
    .bind(kind)
    .bind(after)
    .bind(limit)
    .fetch_all(session)
    .await
}

/// A dead letter that nobody has decided about.
#[derive(Debug, sqlx::FromRow)]
pub struct OldLetter {
    /// The letter's id.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
    /// For how many seconds it has been a dead letter.
    pub for_seconds: f64,
    /// Why the subscriber gave up, cut to 200 characters.
    pub reason: String,
}

/// The oldest dead letters that have been some for longer than `limit`.
pub async fn dead_longer(
    session: &mut Session,
    subscriber: &str,
    limit: Duration,
) -> Result<Vec<OldLetter>, sqlx::Error> {
    sqlx::query_as(
        "select id, event_id, key, stream_seq, (extract(epoch from clock_timestamp()) - extract(epoch from dead_at))::float8
                    as for_seconds,
                left(reason, 200) as reason
           from aftercommit.dead_letter
          where subscriber = $1 and dead_at < clock_timestamp() - make_interval(secs => $2) order by id limit 1000",
    )
    .bind(subscriber)
    .bind(limit.as_secs_f64())
    .fetch_all(session)
    .await
}
