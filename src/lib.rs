#![doc = include_str!("../README.md")]

pub mod backoff;
pub mod config;
pub mod envelope;
pub mod event;
pub mod subject;
pub mod worker;

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;

mod error;
mod jetstream;
mod postgres;

pub use error::{Error, ErrorKind};
pub use event::{Event, EventId};

/// The version of sqlx whose transactions handlers get.
pub use sqlx;
