//! Publishing with diesel 2.3, on connections that wait: `PgConnection`, those of a pool, and any other to PostgreSQL.
//!
//! ```no_run
//! use aftercommit_outbox::diesel as outbox;
//! # use aftercommit_outbox::Event;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//! use diesel::Connection;
//!
//! # fn place(connection: &mut impl Connection<Backend = diesel::pg::Pg>) -> Result<(), Box<dyn std::error::Error>> {
//! connection.transaction(|connection| {
//!     outbox::publish(connection, &OrderPlaced { order: 7 })?;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! This crate does not link libpq; the application does, with diesel's feature `postgres`.
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
//! After [`set_pooled`](crate::set_pooled) its statements have no name, which works behind PgBouncer in transaction
//! mode. For the same to hold of the application's own statements, its connections must keep none:
//! `set_prepared_statement_cache_size(CacheSize::Disabled)`.

use ::diesel::connection::TransactionManager;
use ::diesel::pg::Pg;
use ::diesel::{Connection, QueryResult, RunQueryDsl};

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
pub fn publish<C: Connection<Backend = Pg>, E: Event>(connection: &mut C, event: &E) -> Result<EventId, PublishError> {
    publish_raw(connection, RawEvent::of(event)?)
}

/// Writes any number of events of one type in the transaction that is open on this connection, in their order and in
/// one statement (a further one for each 64 MiB of payload). Without events it does nothing.
///
/// # Errors
/// As [`publish`]; when one event is refused, none is written.
pub fn publish_all<'e, C: Connection<Backend = Pg>, E: Event>(
    connection: &mut C,
    events: impl IntoIterator<Item = &'e E>,
) -> Result<Vec<EventId>, PublishError> {
    write(connection, &admitted(events)?)
}

/// Writes one event whose bytes, content type, headers or id the caller chose.
///
/// # Errors
/// As [`publish`], and [`Duplicate`](crate::PublishErrorKind::Duplicate) when an event with the caller's id is in the
/// outbox.
pub fn publish_raw<C: Connection<Backend = Pg>>(connection: &mut C, event: RawEvent) -> Result<EventId, PublishError> {
    let event = check::admit(event)?;
    write(connection, std::slice::from_ref(&event))?;
    Ok(event.event_id.into())
}

fn write<C: Connection<Backend = Pg>>(connection: &mut C, events: &[NewEvent]) -> Result<Vec<EventId>, PublishError> {
    if let Some(NewEvent { event_type, .. }) = events.first() {
        // It asks diesel, not the server.
        let depth = C::TransactionManager::transaction_manager_status_mut(connection).transaction_depth();
        within(depth, event_type)?;
        insert(connection, events).map_err(|error| failed(event_type, error))?;
    }
    Ok(written(events))
}

fn insert<C: Connection<Backend = Pg>>(connection: &mut C, events: &[NewEvent]) -> QueryResult<()> {
    if let [event] = events {
        InsertOne::of(event, is_pooled()).execute(connection)?;
        return Ok(());
    }
    for events in statements(events) {
        InsertMany::of(events, is_pooled()).execute(connection)?;
    }
    Ok(())
}
