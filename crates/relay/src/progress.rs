//! What the relay tells about itself: to the heartbeat, and through it to `aftercommit status`; to health checks; and to
//! the metrics.

use std::time::Instant;

use chrono::Utc;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use tokio::sync::watch;

use super::cause::ToldCause;
use super::chain::Sent;
use super::classify::Class;
use aftercommit_core::health::Phase;
use aftercommit_core::telemetry;

/// How far the relay is.
#[derive(Debug, Clone)]
pub(super) struct RelayPosition {
    pub(super) phase: Phase,
    /// The epoch in which this relay leads or last led; 0 before it first led.
    pub(super) epoch: i64,
    /// The outbox id of the last event stored in the stream.
    pub(super) last_id: i64,
    /// Its stream sequence.
    pub(super) last_sequence: u64,
    /// Events stored since this process took the lead.
    pub(super) published: u64,
    /// What the relay does or waits for.
    pub(super) state: String,
    /// When it last published something, found nothing to publish, or found another one leading.
    pub(super) progressed: Instant,
    /// When it last told anything: one that waits for a server says so again and again.
    pub(super) told: Instant,
    /// `published` when the window was opened.
    before_window: u64,
}

/// The relay's position, written by whoever moves it, read by heartbeat and health checks.
#[derive(Debug)]
pub(super) struct Progress {
    position: watch::Sender<RelayPosition>,
    metrics: Metrics,
}

impl Progress {
    pub(super) fn new(stream: &str, in_flight_limit: usize) -> Self {
        let position = RelayPosition {
            phase: Phase::Connecting,
            epoch: 0,
            last_id: 0,
            last_sequence: 0,
            published: 0,
            state: String::new(),
            progressed: Instant::now(),
            told: Instant::now(),
            before_window: 0,
        };
        gauge!(telemetry::RELAY_IN_FLIGHT_LIMIT.name, "stream" => stream.to_string()).set(in_flight_limit as f64);
        Self { position: watch::Sender::new(position), metrics: Metrics::new(stream) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<RelayPosition> {
        self.position.subscribe()
    }

    /// Whatever it is at now, with what it does or waits for. To stand by, to lead and to be paused are progress.
    pub(super) fn enter(&self, phase: Phase, state: impl Into<String>) {
        self.position.send_modify(|position| {
            position.phase = phase;
            position.state = state.into();
            position.told = Instant::now();
            if phase != Phase::Connecting {
                position.progressed = Instant::now();
            }
        });
        self.metrics.leader.set(if matches!(phase, Phase::Leading | Phase::Paused) { 1.0 } else { 0.0 });
        self.metrics.paused.set(if phase == Phase::Paused { 1.0 } else { 0.0 });
    }

    /// It leads from now on, and has published nothing yet.
    pub(super) fn lead(&self, epoch: i64) {
        self.position.send_modify(|position| {
            (position.last_id, position.last_sequence, position.published, position.before_window) = (0, 0, 0, 0);
            position.epoch = epoch;
        });
        self.metrics.epoch.set(epoch as f64);
        self.enter(Phase::Leading, "taking over");
    }

    /// Events stored since this process took the lead.
    pub(super) fn published(&self) -> u64 {
        self.position.borrow().published
    }

    /// These events are in the stream now, the last one under `sequence`.
    pub(super) fn stored(&self, events: &[Sent], sequence: u64) {
        let Some(last) = events.last() else { return };
        let now = Instant::now();
        self.position.send_modify(|position| {
            position.last_id = last.outbox_id;
            position.last_sequence = sequence;
            position.published += events.len() as u64;
            (position.progressed, position.told) = (now, now);
        });
        self.metrics.stored(events, now);
    }

    /// The stream's tail was found there.
    pub(super) fn found(&self, outbox_id: i64, sequence: u64) {
        self.position.send_modify(|position| {
            position.last_id = position.last_id.max(outbox_id);
            position.last_sequence = sequence;
        });
    }

    /// So many messages are in flight.
    pub(super) fn in_flight(&self, messages: usize) {
        self.metrics.in_flight.set(messages as f64);
    }

    /// Publishing was interrupted.
    pub(super) fn interrupted(&self, told: &ToldCause) {
        self.in_flight(0);
        counter!(
            telemetry::RELAY_INTERRUPTIONS_TOTAL.name,
            "stream" => self.metrics.stream.clone(),
            "class" => told.class.label()
        )
        .increment(1);
        self.state(format!("interrupted: {}; {}", told.error, told.remedy));
    }

    /// The open window is in the stream.
    pub(super) fn window_done(&self) {
        let mut events = 0;
        self.position.send_modify(|position| {
            events = position.published - position.before_window;
            position.before_window = position.published;
        });
        self.metrics.window_events.record(events as f64);
    }

    /// There is nothing to publish.
    pub(super) fn idle(&self) {
        self.position.send_if_modified(|position| {
            position.progressed = Instant::now();
            position.told = position.progressed;
            let changed = position.state != "idle";
            if changed {
                position.state = "idle".into();
            }
            changed
        });
    }

    pub(super) fn state(&self, state: impl Into<String>) {
        let state = state.into();
        self.position.send_if_modified(|position| {
            let changed = position.state != state;
            position.state = state;
            position.told = Instant::now();
            changed
        });
    }
}

/// The metrics that change with each message, looked up once.
#[derive(Debug)]
struct Metrics {
    stream: String,
    published: Counter,
    ack: Histogram,
    latency: Histogram,
    in_flight: Gauge,
    window_events: Histogram,
    leader: Gauge,
    epoch: Gauge,
    paused: Gauge,
}

impl Metrics {
    fn new(stream: &str) -> Self {
        let gauge = |metric: telemetry::Metric| gauge!(metric.name, "stream" => stream.to_string());
        let histogram = |metric: telemetry::Metric| histogram!(metric.name, "stream" => stream.to_string());
        // A counter that begins with 1 has not grown: the first interruption would not be seen.
        for class in Class::ALL {
            let name = telemetry::RELAY_INTERRUPTIONS_TOTAL.name;
            counter!(name, "stream" => stream.to_string(), "class" => class.label()).increment(0);
        }
        Self {
            stream: stream.into(),
            published: counter!(telemetry::RELAY_PUBLISHED_TOTAL.name, "stream" => stream.to_string()),
            ack: histogram(telemetry::RELAY_ACK_SECONDS),
            latency: histogram(telemetry::RELAY_LATENCY_SECONDS),
            in_flight: gauge(telemetry::RELAY_IN_FLIGHT),
            window_events: histogram(telemetry::RELAY_WINDOW_EVENTS),
            leader: gauge(telemetry::RELAY_LEADER),
            epoch: gauge(telemetry::RELAY_EPOCH),
            paused: gauge(telemetry::RELAY_PAUSED),
        }
    }

    fn stored(&self, events: &[Sent], now: Instant) {
        let clock = Utc::now();
        self.published.increment(events.len() as u64);
        for event in events {
            if let Some(sent_at) = event.sent_at {
                self.ack.record(now.saturating_duration_since(sent_at));
            }
            self.latency.record((clock - event.created_at).as_seconds_f64().max(0.0));
            event.trace_published(&self.stream, now);
        }
    }
}
