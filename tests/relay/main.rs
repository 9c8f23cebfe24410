//! From the outbox to the stream.

mod batches;
mod faults;
mod latency;
mod operations;
mod questions;
mod refusals;
mod replicas;
mod restore;
mod rewind;
mod shared;
mod stream;
#[path = "../support/mod.rs"]
mod support;
