//! What the runner runs, and what a run is given.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;

use super::{Failure, Mode, Scope};
use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind};
use crate::postgres::connections::Connections;
use crate::postgres::finding::{self, NewFinding, State};
use crate::postgres::reconcile::{self, Counts};
use crate::postgres::{self, session::Session};

/// How many findings, and how many failed items, a run names in the log, and a summary names failed items. All of them are
/// in the table.
const NAMED: usize = 100;
/// The kind of the finding about an item that failed.
pub(crate) const FAILED: &str = "item_failed";

/// A reconciler as the runner sees it. Its run may be dropped at any await, when the process stops or the run was taken
/// over: what is not committed then is undone, and the next run goes on from the saved position.
pub trait Job: Send + Sync + 'static {
    /// The key of its row in `aftercommit.reconciler`.
    fn name(&self) -> &str;

    /// When it runs by itself, and how.
    fn schedule(&self) -> Schedule;

    /// Runs it once.
    fn run<'a>(&'a self, run: &'a mut Run) -> BoxFuture<'a, Result<Done, Error>>;
}

/// When a job runs by itself, and how.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// From the end of a run that succeeded to the next.
    pub interval: Duration,
    /// From the end of a sweep over everything to the next; none when it is never scheduled.
    pub full_every: Option<Duration>,
    /// Whether scheduled runs only report, or repair too.
    pub mode: Mode,
    /// After failed runs, but never longer than the interval.
    pub retry: Backoff,
}

impl Schedule {
    pub(super) fn retry_after(&self, failures: i32) -> Duration {
        self.retry.after(failures.unsigned_abs()).min(self.interval)
    }
}

/// What a run that came to its end knows now.
#[derive(Debug, Default)]
pub struct Done {
    /// Everything committed before is accounted for.
    pub reconciled_up_to: Option<DateTime<Utc>>,
    /// The run with which a sweep over everything began that has now ended: what was not found since is gone.
    pub swept_since: Option<i64>,
    /// Where the next run goes on, if that is not where this one saved last.
    pub position: Option<Value>,
    /// More for the run's row.
    pub detail: Option<Value>,
}

/// A run that is under way.
pub struct Run {
    /// Connections to the database that has the runs and findings.
    pub connections: Arc<Connections>,
    /// The run's id in `aftercommit.reconcile_run`.
    pub id: i64,
    /// Name of the reconciler.
    pub name: String,
    /// Whether this run only reports, or repairs too.
    pub mode: Mode,
    /// Never `New` when a full sweep is due.
    pub scope: Scope,
    /// Whether the schedule wanted it, not somebody who waits for it.
    pub scheduled: bool,
    /// `{}` before the first one was saved.
    pub(super) position: Value,
    pub(super) tally: Tally,
    pub(super) failures: Vec<Failure>,
    /// How many findings there were so far.
    pub(super) named: usize,
}

/// What the run has done, as its signs of life tell it.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally(Arc<Mutex<Counts>>);

impl Tally {
    pub(super) fn counts(&self) -> Counts {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Run {
    /// Counts what was looked at.
    pub fn scanned(&self, items: usize) {
        self.tally.change(|counts| counts.scanned += count(items));
    }

    /// Counts differences that are not findings of their own.
    pub fn differences(&self, found: u64) {
        self.tally.change(|counts| counts.found += i64::try_from(found).unwrap_or(i64::MAX));
    }

    /// Counts what was repaired.
    pub fn repaired(&self, differences: u64) {
        self.tally.change(|counts| counts.repaired += i64::try_from(differences).unwrap_or(i64::MAX));
    }

    /// Writes down and counts items that could not be looked at or repaired: findings of the kind `item_failed`.
    pub async fn failed(&mut self, failures: Vec<Failure>) -> Result<(), Error> {
        let mut findings = Vec::new();
        for Failure { item, reason } in failures {
            self.tally.change(|counts| counts.failed += 1);
            if self.failures.len() < NAMED {
                tracing::warn!(reconciler = self.name, run = self.id, item, error = reason, "an item failed");
                self.failures.push(Failure { item: item.clone(), reason: reason.clone() });
            }
            findings.push(NewFinding { kind: FAILED, item, detail: reason, ..NewFinding::default() });
        }
        self.write(&findings).await
    }

    /// Writes down and counts findings. What was found by earlier runs stays one row.
    pub async fn found(&mut self, findings: &[NewFinding]) -> Result<(), Error> {
        let named = NAMED.saturating_sub(self.named);
        self.named += findings.len();
        for finding in findings.iter().take(named) {
            tracing::warn!(
                reconciler = self.name,
                run = self.id,
                kind = finding.kind,
                item = finding.item,
                event_id = finding.event_id.map(tracing::field::display),
                detail = finding.detail,
                "found"
            );
        }
        self.differences(findings.len() as u64);
        self.write(findings).await
    }

    /// Writes findings down, without counting them: what has become of some that were counted.
    pub async fn write(&self, findings: &[NewFinding]) -> Result<(), Error> {
        if findings.is_empty() {
            return Ok(());
        }
        self.on(async |session| finding::record(session, &self.name, self.id, findings).await)
            .await
            .map_err(|error| postgres::database_error("findings cannot be written", error))
    }

    /// Settles earlier findings of `kind` about these items.
    pub async fn settle(&self, kind: &str, items: &[String], state: State) -> Result<u64, Error> {
        if items.is_empty() {
            return Ok(0);
        }
        self.on(async |session| finding::settle(session, &self.name, kind, items, state).await)
            .await
            .map_err(|error| postgres::database_error("findings cannot be settled", error))
    }

    /// Where the last [`Run::save_position`] or [`Done::position`] left off; none when that cannot be read as such.
    pub fn position<P: DeserializeOwned>(&self) -> Option<P> {
        P::deserialize(&self.position).ok()
    }

    /// Keeps where the next page or run goes on. Fails when another process has taken over.
    pub async fn save_position(&mut self, position: &impl Serialize) -> Result<(), Error> {
        let position = written(position);
        let counts = self.tally.counts();
        let saved = self
            .on(async |session| reconcile::save_position(session, &self.name, self.id, &position, counts).await)
            .await;
        match saved {
            Ok(true) => {
                self.position = position;
                Ok(())
            }
            Ok(false) => Err(Error::new(ErrorKind::Fenced, format!("another process runs {} now", self.name))),
            Err(error) => {
                Err(postgres::database_error(format!("the position of {} cannot be saved", self.name), error))
            }
        }
    }

    async fn on<T>(&self, work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        self.connections.run(work).await
    }
}

/// A position as its column has it. One that cannot be written makes the next run begin at the beginning.
pub fn written(position: &impl Serialize) -> Value {
    serde_json::to_value(position).unwrap_or_default()
}

fn count(items: usize) -> i64 {
    i64::try_from(items).unwrap_or(i64::MAX)
}

/// Lets no more than so many items per second through.
#[derive(Debug)]
pub struct Pace {
    /// The time of one item.
    each: Duration,
    /// When the next one may go.
    next: Instant,
}

impl Pace {
    /// Lets `per_second` items through each second, the first one at once.
    pub fn new(per_second: f64) -> Self {
        Self { each: Duration::from_secs_f64(1.0 / per_second.max(0.001)), next: Instant::now() }
    }

    /// Waits until so many items may go.
    pub async fn take(&mut self, items: u32) {
        tokio::time::sleep_until(self.next).await;
        // Time in which nothing wanted to go is not saved up.
        self.next = self.next.max(Instant::now()) + self.each * items;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_run_never_waits_longer_than_the_interval() {
        let retry = Backoff::default();
        let interval = Duration::from_secs(3);
        let schedule = Schedule { interval, full_every: None, mode: Mode::Repair, retry };
        assert!(schedule.retry_after(1) < interval);
        assert_eq!(schedule.retry_after(30), interval);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pace_holds_over_time_and_saves_nothing_up() {
        let mut pace = Pace::new(10.0);
        let start = Instant::now();
        pace.take(5).await;
        pace.take(5).await;
        assert_eq!(start.elapsed(), Duration::from_millis(500));
        tokio::time::sleep(Duration::from_secs(60)).await;
        let start = Instant::now();
        pace.take(1).await;
        pace.take(1).await;
        assert_eq!(start.elapsed(), Duration::from_millis(100));
    }
}
