//! Reading the outbox: is there anything new, and single events. [`Walk`] reads the rows of a window.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::outbox_event::{Body, OutboxEvent, read_body, read_headers};
use super::session::Session;
use super::snapshot::{Mark, xids};
use super::time;
use super::walk::Walk;
use crate::digest::{Contents, Digest};
use crate::envelope::Envelope;

/// Rows of new transactions that a look goes through for low ids. More ids than that move the mark.
const LATE: i64 = 2000;

/// What a look at the outbox found.
#[derive(Debug, FromRow)]
pub struct Look {
    /// A row that the mark does not hold can be read.
    pub news: bool,
    /// The last id that was handed out.
    pub last_id: i64,
    /// Whether ids are handed out one by one, each higher than the last.
    pub orderly: bool,
}

/// Looks for rows that a mark does not hold, at a cost that depends on what is new since the last look.
#[derive(Debug)]
pub struct Watch {
    mark: Mark,
    /// The transactions of which low ids may still come to light.
    running: Vec<String>,
}

impl Watch {
    /// Looks for rows that `mark` does not hold.
    pub fn new(mark: &Mark) -> Self {
        Self { mark: mark.clone(), running: xids(mark.running()) }
    }

    /// Whether it looks behind this mark.
    pub fn is_of(&self, mark: &Mark) -> bool {
        self.mark == *mark
    }

    /// Looks. Each branch is written so that just one index can serve it, and that reads one row of it, whatever plan is
    /// made: the limit and the order rule out reading everything.
    pub async fn look(&mut self, connection: &mut Session) -> Result<Look, sqlx::Error> {
        #[derive(FromRow)]
        struct Looked {
            #[sqlx(flatten)]
            look: Look,
            ended: Vec<String>,
        }
        let Looked { look, ended } = sqlx::query_as(
            "with ended as materialized (
                 select xid from unnest($2::text[]::xid8[]) as t(xid)
                  where pg_visible_in_snapshot(t.xid, pg_current_snapshot())
             )
             select exists (select from (select from aftercommit.outbox where id > $1 order by id limit 1) as new)
                 or exists (
                    select from ended t
                     where exists (select from (
                            select from aftercommit.outbox o
                             where (o.xid, o.id) > (t.xid, $3) and (o.xid, o.id) <= (t.xid, $1)
                             order by o.xid, o.id limit 1) as straggler))
                 or exists (
                    select from (
                            select o.id from aftercommit.outbox o where (o.xid, o.id) > ($4::text::xid8, $3)
                             order by o.xid, o.id limit $5) as late
                     where id > $3 and id <= $1) as news,
                    (select case when is_called then last_value else 0 end from aftercommit.outbox_id_seq) as last_id,
                    (select seqcache = 1 and seqincrement = 1 and not seqcycle from pg_sequence
                      where seqrelid = 'aftercommit.outbox_id_seq'::regclass) as orderly,
                    array(select xid::text from ended) as ended",
        )
        .bind(self.mark.last_id)
        .bind(&self.running)
        .bind(self.mark.floor)
        .bind(self.mark.next_xid.to_string())
        .bind(LATE)
        .fetch_one(connection)
        .await?;
        if !look.news && !ended.is_empty() {
            // They wrote nothing, and will not.
            let ended: HashSet<String> = ended.into_iter().collect();
            self.running.retain(|xid| !ended.contains(xid));
        }
        Ok(look)
    }
}

/// The ids of a window's rows behind `after`, `limit` at most, without reading more of them.
pub async fn ids(
    connection: &mut Session,
    settled: &Mark,
    target: &Mark,
    after: i64,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let limit = usize::try_from(limit).unwrap_or_default();
    Walk::new(settled.clone(), target.clone(), after).next(connection, limit).await
}

/// These events, in the order of their ids; those that are there.
pub async fn some(connection: &mut Session, ids: &[i64]) -> Result<Vec<OutboxEvent>, sqlx::Error> {
    sqlx::query_as(
        "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end
           from (select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                   from aftercommit.outbox where id = any($1)) as picked
          order by id",
    )
    .bind(ids)
    .fetch_all(connection)
    .await
}

/// Headers and payload of a large event.
pub async fn body(connection: &mut Session, id: i64) -> Result<Body, sqlx::Error> {
    let (headers, payload): (Option<String>, Vec<u8>) =
        sqlx::query_as("select headers::text, payload from aftercommit.outbox where id = $1")
            .bind(id)
            .fetch_one(connection)
            .await?;
    read_body(headers.as_deref(), payload)
}

/// The event as it travels; headers and payload of a large one are read here.
pub async fn envelope(connection: &mut Session, row: OutboxEvent, source: &str) -> Result<Envelope, sqlx::Error> {
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
        replaces: Vec::new(),
    })
}

/// A row of the outbox that a message of the stream was made of.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its id in the outbox.
    pub id: i64,
    /// The id of the transaction that wrote it.
    pub xid: u64,
    /// Of what the event is made of.
    digest: Digest,
    /// Of what it was made of before its payload was erased; none when that was not.
    erased: Option<Digest>,
}

impl Known {
    /// Whether a message with this digest is the event, as it is or as it was. One with its ids and another digest is a forgery.
    pub fn is(&self, digest: Digest) -> bool {
        self.digest == digest || self.erased == Some(digest)
    }
}

/// Which of these events the outbox has, each with the outbox id that is given for it.
pub async fn known(
    connection: &mut Session,
    event_ids: &[Uuid],
    ids: &[i64],
) -> Result<HashMap<(Uuid, i64), Known>, sqlx::Error> {
    let rows = sqlx::query(
        "select o.event_id, o.id, o.xid::text, o.type, o.version, o.key, o.content_type, o.created_at,
                case when o.headers <> '{}' then o.headers::text end as headers,
                sha256(o.payload) as payload_sha256, tombstone.digest as erased
           from unnest($1::uuid[], $2::bigint[]) as t(event_id, id)
           join aftercommit.outbox o on o.id = t.id and o.event_id = t.event_id
           left join aftercommit.tombstone on tombstone.event_id = o.event_id
          where aftercommit.reads_up_to(pg_current_snapshot())",
    )
    .bind(event_ids)
    .bind(ids)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let (event_id, id): (Uuid, i64) = (row.try_get("event_id")?, row.try_get("id")?);
            let xid = row.try_get::<&str, _>("xid")?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
            let digest = Digest::of(&Contents {
                event_type: row.try_get("type")?,
                version: row.try_get::<i32, _>("version")?.unsigned_abs(),
                key: row.try_get("key")?,
                content_type: row.try_get("content_type")?,
                time: row.try_get("created_at")?,
                headers: &read_headers(row.try_get("headers")?)?,
                payload: row.try_get("payload_sha256")?,
            });
            let erased = row.try_get::<Option<&[u8]>, _>("erased")?.and_then(Digest::read);
            Ok(((event_id, id), Known { id, xid, digest, erased }))
        })
        .collect()
}

/// The outbox's first id and when it was written; what came before has been removed.
pub async fn first(connection: &mut Session) -> Result<Option<(i64, DateTime<Utc>)>, sqlx::Error> {
    let first: Option<(i64, time::Time)> =
        sqlx::query_as("select id, created_at from aftercommit.outbox order by id limit 1")
            .fetch_optional(connection)
            .await?;
    Ok(first.map(|(id, time)| (id, time.0)))
}
