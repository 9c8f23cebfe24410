//! What the outbox's database says, looked at every few seconds, on a connection that nothing waits for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{Gauge, gauge};
use tokio::sync::watch;

use super::progress::RelayPosition;
use aftercommit_core::config::{Naming, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::health::Phase;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, parked, relay_log, status};
use aftercommit_core::relay::LEASE;
use aftercommit_core::telemetry;

/// The pause between two looks, at least.
const EVERY: Duration = Duration::from_secs(5);
/// The pause lasts so many times as long as the look took, so that a huge backlog does not keep the database busy.
const REST: u32 = 20;
/// A look that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(30);

/// What was seen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) backlog: status::Backlog,
    /// Events that are parked or on their way out.
    pub(super) parked: i64,
    /// The age of the longest open transaction in seconds; none when the role may not see it.
    oldest_transaction: Option<f64>,
}

/// Looks again and again.
pub(super) struct Sampler {
    pub(super) postgres: PostgresConfig,
    pub(super) naming: Arc<Naming>,
    pub(super) position: watch::Receiver<RelayPosition>,
    /// None while the database does not answer.
    pub(super) samples: watch::Sender<Option<Sample>>,
}

impl Sampler {
    pub(super) async fn run(self) {
        let gauges = Gauges::new(&self.naming.stream);
        // Not 0 before the first look.
        gauges.set(None);
        let mut connection = None;
        let mut failed = false;
        loop {
            let began = Instant::now();
            let sample = match tokio::time::timeout(DEADLINE, self.look(&mut connection)).await {
                Ok(sample) => sample,
                Err(_) => Err(Error::new(ErrorKind::Database, format!("no answer in {DEADLINE:?}"))),
            };
            if let Err(error) = &sample {
                connection = None;
                if !failed {
                    tracing::warn!(error = error.report(), "the backlog cannot be read");
                }
            }
            failed = sample.is_err();
            let sample = sample.ok();
            gauges.set(sample.as_ref());
            self.samples.send_replace(sample);
            tokio::time::sleep(EVERY.max(began.elapsed() * REST)).await;
        }
    }

    async fn look(&self, connection: &mut Option<Session>) -> Result<Sample, Error> {
        let failed = |error| database_error("reading the backlog failed", error);
        let mut open = match connection.take() {
            Some(open) => open,
            None => postgres::connect(&self.postgres, "aftercommit-relay").await?.watched(),
        };
        let state = relay_log::newest(&mut open).await.map_err(failed)?;
        let reported = status::leader(&mut open, LEASE).await.map_err(failed)?.and_then(|leader| leader.last_id);
        let own = {
            let position = self.position.borrow();
            matches!(position.phase, Phase::Leading | Phase::Paused).then_some(position.last_id)
        };
        // The leader knows better than its last report.
        let last_id = reported.max(own).unwrap_or(0);
        let backlog = status::backlog(&mut open, &state, last_id).await.map_err(failed)?;
        let parked = parked::count(&mut open).await.map_err(failed)?;
        let oldest_transaction = status::oldest_transaction(&mut open).await.map_err(failed)?;
        *connection = Some(open);
        Ok(Sample { backlog, parked, oldest_transaction })
    }
}

struct Gauges {
    backlog: Gauge,
    oldest: Gauge,
    parked: Gauge,
    oldest_transaction: Gauge,
}

impl Gauges {
    fn new(stream: &str) -> Self {
        let gauge = |metric: telemetry::Metric| gauge!(metric.name, "stream" => stream.to_string());
        Self {
            backlog: gauge(telemetry::RELAY_BACKLOG_EVENTS),
            oldest: gauge(telemetry::RELAY_BACKLOG_OLDEST_SECONDS),
            parked: gauge(telemetry::RELAY_PARKED),
            oldest_transaction: gauge(telemetry::RELAY_OLDEST_TRANSACTION_SECONDS),
        }
    }

    /// An unknown value is no number: an old one would look like a healthy one.
    fn set(&self, sample: Option<&Sample>) {
        let backlog = sample.map(|sample| &sample.backlog);
        self.backlog.set(backlog.map_or(f64::NAN, |backlog| backlog.events as f64));
        self.oldest.set(backlog.map_or(f64::NAN, |backlog| backlog.oldest_seconds.unwrap_or(0.0)));
        self.parked.set(sample.map_or(f64::NAN, |sample| sample.parked as f64));
        self.oldest_transaction.set(sample.and_then(|sample| sample.oldest_transaction).unwrap_or(f64::NAN));
    }
}
