//! Events that an operator redrove to a subscriber: they run from their rows here, not from the stream.

use std::collections::BTreeMap;

use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row, query_as, query_scalar};
use uuid::Uuid;

use crate::envelope::Envelope;

use super::session::{Session, Tx};
use super::time;

/// A row that waits, without its event.
#[derive(Debug, FromRow)]
pub struct Waiting {
    /// The row's id. Rows run in the order of their ids.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's key; none when it has none.
    pub key: Option<String>,
}

/// The event of a row.
#[derive(Debug)]
pub struct Redriven {
    /// The row's id.
    pub id: i64,
    /// None when the rows before it were too large together for it to be read too.
    pub event: Option<Envelope>,
    /// Name of the stream that the event came from.
    pub stream: String,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
}

/// The first rows of a subscriber behind the row `after`, by their ids.
pub async fn waiting(
    connection: &mut Session,
    subscriber: &str,
    after: i64,
    limit: i64,
) -> Result<Vec<Waiting>, sqlx::Error> {
    query_as("select id, event_id, key from aftercommit.redrive where subscriber = $1 and id > $2 order by id limit $3")
        .bind(subscriber)
        .bind(after)
        .bind(limit)
        .fetch_all(connection)
        .await
}

/// Reads the events of rows, by their ids: at least one, and as many as begin within `max_bytes` of payload. Rows that
/// are gone are left out.
pub async fn read(connection: &mut Session, ids: &[i64], max_bytes: usize) -> Result<Vec<Redriven>, sqlx::Error> {
    query_as(
        "select id, event_id, type, version, key, source, time, sequence, headers,
                case when bytes_before < $2 then payload end as payload, content_type, stream, stream_seq
           from (select *, sum(octet_length(payload)) over (order by id) - octet_length(payload) as bytes_before
                   from aftercommit.redrive where id = any($1)) as wanted
          order by id",
    )
    .bind(ids)
    .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await
}

impl FromRow<'_, PgRow> for Redriven {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let payload: Option<Vec<u8>> = row.try_get("payload")?;
        let event = match payload {
            Some(payload) => Some(Envelope {
                id: row.try_get::<Uuid, _>("event_id")?.into(),
                event_type: row.try_get("type")?,
                version: row.try_get::<i32, _>("version")?.try_into().unwrap_or(0),
                key: row.try_get("key")?,
                source: row.try_get("source")?,
                time: time::at(row, "time")?,
                sequence: row.try_get::<Option<i64>, _>("sequence")?.unwrap_or(0),
                headers: headers(row.try_get::<Json<Value>, _>("headers")?.0),
                content_type: row.try_get("content_type")?,
                payload: payload.into(),
                replaces: Vec::new(),
            }),
            None => None,
        };
        let (id, stream) = (row.try_get("id")?, row.try_get("stream")?);
        Ok(Self { id, event, stream, stream_seq: row.try_get("stream_seq")? })
    }
}

/// Headers are text; whatever else an operator's edit made of one is shown as JSON, so that no row is unreadable.
fn headers(value: Value) -> BTreeMap<String, String> {
    let Value::Object(headers) = value else { return BTreeMap::new() };
    let text = |value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    headers.into_iter().map(|(name, value)| (name, text(value))).collect()
}

/// Removes rows and returns the ids of those that were still there; only their events may run in this transaction.
/// Waits for another transaction that is doing the same.
pub async fn take(tx: &mut Tx<'_>, ids: &[i64]) -> Result<Vec<i64>, sqlx::Error> {
    query_scalar("delete from aftercommit.redrive where id operator(pg_catalog.=) any($1) returning id")
        .bind(ids)
        .fetch_all(tx)
        .await
}
