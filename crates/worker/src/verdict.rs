//! What became of a batch, and of each of its events.

use std::time::Duration;

use aftercommit_core::postgres::attempt::Record;

use super::loss::Loss;
use super::pace::Ran;
use super::scheduler::EventPlace;

/// How much of an error is logged: the whole of it is in the database, and an event may fail many times.
pub(super) const LOGGED: usize = 500;

/// What became of an event.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// The event is handled, now or by an earlier run.
    Done,
    /// The event was given up: it is a dead letter, for this reason.
    Dead(String),
    /// An attempt failed. The event runs again after this time.
    Failed(Duration),
    /// The handler snoozed the event. It runs again after this time.
    Later(Duration),
    /// The event may be at fault. It runs again after this time, alone.
    Suspect(Duration),
    /// Redriven events of its key come first, and the dispatcher does not know them yet.
    Held,
    /// A service that the handler needs is not available.
    Interrupted {
        reason: String,
        /// When to try again, if the handler said so.
        wait: OutageWait,
    },
    /// Nothing was decided: the event runs again.
    NotRun,
}

/// How long to wait for the end of an outage.
#[derive(Debug, PartialEq)]
pub(super) enum OutageWait {
    /// Soon, and again and again, as with the servers that the worker itself needs.
    Soon,
    Exactly(Duration),
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct BatchReport {
    pub(super) verdicts: Vec<(EventPlace, Verdict)>,
    /// The subscriber's database, or where it sends all of its events, is not available, for this reason.
    pub(super) outage: Option<String>,
    /// Another instance has taken over.
    pub(super) fenced: bool,
    /// How long the last transaction took that no outage prevented.
    pub(super) ran: Option<Ran>,
    /// The records of events in the database, where they have changed.
    pub(super) records: Vec<(EventPlace, Record)>,
    /// Sessions that were lost while events ran. The database did not answer what became of them: their events have no verdict.
    pub(super) losses: Vec<Loss>,
    /// The numbers of the executors whose losses the database was asked about.
    pub(super) looked_into: Vec<i64>,
    /// Whether the database answered a question about a loss.
    pub(super) answered: bool,
}

impl BatchReport {
    /// Records why the executor stopped in the middle of its batch.
    pub(super) fn halted(&mut self, result: Result<(), Halt>) {
        match result {
            Ok(()) => {}
            Err(Halt::Outage(reason)) => self.outage = Some(format!("the database is not available: {reason}")),
            Err(Halt::Unreachable(reason)) => self.outage = Some(reason),
            Err(Halt::Fenced) => self.fenced = true,
        }
    }
}

/// Why an executor stops in the middle of its batch.
pub(super) enum Halt {
    Outage(String),
    Unreachable(String),
    Fenced,
}
