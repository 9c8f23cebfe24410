//! What is logged and traced. These tests share the one log of their process.

mod events;
mod log;
mod outbox;
mod programs;
mod reconciler;
#[path = "../support/mod.rs"]
mod support;
mod worker;
