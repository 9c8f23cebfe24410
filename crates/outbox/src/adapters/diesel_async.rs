//! Publishing with diesel-async 0.9.
//!
//! ```no_run
//! use aftercommit_outbox::diesel_async as outbox;
//! # use aftercommit_outbox::Event;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//! use diesel_async::{AsyncConnection, AsyncPgConnection};
//!
//! # async fn place(connection: &mut AsyncPgConnection) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! connection
//!     .transaction(async |connection| {
//!         outbox::publish(connection, &OrderPlaced { order: 7 }).await?;
//!         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
//!     })
//!     .await
//! # }
//! ```
//!
//! A connection out of a pool is passed as `&mut *connection`, or as it is where it is known to be one.
//!
//! # Transactions
//! diesel has no type for a transaction, so it is at run time that a publish without one is refused: with
//! [`Invalid`](crate::PublishErrorKind::Invalid), the field `transaction`, and before anything is sent. What counts is
//! whether diesel has begun one; `begin` as a statement of one's own does not.
//!
//! # What its errors tell
//! diesel keeps PostgreSQL's error codes to itself. Where it has no kind of its own for an error, which is so for
//! deadlocks, lock timeouts, missing tables and grants, the error is known by its message, if that is in English. Where
//! `lc_messages` of the server is another language, these are [`Database`](crate::PublishErrorKind::Database) without a
//! hint, and what the message puts in quotes is left out.
//!
//! # PgBouncer
//! diesel-async gives every prepared statement a name. After [`set_pooled`](crate::set_pooled) that of a publish is
//! gone when the publish is done, which is within the transaction and so on one session of the server; otherwise it is
//! kept for the next time. For the same to hold of the application's own statements, its connections must keep none
//! either: `set_prepared_statement_cache_size(CacheSize::Disabled)`.

use std::num::NonZeroU32;

use ::diesel::QueryResult;
use ::diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, TransactionManager};

use crate::check::{self, NewEvent};
use crate::diesel_insert::{InsertMany, InsertOne, failed, within};
use crate::error::PublishError;
use crate::event::{Event, EventId};
use crate::insert::{admitted, statements, written};
use crate::is_pooled;
use crate::raw::RawEvent;

/// Writes one event in the transaction that is open on this connection. Its payload is the event's JSON.
///
/// # Errors
/// [`Invalid`](crate::PublishErrorKind::Invalid) when the event is refused; then nothing was written and the transaction
/// is still usable; also when no transaction is open. Any other kind when PostgreSQL refused the statement; then the
/// transaction can only be rolled back.
pub async fn publish<E: Event>(connection: &mut AsyncPgConnection, event: &E) -> Result<EventId, PublishError> {
    publish_raw(connection, RawEvent::of(event)?).await
}

/// Writes any number of events of one type in the transaction that is open on this connection, in their order and in
/// one statement (a further one for each 64 MiB of payload). Without events it does nothing.
///
/// # Errors
/// As [`publish`]; when one event is refused, none is written.
pub async fn publish_all<'e, E: Event>(
    connection: &mut AsyncPgConnection,
    events: impl IntoIterator<Item = &'e E>,
) -> Result<Vec<EventId>, PublishError> {
    write(connection, &admitted(events)?).await
}

/// Writes one event whose bytes, content type, headers or id the caller chose.
///
/// # Errors
/// As [`publish`], and [`Duplicate`](crate::PublishErrorKind::Duplicate) when an event with the caller's id is in the
/// outbox.
pub async fn publish_raw(connection: &mut AsyncPgConnection, event: RawEvent) -> Result<EventId, PublishError> {
    let event = check::admit(event)?;
    write(connection, std::slice::from_ref(&event)).await?;
    Ok(event.event_id.into())
}

async fn write(connection: &mut AsyncPgConnection, events: &[NewEvent]) -> Result<Vec<EventId>, PublishError> {
    if let Some(NewEvent { event_type, .. }) = events.first() {
        within(depth(connection), event_type)?;
        insert(connection, events).await.map_err(|error| failed(event_type, error))?;
    }
    Ok(written(events))
}

/// How many transactions are open, one within the other. It asks diesel, not the server.
fn depth(connection: &mut AsyncPgConnection) -> QueryResult<Option<NonZeroU32>> {
    type Transactions = <AsyncPgConnection as AsyncConnection>::TransactionManager;
    Transactions::transaction_manager_status_mut(connection).transaction_depth()
}

async fn insert(connection: &mut AsyncPgConnection, events: &[NewEvent]) -> QueryResult<()> {
    if let [event] = events {
        InsertOne::of(event, is_pooled()).execute(connection).await?;
        return Ok(());
    }
    for events in statements(events) {
        InsertMany::of(events, is_pooled()).execute(connection).await?;
    }
    Ok(())
}
