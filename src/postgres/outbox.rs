//! Writing into the outbox.

use std::collections::BTreeMap;

#[cfg(feature = "testing")]
use sqlx::PgConnection;
use sqlx::PgTransaction;
use sqlx::types::Json;
use uuid::Uuid;

/// One row to be, in the columns that a publisher may write.
pub(crate) struct NewEvent {
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) version: i32,
    pub(crate) key: Option<String>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) payload: Vec<u8>,
    pub(crate) content_type: String,
}

/// The payload bytes that go into one statement. PostgreSQL takes up to 1 GB in one value; far less keeps the memory
/// of both sides small and costs no time.
const STATEMENT_BYTES: usize = 64 << 20;

/// Writes the events in their order, in one statement unless they are tens of megabytes. It asks for nothing back, so
/// that the right to insert is enough. `pooled` when a pooler in transaction mode may stand in between, so that prepared
/// statements have no name.
pub(crate) async fn insert(
    tx: &mut PgTransaction<'_>,
    pooled: bool,
    mut events: &[NewEvent],
) -> Result<(), sqlx::Error> {
    if let [event] = events {
        return insert_one(tx, pooled, event).await;
    }
    while !events.is_empty() {
        let (now, later) = events.split_at(statement_length(events));
        insert_many(tx, pooled, now).await?;
        events = later;
    }
    Ok(())
}

/// The usual case. For one row, arrays take PostgreSQL a tenth longer than plain parameters.
async fn insert_one(tx: &mut PgTransaction<'_>, pooled: bool, event: &NewEvent) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(event.event_id)
    .bind(&event.event_type)
    .bind(event.version)
    .bind(&event.key)
    .bind(Json(&event.headers))
    .bind(&event.payload)
    .bind(&event.content_type)
    .persistent(!pooled)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The types of all events that are there.
#[cfg(feature = "testing")]
pub(crate) async fn types(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("select distinct type from aftercommit.outbox order by type").fetch_all(connection).await
}

/// How many of the events fit into one statement; at least one.
fn statement_length(events: &[NewEvent]) -> usize {
    let mut bytes = 0;
    let fitting = events.iter().take_while(|event| {
        bytes += event.payload.len();
        bytes <= STATEMENT_BYTES
    });
    fitting.count().max(1)
}

/// Arrays, so that the number of events never meets the limit on bind parameters. `unnest` keeps their order, and the
/// outbox ids follow it. It runs in the service's transaction, so it names the schema of each type; an `unnest` of several
/// arrays is always PostgreSQL's own.
async fn insert_many(tx: &mut PgTransaction<'_>, pooled: bool, events: &[NewEvent]) -> Result<(), sqlx::Error> {
    fn column<'a, T>(events: &'a [NewEvent], field: impl Fn(&'a NewEvent) -> T) -> Vec<T> {
        events.iter().map(field).collect()
    }
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         select * from unnest($1::pg_catalog.uuid[], $2::pg_catalog.text[], $3::integer[], $4::pg_catalog.text[],
                              $5::pg_catalog.jsonb[], $6::pg_catalog.bytea[], $7::pg_catalog.text[])",
    )
    .bind(column(events, |event| event.event_id))
    .bind(column(events, |event| event.event_type.as_str()))
    .bind(column(events, |event| event.version))
    .bind(column(events, |event| event.key.as_deref()))
    .bind(column(events, |event| Json(&event.headers)))
    .bind(column(events, |event| event.payload.as_slice()))
    .bind(column(events, |event| event.content_type.as_str()))
    .persistent(!pooled)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_takes_what_fits_and_at_least_one() {
        let event = |bytes| NewEvent {
            event_id: Uuid::nil(),
            event_type: "a".into(),
            version: 1,
            key: None,
            headers: BTreeMap::new(),
            payload: vec![0; bytes],
            content_type: "a".into(),
        };
        let events = [event(STATEMENT_BYTES / 2), event(STATEMENT_BYTES / 2), event(1)];
        assert_eq!(statement_length(&events), 2);
        assert_eq!(statement_length(&events[2..]), 1);
        assert_eq!(statement_length(&[event(STATEMENT_BYTES + 1)]), 1);
    }
}
