//! What is logged and traced. These tests share the one log of their process.

mod collector;
mod events;
mod fields;
mod log;
mod otlp;
mod outbox;
mod programs;
mod reconciler;
#[path = "../support/mod.rs"]
mod support;
mod worker;
