//! Writing events into the outbox, inside the transaction that makes them true.
//!
//! [`publish`] takes the caller's open transaction, so the event commits or rolls back with the change that it tells
//! of, savepoints included. After the commit there is no transaction left to pass, so a late publish does not compile.
//!
//! ```no_run
//! # use aftercommit::{Event, outbox};
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64, cents: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//! # async fn place(pool: &sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = pool.begin().await?;
//! sqlx::query("insert into orders (id, cents) values ($1, $2)").bind(7_i64).bind(990_i64).execute(&mut *tx).await?;
//! outbox::publish(&mut tx, &OrderPlaced { order: 7, cents: 990 }).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Neither does a publish without a transaction, or past an open savepoint. The first of these compiles, the others
//! differ from it in one thing each:
//!
//! ```no_run
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! let mut tx = pool.begin().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! let mut tx = pool.begin().await?;
//! tx.commit().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! let mut tx = pool.begin().await?;
//! tx.rollback().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0308
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! outbox::publish_raw(&pool, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0308
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! let mut connection = pool.acquire().await?;
//! outbox::publish_raw(&mut connection, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0499
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! # use aftercommit::outbox::{self, RawEvent};
//! use sqlx::Connection;
//! let mut tx = pool.begin().await?;
//! let savepoint = tx.begin().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! savepoint.rollback().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is refused
//! An event that could not be published or read later is refused before anything is written: see
//! [`PublishErrorKind::Invalid`]. The transaction stays usable.
//!
//! # Order
//! Events of one transaction keep their order. Events of one key keep the commit order of their transactions when each
//! of them locks the key's row (usually by updating it) before it publishes.
//!
//! # Rights
//! The database role needs `usage` on the schema `aftercommit` and `insert` on seven columns of its `outbox`; see
//! `docs/sql-contract.md`.

//!
//! # PgBouncer
//! Behind PgBouncer in transaction mode call [`set_pooled`] once, unless it tracks prepared statements.

mod check;
mod error;
mod json;
mod publisher;
mod raw;
mod trace;

use std::sync::atomic::{AtomicBool, Ordering};

use sqlx::PgTransaction;

use crate::event::{Event, EventId};
use crate::postgres::outbox::NewEvent;

#[cfg(all(feature = "testing", feature = "cli"))]
pub(crate) use check::admit;
pub(crate) use check::headers_are_legal;
pub use check::{MAX_CONTENT_TYPE_BYTES, MAX_HEADERS_BYTES, MAX_KEY_BYTES, MAX_PAYLOAD_BYTES};
pub use error::{PublishError, PublishErrorKind};
pub use publisher::Publisher;
pub use raw::RawEvent;
pub use trace::set_traceparent_source;

/// Whether connections go through a pooler.
static POOLED: AtomicBool = AtomicBool::new(false);

/// Tells, for the whole process, whether a pooler in transaction mode stands between it and PostgreSQL. Events are then
/// written with a prepared statement that has no name and takes one round trip more, because a name would collide with
/// that of another client. PgBouncer from 1.21 on keeps names apart itself (`max_prepared_statements`, which must be set
/// there before 1.24) and does not need this. Defaults to false.
pub fn set_pooled(pooled: bool) {
    POOLED.store(pooled, Ordering::Relaxed);
}

/// Writes one event in the caller's transaction. Its payload is the event's JSON.
///
/// # Errors
/// [`PublishErrorKind::Invalid`] when the event is refused; then nothing was written and the transaction is still
/// usable. Any other kind when PostgreSQL refused the statement; then the transaction can only be rolled back.
pub async fn publish<E: Event>(tx: &mut PgTransaction<'_>, event: &E) -> Result<EventId, PublishError> {
    publish_raw(tx, RawEvent::of(event)?).await
}

/// Writes any number of events of one type in the caller's transaction, in their order and in one statement (a further
/// one for each 64 MiB of payload). Without events it does nothing.
///
/// # Errors
/// As [`publish`]; when one event is refused, none is written.
pub async fn publish_all<'e, E: Event>(
    tx: &mut PgTransaction<'_>,
    events: impl IntoIterator<Item = &'e E>,
) -> Result<Vec<EventId>, PublishError> {
    let events =
        events.into_iter().map(|event| check::admit(RawEvent::of(event)?)).collect::<Result<Vec<_>, PublishError>>()?;
    write(tx, POOLED.load(Ordering::Relaxed), &events).await?;
    Ok(events.iter().map(|event| event.event_id.into()).collect())
}

/// Writes one event whose bytes, content type, headers or id the caller chose.
///
/// # Errors
/// As [`publish`], and [`PublishErrorKind::Duplicate`] when an event with the caller's id is in the outbox.
pub async fn publish_raw(tx: &mut PgTransaction<'_>, event: RawEvent) -> Result<EventId, PublishError> {
    publish_through(POOLED.load(Ordering::Relaxed), tx, event).await
}

/// [`publish_raw`], where it is known how this transaction's connection goes.
pub(crate) async fn publish_through(
    pooled: bool,
    tx: &mut PgTransaction<'_>,
    event: RawEvent,
) -> Result<EventId, PublishError> {
    let event = check::admit(event)?;
    write(tx, pooled, std::slice::from_ref(&event)).await?;
    Ok(event.event_id.into())
}

async fn write(tx: &mut PgTransaction<'_>, pooled: bool, events: &[NewEvent]) -> Result<(), PublishError> {
    let Some(first) = events.first() else { return Ok(()) };
    crate::postgres::outbox::insert(tx, pooled, events)
        .await
        .map_err(|error| PublishError::database(&first.event_type, error))?;
    for event in events {
        tracing::debug!(event_id = %event.event_id, event_type = event.event_type, "event written to the outbox");
    }
    Ok(())
}
