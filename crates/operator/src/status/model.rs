//! What `aftercommit status` shows, put together from what the database and NATS say.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::broker::{Broker, Consumer, StreamStatus};
use super::database::Database;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::pause::Pause;
use aftercommit_core::postgres::status::AtWork;
use aftercommit_core::postgres::worker_status::Heard;
use aftercommit_core::told::{self, Told};
use aftercommit_outbox::event::EventId;

/// What `aftercommit status` shows. With `--json` it is printed as it is here. What is none is not known, or does not apply.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Whether everything flows: there are no `problems`.
    pub well: bool,
    /// What is stuck, waits for a decision or is slow, the worst first.
    pub problems: Vec<Problem>,
    /// Events that are committed and not yet in the stream.
    pub backlog: Backlog,
    /// Events that the stream would not take, and what waits behind them.
    pub parked: Parked,
    /// The leading relay; none when no relay ever ran.
    pub relay: Option<RelayStatus>,
    /// The stream; none when NATS did not answer or there is no such stream, see `stream_error`.
    pub stream: Option<StreamStatus>,
    /// Why there is no stream to show.
    pub stream_error: Option<String>,
    /// What operators have paused in this database: `relay`, `subscriber:<name>`, `subscriber:*` for all of them.
    pub paused: Vec<Paused>,
    /// The subscribers of the stream and those that this database knows, by name.
    pub subscribers: BTreeMap<String, SubscriberStatus>,
    /// Consumers of the stream that are no subscriber's; none when NATS did not answer.
    pub other_consumers: Option<Vec<OtherConsumer>>,
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Events do not get on.
    Stuck,
    /// Something waits for a decision, fails and is tried again, or is slow.
    Attention,
}

/// What kind of problem it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Events wait to be published.
    Backlog,
    /// Events are parked.
    Parked,
    /// NATS does not answer, or there is no such stream.
    Stream,
    /// An operator has paused it.
    Paused,
    /// No worker serves a subscriber, or the one that does cannot work.
    Worker,
    /// Events run or wait for long.
    Slow,
    /// A service that a handler needs is not available.
    Unavailable,
    /// Attempts fail.
    Failing,
    /// Events were given up.
    DeadLetters,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What kind of problem it is.
    pub kind: Kind,
    /// Where: `relay`, `stream`, or `subscriber <name>`.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Something that is paused.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paused {
    /// What.
    pub name: String,
    /// Since when.
    pub since: DateTime<Utc>,
    /// Who paused it.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

/// Events waiting for the relay.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Backlog {
    /// How many; counted up to a million.
    pub events: i64,
    /// The age of the oldest in seconds; none without a backlog.
    pub oldest_seconds: Option<f64>,
}

/// Parked events.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Parked {
    /// Those that the stream would not take.
    pub events: i64,
    /// Those that wait behind them.
    pub behind: i64,
    /// Since when the first of them is parked, in seconds.
    pub oldest_seconds: Option<f64>,
    /// Why the first of them is parked.
    pub reason: Option<String>,
}

/// The relay that leads, or led last.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RelayStatus {
    /// `host:process:instance`.
    pub leader: String,
    /// Grows with every change of leader.
    pub epoch: i64,
    /// Whether its lease is valid now.
    pub alive: bool,
    /// Since when it leads.
    pub since: Option<DateTime<Utc>>,
    /// The outbox id of the last event it stored.
    pub last_outbox_id: Option<i64>,
    /// The stream sequence of that event.
    pub last_stream_sequence: Option<i64>,
    /// What it does or waits for, as of its last heartbeat.
    pub state: Option<String>,
}

/// A subscriber's position.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SubscriberStatus {
    /// Whether the stream has a consumer of this name; none when NATS did not answer. So for the next four.
    pub has_consumer: Option<bool>,
    /// Messages that were not delivered yet.
    pub pending: Option<u64>,
    /// Messages that were delivered and not acknowledged.
    pub in_flight: Option<u64>,
    /// Those of them that were delivered more than once.
    pub redelivered: Option<u64>,
    /// For how long the oldest message that is not acknowledged has been in the stream, in seconds.
    pub oldest_seconds: Option<f64>,
    /// Events of which attempts have failed, and which are to be tried again; none when this database has never served the
    /// subscriber. So for everything below but `paused`.
    pub failing: Option<i64>,
    /// Events that an operator redrove, and which have not run since.
    pub redrive: Option<i64>,
    /// Dead letters.
    pub dead_letters: Option<i64>,
    /// The active worker, as `host:process:instance`; none when no worker serves the subscriber from this database.
    pub active: Option<String>,
    /// Since when it is active.
    pub active_since: Option<DateTime<Utc>>,
    /// Whether nothing keeps it from working.
    pub ready: Option<bool>,
    /// What it does or waits for; when nobody is active, what was said last.
    pub state: Option<String>,
    /// Who was seen last, and when.
    pub last_seen: Option<(String, DateTime<Utc>)>,
    /// Other processes that could take over.
    pub standbys: Option<usize>,
    /// Whether an operator has paused it, alone or with all others.
    pub paused: bool,
    /// The attempt that failed last.
    pub last_failure: Option<LastFailure>,
    /// The event that was given up last.
    pub last_dead_letter: Option<LastDeadLetter>,
    /// Some of the events that wait for a point in time.
    pub waiting: Vec<WaitingEvent>,
    /// What has been running for seconds.
    pub running: Vec<RunningEvents>,
}

/// A failed attempt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastFailure {
    /// The event.
    pub event_id: EventId,
    /// How many attempts of it have failed.
    pub attempts: i32,
    /// How many it has; none when there is no end, or it is not known.
    pub max_attempts: Option<i64>,
    /// Why.
    pub error: String,
    /// When.
    pub at: DateTime<Utc>,
    /// When the next attempt of any event begins.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

/// An event that was given up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastDeadLetter {
    /// Why.
    pub reason: String,
    /// When.
    pub at: DateTime<Utc>,
}

/// Why an event waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// An attempt has failed.
    Failing,
    /// Its handler asked to be run later.
    Snoozed,
    /// A service that its handler needs is not available.
    Unavailable,
}

/// An event that waits for a point in time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WaitingEvent {
    /// The event.
    pub event_id: EventId,
    /// Its key, cut when it is long.
    pub key: Option<String>,
    /// Why it waits.
    pub why: WaitReason,
    /// Which service is not available, and why.
    pub reason: Option<String>,
    /// When it is tried again.
    pub until: DateTime<Utc>,
}

/// Events that run in one transaction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunningEvents {
    /// The first of them.
    pub event_id: EventId,
    /// Its key, cut when it is long.
    pub key: Option<String>,
    /// How many they are.
    pub events: usize,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// A consumer that is no subscriber's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OtherConsumer {
    /// Its name.
    pub name: String,
    /// Whether it stays when nobody reads from it.
    pub durable: bool,
    /// Messages that were not delivered yet.
    pub pending: u64,
}

/// How many seconds after its last word an instance still counts as alive.
pub(super) const SILENCE: f64 = 35.0;

pub(super) fn merge(database: Database, broker: Result<Broker, Error>) -> Status {
    let Database { backlog, parked, leader, paused, at_work, heard } = database;
    let mut subscribers = BTreeMap::new();
    for at_work in at_work {
        let name = at_work.subscriber.clone();
        let heard: Vec<&Heard> = heard.iter().filter(|heard| heard.said.subscriber == name).collect();
        subscribers.insert(name, subscriber(at_work, &heard));
    }
    let all_paused = paused.iter().any(|pause| pause.name == aftercommit_core::subscription::ALL);
    let (stream, stream_error, other_consumers) = match broker {
        Ok(Broker { stream, consumers }) => {
            subscribers.values_mut().for_each(|known| known.has_consumer = Some(false));
            let others = consumers.into_iter().filter_map(|one| place(one, &mut subscribers, all_paused));
            let mut others: Vec<OtherConsumer> = others.collect();
            others.sort_by(|one, other| one.name.cmp(&other.name));
            (Some(stream), None, Some(others))
        }
        Err(error) => (None, Some(error.report()), None),
    };
    let paused = paused.into_iter().map(|Pause { name, since, by, reason }| Paused { name, since, by, reason });
    Status {
        well: true,
        problems: Vec::new(),
        backlog: Backlog { events: backlog.events, oldest_seconds: backlog.oldest_seconds },
        parked: Parked {
            events: parked.events,
            behind: parked.behind,
            oldest_seconds: parked.oldest_seconds,
            reason: parked.reason,
        },
        relay: leader.map(|leader| RelayStatus {
            leader: leader.holder,
            epoch: leader.epoch,
            alive: leader.lease_left > 0.0,
            since: leader.since,
            last_outbox_id: leader.last_id,
            last_stream_sequence: leader.last_sequence,
            state: leader.state,
        }),
        stream,
        stream_error,
        paused: paused.collect(),
        subscribers,
        other_consumers,
    }
}

/// Adds a consumer to its subscriber, or gives it back as somebody else's.
fn place(
    consumer: Consumer,
    subscribers: &mut BTreeMap<String, SubscriberStatus>,
    all_paused: bool,
) -> Option<OtherConsumer> {
    let Consumer { position, oldest_seconds } = consumer;
    if !subscribers.contains_key(&position.name) && !position.ours {
        let (name, durable, pending) = (position.name, position.durable, position.pending);
        return Some(OtherConsumer { name, durable, pending });
    }
    let entry = subscribers
        .entry(position.name)
        .or_insert_with(|| SubscriberStatus { paused: all_paused, ..SubscriberStatus::default() });
    entry.has_consumer = Some(true);
    (entry.pending, entry.in_flight) = (Some(position.pending), Some(position.in_flight));
    (entry.redelivered, entry.oldest_seconds) = (Some(position.redelivered), oldest_seconds);
    None
}

/// A subscriber as its database knows it. `heard` is what its instances said, the newest first.
fn subscriber(at_work: AtWork, heard: &[&Heard]) -> SubscriberStatus {
    let AtWork { active, paused, failing, redrive, dead_letters, last_failure, last_letter, .. } = at_work;
    let word = match &active {
        Some(active) => heard.iter().find(|heard| heard.said.instance == *active),
        None => heard.first(),
    };
    let is_standby = |one: &&&Heard| {
        one.age <= SILENCE && one.said.phase == "standing_by" && active.as_ref() != Some(&one.said.instance)
    };
    let max_attempts = word.map(|word| word.said.max_attempts).filter(|most| *most < u32::MAX.into());
    let told = word.filter(|_| active.is_some()).map(|word| Told::read(&word.said.notes)).unwrap_or_default();
    SubscriberStatus {
        failing: Some(failing),
        redrive: Some(redrive),
        dead_letters: Some(dead_letters),
        active_since: word.filter(|word| active.is_some() && word.said.active).map(|word| word.since),
        // What was said before it became active says nothing of its work.
        ready: word.filter(|word| active.is_some() && word.said.active).map(|word| word.said.ready),
        state: word.map(|word| word.said.state.clone()),
        last_seen: heard.first().map(|last| (last.said.instance.clone(), last.seen_at)),
        standbys: (!heard.is_empty()).then(|| heard.iter().filter(is_standby).count()),
        paused,
        last_failure: last_failure.map(|last| LastFailure {
            event_id: last.event_id.into(),
            attempts: last.attempts,
            max_attempts,
            error: last.error,
            at: last.at,
            next_attempt_at: last.next_attempt_at,
        }),
        last_dead_letter: last_letter.map(|(reason, at)| LastDeadLetter { reason, at }),
        waiting: told.waiting.into_iter().map(WaitingEvent::from).collect(),
        running: told.running.into_iter().map(RunningEvents::from).collect(),
        active,
        ..SubscriberStatus::default()
    }
}

impl From<told::Waiting> for WaitingEvent {
    fn from(waiting: told::Waiting) -> Self {
        let told::Waiting { event_id, key, why, reason, until, .. } = waiting;
        let why = match why {
            told::Why::Failing => WaitReason::Failing,
            told::Why::Snoozed => WaitReason::Snoozed,
            told::Why::Unavailable => WaitReason::Unavailable,
        };
        Self { event_id, key, why, reason, until }
    }
}

impl From<told::Running> for RunningEvents {
    fn from(running: told::Running) -> Self {
        let told::Running { event_id, key, events, since } = running;
        Self { event_id, key, events, since }
    }
}
