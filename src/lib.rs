#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod admin;
pub mod backoff;
#[cfg(feature = "cli")]
pub mod bench;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod envelope;
pub mod event;
pub mod health;
pub mod outbox;
pub mod reconciler;
pub mod relay;
pub mod subject;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod worker;

mod digest;
mod error;
mod fault;
mod jetstream;
mod owner;
mod postgres;
mod text;

pub use error::{Error, ErrorKind};
pub use event::{Event, EventId};

/// The version of sqlx whose transactions handlers get.
pub use sqlx;
