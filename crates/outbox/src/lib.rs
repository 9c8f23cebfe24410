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
//! # Another schema
//! Where the outbox is in another schema than `aftercommit`, call [`set_schema`] once.
//!
//! # PgBouncer
//! Behind PgBouncer in transaction mode call [`set_pooled`] once, unless it tracks prepared statements. What that
//! changes differs by driver.
//!
//! # Drivers
//! The functions here take transactions of sqlx 0.9. Each other driver has the same functions in a module of its own,
//! behind a feature; several may be on together. What is checked, what is written and what an error tells are the same.
//!
//! | Feature and module | Publishes in | Behind PgBouncer in transaction mode |
//! |---|---|---|
//! | `sqlx09`, on by default | `&mut Transaction` of sqlx 0.9 | works after [`set_pooled`] |
//! | `sqlx08` | `&mut Transaction` of sqlx 0.8 | works after [`set_pooled`] |
//! | `tokio-postgres` | `&Transaction` of tokio-postgres 0.7, deadpool-postgres included | works |
//! | `diesel` | any connection of diesel 2.3 to PostgreSQL, in a transaction | works after [`set_pooled`] |
//! | `diesel-async` | `&mut AsyncPgConnection` of diesel-async 0.9, in a transaction | works after [`set_pooled`] |
//! | `sea-orm` | `&DatabaseTransaction` of SeaORM 2 | only where PgBouncer tracks prepared statements |
//!
//! An event type whose JSON is only read elsewhere needs no [`Event`]: see [`RawEvent::json`].

#![warn(clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "diesel")]
#[path = "adapters/diesel.rs"]
pub mod diesel;
#[cfg(feature = "diesel-async")]
#[path = "adapters/diesel_async.rs"]
pub mod diesel_async;
#[cfg(any(feature = "diesel", feature = "diesel-async"))]
#[path = "adapters/diesel_insert.rs"]
mod diesel_insert;
#[cfg(feature = "sea-orm")]
#[path = "adapters/sea_orm.rs"]
pub mod sea_orm;
#[cfg(feature = "sqlx08")]
#[path = "adapters/sqlx08.rs"]
pub mod sqlx08;
#[cfg(feature = "sqlx09")]
#[path = "adapters/sqlx09.rs"]
pub mod sqlx09;
#[cfg(any(feature = "sqlx08", feature = "sqlx09"))]
#[path = "adapters/sqlx.rs"]
mod sqlx_versions;
#[cfg(feature = "tokio-postgres")]
#[path = "adapters/tokio_postgres.rs"]
pub mod tokio_postgres;

pub mod check;
#[cfg_attr(
    not(any(
        feature = "diesel",
        feature = "diesel-async",
        feature = "sea-orm",
        feature = "sqlx08",
        feature = "sqlx09",
        feature = "tokio-postgres"
    )),
    allow(dead_code)
)]
mod error;
pub mod event;
#[cfg(any(
    feature = "diesel",
    feature = "diesel-async",
    feature = "sea-orm",
    feature = "sqlx08",
    feature = "sqlx09",
    feature = "tokio-postgres"
))]
mod insert;
mod json;
mod publisher;
mod raw;
pub mod schema;
pub mod sqlstate;
pub mod subject;
mod trace;

use std::sync::atomic::{AtomicBool, Ordering};

pub use check::{MAX_CONTENT_TYPE_BYTES, MAX_HEADERS_BYTES, MAX_KEY_BYTES, MAX_PAYLOAD_BYTES, TOMBSTONE};
pub use error::{PublishError, PublishErrorKind};
pub use event::{Event, EventId};
pub use publisher::Publisher;
pub use raw::RawEvent;
pub use schema::set_schema;
#[cfg(feature = "sqlx09")]
pub use sqlx09::{publish, publish_all, publish_raw};
pub use trace::{TRACEPARENT, TRACESTATE, TraceContext, is_traceparent, set_traceparent_source};

/// Whether connections go through a pooler.
static POOLED: AtomicBool = AtomicBool::new(false);

/// Tells, for the whole process, whether a pooler in transaction mode stands between it and PostgreSQL. Events are then
/// written with prepared statements that have no name and take one round trip more, because a name would collide with
/// that of another client. PgBouncer from 1.21 on keeps names apart itself (`max_prepared_statements`, which must be
/// set there before 1.24) and does not need this. Defaults to false.
///
/// That is so for sqlx and diesel. diesel-async cannot do without names, but keeps none; tokio-postgres needs no call,
/// and SeaORM none helps: see [Drivers](self#drivers).
pub fn set_pooled(pooled: bool) {
    POOLED.store(pooled, Ordering::Relaxed);
}

#[cfg(any(feature = "diesel", feature = "diesel-async", feature = "sqlx08", feature = "sqlx09"))]
fn is_pooled() -> bool {
    POOLED.load(Ordering::Relaxed)
}
