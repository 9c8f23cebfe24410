//! Periodically compares state with its source, records the differences and repairs them.
//!
//! A reconciler has a name, an interval and a database in which its runs and findings are recorded. Of any number of
//! processes with the same reconciler one runs it per interval, by the database's clock. A run that failed is tried
//! again sooner, after a growing wait, and does not use up the interval; a run whose process died is closed as failed by
//! the next, which goes on where it was. Runs on demand do not wait for the interval.
//!
//! A service writes its own with [`Reconciler`], for state that it derives from other state, and runs them with
//! [`Runner`]. The comparisons of aftercommit itself are [`OutboxComparison`], [`ConsumerComparison`] and [`InboxComparison`].

pub use aftercommit_core::runner::{
    Drift, Failure, ItemError, Mode, Monitor, Outcome, Reconciler, Runner, Scope, Summary,
};
pub use aftercommit_core::subscription::Subscription;
pub use aftercommit_reconciler::{ConsumerComparison, InboxComparison, OutboxComparison, with_comparisons};
