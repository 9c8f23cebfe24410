//! One run of a job, from the wish to the summary.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use metrics::counter;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::job::{Done, Job, Run, Tally};
use super::{Mode, Outcome, Scope, Summary};
use crate::error::{Error, ErrorKind, panic_text};
use crate::fault;
use crate::postgres::connections::Connections;
use crate::postgres::reconcile::{self, Begun, Counts, Ending, NewRun, RunRow};
use crate::postgres::{self, finding};
use crate::telemetry;

/// How long a run counts as alive without a sign of life.
const LEASE: Duration = Duration::from_secs(6);
/// How often it gives one.
const RENEW: Duration = Duration::from_secs(2);
/// How often a run on demand looks whether another one has ended.
const LOOK: Duration = Duration::from_millis(250);
/// How long the database may take for the end of a run.
const END: Duration = Duration::from_secs(10);
/// How long ended runs and settled findings are kept.
const RETENTION: Duration = Duration::from_secs(30 * 86_400);
/// How many of them are deleted after a run.
const PRUNE: i64 = 5_000;

/// What somebody wants to have run.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) scheduled: bool,
    pub(super) mode: Mode,
    pub(super) scope: Scope,
}

/// How a run broke off or ended.
enum End {
    Done(Done),
    Failed(String),
    Stopped,
    Lost,
}

/// Runs jobs against one database.
#[derive(Clone)]
pub(super) struct Executor {
    pub(super) connections: Arc<Connections>,
    pub(super) process: String,
    /// How many jobs of a runner have their turn at the same time.
    pub(super) turns: Arc<Semaphore>,
}

impl Executor {
    /// Runs a job as the schedule wants it: if it is due and nobody else runs it. Fails when the database does not
    /// even say that.
    pub(super) async fn scheduled(&self, job: &dyn Job, stop: &CancellationToken) -> Result<Summary, Error> {
        let order = Order { scheduled: true, mode: job.schedule().mode, scope: Scope::New };
        Ok(match self.begin(job, &order).await? {
            Begun::Run(row) => self.execute(job, order, row, stop).await,
            other => Summary::skipped(job.name(), why(&other)),
        })
    }

    /// Runs a job on demand, after the run that is under way.
    pub(super) async fn demanded(
        &self,
        job: &dyn Job,
        order: Order,
        stop: &CancellationToken,
    ) -> Result<Summary, Error> {
        let mut waiting = false;
        loop {
            match self.begin(job, &order).await? {
                Begun::Run(row) => return Ok(self.execute(job, order, row, stop).await),
                other if !waiting => {
                    tracing::info!(reconciler = job.name(), reason = why(&other), "waiting");
                    waiting = true;
                }
                _ => {}
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(Summary::skipped(job.name(), "stopped while it waited".into())),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn begin(&self, job: &dyn Job, order: &Order) -> Result<Begun, Error> {
        let schedule = job.schedule();
        let new = NewRun {
            name: job.name(),
            cause: if order.scheduled { "scheduled" } else { "demand" },
            mode: order.mode.as_str(),
            scope: order.scope.as_str(),
            holder: &self.process,
            interval: schedule.interval,
            full_every: schedule.full_every.filter(|_| order.scheduled),
            ttl: LEASE,
        };
        let wait = |failures| schedule.retry_after(failures);
        self.connections
            .run(async |session| reconcile::begin(session, &new, wait).await)
            .await
            .map_err(|error| postgres::database_error(format!("a run of {} cannot begin", job.name()), error))
    }

    async fn execute(&self, job: &dyn Job, order: Order, row: RunRow, stop: &CancellationToken) -> Summary {
        fault::point("reconciler-begun");
        let started = Instant::now();
        let scope = if row.scope == "full" { Scope::Full } else { order.scope.clone() };
        tracing::info!(reconciler = job.name(), run = row.id, scope = row.scope, mode = order.mode.as_str(), "running");
        let mut run = Run {
            connections: Arc::clone(&self.connections),
            id: row.id,
            name: job.name().into(),
            mode: order.mode,
            scope,
            scheduled: order.scheduled,
            position: row.position,
            tally: Tally::default(),
            failures: Vec::new(),
            named: 0,
        };
        let end = self.work(job, &mut run, stop).await;
        fault::point("reconciler-done");
        let counts = run.tally.counts();
        let end = match end {
            End::Done(_) if counts.failed > 0 && counts.failed >= counts.scanned => {
                let first = run.failures.first().map(|failure| format!(", {}: {}", failure.item, failure.reason));
                End::Failed(format!("every item failed{}", first.unwrap_or_default()))
            }
            end => end,
        };
        let outcome = match &end {
            End::Done(_) => Outcome::Ran,
            End::Failed(reason) => Outcome::Failed(reason.clone()),
            End::Lost => Outcome::Failed("another process has taken over".into()),
            End::Stopped => Outcome::Stopped,
        };
        self.record(job, &order, row.id, row.failures, &end, counts).await;
        fault::point("reconciler-recorded");
        let amount = |count: i64| count.unsigned_abs();
        let summary = Summary {
            reconciler: job.name().into(),
            run: Some(row.id),
            outcome,
            scanned: amount(counts.scanned),
            found: amount(counts.found),
            repaired: amount(counts.repaired),
            failed: amount(counts.failed),
            failures: run.failures,
            took: started.elapsed(),
        };
        tell(&summary);
        summary
    }

    /// Lets the job work, with signs of life beside it, until it ends or has to.
    async fn work(&self, job: &dyn Job, run: &mut Run, stop: &CancellationToken) -> End {
        let lost = CancellationToken::new();
        let keeper = keep(Arc::clone(&self.connections), run.id, run.tally.clone(), lost.clone());
        let _keeper = AbortOnDropHandle::new(tokio::spawn(keeper));
        tokio::select! {
            biased;
            () = lost.cancelled() => End::Lost,
            () = stop.cancelled() => End::Stopped,
            result = AssertUnwindSafe(job.run(run)).catch_unwind() => match result {
                Ok(Ok(done)) => End::Done(done),
                Ok(Err(error)) if error.kind() == ErrorKind::Fenced => End::Lost,
                Ok(Err(error)) => End::Failed(error.report()),
                Err(panic) => End::Failed(format!("it panicked: {}", panic_text(&*panic))),
            }
        }
    }

    /// Writes down how the run ended. When that fails, the next run closes this one.
    async fn record(&self, job: &dyn Job, order: &Order, run: i64, failures: i32, end: &End, counts: Counts) {
        let keyed = matches!(order.scope, Scope::Keys(_));
        let mut ending = Ending { counts, ..Ending::default() };
        match end {
            End::Lost => return,
            End::Stopped => ending.result = "stopped",
            End::Failed(reason) => {
                ending.result = "failed";
                ending.error = Some(reason);
                ending.retry_after = (!keyed).then(|| job.schedule().retry_after(failures + 1));
            }
            End::Done(done) => {
                ending.result = "ok";
                ending.position = done.position.as_ref();
                ending.detail = done.detail.as_ref();
                ending.reconciled_up_to = done.reconciled_up_to;
                ending.swept_since = done.swept_since;
                // Somebody who only looks must not put off a scheduled repair.
                ending.counts_as_success = !keyed && (order.scheduled || order.mode == Mode::Repair);
            }
        }
        let recorded = self.connections.run(async |session| {
            let ended = reconcile::end(session, job.name(), run, &ending).await?;
            reconcile::prune(session, RETENTION, PRUNE).await?;
            finding::prune(session, RETENTION, PRUNE).await?;
            Ok(ended)
        });
        match tokio::time::timeout(END, recorded).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => tracing::warn!(reconciler = job.name(), run, "the run was closed by another process"),
            Ok(Err(error)) => {
                let error = postgres::database_error("the end of a run cannot be recorded", error).report();
                tracing::error!(reconciler = job.name(), run, error, "not recorded");
            }
            Err(_) => {
                tracing::error!(reconciler = job.name(), run, error = "PostgreSQL does not answer", "not recorded")
            }
        }
    }
}

fn why(begun: &Begun) -> String {
    match begun {
        Begun::Run(row) => format!("run {} has begun", row.id),
        Begun::Busy { holder, seconds } => format!("{holder} runs it since {seconds:.0} s"),
        Begun::NotDue { seconds, due_in } => format!("last success {seconds:.0} s ago, due in {due_in:.0} s"),
        Begun::TooSoon { failures, due_in } => format!("failed {failures} times in a row, next try in {due_in:.0} s"),
        Begun::Closed { failures } => format!("the process of the last run died, {failures} failures in a row"),
    }
}

/// Gives signs of life until another process has closed the run. While the database is away nobody can do that.
async fn keep(connections: Arc<Connections>, run: i64, tally: Tally, lost: CancellationToken) {
    loop {
        tokio::time::sleep(RENEW).await;
        let renewed = connections.run(async |session| reconcile::keep_alive(session, run, tally.counts(), LEASE).await);
        match tokio::time::timeout(LEASE, renewed).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return lost.cancel(),
            Ok(Err(error)) => tracing::debug!(run, error = %error, "no sign of life was given"),
            Err(_) => tracing::debug!(run, "no sign of life was given in time"),
        }
    }
}

/// Logs and counts a run.
fn tell(summary: &Summary) {
    let Summary { reconciler, run, scanned, found, repaired, failed, .. } = summary;
    let result = match &summary.outcome {
        Outcome::Ran => "ok",
        Outcome::Failed(_) => "failed",
        Outcome::Skipped(_) | Outcome::Stopped => "stopped",
    };
    let seconds = summary.took.as_secs_f64();
    match &summary.outcome {
        Outcome::Failed(error) => {
            tracing::error!(reconciler, result, run, scanned, found, repaired, failed, seconds, error, "run ended")
        }
        _ => tracing::info!(reconciler, result, run, scanned, found, repaired, failed, seconds, "run ended"),
    }
    counter!(telemetry::RECONCILER_RUNS_TOTAL.name, "reconciler" => reconciler.clone(), "result" => result)
        .increment(1);
    for (metric, amount) in [
        (telemetry::RECONCILER_DRIFT_TOTAL, *found),
        (telemetry::RECONCILER_REPAIRED_TOTAL, *repaired),
        (telemetry::RECONCILER_FAILED_ITEMS_TOTAL, *failed),
    ] {
        counter!(metric.name, "reconciler" => reconciler.clone()).increment(amount);
    }
}
