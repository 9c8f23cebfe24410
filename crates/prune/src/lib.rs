//! Pruning: finished rows go, with what refers to them, in bounded transactions, and events tell it.
//!
//! A [`Spec`] says once which rows of a table are finished and what goes with them. [`Prune`] deletes a batch of them in the
//! caller's transaction, all or nothing; [`Pruner`] does it periodically for what a [`PruneConfig`] or a `prune.toml` says.
//! Subscribers learn of it by [`RowsPruned`] events, written in the transaction that deleted the rows.
//!
//! Aftercommit removes its own old rows by the same [sweeps](sweep::Sweeper): see [`own`].
//!
//! It never runs VACUUM: autovacuum does that.
#![warn(clippy::unwrap_used, clippy::expect_used)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod condition;
mod error;
mod event;
pub mod file;
pub mod own;
mod policy;
mod pruner;
mod run;
mod spec;
mod sql;
pub mod sweep;

pub use aftercommit_core::postgres::sweep::{SweepResult, SweepStatus};
pub use condition::Condition;
pub use condition::check_expression;
pub use error::{PruneError, PruneErrorKind};
pub use event::RowsPruned;
pub use policy::Policy;
pub use pruner::{PruneConfig, Pruner, PrunerMonitor, status};
pub use run::{Plan, Prune, Pruned};
pub use spec::{Association, Child, MAX_LIMIT, Spec};
pub use sql::table::Table;
pub use sweep::{Pace, Swept};
