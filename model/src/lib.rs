//! The relay's and the worker's protocols as models, checked exhaustively within the bounds of a scope: every
//! interleaving, every fault at every step. `docs/model.md` says what is modelled and what is not.

pub mod inbox;
pub mod jobs;
pub mod relay;
pub mod rewound;

// The product's own code, so that the marks that are checked are those that run.
#[allow(dead_code)]
#[path = "../../crates/core/src/postgres/snapshot.rs"]
mod snapshot;
