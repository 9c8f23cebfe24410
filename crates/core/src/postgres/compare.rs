//! What a comparison of the outbox with its stream asks of the database.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::outbox_event;
use super::session::Session;
use super::snapshot::Mark;
use super::time;
use crate::digest::Digest;

/// A row of the outbox that a message says it was made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Original {
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type.
    pub event_type: String,
    /// The version of the type, from 1.
    pub version: i32,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// The media type of the payload.
    pub content_type: String,
    /// When it was written, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// The publisher's headers.
    pub headers: BTreeMap<String, String>,
    /// None when it has another length than the message's.
    pub payload: Option<Bytes>,
    /// What it was before its payload was erased; none when that was not.
    pub erased: Option<Erased>,
}

/// What an event was before its payload was erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erased {
    /// Its digest then.
    pub digest: Digest,
    /// Whether the stream may still have it, because that is not through yet.
    pub open: bool,
}

/// The rows with these ids, one for each, in the order of the question. Payloads are read only when they are as long as
/// `lengths` says, so that what comes back is no larger than the messages.
pub async fn originals(
    connection: &mut Session,
    ids: &[i64],
    lengths: &[i32],
) -> Result<Vec<Option<Original>>, sqlx::Error> {
    let rows = sqlx::query(
        "select t.n, o.event_id, o.type, o.version, o.key, o.content_type, o.created_at,
                case when o.headers <> '{}' then o.headers::text end as headers,
                case when octet_length(o.payload) = t.length then o.payload end as payload,
                tombstone.digest as erased, f.ended_at is null as erased_open
           from unnest($1::bigint[], $2::integer[]) with ordinality as t(id, length, n)
           join aftercommit.outbox o on o.id = t.id
           left join aftercommit.tombstone on tombstone.event_id = o.event_id
           left join aftercommit.forget_request f on f.id = tombstone.request",
    )
    .bind(ids)
    .bind(lengths)
    .fetch_all(connection)
    .await?;
    let mut originals = vec![None; ids.len()];
    for row in &rows {
        let n = usize::try_from(row.try_get::<i64, _>("n")? - 1).unwrap_or_default();
        if let Some(place) = originals.get_mut(n) {
            *place = Some(Original::from_row(row)?);
        }
    }
    Ok(originals)
}

impl FromRow<'_, PgRow> for Original {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            event_id: row.try_get("event_id")?,
            event_type: row.try_get("type")?,
            version: row.try_get("version")?,
            key: row.try_get("key")?,
            content_type: row.try_get("content_type")?,
            created_at: time::at(row, "created_at")?,
            headers: outbox_event::read_headers(row.try_get("headers")?)?,
            payload: row.try_get::<Option<Vec<u8>>, _>("payload")?.map(Bytes::from),
            erased: match row.try_get::<Option<&[u8]>, _>("erased")?.and_then(Digest::read) {
                Some(digest) => Some(Erased { digest, open: row.try_get("erased_open")? }),
                None => None,
            },
        })
    }
}

/// What lies before it may have been removed from the outbox because it was old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Horizon {
    /// Id and time of the first row that is there by its age; none when the outbox is empty.
    pub first: Option<(i64, DateTime<Utc>)>,
    /// The last id that was given out.
    pub last_id: i64,
}

/// Read after a row was not found.
pub async fn horizon(connection: &mut Session) -> Result<Horizon, sqlx::Error> {
    let first: Option<(i64, time::Time)> = sqlx::query_as(
        "select id, created_at from aftercommit.outbox o
          where not exists (select from aftercommit.parked p where p.outbox_id = o.id and p.state in ('parked', 'released'))
            and not exists (select from aftercommit.repair r where r.outbox_id = o.id and r.state = 'queued')
          order by id limit 1",
    )
    .fetch_optional(&mut *connection)
    .await?;
    let last_id =
        sqlx::query_scalar("select case when is_called then last_value else 0 end from aftercommit.outbox_id_seq")
            .fetch_one(connection)
            .await?;
    Ok(Horizon { first: first.map(|(id, time)| (id, time.0)), last_id })
}

/// A row of the outbox that was not found in the stream where it should be.
#[derive(Debug, Clone, PartialEq)]
pub struct Absent {
    /// Its id in the outbox.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type.
    pub event_type: String,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// How long ago it was written, by the database's clock.
    pub age: Duration,
    /// What became of it when it was parked, and where it is then.
    pub parked: Option<(String, Option<u64>)>,
    /// The same of its repair.
    pub repair: Option<(String, Option<u64>)>,
}

impl FromRow<'_, PgRow> for Absent {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let place = |state: &str, sequence: &str| -> Result<_, sqlx::Error> {
            let Some(state) = row.try_get::<Option<String>, _>(state)? else { return Ok(None) };
            Ok(Some((state, row.try_get::<Option<i64>, _>(sequence)?.map(i64::cast_unsigned))))
        };
        Ok(Self {
            id: row.try_get("id")?,
            event_id: row.try_get("event_id")?,
            event_type: row.try_get("type")?,
            key: row.try_get("key")?,
            age: time::span(row.try_get("age")?),
            parked: place("parked_state", "parked_sequence")?,
            repair: place("repair_state", "repair_sequence")?,
        })
    }
}

/// What is known of these rows, in the order of ids.
pub async fn absent(connection: &mut Session, ids: &[i64]) -> Result<Vec<Absent>, sqlx::Error> {
    sqlx::query_as(
        "select o.id, o.event_id, o.type, o.key,
                greatest(extract(epoch from clock_timestamp()) - extract(epoch from o.created_at), 0)::float8 as age,
                p.state as parked_state, p.sequence as parked_sequence,
                r.state as repair_state, r.sequence as repair_sequence
           from unnest($1::bigint[]) as t(id)
           join aftercommit.outbox o on o.id = t.id
           left join aftercommit.parked p on p.outbox_id = o.id
           left join aftercommit.repair r on r.outbox_id = o.id
          order by o.id",
    )
    .bind(ids)
    .fetch_all(connection)
    .await
}

/// The ids of the outbox behind `after` and up to `to`, `limit` at most, whatever the relay's marks say of them.
pub async fn listed(connection: &mut Session, after: i64, to: i64, limit: i64) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar("select id from aftercommit.outbox where id > $1 and id <= $2 order by id limit $3")
        .bind(after)
        .bind(to)
        .bind(limit)
        .fetch_all(connection)
        .await
}

/// Those behind `after` that a mark counts as settled, `limit` at most.
pub async fn held(connection: &mut Session, mark: &Mark, after: i64, limit: i64) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select id from aftercommit.outbox
          where id > $1 and id <= $2 and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
          order by id limit $4",
    )
    .bind(after)
    .bind(mark.last_id)
    .bind(mark.snapshot.to_string())
    .bind(limit)
    .bind(mark.floor)
    .fetch_all(connection)
    .await
}

/// Those of these ids that a mark counts as settled.
pub async fn held_of(connection: &mut Session, mark: &Mark, ids: &[i64]) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select id from aftercommit.outbox
          where id = any($1) and id <= $2 and (id <= $4 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
          order by id",
    )
    .bind(ids)
    .bind(mark.last_id)
    .bind(mark.snapshot.to_string())
    .bind(mark.floor)
    .fetch_all(connection)
    .await
}

/// The next ids behind `after` of events that were published out of the outbox's order between two sequences, as far as
/// the outbox still has them.
pub async fn placed(
    connection: &mut Session,
    behind: u64,
    up_to: u64,
    after: i64,
    limit: i64,
) -> Result<Vec<(i64, Uuid)>, sqlx::Error> {
    sqlx::query_as(
        "select o.id, o.event_id
           from (select outbox_id from aftercommit.repair
                  where state = 'published' and sequence > $1 and sequence <= $2
                 union
                 select outbox_id from aftercommit.parked p
                  where state = 'published' and sequence > $1 and sequence <= $2
                    and not exists (select from aftercommit.repair r where r.outbox_id = p.outbox_id)) as placed
           join aftercommit.outbox o on o.id = placed.outbox_id
          where o.id > $3 order by o.id limit $4",
    )
    .bind(behind.cast_signed())
    .bind(up_to.cast_signed())
    .bind(after)
    .bind(limit)
    .fetch_all(connection)
    .await
}

/// Settles the open findings of a kind about events that `mark` does not hold: what they say has to be looked at again.
pub async fn forget_behind(
    connection: &mut Session,
    reconciler: &str,
    kind: &str,
    mark: &Mark,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.finding f set state = 'gone', settled_at = clock_timestamp()
           from aftercommit.outbox o
          where f.name = $1 and f.kind = $2 and f.state = 'open' and o.id = f.outbox_id and o.id > $3
            and (o.id > $4 or not pg_visible_in_snapshot(o.xid, $5::text::pg_snapshot))",
    )
    .bind(reconciler)
    .bind(kind)
    .bind(mark.floor)
    .bind(mark.last_id)
    .bind(mark.snapshot.to_string())
    .execute(connection)
    .await
    .map(drop)
}

/// An event that has been parked for long.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct LongParked {
    /// Its id in the outbox.
    pub outbox_id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// Why it was parked.
    pub reason: String,
    /// For how many seconds it has been parked.
    pub for_seconds: f64,
}

/// The events that have been parked for longer than `limit`, the first thousand.
pub async fn parked_longer(connection: &mut Session, limit: Duration) -> Result<Vec<LongParked>, sqlx::Error> {
    sqlx::query_as(
        "select outbox_id, event_id, key, reason, (extract(epoch from clock_timestamp()) - extract(epoch from parked_at))::float8
                    as for_seconds
           from aftercommit.parked
          where state = 'parked' and code is not null and parked_at < clock_timestamp() - make_interval(secs => $1)
          order by outbox_id limit 1000",
    )
    .bind(limit.as_secs_f64())
    .fetch_all(connection)
    .await
}
