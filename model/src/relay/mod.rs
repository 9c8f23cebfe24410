//! From the outbox into an exclusive stream: transactions, marks, windows, durability, lease, log, chain, resume.
//!
//! A step is what happens at once in the product: one statement, one message, one decision. Between any two of them
//! anything else may happen, so a relay that is paused, cut off or slow needs no step of its own.

mod database;
mod leader;
mod model;

pub use model::{IN_ORDER, NO_GHOST, NOTHING_LOST, ONCE};

use database::Database;
use leader::Leader;

/// What is checked: these writers, so many relays, and so many faults at most.
#[derive(Debug, Clone)]
pub struct Scope {
    /// What the services write, one entry per transaction. Each commits or rolls back.
    pub transactions: Vec<Transaction>,
    /// Events that the stream will never take, by their place among all: the relay parks them.
    pub unfit: Vec<u8>,
    /// Relay processes.
    pub relays: usize,
    /// Messages in flight at most.
    pub in_flight: usize,
    /// How often what may go wrong.
    pub faults: Faults,
    /// Whether ids are taken in advance, before the transaction that writes them has its own.
    pub ids_in_advance: bool,
    /// What of the protocol is left out.
    pub broken: Option<Broken>,
}

/// A transaction that writes events.
#[derive(Debug, Clone)]
pub struct Transaction {
    /// The key of each event. Its row is locked before the event is written, as writers have to.
    pub keys: Vec<u8>,
    /// Whether it commits with `synchronous_commit = off`.
    pub asynchronous: bool,
}

impl Transaction {
    /// A transaction with these events that waits for the disk.
    pub fn durable(keys: &[u8]) -> Self {
        Self { keys: keys.to_vec(), asynchronous: false }
    }

    /// A transaction with these events that does not wait for the disk.
    pub fn asynchronous(keys: &[u8]) -> Self {
        Self { keys: keys.to_vec(), asynchronous: true }
    }
}

/// How often each fault may happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// The database crashes and loses whatever part of its log is not on disk.
    pub database_crashes: u8,
    /// An asynchronous standby is promoted that has any beginning of the database's log.
    pub promotions: u8,
    /// A relay process dies.
    pub relay_crashes: u8,
    /// The lease of a living relay runs out.
    pub expiries: u8,
    /// A relay stops waiting for acknowledgements; what it sent may still arrive, at any time.
    pub timeouts: u8,
    /// A message is lost on its way to the server.
    pub lost_publishes: u8,
    /// A message is stored, and its acknowledgement is lost.
    pub lost_acks: u8,
    /// Somebody else writes a message into the stream.
    pub foreign: u8,
}

/// A protocol without one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The relay reads `id > last`.
    LastIdCursor,
    /// The relay reads `id > last and xid < xmin`.
    XminCursor,
    /// A mark knows as running only what the snapshot lists, not what began after the newest ended transaction.
    SnapshotListOnly,
    /// A window knows nothing of low ids of transactions that began after the settled mark.
    NoLateRows,
    /// Opening a window does not wait for the disk.
    NoBarrier,
    /// Parking an event does not wait for the disk.
    ParkingNotDurable,
    /// A relay does not look whether its state was written before a failover.
    NoTimeline,
    /// A relay appends to the log whatever is in it.
    NoLogFence,
    /// A message names no predecessor.
    NoExpectedSequence,
    /// A message names its predecessor by sequence alone.
    SequenceOnly,
    /// After a doubt the relay goes on from the settled mark without reading the stream.
    NoTail,
    /// The chain begins at the stream's end as it is when a message is sent, not as it was when the stream was read.
    LateEnd,
}

/// An event, by its place among all of the scope.
pub(crate) type Event = u8;

/// A message on its way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Publish {
    event: Event,
    outbox_id: i64,
    expected_sequence: Option<u8>,
    expected_id: Option<Event>,
    /// The relay that waits for the answer; none when nobody does any more.
    sender: Option<u8>,
}

/// A message of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stored {
    Own { event: Event, outbox_id: i64 },
    Foreign,
}

/// A relay process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Relay {
    Down,
    StandingBy,
    /// It has the lease and has read the newest state; whether that is still the newest one.
    TakingOver {
        newest: bool,
    },
    Leading(Leader),
}

/// All of it at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    pub(crate) database: Database,
    pub(crate) relays: Vec<Relay>,
    /// Those that nobody waits for first, then those of each relay.
    pub(crate) wire: Vec<Publish>,
    pub(crate) stream: Vec<Stored>,
    pub(crate) left: Faults,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A transaction gets its id.
    Begin(usize),
    /// A transaction takes an id for its next event and writes it.
    Write(usize),
    /// A transaction commits.
    Commit(usize),
    /// A transaction rolls back.
    RollBack(usize),
    /// A relay gets the lease and reads the newest state.
    Acquire(usize),
    /// It appends that state under its epoch.
    TakeOver(usize),
    /// It notices that it has lost the lease, or the database.
    StepDown(usize),
    /// The leader reads where the stream ends.
    ReadEnd(usize),
    /// It makes sure that it still leads and finds its place in the stream.
    FindPlace(usize),
    /// It sends the next event.
    Send(usize),
    /// It parks the next event, and must look at the stream then.
    Park(usize),
    /// It waits for an answer no longer.
    GiveUp(usize),
    /// It finds news, or ids that came to nothing, and is about to open a window.
    BeginWindow(usize),
    /// The statement that opens it takes its snapshot.
    TakeSnapshot(usize),
    /// The same statement reads the sequence.
    ReadSequence(usize),
    /// The same statement takes its transaction id and commits.
    OpenWindow(usize),
    /// The leader closes its window in the log.
    Settle(usize),
    /// An idle leader finds that the stream is not as it left it.
    LookAtStream(usize),
    /// A message arrives, and so does the answer.
    Deliver(usize),
    /// A message arrives whose answer is lost.
    DeliverUnanswered(usize),
    /// A message is lost.
    Lose(usize),
    /// The lease of a living relay runs out.
    Expire,
    /// A relay process dies.
    Crash(usize),
    /// It is started again.
    Start(usize),
    /// The database crashes, and keeps so many records that were not on disk.
    CrashDatabase(usize),
    /// A standby is promoted that has so many records.
    Promote(usize),
    /// Somebody else writes into the stream.
    Foreign,
}

impl Action {
    /// Whether it needs no fault: what is left to do when all goes well.
    fn is_progress(self) -> bool {
        !matches!(
            self,
            Self::DeliverUnanswered(_)
                | Self::Lose(_)
                | Self::Expire
                | Self::Crash(_)
                | Self::CrashDatabase(_)
                | Self::Promote(_)
                | Self::Foreign
        )
    }
}
