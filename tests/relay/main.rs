//! From the outbox to the stream.

mod batches;
mod faults;
mod ids;
mod latency;
mod operations;
mod parking;
mod plans;
mod questions;
mod refusals;
mod replicas;
mod restore;
mod rewind;
mod room;
mod settings;
mod shared;
mod strangers;
mod stream;
#[path = "../support/mod.rs"]
mod support;
