//! An event of the outbox, as its row is read.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::time;

/// An event of the outbox.
#[derive(Clone)]
pub struct OutboxEvent {
    /// Its id in the outbox.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type.
    pub event_type: String,
    /// The version of the type, from 1.
    pub version: i32,
    /// The event's key; none when its order does not matter.
    pub key: Option<String>,
    /// The media type of the payload.
    pub content_type: String,
    /// When it was written, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// Headers and payload; none when they are so large that they are read one by one, see [`body`](super::window::body).
    pub body: Option<Body>,
}

/// The columns of an event, in the order in which every statement selects them.
type Columns<'r> = (i64, Uuid, String, i32, Option<String>, String, time::Time, Option<&'r str>, Option<Vec<u8>>);

impl<'r> FromRow<'r, PgRow> for OutboxEvent {
    /// By place and not by name: the relay does this for every event, and each name would be looked up in a map.
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        let (id, event_id, event_type, version, key, content_type, created_at, headers, payload) =
            Columns::from_row(row)?;
        let body = payload.map(|payload| read_body(headers, payload)).transpose()?;
        Ok(Self { id, event_id, event_type, version, key, content_type, created_at: created_at.into(), body })
    }
}

/// The part of an event that can be large.
#[derive(Clone)]
pub struct Body {
    /// The publisher's headers.
    pub headers: BTreeMap<String, String>,
    /// The payload, as it was written.
    pub payload: Bytes,
}

pub(super) fn read_body(headers: Option<&str>, payload: Vec<u8>) -> Result<Body, sqlx::Error> {
    Ok(Body { headers: read_headers(headers)?, payload: payload.into() })
}

/// Headers as they were read; none stand for an empty object.
pub(super) fn read_headers(headers: Option<&str>) -> Result<BTreeMap<String, String>, sqlx::Error> {
    headers.map_or(Ok(BTreeMap::new()), |headers| {
        serde_json::from_str(headers).map_err(|error| sqlx::Error::Decode(Box::new(error)))
    })
}
