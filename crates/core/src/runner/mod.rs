//! Looks again and again whether everything is as it should be, and puts right what is not.
//!
//! A reconciler has a name, an interval and a database in which its runs and findings are recorded. Of any number of
//! processes with the same reconciler one runs it per interval, by the database's clock. A run that failed is tried
//! again sooner, after a growing wait, and does not use up the interval; a run whose process died is closed as failed by
//! the next, which goes on where it was. Runs on demand do not wait for the interval.
//!
//! A service writes its own with [`Reconciler`], for state that it derives from other state, and runs them with
//! [`Runner`].

mod due;
mod execute;
mod item;
pub mod job;
mod monitor;

use std::fmt;
use std::time::Duration;

pub use due::Runner;
pub use due::{Definition, check};
pub use item::{Drift, ItemError, Reconciler};
pub use monitor::{JOBS, Monitor};

/// What a run does about what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It writes it down.
    Report,
    /// It puts it right, too.
    Repair,
}

impl Mode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Repair => "repair",
        }
    }
}

/// What a run looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// What the runs before have not looked at. A [`Reconciler`] goes on with a sweep that was broken off, or begins one.
    New,
    /// Everything, from the beginning.
    Full,
    /// These items. Such a run goes beside others.
    Keys(Vec<String>),
}

impl Scope {
    fn as_str(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Full => "full",
            Self::Keys(_) => "keys",
        }
    }
}

/// What came of a run. Printed it is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// The reconciler.
    pub reconciler: String,
    /// The run's row in `aftercommit.reconcile_run`; none when nothing was run.
    pub run: Option<i64>,
    /// How it ended.
    pub outcome: Outcome,
    /// How many items it looked at.
    pub scanned: u64,
    /// How many differences it found.
    pub found: u64,
    /// How many of them it repaired, or queued the repair of.
    pub repaired: u64,
    /// How many items failed.
    pub failed: u64,
    /// The first 100 of them.
    pub failures: Vec<Failure>,
    /// How long it took.
    pub took: Duration,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It came to its end. Single items may have failed.
    Ran,
    /// Nothing was run, for this reason.
    Skipped(String),
    /// It broke off, or every item failed.
    Failed(String),
    /// It was stopped together with its process; the next one goes on where it was.
    Stopped,
}

/// An item that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its key.
    pub item: String,
    /// Why.
    pub reason: String,
}

impl Summary {
    fn skipped(reconciler: &str, reason: String) -> Self {
        Self {
            reconciler: reconciler.into(),
            run: None,
            outcome: Outcome::Skipped(reason),
            scanned: 0,
            found: 0,
            repaired: 0,
            failed: 0,
            failures: Vec::new(),
            took: Duration::ZERO,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (result, reason) = match &self.outcome {
            Outcome::Ran => ("ran", None),
            Outcome::Skipped(reason) => ("skipped", Some(reason)),
            Outcome::Failed(reason) => ("failed", Some(reason)),
            Outcome::Stopped => ("stopped", None),
        };
        write!(f, "reconciler={} result={result}", self.reconciler)?;
        if self.run.is_some() {
            let Self { scanned, found, repaired, failed, .. } = self;
            write!(f, " scanned={scanned} found={found} repaired={repaired} failed={failed}")?;
        }
        reason.map_or(Ok(()), |reason| write!(f, ": {reason}"))
    }
}
