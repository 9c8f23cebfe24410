//! What was lost all the same is found and repaired.

mod consumer;
mod inbox;
mod liars;
mod order;
mod outbox;
mod outbox_races;
mod runner;
mod scenarios;
mod start;
#[path = "../support/mod.rs"]
mod support;
