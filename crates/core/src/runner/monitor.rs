//! Reconcilers as they look from outside.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::gauge;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::health::{Check, Health};
use crate::postgres::connections::Connections;
use crate::postgres::reconcile_status::{self, ReconcilerRow};
use crate::postgres::{finding, job};
use crate::telemetry;

/// How often the tables are read.
const SAMPLE: Duration = Duration::from_secs(5);
/// How old what was read may be, and how late a run.
const PATIENCE: Duration = Duration::from_secs(30);
/// How names of reconcilers begin that ask participants of jobs again.
pub const JOBS: &str = "job-";
/// So many failures in a row are unhealthy.
const FAILURES: i32 = 3;

/// What is known of the reconcilers.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    rows: Vec<ReconcilerRow>,
    taken: Instant,
}

/// A reconciler to look after.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    pub(super) name: String,
    pub(super) interval: Duration,
}

/// Tells how a runner's reconcilers are doing, from [`super::Runner::monitor`]. It stays valid while the runner runs.
///
/// Unhealthy is a reconciler that failed three times in a row, or that has not succeeded for more than two intervals
/// and 30 seconds, wherever it runs.
#[derive(Debug, Clone)]
pub struct Monitor {
    watched: Arc<[Watched]>,
    started: Instant,
    samples: watch::Receiver<Option<Sample>>,
}

impl Monitor {
    pub(super) fn new(watched: Vec<Watched>, samples: watch::Receiver<Option<Sample>>) -> Self {
        Self { watched: watched.into(), started: Instant::now(), samples }
    }

    fn judge(&self, now: Instant) -> Health {
        let sample = self.samples.borrow();
        let taken = sample.as_ref().map_or(self.started, |sample| sample.taken);
        let silence = now.saturating_duration_since(taken);
        if silence > PATIENCE {
            return Health {
                ok: false,
                text: format!("reconcilers: the database is silent for {} s", silence.as_secs()),
            };
        }
        let Some(sample) = sample.as_ref() else { return Health { ok: true, text: "reconcilers: starting".into() } };
        let up = now.saturating_duration_since(self.started);
        let troubles: Vec<String> = self
            .watched
            .iter()
            .filter_map(|watched| trouble(watched, sample.rows.iter().find(|row| row.name == watched.name), up))
            .collect();
        match troubles.is_empty() {
            true => Health { ok: true, text: format!("{} reconcilers are well", self.watched.len()) },
            false => Health { ok: false, text: troubles.join("; ") },
        }
    }
}

/// What is wrong with a reconciler, if anything. `up` is how long there was time for it to run.
fn trouble(watched: &Watched, row: Option<&ReconcilerRow>, up: Duration) -> Option<String> {
    let name = &watched.name;
    let error = row.and_then(|row| row.error.as_deref()).map(|error| format!(": {error}")).unwrap_or_default();
    let failures = row.map_or(0, |row| row.failures);
    if failures >= FAILURES {
        return Some(format!("reconciler {name} failed {failures} times in a row{error}"));
    }
    let late = watched.interval * 2 + PATIENCE;
    match row.and_then(|row| row.since_success) {
        Some(seconds) if seconds > late.as_secs_f64() && up > PATIENCE => {
            Some(format!("reconciler {name} is overdue, its last success was {seconds:.0} s ago{error}"))
        }
        None if up > late => Some(format!("reconciler {name} is overdue, it has never succeeded{error}")),
        _ => None,
    }
}

impl Check for Monitor {
    fn health(&self) -> Health {
        self.judge(Instant::now())
    }

    fn readiness(&self) -> Health {
        let ok = self.samples.borrow().as_ref().is_some_and(|sample| sample.taken.elapsed() <= PATIENCE);
        Health { ok, text: if ok { "reconcilers: ready" } else { "reconcilers: the database is silent" }.into() }
    }

    fn refresh_metrics(&self) {}
}

/// Reads the state of the reconcilers every few seconds, for the monitor and the metrics.
pub(super) async fn sample(
    connections: Arc<Connections>,
    watched: Vec<Watched>,
    samples: watch::Sender<Option<Sample>>,
    stop: CancellationToken,
) {
    let names: Vec<&str> = watched.iter().map(|watched| watched.name.as_str()).collect();
    for Watched { name, interval } in &watched {
        gauge!(telemetry::RECONCILER_INTERVAL_SECONDS.name, "reconciler" => name.clone()).set(interval.as_secs_f64());
    }
    export_unknown(&names, &BTreeSet::new());
    // Kinds that had findings once, so that their gauges go back to zero.
    let mut kinds = BTreeSet::new();
    // Those that ask participants of jobs again are in a database with jobs, which they may read.
    let has_jobs = names.iter().any(|name| name.starts_with(JOBS));
    let mut jobs = BTreeSet::new();
    while !stop.is_cancelled() {
        let read = connections.run(async |session| {
            Ok((reconcile_status::state(session, &names).await?, finding::count_open(session, &names).await?))
        });
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(Ok((rows, open))) => {
                kinds.extend(open.iter().map(|(name, kind, _)| (name.clone(), kind.clone())));
                export(&rows, &open, &kinds);
                samples.send_replace(Some(Sample { rows, taken: Instant::now() }));
            }
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "the state of the reconcilers was not read");
                export_unknown(&names, &kinds);
            }
            Err(_) => {
                tracing::debug!("the state of the reconcilers was not read in time");
                export_unknown(&names, &kinds);
            }
        }
        if has_jobs {
            let read = connections.run(async |session| job::running(session).await);
            let read = tokio::time::timeout(PATIENCE, read).await.ok().and_then(Result::ok);
            export_jobs(read.as_deref(), &mut jobs);
        }
        let _ = tokio::time::timeout(SAMPLE, stop.cancelled()).await;
    }
}

/// `kinds` are those that had jobs once, so that their gauges go back to zero.
fn export_jobs(running: Option<&[(String, i64, i64)]>, kinds: &mut BTreeSet<String>) {
    kinds.extend(running.unwrap_or_default().iter().map(|(kind, ..)| kind.clone()));
    for kind in kinds.iter() {
        let overdue =
            running.map(|rows| rows.iter().find(|(name, ..)| name == kind).map_or(0, |(_, _, overdue)| *overdue));
        let overdue = overdue.map_or(f64::NAN, |overdue| overdue as f64);
        gauge!(telemetry::JOBS_OVERDUE.name, "kind" => kind.clone()).set(overdue);
    }
}

/// An unknown value is no number: an old one would look like a healthy one.
fn export_unknown(names: &[&str], kinds: &BTreeSet<(String, String)>) {
    for name in names {
        for metric in [telemetry::RECONCILER_LAST_SUCCESS_SECONDS, telemetry::RECONCILER_FAILURES] {
            gauge!(metric.name, "reconciler" => name.to_string()).set(f64::NAN);
        }
    }
    for (name, kind) in kinds {
        gauge!(telemetry::RECONCILER_FINDINGS.name, "reconciler" => name.clone(), "kind" => kind.clone()).set(f64::NAN);
    }
}

fn export(rows: &[ReconcilerRow], open: &[(String, String, i64)], kinds: &BTreeSet<(String, String)>) {
    for row in rows {
        let age = row.since_success.unwrap_or(f64::NAN);
        gauge!(telemetry::RECONCILER_LAST_SUCCESS_SECONDS.name, "reconciler" => row.name.clone()).set(age);
        let failures = gauge!(telemetry::RECONCILER_FAILURES.name, "reconciler" => row.name.clone());
        failures.set(f64::from(row.failures));
        if let Some(time) = row.reconciled_up_to {
            #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit into 52 bits")]
            let seconds = time.timestamp_millis() as f64 / 1_000.0;
            gauge!(telemetry::RECONCILER_UP_TO.name, "reconciler" => row.name.clone()).set(seconds);
        }
    }
    for (name, kind) in kinds {
        let count = open.iter().find(|(n, k, _)| n == name && k == kind).map_or(0, |(_, _, count)| *count);
        #[expect(clippy::cast_precision_loss, reason = "so many findings nobody has")]
        gauge!(telemetry::RECONCILER_FINDINGS.name, "reconciler" => name.clone(), "kind" => kind.clone())
            .set(count as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(row: Option<ReconcilerRow>) -> Monitor {
        let sample = Sample { rows: row.into_iter().collect(), taken: Instant::now() + Duration::from_secs(3600) };
        let watched = Watched { name: "stewards".into(), interval: Duration::from_secs(60) };
        Monitor::new(vec![watched], watch::Sender::new(Some(sample)).subscribe())
    }

    fn row(since_success: Option<f64>, failures: i32, error: Option<&str>) -> ReconcilerRow {
        let error = error.map(str::to_string);
        ReconcilerRow { name: "stewards".into(), since_success, failures, reconciled_up_to: None, error }
    }

    fn after(seconds: u64, row: Option<ReconcilerRow>) -> Health {
        let monitor = monitor(row);
        monitor.judge(monitor.started + Duration::from_secs(seconds))
    }

    #[test]
    fn overdue_runs_are_unhealthy_and_named() {
        assert!(after(40, Some(row(Some(140.0), 0, None))).ok);
        let late = after(40, Some(row(Some(151.0), 1, Some("boom"))));
        assert!(!late.ok && late.text.contains("stewards is overdue") && late.text.contains("boom"), "{}", late.text);
        assert!(after(20, Some(row(Some(9999.0), 0, None))).ok, "the process has just begun");
    }

    #[test]
    fn one_that_never_succeeded_has_the_same_time() {
        assert!(after(140, None).ok);
        assert!(!after(151, None).ok);
        assert!(after(140, Some(row(None, 2, None))).ok);
    }

    #[test]
    fn failures_in_a_row_are_unhealthy_with_their_error() {
        assert!(after(10, Some(row(Some(1.0), 2, Some("boom")))).ok);
        let failing = after(10, Some(row(Some(1.0), 3, Some("boom"))));
        assert_eq!(failing, Health { ok: false, text: "reconciler stewards failed 3 times in a row: boom".into() });
    }

    #[test]
    fn a_silent_database_is_unhealthy() {
        let monitor = monitor(None);
        let later = Instant::now() + Duration::from_secs(3631 + 1);
        assert!(!monitor.judge(later).ok);
        let starting = Monitor::new(Vec::new(), watch::Sender::new(None).subscribe());
        assert!(starting.judge(starting.started).ok && !starting.readiness().ok);
    }
}
