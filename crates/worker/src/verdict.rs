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
    /// Handled, now or before.
    Done,
    /// Given up.
    Dead(String),
    /// It failed: not before this time has passed.
    Failed(Duration),
    /// It asked for it: not before this time has passed.
    Later(Duration),
    /// It is under suspicion: not before this time has passed, and then alone.
    Suspect(Duration),
    /// Redriven events of its key come first, and are not known here yet.
    Held,
    /// Something that its handler needs is away.
    Interrupted {
        reason: String,
        /// What the handler said of when to try again.
        wait: OutageWait,
    },
    /// It did not come to a decision.
    NotRun,
}

/// How long to wait for the end of an outage.
#[derive(Debug, PartialEq)]
pub(super) enum OutageWait {
    /// As for servers of our own: soon, and again and again.
    Soon,
    Exactly(Duration),
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct BatchReport {
    pub(super) verdicts: Vec<(EventPlace, Verdict)>,
    /// The subscriber's database, or where it sends all of its events, is away, for this reason.
    pub(super) outage: Option<String>,
    /// Another instance has taken over.
    pub(super) fenced: bool,
    /// What the last transaction took that no outage prevented.
    pub(super) ran: Option<Ran>,
    /// What is on record of events now.
    pub(super) records: Vec<(EventPlace, Record)>,
    /// Sessions that ended while events ran, of which the database could not be asked. Their events have no verdict yet.
    pub(super) losses: Vec<Loss>,
    /// The executors of losses of which it was asked.
    pub(super) looked_into: Vec<i64>,
    /// The database has answered a question about a loss.
    pub(super) answered: bool,
}

impl BatchReport {
    /// Takes note of why an executor cannot go on.
    pub(super) fn halted(&mut self, result: Result<(), Halt>) {
        match result {
            Ok(()) => {}
            Err(Halt::Outage(reason)) => self.outage = Some(format!("the database is away: {reason}")),
            Err(Halt::Unreachable(reason)) => self.outage = Some(reason),
            Err(Halt::Fenced) => self.fenced = true,
        }
    }
}

/// The executor cannot go on with its batch.
pub(super) enum Halt {
    Outage(String),
    Unreachable(String),
    Fenced,
}
