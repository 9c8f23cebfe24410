//! Publishing with tokio-postgres 0.7, and with the pools that hand out its transactions.
//!
//! ```no_run
//! use aftercommit_outbox::tokio_postgres as outbox;
//! # use aftercommit_outbox::Event;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//!
//! # async fn place(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = client.transaction().await?;
//! tx.execute("insert into orders (id) values ($1)", &[&7_i64]).await?;
//! outbox::publish(&tx, &OrderPlaced { order: 7 }).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! With deadpool-postgres it reads the same: `&` of its transaction is taken for that of tokio-postgres.
//!
//! ```ignore
//! let mut client = pool.get().await?;
//! let tx = client.transaction().await?;
//! outbox::publish(&tx, &OrderPlaced { order: 7 }).await?;
//! tx.commit().await?;
//! ```
//!
//! Neither a late publish compiles, nor one without a transaction, nor one past an open savepoint. The first of these
//! compiles, the others differ from it in one thing each:
//!
//! ```no_run
//! # use aftercommit_outbox::{RawEvent, tokio_postgres as outbox};
//! # async fn in_time(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = client.transaction().await?;
//! outbox::publish_raw(&tx, RawEvent::new("a", "text/plain", "")).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # use aftercommit_outbox::{RawEvent, tokio_postgres as outbox};
//! # async fn late(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = client.transaction().await?;
//! tx.commit().await?;
//! outbox::publish_raw(&tx, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0308
//! # use aftercommit_outbox::{RawEvent, tokio_postgres as outbox};
//! # async fn bare(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! outbox::publish_raw(&client, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0502
//! # use aftercommit_outbox::{RawEvent, tokio_postgres as outbox};
//! # async fn past(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = client.transaction().await?;
//! let savepoint = tx.transaction().await?;
//! outbox::publish_raw(&tx, RawEvent::new("a", "text/plain", "")).await?;
//! savepoint.rollback().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # PgBouncer
//! The statements have no name and take one round trip each, so this works behind PgBouncer in transaction mode as it
//! is. [`set_pooled`](crate::set_pooled) changes nothing here.

use ::tokio_postgres::types::{Json, ToSql, Type};
use ::tokio_postgres::{Error, Transaction};

use crate::check::{self, NewEvent};
use crate::error::{PublishError, PublishErrorKind, Refusal, tells_of_stale_plan};
use crate::event::{Event, EventId};
use crate::insert::{Columns, MANY, ONE, admitted, statements, written};
use crate::raw::RawEvent;

/// Writes one event in the caller's transaction. Its payload is the event's JSON.
///
/// # Errors
/// [`PublishErrorKind::Invalid`] when the event is refused; then nothing was written and the transaction is still
/// usable. Any other kind when PostgreSQL refused the statement; then the transaction can only be rolled back.
pub async fn publish<E: Event>(tx: &Transaction<'_>, event: &E) -> Result<EventId, PublishError> {
    publish_raw(tx, RawEvent::of(event)?).await
}

/// Writes any number of events of one type in the caller's transaction, in their order and in one statement (a further
/// one for each 64 MiB of payload). Without events it does nothing.
///
/// # Errors
/// As [`publish`]; when one event is refused, none is written.
pub async fn publish_all<'e, E: Event>(
    tx: &Transaction<'_>,
    events: impl IntoIterator<Item = &'e E>,
) -> Result<Vec<EventId>, PublishError> {
    write(tx, &admitted(events)?).await
}

/// Writes one event whose bytes, content type, headers or id the caller chose.
///
/// # Errors
/// As [`publish`], and [`PublishErrorKind::Duplicate`] when an event with the caller's id is in the outbox.
pub async fn publish_raw(tx: &Transaction<'_>, event: RawEvent) -> Result<EventId, PublishError> {
    let event = check::admit(event)?;
    write(tx, std::slice::from_ref(&event)).await?;
    Ok(event.event_id.into())
}

async fn write(tx: &Transaction<'_>, events: &[NewEvent]) -> Result<Vec<EventId>, PublishError> {
    if let Some(first) = events.first() {
        insert(tx, events).await.map_err(|error| failed(&first.event_type, error))?;
    }
    Ok(written(events))
}

async fn insert(tx: &Transaction<'_>, events: &[NewEvent]) -> Result<(), Error> {
    if let [event] = events {
        return insert_one(tx, event).await;
    }
    for events in statements(events) {
        insert_many(tx, events).await?;
    }
    Ok(())
}

async fn insert_one(tx: &Transaction<'_>, event: &NewEvent) -> Result<(), Error> {
    let parameters: [(&(dyn ToSql + Sync), Type); 7] = [
        (&event.event_id, Type::UUID),
        (&event.event_type, Type::TEXT),
        (&event.version, Type::INT4),
        (&event.key, Type::TEXT),
        (&Json(&event.headers), Type::JSONB),
        (&event.payload, Type::BYTEA),
        (&event.content_type, Type::TEXT),
    ];
    tx.query_typed(ONE.sql(), &parameters).await?;
    Ok(())
}

async fn insert_many(tx: &Transaction<'_>, events: &[NewEvent]) -> Result<(), Error> {
    let Columns { event_ids, types, versions, keys, headers, payloads, content_types } = Columns::of(events);
    let headers: Vec<_> = headers.into_iter().map(Json).collect();
    let parameters: [(&(dyn ToSql + Sync), Type); 7] = [
        (&event_ids, Type::UUID_ARRAY),
        (&types, Type::TEXT_ARRAY),
        (&versions, Type::INT4_ARRAY),
        (&keys, Type::TEXT_ARRAY),
        (&headers, Type::JSONB_ARRAY),
        (&payloads, Type::BYTEA_ARRAY),
        (&content_types, Type::TEXT_ARRAY),
    ];
    tx.query_typed(MANY.sql(), &parameters).await?;
    Ok(())
}

fn failed(event_type: &str, error: Error) -> PublishError {
    match error.as_db_error() {
        Some(error) => PublishError::refused(
            event_type,
            &Refusal {
                code: error.code().code(),
                message: error.message(),
                constraint: error.constraint(),
                stale_plan: tells_of_stale_plan(error.code().code(), error.routine()),
            },
        ),
        // The parameters fit their types, so what is left is the way to the server.
        None => PublishError::driver(event_type, PublishErrorKind::Unavailable, error),
    }
}
