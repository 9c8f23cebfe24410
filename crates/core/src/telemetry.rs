//! The metrics: their names, kinds and meanings in one place.
//!
//! The roles record them through the facade of the crate `metrics`. The binaries serve them in Prometheus form; a service
//! that runs a role itself installs a recorder of its own choice before it makes the role. Without a recorder nothing is
//! kept.

use std::fmt;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram};

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from 0 at the start of the process.
    Counter,
    /// The present value.
    Gauge,
    /// Counts of values by size.
    Histogram,
}

/// One metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// The name under which it is recorded and served.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub meaning: &'static str,
}

impl fmt::Display for Metric {
    /// A row of the table in `docs/metrics.md`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<String> = self.labels.iter().map(|label| format!("`{label}`")).collect();
        let kind = format!("{:?}", self.kind).to_lowercase();
        write!(f, "| `{}` | {kind} | {} | {} |", self.name, labels.join(", "), self.meaning)
    }
}

/// One constant for each row, documented by what it says, and all of them in this order, which is that of the documentation.
macro_rules! metrics {
    ($($constant:ident, $kind:ident, $name:literal, [$($label:literal),+]: $meaning:literal;)+) => {
        $(
            #[doc = $meaning]
            pub const $constant: Metric =
                Metric { name: $name, kind: Kind::$kind, labels: &[$($label),+], meaning: $meaning };
        )+

        /// All of them.
        pub const METRICS: &[Metric] = &[$($constant),+];
    };
}

metrics! {
    RELAY_BACKLOG_EVENTS, Gauge, "aftercommit_relay_backlog_events", ["stream"]:
        "Events that are committed and not in the stream, counted up to a million every few seconds by every \
         relay, whether it leads or not. `NaN` while the database does not answer.";
    RELAY_BACKLOG_OLDEST_SECONDS, Gauge, "aftercommit_relay_backlog_oldest_seconds", ["stream"]:
        "How long ago the oldest of them was written, by the database's clock; 0 without a backlog, `NaN` as above.";
    RELAY_PUBLISHED_TOTAL, Counter, "aftercommit_relay_published_total", ["stream"]:
        "Events that the stream has acknowledged to this process.";
    RELAY_ACK_SECONDS, Histogram, "aftercommit_relay_ack_seconds", ["stream"]:
        "From handing a message to the connection until it and all before it are acknowledged.";
    RELAY_LATENCY_SECONDS, Histogram, "aftercommit_relay_latency_seconds", ["stream"]:
        "From the event's `created_at` until the same; it holds the rest of the publisher's transaction, and the \
         difference between the database's clock and the relay's.";
    RELAY_IN_FLIGHT, Gauge, "aftercommit_relay_in_flight", ["stream"]:
        "Messages in flight: sent and not acknowledged.";
    RELAY_IN_FLIGHT_LIMIT, Gauge, "aftercommit_relay_in_flight_limit", ["stream"]:
        "How many messages may be in flight: sent and not acknowledged.";
    RELAY_WINDOW_EVENTS, Histogram, "aftercommit_relay_window_events", ["stream"]:
        "Events per window, when the window is in the stream. Many large windows mean that the relay is behind.";
    RELAY_INTERRUPTIONS_TOTAL, Counter, "aftercommit_relay_interruptions_total", ["stream", "class"]:
        "How often publishing was interrupted and what is stored had to be read from the stream, by class.";
    RELAY_PARKED, Gauge, "aftercommit_relay_parked", ["stream"]:
        "Parked events: the stream will never take them; and those that wait behind them, \
         until an operator decides (`aftercommit parked list`). `NaN` while the database does not answer.";
    RELAY_LEADER, Gauge, "aftercommit_relay_leader", ["stream"]:
        "1 for the relay that leads, 0 for one that stands by or connects.";
    RELAY_EPOCH, Gauge, "aftercommit_relay_epoch", ["stream"]:
        "The epoch in which this relay leads or last led; it grows with every change of leader.";
    RELAY_PAUSED, Gauge, "aftercommit_relay_paused", ["stream"]:
        "1 while an operator has paused the relay.";
    RELAY_SECONDS_SINCE_PROGRESS, Gauge, "aftercommit_relay_seconds_since_progress", ["stream"]:
        "Since this relay last published something, found nothing to publish, or found another one leading. \
         `/healthz` goes by it.";
    RELAY_OLDEST_TRANSACTION_SECONDS, Gauge, "aftercommit_relay_oldest_transaction_seconds", ["stream"]:
        "The age of the longest open transaction of the outbox's database, prepared ones included; 0 without one. \
         `NaN` when the relay's role may not see other roles' transactions (`grant pg_read_all_stats`).";
    RECONCILER_RUNS_TOTAL, Counter, "aftercommit_reconciler_runs_total", ["reconciler", "result"]:
        "Runs of a reconciler that this process has ended, by result: `ok`, `failed`, `stopped`.";
    RECONCILER_LAST_SUCCESS_SECONDS, Gauge, "aftercommit_reconciler_last_success_seconds", ["reconciler"]:
        "How long ago a run of it last succeeded, in whatever process, by the database's clock; `NaN` when none \
         ever did, and while the database does not answer.";
    RECONCILER_INTERVAL_SECONDS, Gauge, "aftercommit_reconciler_interval_seconds", ["reconciler"]:
        "How often it is to run. It is overdue when it has not succeeded for two intervals and 30 seconds.";
    RECONCILER_FAILURES, Gauge, "aftercommit_reconciler_failures", ["reconciler"]:
        "How many of its runs failed in a row, in whatever process. `/healthz` goes by it from 3 on. `NaN` while the \
         database does not answer.";
    RECONCILER_UP_TO, Gauge, "aftercommit_reconciler_up_to_timestamp_seconds", ["reconciler"]:
        "Everything that was committed before this time, in seconds since 1970, is accounted for.";
    RECONCILER_FINDINGS, Gauge, "aftercommit_reconciler_findings", ["reconciler", "kind"]:
        "What it found and what is not settled, by kind. `NaN` as above.";
    RECONCILER_DRIFT_TOTAL, Counter, "aftercommit_reconciler_drift_total", ["reconciler"]:
        "Differences that runs in this process found.";
    RECONCILER_REPAIRED_TOTAL, Counter, "aftercommit_reconciler_repaired_total", ["reconciler"]:
        "Those of them that were repaired, or whose repair was queued.";
    RECONCILER_FAILED_ITEMS_TOTAL, Counter, "aftercommit_reconciler_failed_items_total", ["reconciler"]:
        "Items that runs in this process could not reconcile.";
    JOBS_OVERDUE, Gauge, "aftercommit_jobs_overdue", ["kind"]:
        "Jobs that run and are past the time they were due, by kind, counted every few seconds by every process that asks \
         participants again. `NaN` while the database does not answer.";
    PRUNED_ROWS_TOTAL, Counter, "aftercommit_pruned_rows_total", ["category"]:
        "Rows that sweeps of this process removed, by category, such as `outbox` or the name of a spec.";
    SWEEPS_TOTAL, Counter, "aftercommit_sweeps_total", ["category", "result"]:
        "Sweeps that this process has ended, by result: `done`, `budget`, `stopped`, `busy`, `failed`.";
    TELEMETRY_LOST_TOTAL, Counter, "aftercommit_telemetry_lost_total", ["signal"]:
        "Spans, log records and exports of metrics that this process could not give to the collector of \
         OpenTelemetry, by signal: `traces`, `logs`, `metrics`.";
    WORKER_EVENTS_TOTAL, Counter, "aftercommit_worker_events_total", ["subscriber", "outcome"]:
        "What became of events at this process, by outcome.";
    WORKER_HANDLER_SECONDS, Histogram, "aftercommit_worker_handler_seconds", ["subscriber"]:
        "How long a handler ran, whatever came of it; of an SQL function, one call for all events of a transaction.";
    WORKER_BATCH_EVENTS, Histogram, "aftercommit_worker_batch_events", ["subscriber"]:
        "Events per committed transaction.";
    WORKER_LATENCY_SECONDS, Histogram, "aftercommit_worker_latency_seconds", ["subscriber"]:
        "From the time at which the event was written (`ce-time`) until its effects were committed here; it holds \
         the difference between the clocks of the publisher's database and of the worker.";
    WORKER_REDELIVERED_TOTAL, Counter, "aftercommit_worker_redelivered_total", ["subscriber"]:
        "Messages that JetStream delivered to this process and not for the first time.";
    WORKER_PENDING, Gauge, "aftercommit_worker_pending", ["subscriber"]:
        "Events that JetStream has not delivered yet, looked at every few seconds by every instance, active or \
         not. `NaN` while NATS does not answer or the consumer is missing.";
    WORKER_IN_FLIGHT, Gauge, "aftercommit_worker_in_flight", ["subscriber"]:
        "Events that were delivered and are not done: running, waiting for the next attempt, or waiting behind \
         another event of their key. `NaN` as above.";
    WORKER_HELD, Gauge, "aftercommit_worker_held", ["subscriber"]:
        "Events that wait at this process for their next attempt, for the end of a snooze, or of an outage.";
    WORKER_FAILING, Gauge, "aftercommit_worker_failing", ["subscriber"]:
        "Events with failed attempts that are still to be retried (`aftercommit.attempt`). `NaN` while the \
         database does not answer.";
    WORKER_DEAD_LETTERS, Gauge, "aftercommit_worker_dead_letters", ["subscriber"]:
        "Events that the subscriber gave up on (`aftercommit.dead_letter`), until an operator decides. `NaN` as above.";
    WORKER_REDRIVE, Gauge, "aftercommit_worker_redrive", ["subscriber"]:
        "Events that an operator has redriven and that are not done yet (`aftercommit.redrive`). `NaN` as above.";
    WORKER_ACTIVE, Gauge, "aftercommit_worker_active", ["subscriber"]:
        "1 for the instance that is active for the subscriber, paused or not, 0 for one that stands by or connects.";
    WORKER_EPOCH, Gauge, "aftercommit_worker_epoch", ["subscriber"]:
        "The epoch in which this instance is active or last was; it grows with every change of hands.";
    WORKER_PAUSED, Gauge, "aftercommit_worker_paused", ["subscriber"]:
        "1 at the active instance while an operator has paused the subscriber, or all of them.";
    WORKER_SECONDS_SINCE_PROGRESS, Gauge, "aftercommit_worker_seconds_since_progress", ["subscriber"]:
        "Since this instance last decided about an event, found nothing to do, or found another instance active. \
         `/healthz` goes by it.";
}

/// Counts a sweep that ended with this result.
pub fn swept(category: &str, removed: u64, result: &'static str) {
    counter!(PRUNED_ROWS_TOTAL.name, "category" => category.to_string()).increment(removed);
    counter!(SWEEPS_TOTAL.name, "category" => category.to_string(), "result" => result).increment(1);
    // A counter that begins with 1 has not grown: so the first failure after a success is seen.
    counter!(SWEEPS_TOTAL.name, "category" => category.to_string(), "result" => "failed").increment(0);
}

/// Gives the installed recorder the meaning of every metric.
pub fn describe() {
    for metric in METRICS {
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, metric.meaning),
            Kind::Gauge => describe_gauge!(metric.name, metric.meaning),
            Kind::Histogram => describe_histogram!(metric.name, metric.meaning),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_exactly_these_metrics() {
        let documented: Vec<&str> = include_str!("../../../docs/metrics.md")
            .lines()
            .filter(|line| line.starts_with("| `aftercommit_"))
            .collect();
        let metrics: Vec<String> = METRICS.iter().map(Metric::to_string).collect();
        assert_eq!(documented, metrics);
    }

    #[test]
    fn alerts_are_about_metrics_that_exist() {
        let alerts = include_str!("../../../deploy/prometheus/alerts.yml");
        let words = alerts.split(|c: char| !c.is_ascii_lowercase() && c != '_');
        let named: Vec<&str> = words.filter(|word| word.starts_with("aftercommit_")).collect();
        assert!(!named.is_empty());
        for name in named {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
            assert!(known(name) || base.is_some_and(known), "{name}");
        }
    }
}
