//! Reading the outbox: is there anything new, and the rows of a window, ordered by id, page by page.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::session::Session;
use super::snapshot::{Mark, xids};
use crate::envelope::Envelope;
use crate::fault;

/// An event of the outbox.
#[derive(Clone)]
pub(crate) struct OutboxEvent {
    pub(crate) id: i64,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) version: i32,
    pub(crate) key: Option<String>,
    pub(crate) content_type: String,
    pub(crate) created_at: DateTime<Utc>,
    /// Headers and payload; none when they are so large that they are read one by one, see [`body`].
    pub(crate) body: Option<Body>,
}

/// The part of an event that can be large.
#[derive(Clone)]
pub(crate) struct Body {
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) payload: Bytes,
}

/// What a look at the outbox found.
#[derive(Debug)]
pub(crate) struct Look {
    /// A row that `settled` does not hold can be read.
    pub(crate) news: bool,
    /// The last id that was handed out.
    pub(crate) last_id: i64,
}

/// Looks whether rows that `settled` does not hold can be read, at a cost that does not depend on the outbox's size.
pub(crate) async fn look(connection: &mut Session, settled: &Mark) -> Result<Look, sqlx::Error> {
    let row = sqlx::query(
        "select exists (select from aftercommit.outbox where id > $1)
             or exists (
                select from unnest($2::text[]::xid8[]) as t(xid)
                 where pg_visible_in_snapshot(t.xid, pg_current_snapshot())
                   and exists (select from (
                        select from aftercommit.outbox o
                         where (o.xid, o.id) > (t.xid, $3) and (o.xid, o.id) <= (t.xid, $1)
                         order by o.xid, o.id limit 1) as straggler)),
                (select case when is_called then last_value else 0 end from aftercommit.outbox_id_seq)",
    )
    .bind(settled.last_id)
    .bind(xids(settled.running()))
    .bind(settled.floor)
    .fetch_one(connection)
    .await?;
    Ok(Look { news: row.try_get(0)?, last_id: row.try_get(1)? })
}

/// Up to `limit` rows behind `after` of those that `target` holds and `settled` does not, ordered by id.
///
/// First the stragglers: rows with ids that `settled` had already passed, of transactions that have ended since. Then
/// the new rows by primary key. Each branch is written so that just one index can serve it, whatever the statistics
/// say: the row comparison fits only the index on (xid, id).
pub(crate) async fn page(
    connection: &mut Session,
    settled: &Mark,
    target: &Mark,
    after: i64,
    limit: usize,
) -> Result<Vec<OutboxEvent>, sqlx::Error> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let ended = if fault::broken("stragglers") { Vec::new() } else { settled.ended_by(target) };
    if after < settled.last_id && !ended.is_empty() {
        let rows = stragglers(connection, &ended, after.max(settled.floor), settled.last_id, limit).await?;
        if !rows.is_empty() {
            return Ok(rows);
        }
    }
    let rows = sqlx::query(
        "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end
           from (select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                   from aftercommit.outbox
                  where id > $1 and id <= $2
                    and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
                  order by id limit $4) as page
          order by id",
    )
    .bind(after.max(settled.last_id))
    .bind(target.last_id)
    .bind(target.snapshot.to_string())
    .bind(limit)
    .bind(target.floor)
    .fetch_all(connection)
    .await?;
    rows.iter().map(event).collect()
}

async fn stragglers(
    connection: &mut Session,
    ended: &[u64],
    after: i64,
    last_id: i64,
    limit: i64,
) -> Result<Vec<OutboxEvent>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end
           from unnest($1::text[]::xid8[]) as t(xid)
          cross join lateral (
                select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                  from aftercommit.outbox o
                 where (o.xid, o.id) > (t.xid, $2) and (o.xid, o.id) <= (t.xid, $3)
                 order by o.xid, o.id limit $4) as page
          order by id limit $4",
    )
    .bind(xids(ended.iter().copied()))
    .bind(after)
    .bind(last_id)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    rows.iter().map(event).collect()
}

/// The ids of the rows that [`page`] would return, without reading more of them.
pub(crate) async fn ids(
    connection: &mut Session,
    settled: &Mark,
    target: &Mark,
    after: i64,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let ended = settled.ended_by(target);
    if after < settled.last_id && !ended.is_empty() {
        let ids: Vec<i64> = sqlx::query_scalar(
            "select page.id
               from unnest($1::text[]::xid8[]) as t(xid)
              cross join lateral (
                    select o.id from aftercommit.outbox o
                     where (o.xid, o.id) > (t.xid, $2) and (o.xid, o.id) <= (t.xid, $3)
                     order by o.xid, o.id limit $4) as page
              order by id limit $4",
        )
        .bind(xids(ended.iter().copied()))
        .bind(after.max(settled.floor))
        .bind(settled.last_id)
        .bind(limit)
        .fetch_all(&mut *connection)
        .await?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    sqlx::query_scalar(
        "select id from aftercommit.outbox
          where id > $1 and id <= $2 and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
          order by id limit $4",
    )
    .bind(after.max(settled.last_id))
    .bind(target.last_id)
    .bind(target.snapshot.to_string())
    .bind(limit)
    .bind(target.floor)
    .fetch_all(connection)
    .await
}

/// These events, in the order of their ids; those that are there.
pub(crate) async fn some(connection: &mut Session, ids: &[i64]) -> Result<Vec<OutboxEvent>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end
           from (select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                   from aftercommit.outbox where id = any($1)) as picked
          order by id",
    )
    .bind(ids)
    .fetch_all(connection)
    .await?;
    rows.iter().map(event).collect()
}

/// One event by its outbox id.
pub(crate) async fn one(connection: &mut Session, id: i64) -> Result<OutboxEvent, sqlx::Error> {
    let row = sqlx::query(
        "select id, event_id, type, version, key, content_type, created_at, headers::text, payload
           from aftercommit.outbox where id = $1",
    )
    .bind(id)
    .fetch_one(connection)
    .await?;
    event(&row)
}

/// Headers and payload of a large event.
pub(crate) async fn body(connection: &mut Session, id: i64) -> Result<Body, sqlx::Error> {
    let row = sqlx::query("select headers::text, payload from aftercommit.outbox where id = $1")
        .bind(id)
        .fetch_one(connection)
        .await?;
    read_body(row.try_get(0)?, row.try_get(1)?)
}

/// The event as it travels; headers and payload of a large one are read here.
pub(crate) async fn envelope(
    connection: &mut Session,
    row: OutboxEvent,
    source: &str,
) -> Result<Envelope, sqlx::Error> {
    let body = match row.body {
        Some(body) => body,
        None => self::body(connection, row.id).await?,
    };
    Ok(Envelope {
        id: row.event_id.into(),
        event_type: row.event_type,
        version: row.version.unsigned_abs(),
        key: row.key,
        source: source.to_string(),
        time: row.created_at,
        sequence: row.id,
        headers: body.headers,
        content_type: row.content_type,
        payload: body.payload,
    })
}

/// A row of the outbox that a message of the stream was made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub(crate) id: i64,
    pub(crate) xid: u64,
}

/// Which of these events the outbox has, each with the outbox id that is given for it.
pub(crate) async fn known(
    connection: &mut Session,
    event_ids: &[Uuid],
    ids: &[i64],
) -> Result<HashMap<Uuid, Known>, sqlx::Error> {
    let rows: Vec<(Uuid, i64, String)> = sqlx::query_as(
        "select o.event_id, o.id, o.xid::text from unnest($1::uuid[], $2::bigint[]) as t(event_id, id)
           join aftercommit.outbox o on o.id = t.id and o.event_id = t.event_id",
    )
    .bind(event_ids)
    .bind(ids)
    .fetch_all(connection)
    .await?;
    let number = |xid: String| xid.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)));
    rows.into_iter().map(|(event_id, id, xid)| Ok((event_id, Known { id, xid: number(xid)? }))).collect()
}

/// The outbox's first id and when it was written; what came before has been removed.
pub(crate) async fn first(connection: &mut Session) -> Result<Option<(i64, DateTime<Utc>)>, sqlx::Error> {
    sqlx::query_as("select id, created_at from aftercommit.outbox order by id limit 1").fetch_optional(connection).await
}

fn event(row: &PgRow) -> Result<OutboxEvent, sqlx::Error> {
    let payload: Option<Vec<u8>> = row.try_get(8)?;
    let body = match payload {
        Some(payload) => Some(read_body(row.try_get(7)?, payload)?),
        None => None,
    };
    Ok(OutboxEvent {
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        event_type: row.try_get(2)?,
        version: row.try_get(3)?,
        key: row.try_get(4)?,
        content_type: row.try_get(5)?,
        created_at: row.try_get(6)?,
        body,
    })
}

fn read_body(headers: Option<&str>, payload: Vec<u8>) -> Result<Body, sqlx::Error> {
    Ok(Body { headers: read_headers(headers)?, payload: payload.into() })
}

/// Headers as they were read; none stand for an empty object.
pub(super) fn read_headers(headers: Option<&str>) -> Result<BTreeMap<String, String>, sqlx::Error> {
    headers.map_or(Ok(BTreeMap::new()), |headers| {
        serde_json::from_str(headers).map_err(|error| sqlx::Error::Decode(Box::new(error)))
    })
}
