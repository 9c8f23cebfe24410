//! Publishing with sqlx 0.8.
//!
//! ```no_run
//! use aftercommit_outbox::sqlx08 as outbox;
//! # use aftercommit_outbox::Event;
//! # use sqlx08 as sqlx;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//!
//! # async fn place(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = pool.begin().await?;
//! outbox::publish(&mut tx, &OrderPlaced { order: 7 }).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Neither a late publish compiles, nor one without a transaction, nor one past an open savepoint. The first of these
//! compiles, the others differ from it in one thing each:
//!
//! ```no_run
//! # use aftercommit_outbox::{RawEvent, sqlx08 as outbox};
//! # use sqlx08 as sqlx;
//! # async fn in_time(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = pool.begin().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # use aftercommit_outbox::{RawEvent, sqlx08 as outbox};
//! # use sqlx08 as sqlx;
//! # async fn late(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = pool.begin().await?;
//! tx.commit().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0308
//! # use aftercommit_outbox::{RawEvent, sqlx08 as outbox};
//! # use sqlx08 as sqlx;
//! # async fn bare(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut connection = pool.acquire().await?;
//! outbox::publish_raw(&mut connection, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0499
//! # use aftercommit_outbox::{RawEvent, sqlx08 as outbox};
//! # use sqlx08 as sqlx;
//! # async fn past(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! use sqlx::Connection;
//! let mut tx = pool.begin().await?;
//! let savepoint = tx.begin().await?;
//! outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await?;
//! savepoint.rollback().await?;
//! # Ok(())
//! # }
//! ```
//!
//! After [`set_pooled`](crate::set_pooled) its statements have no name, which works behind PgBouncer in transaction
//! mode.

crate::sqlx_versions::adapter!(sqlx08);
