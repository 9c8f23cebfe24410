//! From the stream to the effect.

mod crashes;
mod doubt;
mod failures;
mod handover;
mod http;
mod instances;
mod many;
mod memory;
mod once;
mod operations;
mod order;
mod outages;
mod owner;
mod pause;
mod poison;
mod policies;
mod pruning;
mod readiness;
mod reconcilers;
mod redrive;
mod registry;
mod session_state;
mod soak;
mod subscribers;
#[path = "../support/mod.rs"]
mod support;
mod takeover;
mod unreadable;
mod waits;
