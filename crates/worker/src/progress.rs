//! What a subscriber tells about itself while it runs: to health checks and to the metrics.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::notes::Notes;
use super::sample::Sample;
use super::subscriber::Subscriber;
use aftercommit_core::health::{Facts, Health, Phase};
use aftercommit_core::telemetry;

/// How far a subscriber is.
#[derive(Debug, Clone)]
pub(super) struct SubscriberPosition {
    pub(super) phase: Phase,
    /// The epoch in which this instance is active or last was; 0 before the first time.
    pub(super) epoch: i64,
    /// What it does or waits for.
    pub(super) state: String,
    /// What a handler said of that. Health checks, which everybody may ask, do not show it.
    detail: Option<String>,
    /// Whether something keeps it from working.
    troubled: bool,
    /// Why the database does not let it keep its lease.
    database: Option<String>,
    /// Why the NATS server does not deliver.
    delivery: Option<String>,
    /// When it last decided about an event, found nothing to do, or found another instance active.
    pub(super) progressed: Instant,
    pub(super) load: DispatcherLoad,
    /// Events that this instance has decided about since it was started.
    pub(super) settled: u64,
}

/// What a dispatcher has in hand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DispatcherLoad {
    /// Events that could be given to an executor.
    pub(super) ready: usize,
    /// Executors that work.
    pub(super) executors: usize,
    /// Events that wait for a point in time.
    pub(super) held: usize,
    /// Those of them that wait for the end of an outage.
    pub(super) interrupted: usize,
}

/// What became of an event, as the label `outcome`.
#[derive(Debug, Clone, Copy)]
pub(super) enum EventOutcome {
    /// It took effect.
    Ok,
    /// It had been done before.
    Duplicate,
    /// Its attempt failed.
    Retry,
    /// It asked to come again later.
    Snoozed,
    /// A service that its handler needs is not available.
    Interrupted,
    /// It became a dead letter.
    Dead,
}

/// The position of one subscriber, written by whoever moves it.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) subscriber: String,
    /// How long a handler may take.
    time_limit: Duration,
    position: Mutex<SubscriberPosition>,
    sample: Mutex<Sample>,
    pub(super) notes: Notes,
    metrics: Metrics,
}

impl Progress {
    pub(super) fn new(subscriber: &Subscriber) -> Self {
        let position = SubscriberPosition {
            phase: Phase::Connecting,
            epoch: 0,
            state: "starting".into(),
            detail: None,
            troubled: false,
            database: None,
            delivery: None,
            progressed: Instant::now(),
            load: DispatcherLoad::default(),
            settled: 0,
        };
        let metrics = Metrics::new(&subscriber.name);
        // Not 0 before the first look.
        metrics.sampled(&Sample::default());
        Self {
            subscriber: subscriber.name.clone(),
            time_limit: subscriber.settings.time_limit,
            position: Mutex::new(position),
            sample: Mutex::default(),
            notes: Notes::default(),
            metrics,
        }
    }

    /// Where it is now.
    pub(super) fn position(&self) -> SubscriberPosition {
        self.lock().clone()
    }

    /// What was seen last of its consumer and its tables.
    pub(super) fn sample(&self) -> Sample {
        self.sample.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, SubscriberPosition> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It stands by or is paused, which counts as progress.
    pub(super) fn rest(&self, phase: Phase, state: impl Into<String>) {
        let mut position = self.lock();
        (position.phase, position.state, position.troubled) = (phase, state.into(), false);
        position.progressed = Instant::now();
        position.load = DispatcherLoad::default();
        position.delivery = None;
        self.metrics.held.set(0.0);
        self.metrics.phase(phase);
    }

    /// It is active from now on.
    pub(super) fn lead(&self, epoch: i64) {
        self.lock().epoch = epoch;
        self.metrics.epoch.set(epoch as f64);
        self.rest(Phase::Leading, "taking over");
    }

    /// It has a consumer and goes to work.
    pub(super) fn work(&self) {
        let mut position = self.lock();
        position.phase = Phase::Leading;
        (position.state, position.troubled) = ("working".into(), false);
        position.delivery = None;
        self.metrics.phase(Phase::Leading);
    }

    /// It does not know who is active, for this reason.
    pub(super) fn connecting(&self, reason: impl Into<String>) {
        self.trouble(reason);
        self.lock().phase = Phase::Connecting;
        self.metrics.phase(Phase::Connecting);
    }

    /// Something keeps it from working.
    pub(super) fn trouble(&self, reason: impl Into<String>) {
        self.trouble_with(reason, None);
    }

    /// The same, with what a handler said of it.
    pub(super) fn trouble_with(&self, reason: impl Into<String>, detail: Option<String>) {
        let mut position = self.lock();
        (position.state, position.detail, position.troubled) = (reason.into(), detail, true);
    }

    /// Whether the database lets it keep its lease; if not, why.
    pub(super) fn database(&self, problem: Option<String>) {
        self.lock().database = problem;
    }

    /// Whether the server delivers; if not, why.
    pub(super) fn delivery(&self, problem: Option<String>) {
        self.lock().delivery = problem.map(|why| format!("the server does not deliver: {why}"));
    }

    /// What its dispatcher has in hand.
    pub(super) fn load(&self, load: DispatcherLoad) {
        let held = std::mem::replace(&mut self.lock().load, load).held;
        if held != load.held {
            self.metrics.held.set(load.held as f64);
        }
    }

    /// It has decided about an event.
    pub(super) fn settled(&self) {
        let mut position = self.lock();
        position.progressed = Instant::now();
        position.settled += 1;
        if position.troubled {
            (position.state, position.troubled) = ("working".into(), false);
        }
    }

    /// This became of an event.
    pub(super) fn count(&self, outcome: EventOutcome) {
        self.metrics.outcome(outcome).increment(1);
    }

    /// An event that was written at that time has taken effect.
    pub(super) fn took_effect(&self, written: DateTime<Utc>) {
        self.count(EventOutcome::Ok);
        self.metrics.latency.record((Utc::now() - written).as_seconds_f64().max(0.0));
    }

    /// A handler ran for so long.
    pub(super) fn handled(&self, took: Duration) {
        self.metrics.handler.record(took);
    }

    /// So many events were committed in one transaction.
    pub(super) fn committed(&self, events: usize) {
        self.metrics.batch.record(events as f64);
    }

    /// A message was delivered once more.
    pub(super) fn redelivered(&self) {
        self.metrics.redelivered.increment(1);
    }

    /// Something was seen of its consumer or its tables. When nothing is left to do, that is progress too.
    pub(super) fn sampled(&self, note: impl FnOnce(&mut Sample)) {
        let mut sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        note(&mut sample);
        self.metrics.sampled(&sample);
        let nothing_left = sample.pending() == Some(0);
        drop(sample);
        let mut position = self.lock();
        let idle = position.phase == Phase::Leading && position.load.runnable() == 0 && !position.is_troubled();
        if nothing_left && idle {
            position.progressed = Instant::now();
        }
    }

    /// Whether it makes progress.
    pub(super) fn health(&self, outage: Option<&str>, patience: Duration, now: Instant) -> Health {
        let position = self.position();
        let patience = self.patience(&position, patience);
        self.with_facts(&position, outage, |facts| facts.health(patience, now))
    }

    /// Whether it makes none and nothing is known to keep it.
    pub(super) fn hangs(&self, outage: Option<&str>, patience: Duration, now: Instant) -> bool {
        let position = self.position();
        let patience = self.patience(&position, patience);
        self.with_facts(&position, outage, |facts| facts.hangs(patience, now))
    }

    /// A handler that is within its time limit is not stuck.
    fn patience(&self, position: &SubscriberPosition, patience: Duration) -> Duration {
        let handlers_run = position.load.executors > 0 && !position.is_troubled();
        patience + if handlers_run { self.time_limit } else { Duration::ZERO }
    }

    /// Whether it has what it needs to work.
    pub(super) fn readiness(&self, outage: Option<&str>) -> Health {
        self.with_facts(&self.position(), outage, |facts| facts.readiness())
    }

    /// Its phase, whether it can work, and in words what it does or waits for.
    pub(super) fn standing(&self) -> (Phase, bool, String) {
        let position = self.position();
        let ready = !position.is_troubled() && position.phase != Phase::Connecting;
        let state = self.state(&position);
        let state = match position.detail.as_ref().filter(|_| position.troubled) {
            Some(detail) => format!("{state}: {detail}"),
            None => state,
        };
        (position.phase, ready, state)
    }

    /// What it does or waits for, with all that is known to be in its way.
    fn state(&self, position: &SubscriberPosition) -> String {
        let mut state = position.state.clone();
        if position.phase == Phase::Leading {
            let told = [&position.database, &position.delivery].into_iter().flatten().cloned();
            for obstacle in told.chain(self.sample().obstacles()) {
                if !state.contains(&obstacle) {
                    state = format!("{state}; {obstacle}");
                }
            }
        }
        state
    }

    fn with_facts<T>(
        &self,
        position: &SubscriberPosition,
        outage: Option<&str>,
        judge: impl FnOnce(&Facts<'_>) -> T,
    ) -> T {
        let sample = self.sample();
        let runnable = position.load.runnable() as u64;
        let waiting =
            sample.pending().map(|pending| i64::try_from(pending.saturating_add(runnable)).unwrap_or(i64::MAX));
        judge(&Facts {
            phase: position.phase,
            state: &self.state(position),
            waiting,
            blocked: position.is_troubled(),
            outage,
            progressed: position.progressed,
        })
    }

    /// Brings the metric up to date that changes by itself.
    pub(super) fn refresh(&self) {
        self.metrics.since_progress.set(self.lock().progressed.elapsed().as_secs_f64());
    }
}

impl SubscriberPosition {
    fn is_troubled(&self) -> bool {
        self.troubled || self.database.is_some() || self.delivery.is_some()
    }
}

impl DispatcherLoad {
    /// Events that could run now. Those that wait for their next attempt, and those behind them, are not counted: they
    /// wait as they should.
    fn runnable(&self) -> usize {
        self.ready + self.executors + self.interrupted
    }
}

/// The metrics of a subscriber, looked up once.
#[derive(Debug)]
struct Metrics {
    outcomes: [Counter; 6],
    handler: Histogram,
    batch: Histogram,
    latency: Histogram,
    redelivered: Counter,
    pending: Gauge,
    in_flight: Gauge,
    held: Gauge,
    failing: Gauge,
    dead_letters: Gauge,
    redrive: Gauge,
    active: Gauge,
    epoch: Gauge,
    paused: Gauge,
    since_progress: Gauge,
}

impl Metrics {
    fn new(subscriber: &str) -> Self {
        let gauge = |metric: telemetry::Metric| gauge!(metric.name, "subscriber" => subscriber.to_string());
        let histogram = |metric: telemetry::Metric| histogram!(metric.name, "subscriber" => subscriber.to_string());
        let outcome = |outcome: &'static str| {
            let name = telemetry::WORKER_EVENTS_TOTAL.name;
            counter!(name, "subscriber" => subscriber.to_string(), "outcome" => outcome)
        };
        Self {
            outcomes: ["ok", "duplicate", "retry", "snoozed", "interrupted", "dead"].map(outcome),
            handler: histogram(telemetry::WORKER_HANDLER_SECONDS),
            batch: histogram(telemetry::WORKER_BATCH_EVENTS),
            latency: histogram(telemetry::WORKER_LATENCY_SECONDS),
            redelivered: counter!(telemetry::WORKER_REDELIVERED_TOTAL.name, "subscriber" => subscriber.to_string()),
            pending: gauge(telemetry::WORKER_PENDING),
            in_flight: gauge(telemetry::WORKER_IN_FLIGHT),
            held: gauge(telemetry::WORKER_HELD),
            failing: gauge(telemetry::WORKER_FAILING),
            dead_letters: gauge(telemetry::WORKER_DEAD_LETTERS),
            redrive: gauge(telemetry::WORKER_REDRIVE),
            active: gauge(telemetry::WORKER_ACTIVE),
            epoch: gauge(telemetry::WORKER_EPOCH),
            paused: gauge(telemetry::WORKER_PAUSED),
            since_progress: gauge(telemetry::WORKER_SECONDS_SINCE_PROGRESS),
        }
    }

    fn outcome(&self, outcome: EventOutcome) -> &Counter {
        let [ok, duplicate, retry, snoozed, interrupted, dead] = &self.outcomes;
        match outcome {
            EventOutcome::Ok => ok,
            EventOutcome::Duplicate => duplicate,
            EventOutcome::Retry => retry,
            EventOutcome::Snoozed => snoozed,
            EventOutcome::Interrupted => interrupted,
            EventOutcome::Dead => dead,
        }
    }

    fn phase(&self, phase: Phase) {
        self.active.set(if matches!(phase, Phase::Leading | Phase::Paused) { 1.0 } else { 0.0 });
        self.paused.set(if phase == Phase::Paused { 1.0 } else { 0.0 });
    }

    /// An unknown value is no number: an old one would look like a healthy one.
    fn sampled(&self, sample: &Sample) {
        let number = |value: Option<u64>| value.map_or(f64::NAN, |value| value as f64);
        self.pending.set(number(sample.pending()));
        self.in_flight.set(number(sample.in_flight()));
        self.failing.set(number(sample.failing()));
        self.dead_letters.set(number(sample.dead_letters()));
        self.redrive.set(number(sample.redrive()));
    }
}
