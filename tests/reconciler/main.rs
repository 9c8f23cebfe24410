//! What was lost all the same is found and repaired.

mod consumer;
mod inbox;
mod liars;
mod outbox;
mod runner;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;
