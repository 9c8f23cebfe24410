//! A running relay as it looks from outside.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::gauge;
use serde::Serialize;
use tokio::sync::watch;

use super::progress::RelayPosition;
use super::sample::Sample;
use aftercommit_core::config::Naming;
use aftercommit_core::health::{Check, Facts, Health, Phase};
use aftercommit_core::jetstream::Connection;
use aftercommit_core::telemetry;

/// Tells how a relay is doing, from [`super::Relay::monitor`]. It stays valid while the relay runs.
#[derive(Clone)]
pub struct Monitor {
    pub(super) naming: Arc<Naming>,
    pub(super) holder: String,
    pub(super) patience: Duration,
    pub(super) position: watch::Receiver<RelayPosition>,
    pub(super) samples: watch::Receiver<Option<Sample>>,
    pub(super) nats: watch::Receiver<Option<Connection>>,
}

/// What a relay answers on `aftercommit.relay.<stream>.status`, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RelayReport {
    /// This relay, as `host:process:instance`.
    pub holder: String,
    /// The stream that it publishes to.
    pub stream: String,
    /// The version of aftercommit.
    pub version: &'static str,
    /// What it is at.
    pub phase: Phase,
    /// Whether it leads.
    pub leader: bool,
    /// The epoch in which it leads or last led; 0 before it first led.
    pub epoch: i64,
    /// What it does or waits for.
    pub state: String,
    /// The outbox id of the last event that it stored; 0 before the first.
    pub last_outbox_id: i64,
    /// The stream sequence of that event; 0 before the first.
    pub last_sequence: u64,
    /// Events stored since it took the lead.
    pub published: u64,
    /// Events that are committed and not in the stream; none while the database does not answer.
    pub backlog: Option<i64>,
    /// The age of the oldest of them in seconds; none without a backlog.
    pub backlog_oldest_seconds: Option<f64>,
    /// Events that are parked or on their way out; none while the database does not answer.
    pub parked: Option<i64>,
    /// Whether it is healthy.
    pub healthy: bool,
    /// What it does, or why it makes no progress.
    pub health: String,
}

impl Monitor {
    /// Everything that is known of the relay now.
    pub fn report(&self) -> RelayReport {
        let health = self.health();
        let position = self.position.borrow().clone();
        let sample = self.samples.borrow().clone();
        RelayReport {
            holder: self.holder.clone(),
            stream: self.naming.stream.clone(),
            version: env!("CARGO_PKG_VERSION"),
            phase: position.phase,
            leader: matches!(position.phase, Phase::Leading | Phase::Paused),
            epoch: position.epoch,
            state: position.state,
            last_outbox_id: position.last_id,
            last_sequence: position.last_sequence,
            published: position.published,
            backlog: sample.as_ref().map(|sample| sample.backlog.events),
            backlog_oldest_seconds: sample.as_ref().and_then(|sample| sample.backlog.oldest_seconds),
            parked: sample.as_ref().map(|sample| sample.parked),
            healthy: health.ok,
            health: health.text,
        }
    }

    fn with_facts<T>(&self, judge: impl FnOnce(&Facts<'_>) -> T) -> T {
        let waiting = self.samples.borrow().as_ref().map(|sample| sample.backlog.events);
        let outage = self.nats.borrow().as_ref().map_or_else(|| Some(String::new()), Connection::outage);
        let position = self.position.borrow();
        judge(&Facts {
            phase: position.phase,
            state: &position.state,
            waiting,
            blocked: false,
            outage: outage.as_deref(),
            progressed: position.progressed,
        })
    }
}

impl Check for Monitor {
    fn health(&self) -> Health {
        self.with_facts(|facts| facts.health(self.patience, Instant::now()))
    }

    fn readiness(&self) -> Health {
        self.with_facts(|facts| facts.readiness())
    }

    fn hangs(&self) -> bool {
        let silent = self.position.borrow().told.elapsed() > self.patience;
        silent && self.with_facts(|facts| facts.hangs(self.patience, Instant::now()))
    }

    fn refresh_metrics(&self) {
        let since = self.position.borrow().progressed.elapsed();
        let name = telemetry::RELAY_SECONDS_SINCE_PROGRESS.name;
        gauge!(name, "stream" => self.naming.stream.clone()).set(since.as_secs_f64());
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("holder", &self.holder).finish_non_exhaustive()
    }
}
