//! What aftercommit's relay, worker, reconciler and tools share. It is internal: use the crate `aftercommit`, or
//! `aftercommit-outbox` in a service that only publishes.
//!
//! All SQL is below [`postgres`], all of NATS below [`jetstream`]; what both carry, the queries of an outbox, has its SQL and its
//! NATS in files of its own in [`outbox_query`].
#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod backoff;
pub mod config;
pub mod digest;
pub mod envelope;
pub mod error;
pub mod fault;
pub mod health;
pub mod jetstream;
pub mod outbox_query;
pub mod owner;
pub mod postgres;
pub mod relay;
pub mod runner;
pub mod sending;
pub mod subscription;
pub mod telemetry;
pub mod text;
pub mod told;
pub mod trace;

pub use error::{Error, ErrorKind};
