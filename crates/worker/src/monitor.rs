//! A running worker as it looks from outside.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use super::progress::Progress;
use super::sampler::Watched;
use aftercommit_core::error::Error;
use aftercommit_core::health::{Check, Health, Phase};
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::service::{self, Service};
use aftercommit_core::postgres::lease;

/// Where a worker writes what its monitors show.
#[derive(Debug)]
pub(super) struct Board {
    /// Who holds the leases.
    pub(super) holder: String,
    pub(super) patience: Duration,
    stream: String,
    subscribers: watch::Sender<Vec<Arc<Progress>>>,
    nats: watch::Sender<Option<Connection>>,
}

impl Board {
    pub(super) fn new(stream: &str) -> Self {
        Self {
            holder: lease::new_holder(),
            patience: Duration::from_secs(30),
            stream: stream.into(),
            subscribers: watch::Sender::default(),
            nats: watch::Sender::new(None),
        }
    }

    pub(super) fn monitor(&self) -> Monitor {
        Monitor {
            holder: self.holder.clone(),
            patience: self.patience,
            subscribers: self.subscribers.subscribe(),
            nats: self.nats.subscribe(),
        }
    }

    /// These are the worker's subscribers.
    pub(super) fn show(&self, subscribers: &[Watched]) {
        self.subscribers.send_replace(subscribers.iter().map(|(progress, _)| Arc::clone(progress)).collect());
    }

    /// NATS cannot be reached when the worker starts.
    pub(super) fn waiting(&self, error: &Error) {
        self.subscribers.borrow().iter().for_each(|progress| progress.connecting(error.report()));
    }

    pub(super) fn connected(&self, nats: &Connection) {
        self.nats.send_replace(Some(nats.clone()));
    }

    /// Registers the worker as a NATS micro service, so that it can be found and asked with the `nats` program.
    pub(super) fn service(&self, nats: Connection) -> impl Future<Output = ()> + use<> {
        let names: Vec<_> = self.subscribers.borrow().iter().map(|progress| progress.subscriber.clone()).collect();
        let metadata =
            [("stream", self.stream.clone()), ("holder", self.holder.clone()), ("subscribers", names.join(","))];
        let service = Service {
            name: "aftercommit-worker",
            description: "Runs handlers for the events of a stream",
            metadata: metadata.into(),
            endpoint: "status",
            subject: format!("aftercommit.worker.{}.status", self.stream),
        };
        let monitor = self.monitor();
        service::run(nats, service, move || serde_json::to_value(monitor.report()).unwrap_or_default())
    }
}

/// Tells how a worker is doing, from [`super::Worker::monitor`]. It stays valid while the worker runs.
#[derive(Clone)]
pub struct Monitor {
    holder: String,
    patience: Duration,
    /// Empty before the worker runs.
    subscribers: watch::Receiver<Vec<Arc<Progress>>>,
    nats: watch::Receiver<Option<Connection>>,
}

/// What a worker answers on `aftercommit.worker.<stream>.status`, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkerReport {
    /// This worker, as `host:process:instance`.
    pub holder: String,
    /// The version of aftercommit.
    pub version: &'static str,
    /// Whether all of its subscribers are healthy.
    pub healthy: bool,
    /// Its subscribers, in the order of their definition.
    pub subscribers: Vec<SubscriberReport>,
}

/// One subscriber of a [`WorkerReport`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SubscriberReport {
    /// The subscriber's name.
    pub name: String,
    /// Its phase in this process; `leading` means that this instance is the active one.
    pub phase: Phase,
    /// Whether this instance is the active one.
    pub active: bool,
    /// The epoch in which this instance is active or last was; 0 before the first time.
    pub epoch: i64,
    /// What it does or waits for.
    pub state: String,
    /// Events that this instance has decided about since it was started.
    pub settled: u64,
    /// Events that JetStream has not delivered yet; none when NATS does not answer.
    pub pending: Option<u64>,
    /// Events that were delivered and not answered; none when NATS does not answer.
    pub in_flight: Option<u64>,
    /// Events that wait here for their next attempt, or for the end of an outage.
    pub held: usize,
    /// Events with failed attempts that are still to be retried; none when the database does not answer.
    pub failing: Option<u64>,
    /// Dead letters; none when the database does not answer.
    pub dead_letters: Option<u64>,
    /// Events that an operator has redriven and that have not run yet; none when the database does not answer.
    pub redrive: Option<u64>,
    /// Whether it is healthy.
    pub healthy: bool,
    /// What it does, or why it makes no progress.
    pub health: String,
}

impl Monitor {
    /// Everything that is known of the worker now.
    pub fn report(&self) -> WorkerReport {
        let outage = self.outage();
        let progress = self.subscribers.borrow().clone();
        let subscribers: Vec<_> =
            progress.iter().map(|progress| self.subscriber(progress, outage.as_deref())).collect();
        WorkerReport {
            holder: self.holder.clone(),
            version: env!("CARGO_PKG_VERSION"),
            healthy: self.health().ok,
            subscribers,
        }
    }

    fn subscriber(&self, progress: &Progress, outage: Option<&str>) -> SubscriberReport {
        let health = progress.health(outage, self.patience, Instant::now());
        let (position, sample) = (progress.position(), progress.sample());
        SubscriberReport {
            name: progress.subscriber.clone(),
            phase: position.phase,
            active: matches!(position.phase, Phase::Leading | Phase::Paused),
            epoch: position.epoch,
            state: position.state,
            settled: position.settled,
            pending: sample.pending(),
            in_flight: sample.in_flight(),
            held: position.load.held,
            failing: sample.failing(),
            dead_letters: sample.dead_letters(),
            redrive: sample.redrive(),
            healthy: health.ok,
            health: health.text,
        }
    }

    fn outage(&self) -> Option<String> {
        self.nats.borrow().as_ref().map_or_else(|| Some(String::new()), Connection::outage)
    }

    /// One line per subscriber, those that are not well first.
    fn all(&self, judge: impl Fn(&Progress, Option<&str>) -> Health) -> Health {
        let outage = self.outage();
        let progress = self.subscribers.borrow();
        if progress.is_empty() {
            return Health { ok: false, text: "starting".into() };
        }
        let judged = progress.iter().map(|progress| {
            let Health { ok, text } = judge(progress, outage.as_deref());
            (ok, format!("{}: {text}", progress.subscriber))
        });
        let mut lines: Vec<(bool, String)> = judged.collect();
        lines.sort_by_key(|(ok, _)| *ok);
        let ok = lines.iter().all(|(ok, _)| *ok);
        Health { ok, text: lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n") }
    }
}

impl Check for Monitor {
    fn health(&self) -> Health {
        let now = Instant::now();
        self.all(|progress, outage| progress.health(outage, self.patience, now))
    }

    fn readiness(&self) -> Health {
        self.all(Progress::readiness)
    }

    fn hangs(&self) -> bool {
        let (outage, now) = (self.outage(), Instant::now());
        self.subscribers.borrow().iter().any(|progress| progress.hangs(outage.as_deref(), self.patience, now))
    }

    fn refresh_metrics(&self) {
        self.subscribers.borrow().iter().for_each(|progress| progress.refresh());
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("holder", &self.holder).finish_non_exhaustive()
    }
}
