//! What a subscriber's active instance tells of single events, as it stands in `aftercommit.worker_status`: which wait, for
//! what and until when, and which run for long. The worker writes it, `aftercommit status`, `peek` and `explain` read it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::text;
use aftercommit_outbox::event::EventId;

/// How much of a reason and of a key is told.
pub const LENGTH: usize = 200;

/// Why an event waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// An attempt has failed.
    Failing,
    /// Its handler asked to be run later.
    Snoozed,
    /// A service that its handler needs is not available.
    Unavailable,
}

/// An event that waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    /// The event's id.
    pub event_id: EventId,
    /// The event's key, cut to a bounded length; none when it has none.
    pub key: Option<String>,
    /// What it waits for.
    pub why: Why,
    /// Which service is not available; none for a failed attempt, whose error is on record elsewhere.
    pub reason: Option<String>,
    /// How often in a row that has happened; 0 for what is counted elsewhere.
    pub times: u32,
    /// When it is run again, by the worker's clock.
    pub until: DateTime<Utc>,
}

/// Events that run for long in one transaction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// The first of them.
    pub event_id: EventId,
    /// The key of the first of them, cut to a bounded length; none when it has none.
    pub key: Option<String>,
    /// How many they are.
    pub events: usize,
    /// Since when they run, by the worker's clock.
    pub since: DateTime<Utc>,
}

/// What is told of single events.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Told {
    /// Events that wait; a bounded number.
    pub waiting: Vec<Waiting>,
    /// Events that run for long; a bounded number.
    pub running: Vec<Running>,
}

impl Told {
    /// As the database has it; what another version has written is read as far as it is known.
    pub fn read(notes: &Value) -> Self {
        let list = |name: &str| notes.get(name).and_then(Value::as_array).into_iter().flatten();
        let waiting = list("waiting").filter_map(|one| Waiting::deserialize(one).ok()).collect();
        Self { waiting, running: list("running").filter_map(|one| Running::deserialize(one).ok()).collect() }
    }
}

/// A key as notes have it.
pub fn shown_key(key: &str) -> String {
    text::cut(key, LENGTH)
}
