//! What happened, as everybody who took part wrote it down: one JSON object per line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What a subscriber shall make of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Fail twice, then succeed.
    Flaky,
    /// Panic once, then succeed.
    Panic,
    /// Take longer than the server waits for an ack.
    Slow,
    /// Come later, once.
    Snooze,
    /// Always fail: it must become a dead letter.
    Poison,
    /// Be refused: it must become a dead letter.
    Reject,
}

impl Act {
    /// Whether the event must end as a dead letter.
    pub fn is_deadly(self) -> bool {
        matches!(self, Self::Poison | Self::Reject)
    }
}

/// What each subscriber, by name, shall make of an event; those that are not named handle it.
pub type Fate = BTreeMap<String, Act>;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum What {
    /// A publisher wrote an event in a transaction that was still open.
    Wrote {
        tx: Uuid,
        event: Uuid,
        key: Option<String>,
        version: i64,
        fate: Fate,
        oversize: bool,
    },
    /// It went back to a savepoint before that.
    Undone {
        tx: Uuid,
        event: Uuid,
    },
    /// PostgreSQL confirmed the commit; a crash may take back what was not durable.
    Committed {
        tx: Uuid,
        durable: bool,
    },
    RolledBack {
        tx: Uuid,
    },
    /// There was no answer.
    Unknown {
        tx: Uuid,
    },
    Fault {
        name: String,
        detail: String,
    },
    Healed {
        name: String,
    },
    /// Somebody took the message of the event out of the stream.
    Removed {
        event: Uuid,
    },
    /// Somebody purged the stream: whatever was written before may be gone from it, for good or until a server that was
    /// killed at that moment finds it again.
    Purged,
    /// At the end: the row that the service wrote with the event.
    Kept {
        event: Uuid,
        key: Option<String>,
        version: i64,
        digest: String,
    },
    /// At the end: a row of the outbox.
    Outboxed {
        event: Uuid,
        bytes: u64,
    },
    /// At the end: a message of the stream.
    Stored {
        sequence: u64,
        event: Uuid,
        bytes: u64,
    },
    /// At the end: the relay had parked it.
    Parked {
        event: Uuid,
        reason: String,
    },
    /// At the end: what a subscriber wrote when it handled the event, in the order in which it did.
    Effect {
        subscriber: String,
        event: Uuid,
        key: Option<String>,
        version: i64,
        digest: String,
    },
    /// At the end: a dead letter.
    Dead {
        subscriber: String,
        event: Uuid,
        reason: String,
    },
    /// Everything was handled so long after everything was healed; not at all within the bound when there is no time.
    Drained {
        seconds: Option<f64>,
    },
    /// Nothing went on after everything was healed, so all NATS servers were started again.
    NatsRestarted,
    /// At the end: somebody was not well.
    Unwell {
        who: String,
        says: String,
    },
    /// At the end: a transaction that was held open, a paused consumer and so on, for the story only.
    Note {
        text: String,
    },
}

impl What {
    /// The event that it is about.
    pub fn event(&self) -> Option<Uuid> {
        match self {
            Self::Wrote { event, .. }
            | Self::Undone { event, .. }
            | Self::Removed { event }
            | Self::Kept { event, .. }
            | Self::Outboxed { event, .. }
            | Self::Stored { event, .. }
            | Self::Parked { event, .. }
            | Self::Effect { event, .. }
            | Self::Dead { event, .. } => Some(*event),
            _ => None,
        }
    }

    /// The transaction that it is about.
    pub fn transaction(&self) -> Option<Uuid> {
        match self {
            Self::Wrote { tx, .. }
            | Self::Undone { tx, .. }
            | Self::Committed { tx, .. }
            | Self::RolledBack { tx }
            | Self::Unknown { tx } => Some(*tx),
            _ => None,
        }
    }
}

/// When it happened, and what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Microseconds since 1970.
    pub at: i64,
    #[serde(flatten)]
    pub what: What,
}

/// A file to which entries are appended. Each is there when `write` returns, whatever becomes of the process.
pub struct Journal(Mutex<File>);

impl Journal {
    pub fn open(path: &Path) -> Self {
        Self(Mutex::new(File::options().create(true).append(true).open(path).unwrap()))
    }

    pub fn write(&self, what: What) {
        let entry = Entry { at: chrono::Utc::now().timestamp_micros(), what };
        let line = serde_json::to_string(&entry).unwrap() + "\n";
        self.0.lock().unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// All entries of all files in a directory, by time.
pub fn read(directory: &Path) -> Vec<Entry> {
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    let mut entries = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        // A process may have been killed in the middle of its last line.
        entries.extend(text.lines().filter_map(|line| serde_json::from_str::<Entry>(line).ok()));
    }
    entries.sort_by_key(|entry| entry.at);
    entries
}
