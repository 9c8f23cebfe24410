//! Events of the outbox that a person looks for.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::FromRow;
use uuid::Uuid;

use super::session::Session;
use super::time;
use aftercommit_outbox::event::EventId;

/// Rows that are looked at in one go.
pub const REACH: i64 = 100_000;

/// What is looked for; what is none does not matter.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted<'a> {
    /// Events of this type, or, when it ends with `*`, of types that begin so.
    pub event_type: Option<&'a str>,
    /// Events with this key.
    pub key: Option<&'a str>,
    /// Events with this header, and this value of it.
    pub header: Option<(&'a str, &'a str)>,
    /// Events that were written at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Events that were written before.
    pub until: Option<DateTime<Utc>>,
}

/// An event of the outbox, without what it holds.
#[derive(Debug, Clone, PartialEq, Serialize, FromRow)]
pub struct Found {
    /// Its place in the outbox.
    pub outbox_id: i64,
    /// Its identity.
    #[sqlx(try_from = "Uuid")]
    pub event_id: EventId,
    /// Its type.
    #[serde(rename = "type")]
    #[sqlx(rename = "type")]
    pub event_type: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// When it was written.
    #[sqlx(try_from = "time::Time")]
    pub written_at: DateTime<Utc>,
    /// The payload's length.
    pub payload_bytes: i32,
}

/// The newest `limit` of the wanted events before the place `before`, among the [`REACH`] rows there.
pub async fn search(
    session: &mut Session,
    wanted: &Wanted<'_>,
    before: i64,
    limit: i64,
) -> Result<Vec<Found>, sqlx::Error> {
    let (header, value) = wanted.header.unzip();
    sqlx::query_as(
        "select id as outbox_id, event_id, type, key, created_at as written_at, octet_length(payload) as payload_bytes
           from (select id, event_id, type, key, headers, created_at, payload
                   from aftercommit.outbox where id < $1 order by id desc limit $2) as looked
          where ($3::text is null or type = $3 or (right($3, 1) = '*' and starts_with(type, left($3, -1))))
            and ($4::text is null or key = $4)
            and ($5::text is null or headers ->> $5 = $6)
            and ($7::timestamptz is null or created_at >= $7)
            and ($8::timestamptz is null or created_at < $8)
          order by id desc limit $9",
    )
    .bind(before)
    .bind(REACH)
    .bind(wanted.event_type)
    .bind(wanted.key)
    .bind(header)
    .bind(value)
    .bind(wanted.since)
    .bind(wanted.until)
    .bind(limit)
    .fetch_all(session)
    .await
}

/// How far such a search looks back: the place behind which it goes on, and when that event was written. None when there is
/// nothing before it.
pub async fn reach(session: &mut Session, before: i64) -> Result<Option<(i64, DateTime<Utc>)>, sqlx::Error> {
    let row: Option<(i64, time::Time)> = sqlx::query_as(
        "select id, created_at from aftercommit.outbox where id < $1 order by id desc offset $2 limit 1",
    )
    .bind(before)
    .bind(REACH - 1)
    .fetch_optional(session)
    .await?;
    Ok(row.map(|(id, at)| (id, at.0)))
}
