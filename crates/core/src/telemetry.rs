//! The metrics: their names, kinds and meanings in one place.
//!
//! The roles record them through the facade of the crate `metrics`. The binaries serve them in Prometheus form; a service
//! that runs a role itself installs a recorder of its own choice before it makes the role. Without a recorder nothing is
//! kept.

use std::fmt;

use metrics::{describe_counter, describe_gauge, describe_histogram};

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

const STREAM: &[&str] = &["stream"];
const SUBSCRIBER: &[&str] = &["subscriber"];

/// Events that are committed and not in the stream.
pub const RELAY_BACKLOG_EVENTS: Metric = Metric {
    name: "aftercommit_relay_backlog_events",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "Events that are committed and not in the stream, counted up to a million every few seconds by every \
              relay, whether it leads or not. `NaN` while the database does not answer.",
};

/// The age of the oldest event of the backlog.
pub const RELAY_BACKLOG_OLDEST_SECONDS: Metric = Metric {
    name: "aftercommit_relay_backlog_oldest_seconds",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "How long ago the oldest of them was written, by the database's clock; 0 without a backlog, `NaN` as above.",
};

/// Events stored in the stream.
pub const RELAY_PUBLISHED_TOTAL: Metric = Metric {
    name: "aftercommit_relay_published_total",
    kind: Kind::Counter,
    labels: STREAM,
    meaning: "Events that the stream has acknowledged to this process.",
};

/// From sending a message to its acknowledgement.
pub const RELAY_ACK_SECONDS: Metric = Metric {
    name: "aftercommit_relay_ack_seconds",
    kind: Kind::Histogram,
    labels: STREAM,
    meaning: "From handing a message to the connection until it and all before it are acknowledged.",
};

/// From writing an event to its acknowledgement.
pub const RELAY_LATENCY_SECONDS: Metric = Metric {
    name: "aftercommit_relay_latency_seconds",
    kind: Kind::Histogram,
    labels: STREAM,
    meaning: "From the event's `created_at` until the same; it holds the rest of the publisher's transaction, and the \
              difference between the database's clock and the relay's.",
};

/// Messages that are sent and not acknowledged.
pub const RELAY_UNDER_WAY: Metric = Metric {
    name: "aftercommit_relay_under_way",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "Messages that are sent and not acknowledged.",
};

/// How many messages may be under way.
pub const RELAY_UNDER_WAY_LIMIT: Metric = Metric {
    name: "aftercommit_relay_under_way_limit",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "How many messages may be under way.",
};

/// Events per window.
pub const RELAY_WINDOW_EVENTS: Metric = Metric {
    name: "aftercommit_relay_window_events",
    kind: Kind::Histogram,
    labels: STREAM,
    meaning: "Events per window, when the window is in the stream. Many large windows mean that the relay is behind.",
};

/// Interruptions of publishing.
pub const RELAY_INTERRUPTIONS_TOTAL: Metric = Metric {
    name: "aftercommit_relay_interruptions_total",
    kind: Kind::Counter,
    labels: &["stream", "class"],
    meaning: "How often publishing was interrupted and what is stored had to be read from the stream, by class.",
};

/// Parked events.
pub const RELAY_PARKED: Metric = Metric {
    name: "aftercommit_relay_parked",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "Events that are set aside because the stream will never take them, and those that wait behind them, \
              until an operator decides (`aftercommit parked list`). `NaN` while the database does not answer.",
};

/// Whether this relay leads.
pub const RELAY_LEADER: Metric = Metric {
    name: "aftercommit_relay_leader",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "1 for the relay that leads, 0 for one that stands by or connects.",
};

/// The epoch of this relay's lead.
pub const RELAY_EPOCH: Metric = Metric {
    name: "aftercommit_relay_epoch",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "The epoch in which this relay leads or last led; it grows with every change of leader.",
};

/// Whether the relay is paused.
pub const RELAY_PAUSED: Metric = Metric {
    name: "aftercommit_relay_paused",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "1 while an operator has paused the relay.",
};

/// Since the relay last got on.
pub const RELAY_SECONDS_SINCE_PROGRESS: Metric = Metric {
    name: "aftercommit_relay_seconds_since_progress",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "Since this relay last published something, found nothing to publish, or found another one leading. \
              `/healthz` goes by it.",
};

/// The longest open transaction.
pub const RELAY_OLDEST_TRANSACTION_SECONDS: Metric = Metric {
    name: "aftercommit_relay_oldest_transaction_seconds",
    kind: Kind::Gauge,
    labels: STREAM,
    meaning: "The age of the longest open transaction of the outbox's database, prepared ones included; 0 without one. \
              `NaN` when the relay's role may not see other roles' transactions (`grant pg_read_all_stats`).",
};

/// What became of events.
pub const WORKER_EVENTS_TOTAL: Metric = Metric {
    name: "aftercommit_worker_events_total",
    kind: Kind::Counter,
    labels: &["subscriber", "outcome"],
    meaning: "What became of events at this process, by outcome.",
};

/// How long handlers take.
pub const WORKER_HANDLER_SECONDS: Metric = Metric {
    name: "aftercommit_worker_handler_seconds",
    kind: Kind::Histogram,
    labels: SUBSCRIBER,
    meaning: "How long a handler ran, whatever came of it; of an SQL function, one call for all events of a \
              transaction.",
};

/// Events per transaction.
pub const WORKER_BATCH_EVENTS: Metric = Metric {
    name: "aftercommit_worker_batch_events",
    kind: Kind::Histogram,
    labels: SUBSCRIBER,
    meaning: "Events per committed transaction.",
};

/// From writing an event to its effect.
pub const WORKER_LATENCY_SECONDS: Metric = Metric {
    name: "aftercommit_worker_latency_seconds",
    kind: Kind::Histogram,
    labels: SUBSCRIBER,
    meaning: "From the time at which the event was written (`ce-time`) until its effects were committed here; it \
              holds the difference between the clocks of the publisher's database and of the worker.",
};

/// Messages that came once more.
pub const WORKER_REDELIVERED_TOTAL: Metric = Metric {
    name: "aftercommit_worker_redelivered_total",
    kind: Kind::Counter,
    labels: SUBSCRIBER,
    meaning: "Messages that JetStream delivered to this process and not for the first time.",
};

/// Events that were not delivered yet.
pub const WORKER_PENDING: Metric = Metric {
    name: "aftercommit_worker_pending",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events that JetStream has not delivered yet, looked at every few seconds by every instance, active \
              or not. `NaN` while NATS does not answer or the consumer is missing.",
};

/// Events that were delivered and not answered.
pub const WORKER_IN_FLIGHT: Metric = Metric {
    name: "aftercommit_worker_in_flight",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events that were delivered and are not done: running, waiting for the next attempt, or waiting \
              behind another event of their key. `NaN` as above.",
};

/// Events that wait for a point in time.
pub const WORKER_HELD: Metric = Metric {
    name: "aftercommit_worker_held",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events that wait at this process for their next attempt, for the end of a snooze, or of an outage.",
};

/// Events whose attempts failed.
pub const WORKER_FAILING: Metric = Metric {
    name: "aftercommit_worker_failing",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events with failed attempts that are still to be retried (`aftercommit.attempt`). `NaN` while the \
              database does not answer.",
};

/// Dead letters.
pub const WORKER_DEAD_LETTERS: Metric = Metric {
    name: "aftercommit_worker_dead_letters",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events that the subscriber gave up on (`aftercommit.dead_letter`), until an operator decides. \
              `NaN` as above.",
};

/// Events that run again.
pub const WORKER_REDRIVE: Metric = Metric {
    name: "aftercommit_worker_redrive",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Events that an operator has sent back and that are not done yet (`aftercommit.redrive`). `NaN` as \
              above.",
};

/// Whether this instance is active.
pub const WORKER_ACTIVE: Metric = Metric {
    name: "aftercommit_worker_active",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "1 for the instance that is active for the subscriber, paused or not, 0 for one that stands by or \
              connects.",
};

/// The epoch of this instance.
pub const WORKER_EPOCH: Metric = Metric {
    name: "aftercommit_worker_epoch",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "The epoch in which this instance is active or last was; it grows with every change of hands.",
};

/// Whether the subscriber is paused.
pub const WORKER_PAUSED: Metric = Metric {
    name: "aftercommit_worker_paused",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "1 at the active instance while an operator has paused the subscriber, or all of them.",
};

/// Since the subscriber last got on.
pub const WORKER_SECONDS_SINCE_PROGRESS: Metric = Metric {
    name: "aftercommit_worker_seconds_since_progress",
    kind: Kind::Gauge,
    labels: SUBSCRIBER,
    meaning: "Since this instance last decided about an event, found nothing to do, or found another instance \
              active. `/healthz` goes by it.",
};

const RECONCILER: &[&str] = &["reconciler"];

/// Runs of reconcilers by result.
pub const RECONCILER_RUNS_TOTAL: Metric = Metric {
    name: "aftercommit_reconciler_runs_total",
    kind: Kind::Counter,
    labels: &["reconciler", "result"],
    meaning: "Runs of a reconciler that this process has ended, by result: `ok`, `failed`, `stopped`.",
};

/// The age of the last success.
pub const RECONCILER_LAST_SUCCESS_SECONDS: Metric = Metric {
    name: "aftercommit_reconciler_last_success_seconds",
    kind: Kind::Gauge,
    labels: RECONCILER,
    meaning: "How long ago a run of it last succeeded, in whatever process, by the database's clock; `NaN` when none ever \
              did.",
};

/// Failures in a row.
pub const RECONCILER_FAILURES: Metric = Metric {
    name: "aftercommit_reconciler_failures",
    kind: Kind::Gauge,
    labels: RECONCILER,
    meaning: "How many of its runs failed in a row, in whatever process. `/healthz` goes by it from 3 on.",
};

/// Until when everything is accounted for.
pub const RECONCILER_UP_TO: Metric = Metric {
    name: "aftercommit_reconciler_up_to_timestamp_seconds",
    kind: Kind::Gauge,
    labels: RECONCILER,
    meaning: "Everything that was committed before this time, in seconds since 1970, is accounted for.",
};

/// Findings that are not settled.
pub const RECONCILER_FINDINGS: Metric = Metric {
    name: "aftercommit_reconciler_findings",
    kind: Kind::Gauge,
    labels: &["reconciler", "kind"],
    meaning: "What it found and what is not settled, by kind.",
};

/// Differences that runs found.
pub const RECONCILER_DRIFT_TOTAL: Metric = Metric {
    name: "aftercommit_reconciler_drift_total",
    kind: Kind::Counter,
    labels: RECONCILER,
    meaning: "Differences that runs in this process found.",
};

/// Differences that runs repaired.
pub const RECONCILER_REPAIRED_TOTAL: Metric = Metric {
    name: "aftercommit_reconciler_repaired_total",
    kind: Kind::Counter,
    labels: RECONCILER,
    meaning: "Those of them that were repaired, or whose repair was queued.",
};

/// Items that could not be reconciled.
pub const RECONCILER_FAILED_ITEMS_TOTAL: Metric = Metric {
    name: "aftercommit_reconciler_failed_items_total",
    kind: Kind::Counter,
    labels: RECONCILER,
    meaning: "Items that runs in this process could not reconcile.",
};

/// All of them, in the order of the documentation.
pub const METRICS: &[Metric] = &[
    RELAY_BACKLOG_EVENTS,
    RELAY_BACKLOG_OLDEST_SECONDS,
    RELAY_PUBLISHED_TOTAL,
    RELAY_ACK_SECONDS,
    RELAY_LATENCY_SECONDS,
    RELAY_UNDER_WAY,
    RELAY_UNDER_WAY_LIMIT,
    RELAY_WINDOW_EVENTS,
    RELAY_INTERRUPTIONS_TOTAL,
    RELAY_PARKED,
    RELAY_LEADER,
    RELAY_EPOCH,
    RELAY_PAUSED,
    RELAY_SECONDS_SINCE_PROGRESS,
    RELAY_OLDEST_TRANSACTION_SECONDS,
    RECONCILER_RUNS_TOTAL,
    RECONCILER_LAST_SUCCESS_SECONDS,
    RECONCILER_FAILURES,
    RECONCILER_UP_TO,
    RECONCILER_FINDINGS,
    RECONCILER_DRIFT_TOTAL,
    RECONCILER_REPAIRED_TOTAL,
    RECONCILER_FAILED_ITEMS_TOTAL,
    WORKER_EVENTS_TOTAL,
    WORKER_HANDLER_SECONDS,
    WORKER_BATCH_EVENTS,
    WORKER_LATENCY_SECONDS,
    WORKER_REDELIVERED_TOTAL,
    WORKER_PENDING,
    WORKER_IN_FLIGHT,
    WORKER_HELD,
    WORKER_FAILING,
    WORKER_DEAD_LETTERS,
    WORKER_REDRIVE,
    WORKER_ACTIVE,
    WORKER_EPOCH,
    WORKER_PAUSED,
    WORKER_SECONDS_SINCE_PROGRESS,
];

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
