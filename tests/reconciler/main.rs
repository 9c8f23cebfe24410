//! What was lost all the same is found and repaired.

mod consumer;
mod inbox;
mod liars;
mod outbox;
mod outbox_races;
mod runner;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;
