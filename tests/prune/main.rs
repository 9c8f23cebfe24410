//! Pruning: finished rows go with what refers to them, and events tell it.

mod batches;
mod events;
mod example;
mod own;
mod plan;
mod sessions;
mod spec;
#[path = "../support/mod.rs"]
mod support;
mod sweeps;
