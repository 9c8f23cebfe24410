//! What is done to a system, and when: all of it follows from the seed.

use std::time::Duration;

use super::support::Random;

/// Who stands at the one end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Relay,
    Worker,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    PublisherKilled,
    RelayKilled,
    RelayStopped,
    RelayFrozen,
    WorkerKilled,
    WorkerStopped,
    WorkerFrozen,
    ReconcilerKilled,
    PublisherPostgresKilled,
    SubscriberPostgresKilled,
    NatsKilled,
    NatsLeaderKilled,
    NatsAllKilled,
    NatsFrozen,
    /// The connections end, and new ones are refused.
    NatsCut(Who),
    /// What the server says is lost.
    NatsDeaf(Who),
    /// What the client says is lost.
    NatsMute(Who),
    NatsSlow(Who),
    PostgresCut(Who),
    PostgresDeaf(Who),
    LeasesTaken,
    TransactionHeld,
    RelayPaused,
    WorkerPaused,
    ConsumerDeleted,
    ConsumerPaused,
    MessageRepeated,
    MessagesRemoved,
    StreamPurged,
    StreamWiped,
    StreamFull,
    /// Its settings become such that it could lose events.
    StreamSettingsChanged,
    SequenceSetBack,
    SequenceSetAhead,
}

/// Every fault: its name, how many times of a hundred or so it is chosen, and for how many milliseconds it lasts.
const FAULTS: &[(Kind, &str, u64, (u64, u64))] = &[
    (Kind::PublisherKilled, "publisher-killed", 5, (0, 500)),
    (Kind::RelayKilled, "relay-killed", 10, (0, 1000)),
    (Kind::RelayStopped, "relay-stopped", 2, (0, 500)),
    (Kind::RelayFrozen, "relay-frozen", 4, (2500, 7000)),
    (Kind::WorkerKilled, "worker-killed", 10, (0, 1000)),
    (Kind::WorkerStopped, "worker-stopped", 3, (0, 500)),
    (Kind::WorkerFrozen, "worker-frozen", 4, (1000, 7000)),
    (Kind::ReconcilerKilled, "reconciler-killed", 3, (0, 1000)),
    (Kind::PublisherPostgresKilled, "publisher-postgres-killed", 5, (0, 1500)),
    (Kind::SubscriberPostgresKilled, "subscriber-postgres-killed", 5, (0, 1500)),
    (Kind::NatsKilled, "nats-killed", 4, (0, 2000)),
    (Kind::NatsLeaderKilled, "nats-leader-killed", 4, (0, 2000)),
    (Kind::NatsAllKilled, "nats-all-killed", 2, (0, 2000)),
    (Kind::NatsFrozen, "nats-frozen", 3, (500, 5000)),
    (Kind::NatsCut(Who::Relay), "relay-nats-cut", 3, (100, 4000)),
    (Kind::NatsDeaf(Who::Relay), "relay-nats-deaf", 3, (100, 6000)),
    (Kind::NatsMute(Who::Relay), "relay-nats-mute", 2, (100, 6000)),
    (Kind::NatsSlow(Who::Relay), "relay-nats-slow", 2, (500, 3000)),
    (Kind::PostgresCut(Who::Relay), "relay-postgres-cut", 3, (100, 4000)),
    (Kind::PostgresDeaf(Who::Relay), "relay-postgres-deaf", 2, (100, 6000)),
    (Kind::NatsCut(Who::Worker), "worker-nats-cut", 3, (100, 4000)),
    (Kind::NatsDeaf(Who::Worker), "worker-nats-deaf", 3, (100, 6000)),
    (Kind::NatsMute(Who::Worker), "worker-nats-mute", 2, (100, 6000)),
    (Kind::NatsSlow(Who::Worker), "worker-nats-slow", 2, (500, 3000)),
    (Kind::PostgresCut(Who::Worker), "worker-postgres-cut", 3, (100, 4000)),
    (Kind::PostgresDeaf(Who::Worker), "worker-postgres-deaf", 2, (100, 6000)),
    (Kind::LeasesTaken, "leases-taken", 4, (0, 1)),
    (Kind::TransactionHeld, "transaction-held", 4, (500, 8000)),
    (Kind::RelayPaused, "relay-paused", 1, (200, 2000)),
    (Kind::WorkerPaused, "worker-paused", 1, (200, 2000)),
    (Kind::ConsumerDeleted, "consumer-deleted", 2, (0, 1000)),
    (Kind::ConsumerPaused, "consumer-paused", 2, (200, 3000)),
    (Kind::MessageRepeated, "message-repeated", 1, (0, 1)),
    (Kind::MessagesRemoved, "messages-removed", 3, (0, 1)),
    (Kind::StreamPurged, "stream-purged", 1, (0, 1)),
    (Kind::StreamWiped, "stream-wiped", 1, (0, 1000)),
    (Kind::StreamFull, "stream-full", 2, (200, 3000)),
    (Kind::StreamSettingsChanged, "stream-settings-changed", 2, (500, 8000)),
    (Kind::SequenceSetBack, "sequence-set-back", 2, (0, 1)),
    (Kind::SequenceSetAhead, "sequence-set-ahead", 2, (0, 1)),
];

impl Kind {
    pub fn name(self) -> &'static str {
        FAULTS.iter().find(|fault| fault.0 == self).map_or("?", |fault| fault.1)
    }
}

/// The names of all faults.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAULTS.iter().map(|fault| fault.1)
}

/// One fault of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Since the beginning.
    pub at: Duration,
    pub kind: Kind,
    /// Which of several, modulo their number.
    pub target: usize,
    pub lasts: Duration,
}

/// Stands for a mechanism where none is taken away.
pub const CONTROL: &str = "nothing";

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub length: Duration,
    /// How many nats-servers there are, and replicas of the stream.
    pub replicas: usize,
    pub steps: Vec<Step>,
    /// Whether reconcilers run and repair.
    pub reconciled: bool,
    /// The mechanism of the product that is taken away, to see that it is missed.
    pub broken: Option<&'static str>,
    /// How long nothing at all may be handled once everything is healed, until what is missing then counts as lost.
    pub patience: Duration,
}

impl Plan {
    /// The schedule of a seed. With names in `only`, no other faults are chosen.
    pub fn new(seed: u64, length: Duration, only: &[String]) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xA5A5_5A5A);
        (0..8).for_each(|_| _ = random.next());
        let replicas = if seed.is_multiple_of(2) { 3 } else { 1 };
        let chosen: Vec<_> =
            FAULTS.iter().filter(|fault| only.is_empty() || only.iter().any(|name| name == fault.1)).collect();
        let total = chosen.iter().map(|fault| fault.2).sum::<u64>();
        let (mut steps, mut at) = (Vec::new(), Duration::from_secs(2));
        while at < length && total > 0 {
            let mut choice = random.below(total);
            let fault = chosen.iter().find(|fault| match choice.checked_sub(fault.2) {
                Some(rest) => {
                    choice = rest;
                    false
                }
                None => true,
            });
            let (kind, _, _, (least, most)) = **fault.unwrap();
            let lasts = Duration::from_millis(least + random.below(most - least));
            steps.push(Step { at, kind, target: random.below(60) as usize, lasts });
            // Now and then several come at once.
            at += Duration::from_millis(if random.one_in(5) { 50 } else { 300 + random.below(1500) });
        }
        Self { seed, length, replicas, steps, reconciled: true, broken: None, patience: Duration::from_secs(120) }
    }

    /// A short run without a mechanism, and with nobody who repairs what then goes wrong.
    pub fn without(mechanism: &'static str, only: &[&str], seconds_between: u64, seed: u64) -> Self {
        let only: Vec<String> = only.iter().map(|name| (*name).into()).collect();
        let mut plan = Self::new(seed, Duration::from_secs(30), &only);
        // Enough time in between for something to go wrong.
        let mut last = Duration::ZERO;
        plan.steps.retain(|step| {
            let keep = !only.is_empty() && step.at >= last + Duration::from_secs(seconds_between);
            last = if keep { step.at } else { last };
            keep
        });
        let patience = Duration::from_secs(if mechanism == CONTROL { 120 } else { 10 });
        Self { reconciled: false, broken: Some(mechanism), patience, ..plan }
    }
}

#[test]
fn a_seed_decides_everything_and_each_fault_has_its_turn() {
    let length = Duration::from_secs(3600);
    let plan = Plan::new(7, length, &[]);
    assert_eq!(plan.steps, Plan::new(7, length, &[]).steps);
    assert_ne!(plan.steps, Plan::new(8, length, &[]).steps);
    for fault in FAULTS {
        assert!(plan.steps.iter().any(|step| step.kind == fault.0), "{} never comes", fault.1);
    }
    let only = Plan::new(7, length, &["relay-killed".into()]);
    assert!(only.steps.iter().all(|step| step.kind == Kind::RelayKilled));
}
