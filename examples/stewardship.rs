//! Derived state that events keep up to date and a reconciler keeps right.
//!
//! Stewards of a system become stewards of every monitor that watches one of its connections and inherits; what each
//! user may see (`client.monitors`) is derived from that in turn. Five events tell of everything that matters. Their
//! handlers and the reconciler share one function, which looks at the state as it is now and writes the difference, so
//! it does not matter which of them comes first, twice, late or never.
//!
//! `cargo run --features testing --example stewardship -- all-modes` shows it, on servers that it starts for itself.

#[path = "stewardship/derived.rs"]
pub(crate) mod derived;
#[path = "stewardship/events.rs"]
pub(crate) mod events;
#[path = "stewardship/modes.rs"]
pub(crate) mod modes;
#[path = "stewardship/repository.rs"]
pub(crate) mod repository;
#[path = "stewardship/stage.rs"]
pub(crate) mod stage;

use std::process::ExitCode;

/// Any error.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    modes::show(&wanted).await
}
