//! From the stream to the effect.

mod crashes;
mod failures;
mod http;
mod instances;
mod once;
mod operations;
mod order;
mod outages;
mod pause;
mod poison;
mod policies;
mod pruning;
mod reconcilers;
mod redrive;
mod registry;
mod soak;
mod subscribers;
#[path = "../support/mod.rs"]
mod support;
