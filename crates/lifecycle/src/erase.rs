//! Erasing a tenant or a person in every service: one request, an answer of each, and a proof.
//!
//! An erasure is a [job](crate::fanout): the requester asks ([`Request`]), each service erases in its own database and answers in the
//! transaction of the work ([`participant`]), and the requester's [`Coordinator`] writes the answers down. When all have answered that
//! it is done, it asks them to look once more ([`Act::Verify`]); only when nobody has found a row that stays, the job ends as
//! `completed`, and [`Verified`] says so.
//!
//! A service has an [`Eraser`]. For rows of tables it needs no code: [`Tables`].

mod catalogue;
mod coordinator;
mod eraser;
mod events;
pub mod file;
pub mod forget;
pub mod operate;
mod plan;
mod request;
#[cfg(feature = "seal")]
mod seal;
mod sweep;
mod tables;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fanout::{self, Kind};

pub use coordinator::{Coordinator, Left, Verified};
pub use eraser::{Eraser, Erasing, Preview, participant};
pub use events::Events;
pub use request::{Asked, Request};
#[cfg(feature = "seal")]
pub use seal::{MasterKey, Opened, SEALED_CONTENT_TYPE, SealError, SealErrorKind, Sealed, Sealer};
pub use tables::{Rows, Tables};

/// Whose data is meant. It travels in events and stays on record, so it has no name and nothing else of a person: an id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// What it is, such as `tenant` or `person`.
    pub kind: String,
    /// Its id, as PostgreSQL writes it as text.
    pub id: String,
}

impl Subject {
    /// The subject of a kind with an id.
    pub fn new(kind: impl Into<String>, id: impl ToString) -> Self {
        Self { kind: kind.into(), id: id.to_string() }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.id)
    }
}

/// How long who does not answer is asked again for a preview.
const PREVIEW: Duration = Duration::from_secs(3600);

/// What participants do about a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// They count what they would delete, and change nothing.
    Preview,
    /// They erase.
    Erase,
    /// They look whether something is left, sweep rows that came late, and look again.
    Verify,
}

/// What participants are asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Whose data.
    pub subject: Subject,
    /// What is done about it.
    pub act: Act,
}

/// The [kind](Kind) of all jobs about a subject. On record, as `aftercommit job list` shows them, they are `erasure.preview`,
/// `erasure` and `erasure.verification`.
#[derive(Debug)]
pub struct Erasure;

impl Kind for Erasure {
    const NAME: &'static str = "erasure";
    const REQUESTED: &'static str = "erasure.requested";
    const OUTCOME: &'static str = "erasure.outcome";
    const ENDED: &'static str = "erasure.ended";
    type Request = Task;

    fn name_of(task: &Task) -> &'static str {
        match task.act {
            Act::Preview => "erasure.preview",
            Act::Erase => Self::NAME,
            Act::Verify => "erasure.verification",
        }
    }

    fn asks_again(task: &Task, age: Duration) -> bool {
        // Nobody waits for it any more.
        task.act != Act::Preview || age < PREVIEW
    }

    fn is_audited(task: &Task) -> bool {
        task.act != Act::Preview
    }
}

/// The event that asks participants: `Subscriber::new("orders-erasures").on::<erase::Requested>(…)`.
pub type Requested = fanout::Requested<Erasure>;

/// The event by which a participant answers: `Subscriber::new("erasures").on::<erase::Outcome>(…)`.
pub type Outcome = fanout::Outcome<Erasure>;

/// The event that tells the end of a job.
pub type Ended = fanout::Ended<Erasure>;

/// Asks participants again that do not answer.
pub type Overdue = fanout::Overdue<Erasure>;
