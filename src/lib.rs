//! A transactional outbox on PostgreSQL and NATS JetStream: what your transaction commits, your subscribers get, once, in
//! order, and provably.
//!
//! | To | Use |
//! |---|---|
//! | publish in your transaction | [`outbox::publish`]; a service that does nothing else depends on the crate `aftercommit-outbox` |
//! | handle events | [`worker::Subscriber`], [`worker::Handler`], [`worker::main`] |
//! | run the relay in your own program | [`relay::Relay`] |
//! | keep derived state right | [`reconciler::Reconciler`], [`reconciler::Runner`] |
//! | delete old rows, with what refers to them | [`prune::Spec`], [`prune::Pruner`] |
//! | know what a delete will take, and tell it | [`hooks::DeleteHooks`], [`hooks::Links`] |
//! | publish the changes of a table, whoever makes them | [`capture::Capture`] |
//! | have several services do their part of one request | [`fanout::Jobs`], [`fanout::Participant`] |
//! | erase a tenant or a person everywhere, with a proof | [`erase::Request`], [`erase::Tables`] |
//! | look and act as an operator does | [`operator`] |
//! | test all of this | `testing`, behind the feature of that name |
//!
//! Features: `cli` (default) are the programs and [`worker::main`]; `console` are pages for operators, `console::Console`; `otlp` has them export traces, metrics and logs; `seal` are events that can be made unreadable; `testing` is the testing kit, for `[dev-dependencies]`.
//!
//! The repository's README has a quickstart, and its folder `docs` the guarantees and how to operate it.
#![warn(clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
mod erasers;
#[cfg(all(feature = "cli", feature = "testing"))]
#[doc(hidden)]
pub mod parsers;
pub mod reconciler;
pub mod relay;
#[cfg(feature = "testing")]
pub mod testing;
pub mod worker;

#[cfg(feature = "console")]
pub use aftercommit_console as console;
pub use aftercommit_core::{Error, ErrorKind};
pub use aftercommit_core::{backoff, config, envelope, health, telemetry};
pub use aftercommit_lifecycle::{capture, erase, fanout, hooks};
pub use aftercommit_operator as operator;
pub use aftercommit_outbox as outbox;
pub use aftercommit_outbox::{Event, EventId};
pub use aftercommit_outbox::{event, subject};
pub use aftercommit_prune as prune;

/// The version of sqlx whose transactions handlers get.
pub use sqlx;

/// The README's code.
#[cfg(all(doctest, feature = "cli"))]
#[doc = include_str!("../README.md")]
struct Readme;
