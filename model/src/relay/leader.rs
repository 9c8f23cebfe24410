//! The leading relay, after `crates/relay/src/leader.rs`, `chain.rs` and `resume.rs`.

use crate::snapshot::Mark;

use super::database::{Database, LogRow, Row};
use super::{Broken, Event, Publish, Scope, Stored};

/// A leader's memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Leader {
    /// The state that it acts on.
    pub(super) row: LogRow,
    /// Whether that is still the newest one: its number plus one is free.
    pub(super) newest: bool,
    /// The database has crashed: its next statement fails.
    pub(super) cut_off: bool,
    pub(super) step: Step,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// What became of its messages must be read from the stream.
    Doubt,
    /// It has read where the stream ends.
    End(u8),
    /// It sends what is to do; what it read does not depend on the database any more.
    Publishing { chain: Chain, to_do: Vec<(Event, i64)> },
    /// Everything of the window is in the stream.
    Idle(Chain),
    /// It is about to open a window, or in the middle of the statement that does.
    Opening { base: u8, again: bool, end: u8, snapshot: Option<String>, last_id: Option<i64> },
}

/// Where the chain stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Chain {
    pub(super) sequence: u8,
    message_id: Option<Event>,
    /// Messages in flight, and whether each is known to be stored.
    pub(super) in_flight: Vec<(Event, bool)>,
}

/// What the server says to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Stored(u8),
    Refused,
}

impl Chain {
    pub(super) fn behind(sequence: u8) -> Self {
        Self { sequence, ..Self::default() }
    }

    /// Takes the next message up as in flight and says what it must be behind.
    pub(super) fn send(&mut self, event: Event) -> (u8, Option<Event>) {
        let sequence = self.sequence + self.in_flight.len() as u8;
        let id = self.in_flight.last().map_or(self.message_id, |(event, _)| Some(*event));
        self.in_flight.push((event, false));
        (sequence, id)
    }

    /// Takes an answer in; false when the chain ends with it.
    pub(super) fn answered(&mut self, event: Event, answer: Answer) -> bool {
        let Some(at) = self.in_flight.iter().position(|(sent, _)| *sent == event) else { return true };
        if answer != Answer::Stored(self.sequence + at as u8 + 1) {
            return false;
        }
        self.in_flight[at].1 = true;
        while let Some((event, true)) = self.in_flight.first().copied() {
            self.in_flight.remove(0);
            self.sequence += 1;
            self.message_id = Some(event);
        }
        true
    }
}

/// What came of looking for the place.
pub(super) enum Place {
    Behind(i64),
    /// The stream holds what the log does not explain.
    Unknown,
}

/// Whether a window holds a row, as the variant sees it.
pub(super) fn in_window(row: &Row, settled: &Mark, target: &Mark, broken: Option<Broken>) -> bool {
    match broken {
        Some(Broken::LastIdCursor | Broken::XminCursor) => {
            row.id > settled.last_id && row.id <= target.last_id && target.snapshot.sees(row.xid)
        }
        _ => target.holds(row.id, row.xid) && !settled.holds(row.id, row.xid),
    }
}

/// The rows of a window behind an id, read as the product reads them: the stragglers, then the new rows.
fn read_window(rows: &[Row], settled: &Mark, target: &Mark, after: i64, broken: Option<Broken>) -> Vec<Row> {
    if let Some(Broken::LastIdCursor | Broken::XminCursor) = broken {
        let wanted = rows.iter().filter(|row| row.id > after && in_window(row, settled, target, broken));
        return wanted.copied().collect();
    }
    let mut ended = settled.ended_by(target);
    if broken == Some(Broken::SnapshotListOnly) {
        ended.retain(|xid| listed(settled).contains(xid));
    }
    let late = |row: &Row| {
        broken != Some(Broken::NoLateRows) && row.xid >= settled.next_xid && settled.has_ended_by(target, row.xid)
    };
    let low = |row: &&Row| row.id > after && row.id <= settled.last_id;
    let stragglers = rows.iter().filter(low).filter(|row| ended.contains(&row.xid) || late(row));
    let new = rows
        .iter()
        .filter(|row| row.id > after.max(settled.last_id) && row.id <= target.last_id && target.snapshot.sees(row.xid));
    stragglers.chain(new).copied().collect()
}

/// The list of a mark's snapshot.
fn listed(mark: &Mark) -> Vec<u64> {
    let text = mark.snapshot.to_string();
    text.rsplit(':').next().unwrap_or("").split(',').filter_map(|xid| xid.parse().ok()).collect()
}

/// The transactions whose rows with low ids may still come to light.
fn running(mark: &Mark, broken: Option<Broken>) -> Vec<u64> {
    match broken {
        Some(Broken::SnapshotListOnly) => listed(mark),
        _ => mark.running().collect(),
    }
}

/// The mark of a statement that began with `snapshot`, read `last_id`, and then got `xid`.
pub(super) fn mark(scope: &Scope, database: &Database, snapshot: &str, last_id: i64, xid: u64) -> Mark {
    let snapshot: crate::snapshot::Snapshot = snapshot.parse().expect("the model writes snapshots as PostgreSQL does");
    let xmin = snapshot.to_string().split(':').next().and_then(|xmin| xmin.parse::<u64>().ok()).unwrap_or(0);
    let read = |row: &&Row| match scope.broken {
        Some(Broken::XminCursor) => row.xid < xmin,
        _ => snapshot.sees(row.xid),
    };
    let last_id = match scope.broken {
        // A cursor stands on the last row that was read.
        Some(Broken::LastIdCursor | Broken::XminCursor) => {
            database.rows(scope).iter().filter(read).map(|row| row.id).max().unwrap_or(0)
        }
        _ => last_id,
    };
    Mark { snapshot, last_id, next_xid: xid, floor: 0 }
}

impl Leader {
    /// Up to where everything is in the stream.
    fn handled(&self) -> &Mark {
        self.row.target.as_ref().unwrap_or(&self.row.settled)
    }

    /// Whether a row can be read that is not handled.
    pub(super) fn news(&self, scope: &Scope, database: &Database) -> bool {
        let handled = self.handled();
        let rows = database.rows(scope);
        match scope.broken {
            Some(Broken::LastIdCursor) => rows.iter().any(|row| row.id > handled.last_id),
            Some(Broken::XminCursor) => {
                let snapshot = database.snapshot();
                let xmin = snapshot.split(':').next().and_then(|xmin| xmin.parse::<u64>().ok()).unwrap_or(0);
                rows.iter().any(|row| row.id > handled.last_id && row.xid < xmin)
            }
            broken => {
                let running = running(handled, broken);
                let late = |row: &Row| broken != Some(Broken::NoLateRows) && row.xid >= handled.next_xid;
                rows.iter().any(|row| row.id > handled.last_id || running.contains(&row.xid) || late(row))
            }
        }
    }

    /// Whether ids were handed out of which nothing can be read.
    pub(super) fn unseen(&self, scope: &Scope, database: &Database) -> bool {
        match scope.broken {
            Some(Broken::LastIdCursor | Broken::XminCursor) => false,
            _ => database.last_id > self.handled().last_id,
        }
    }

    /// Finds the last event of the open window in the stream.
    pub(super) fn place(&self, scope: &Scope, database: &Database, stream: &[Stored], end: u8) -> Place {
        let LogRow { settled, target, base, .. } = &self.row;
        if scope.broken == Some(Broken::NoTail) {
            return Place::Behind(0);
        }
        match stream[usize::from(*base).min(usize::from(end))..usize::from(end)].last() {
            None => Place::Behind(0),
            Some(Stored::Foreign) => Place::Unknown,
            Some(Stored::Own { event, outbox_id }) => {
                let row = database.rows(scope).into_iter().find(|row| row.event == *event && row.id == *outbox_id);
                match (row, target) {
                    (Some(row), Some(target)) if in_window(&row, settled, target, scope.broken) => {
                        Place::Behind(row.id)
                    }
                    _ => Place::Unknown,
                }
            }
        }
    }

    /// What is to be published of the open window behind `after`, apart from what the stream holds behind the base when
    /// that has to be looked up.
    pub(super) fn to_do(
        &self,
        scope: &Scope,
        database: &Database,
        stream: &[Stored],
        end: u8,
        after: i64,
    ) -> Vec<(Event, i64)> {
        let LogRow { settled, target: Some(target), base, scattered, .. } = &self.row else { return Vec::new() };
        let rows = read_window(&database.rows(scope), settled, target, after, scope.broken);
        let found = |row: &Row| {
            *scattered
                && stream[usize::from(*base)..usize::from(end)]
                    .contains(&Stored::Own { event: row.event, outbox_id: row.id })
        };
        let is_to_do = |row: &&Row| !found(row) && !database.parked.contains(&row.event);
        rows.iter().filter(is_to_do).map(|row| (row.event, row.id)).collect()
    }

    /// The next message.
    pub(super) fn send(&mut self, scope: &Scope, sender: u8, stream: &[Stored]) -> Option<Publish> {
        let Step::Publishing { chain, to_do } = &mut self.step else { return None };
        let (event, outbox_id) = to_do.remove(0);
        let (sequence, id) = chain.send(event);
        let sequence = match scope.broken {
            Some(Broken::LateEnd) if id.is_none() => stream.len() as u8,
            _ => sequence,
        };
        let (expected_sequence, expected_id) = match scope.broken {
            Some(Broken::NoExpectedSequence) => (None, None),
            Some(Broken::SequenceOnly) => (Some(sequence), None),
            _ => (Some(sequence), id),
        };
        Some(Publish { event, outbox_id, expected_sequence, expected_id, sender: Some(sender) })
    }

    /// Publishing has come to its end when nothing is left to send or in flight.
    pub(super) fn rest_if_done(&mut self) {
        if let Step::Publishing { chain, to_do } = &self.step
            && chain.in_flight.is_empty()
            && to_do.is_empty()
        {
            self.step = Step::Idle(chain.clone());
        }
    }
}
