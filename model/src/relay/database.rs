//! The publisher's PostgreSQL: transactions, the sequence, snapshots, the write-ahead log, the relay's log and lease.

use crate::snapshot::Mark;

use super::{Event, Scope};

/// How far a transaction is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    NotBegun,
    /// The ids of the events written so far; without a transaction id only where ids are taken in advance.
    Running {
        xid: Option<u64>,
        ids: Vec<i64>,
    },
    Committed {
        xid: u64,
        ids: Vec<i64>,
    },
    RolledBack,
    /// Committed, and taken back by a crash.
    Lost,
}

/// A record that may not be on disk yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Record {
    Write {
        xid: u64,
        id: i64,
    },
    Commit(usize),
    Park(Event),
    /// With the state that was the newest one before.
    Log {
        xid: u64,
        before: Box<LogRow>,
    },
}

/// A state of the relay.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LogRow {
    pub(super) settled: Mark,
    pub(super) target: Option<Mark>,
    pub(super) base: u8,
    pub(super) scattered: bool,
    /// The timeline in which it was written.
    pub(super) timeline: u8,
}

/// A row of the outbox that can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: i64,
    pub(super) xid: u64,
    pub(super) event: Event,
}

/// What of the database outlives its connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Database {
    pub(super) stages: Vec<Stage>,
    pub(super) next_xid: u64,
    /// The newest ended transaction.
    ended: u64,
    pub(super) last_id: i64,
    unflushed: Vec<Record>,
    /// What is on disk, as far as a standby may lack it.
    history: Option<Vec<Record>>,
    pub(super) timeline: u8,
    pub(super) parked: Vec<Event>,
    flushed_xid: u64,
    flushed_id: i64,
    /// The newest state of the relay's log.
    pub(super) newest: LogRow,
    pub(super) holder: Option<u8>,
}

const FIRST_XID: u64 = 3;

impl Database {
    pub(super) fn new(scope: &Scope) -> Self {
        Self {
            stages: vec![Stage::NotBegun; scope.transactions.len()],
            next_xid: FIRST_XID,
            ended: FIRST_XID - 1,
            last_id: 0,
            unflushed: Vec::new(),
            history: (scope.faults.promotions > 0).then(Vec::new),
            timeline: 0,
            parked: Vec::new(),
            flushed_xid: FIRST_XID - 1,
            flushed_id: 0,
            newest: LogRow { settled: Mark::nothing(), target: None, base: 0, scattered: false, timeline: 0 },
            holder: None,
        }
    }

    pub(super) fn begin(&mut self, tx: usize, scope: &Scope) {
        let xid = (!scope.ids_in_advance).then(|| self.take_xid());
        self.stages[tx] = Stage::Running { xid, ids: Vec::new() };
    }

    fn take_xid(&mut self) -> u64 {
        self.next_xid += 1;
        self.next_xid - 1
    }

    /// Whether the transaction may take an id for its next event: the row of the key is not locked by another one.
    pub(super) fn may_write(&self, scope: &Scope, tx: usize) -> bool {
        let Stage::Running { ids, .. } = &self.stages[tx] else { return false };
        let keys = &scope.transactions[tx].keys;
        let Some(key) = keys.get(ids.len()) else { return false };
        keys[..ids.len()].contains(key)
            || !self.stages.iter().enumerate().any(|(other, stage)| {
                other != tx
                    && matches!(stage, Stage::Running { ids, .. } if scope.transactions[other].keys[..ids.len()].contains(key))
            })
    }

    pub(super) fn write(&mut self, tx: usize) {
        self.last_id += 1;
        let id = self.last_id;
        if let Stage::Running { xid, ids } = &mut self.stages[tx] {
            ids.push(id);
            if let Some(xid) = *xid {
                self.unflushed.push(Record::Write { xid, id });
            }
        }
    }

    pub(super) fn may_commit(&self, scope: &Scope, tx: usize) -> bool {
        matches!(&self.stages[tx], Stage::Running { ids, .. } if ids.len() == scope.transactions[tx].keys.len())
    }

    pub(super) fn commit(&mut self, scope: &Scope, tx: usize) {
        let Stage::Running { xid, ids } = self.stages[tx].clone() else { return };
        // In the wrong order it gets its number between the id and the commit; the last moment is the worst.
        let xid = xid.unwrap_or_else(|| self.take_xid());
        self.stages[tx] = Stage::Committed { xid, ids };
        self.ended = self.ended.max(xid);
        self.unflushed.push(Record::Commit(tx));
        if !scope.transactions[tx].asynchronous {
            self.flush();
        }
    }

    pub(super) fn roll_back(&mut self, tx: usize) {
        if let Stage::Running { xid: Some(xid), .. } = self.stages[tx] {
            self.ended = self.ended.max(xid);
        }
        self.stages[tx] = Stage::RolledBack;
    }

    fn flush(&mut self) {
        for record in std::mem::take(&mut self.unflushed) {
            self.keep(record);
        }
    }

    fn keep(&mut self, record: Record) {
        if let Some(history) = &mut self.history {
            history.push(record.clone());
        }
        match record {
            Record::Write { xid, id } => {
                self.flushed_xid = self.flushed_xid.max(xid);
                self.flushed_id = self.flushed_id.max(id);
            }
            Record::Commit(tx) => {
                if let Stage::Committed { xid, .. } = self.stages[tx] {
                    self.flushed_xid = self.flushed_xid.max(xid);
                }
            }
            Record::Park(_) => {}
            Record::Log { xid, .. } => self.flushed_xid = self.flushed_xid.max(xid),
        }
    }

    /// Parks an event in a transaction of its own, whose number matters to nobody.
    pub(super) fn park(&mut self, event: Event, durable: bool) {
        if !self.parked.contains(&event) {
            self.parked.push(event);
            self.parked.sort_unstable();
            self.unflushed.push(Record::Park(event));
        }
        if durable {
            self.flush();
        }
    }

    /// Records that a standby may have.
    pub(super) fn records(&self) -> usize {
        self.history.as_ref().map_or(0, Vec::len) + self.unflushed.len()
    }

    /// A standby that has the first `kept` records takes the place of the database.
    pub(super) fn promote(&mut self, kept: usize) {
        let mut records = self.history.replace(Vec::new()).unwrap_or_default();
        records.append(&mut self.unflushed);
        (self.flushed_xid, self.flushed_id) = (FIRST_XID - 1, 0);
        self.unflushed = records;
        self.crash(kept);
        self.timeline += 1;
    }

    pub(super) fn unflushed(&self) -> usize {
        self.unflushed.len()
    }

    /// Loses all but the first `kept` records that were not on disk. Numbers that are nowhere on disk come again.
    pub(super) fn crash(&mut self, kept: usize) {
        let records = std::mem::take(&mut self.unflushed);
        let (kept, lost) = (records[..kept].to_vec(), &records[kept..]);
        for record in kept {
            self.keep(record);
        }
        for record in lost.iter().rev() {
            match record {
                Record::Write { .. } => {}
                Record::Commit(tx) => self.stages[*tx] = Stage::Lost,
                Record::Park(event) => self.parked.retain(|parked| parked != event),
                Record::Log { before, .. } => self.newest = LogRow::clone(before),
            }
        }
        for stage in &mut self.stages {
            if let Stage::Running { .. } = stage {
                *stage = Stage::RolledBack;
            }
        }
        self.next_xid = self.flushed_xid + 1;
        self.ended = self.flushed_xid;
        self.last_id = self.flushed_id;
    }

    /// A snapshot as PostgreSQL writes it: its xmax is one above the newest ended transaction.
    pub(super) fn snapshot(&self) -> String {
        let xmax = self.ended + 1;
        let running: Vec<u64> = self
            .stages
            .iter()
            .filter_map(|stage| match stage {
                Stage::Running { xid: Some(xid), .. } if *xid < xmax => Some(*xid),
                _ => None,
            })
            .collect();
        let xmin = running.iter().min().copied().unwrap_or(xmax);
        let list: Vec<String> = running.iter().map(u64::to_string).collect();
        format!("{xmin}:{xmax}:{}", list.join(","))
    }

    /// The rows that can be seen, by id.
    pub(super) fn rows(&self, scope: &Scope) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut event = 0;
        for (stage, transaction) in self.stages.iter().zip(&scope.transactions) {
            if let Stage::Committed { xid, ids } = stage {
                rows.extend(ids.iter().zip(event..).map(|(id, event)| Row { id: *id, xid: *xid, event }));
            }
            event += transaction.keys.len() as u8;
        }
        rows.sort_unstable_by_key(|row| row.id);
        rows
    }

    /// Appends a state in a transaction of its own.
    pub(super) fn append(&mut self, mut row: LogRow, durable: bool) {
        row.timeline = self.timeline;
        let xid = self.take_xid();
        let before = Box::new(std::mem::replace(&mut self.newest, row));
        self.ended = self.ended.max(xid);
        self.unflushed.push(Record::Log { xid, before });
        if durable {
            self.flush();
        }
    }
}
