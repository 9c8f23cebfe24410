//! What all pages and all browsers share: the state of the system, read by one task.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use aftercommit_operator::status::{self, Status, SubscriberStatus};

use crate::config::ConsoleConfig;

/// How often it is read while somebody looks.
const WATCHED: Duration = Duration::from_secs(2);
/// How often when nobody does, for the charts.
const UNWATCHED: Duration = Duration::from_secs(20);
/// For how long somebody who looked counts as looking.
const LOOKS: Duration = Duration::from_secs(30);
/// The distance of the points of a chart.
const STEP: Duration = Duration::from_secs(20);
/// Points that are kept: those of an hour.
const POINTS: usize = 180;
/// How long one reading may take.
const LIMIT: Duration = Duration::from_secs(15);

/// What was read, and when.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Seen {
    pub(crate) at: DateTime<Utc>,
    /// None before the first reading, and when it failed.
    pub(crate) status: Option<Status>,
    /// Why there is none, and which databases have not answered.
    pub(crate) unknown: Vec<String>,
    /// The last hour.
    pub(crate) history: History,
    /// Whether the servers have been asked.
    #[serde(skip)]
    pub(crate) is_read: bool,
}

/// The last hour, a point every 20 seconds; none where nothing was known.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct History {
    /// Events that waited to be published.
    pub(crate) backlog: VecDeque<Option<f64>>,
    /// Events that waited for each subscriber.
    pub(crate) pending: BTreeMap<String, VecDeque<Option<f64>>>,
}

/// Reads the state, for everybody.
pub(crate) struct Collector {
    seen: watch::Receiver<Arc<Seen>>,
    looked: watch::Sender<Instant>,
    wake: Arc<Notify>,
}

impl Collector {
    pub(crate) fn start(config: &ConsoleConfig, shutdown: CancellationToken) -> Self {
        let unknown = vec!["the servers have not answered yet".into()];
        let first = Seen { at: Utc::now(), status: None, unknown, history: History::default(), is_read: false };
        let (sender, seen) = watch::channel(Arc::new(first));
        let looked = watch::Sender::new(Instant::now());
        let wake = Arc::new(Notify::new());
        let task = collect(config.clone(), sender, looked.subscribe(), Arc::clone(&wake));
        tokio::spawn(async move {
            tokio::select! {
                () = task => {}
                () = shutdown.cancelled() => {}
            }
        });
        Self { seen, looked, wake }
    }

    /// The state, at most as old as somebody who looks can bear; waits for the first reading.
    pub(crate) async fn look(&self) -> Arc<Seen> {
        let mut seen = self.watch();
        _ = tokio::time::timeout(LIMIT, seen.wait_for(|seen| seen.is_read)).await;
        Arc::clone(&seen.borrow())
    }

    /// The same whenever it changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Seen>> {
        let before = self.looked.send_replace(Instant::now());
        if before.elapsed() > LOOKS {
            self.wake.notify_one();
        }
        self.seen.clone()
    }

    /// Somebody still looks.
    pub(crate) fn goes_on(&self) {
        self.looked.send_replace(Instant::now());
    }
}

async fn collect(
    config: ConsoleConfig,
    sender: watch::Sender<Arc<Seen>>,
    looked: watch::Receiver<Instant>,
    wake: Arc<Notify>,
) {
    let mut history = History::default();
    let mut point: Option<Instant> = None;
    loop {
        let (status, unknown) = read(&config).await;
        if point.is_none_or(|point| point.elapsed() >= STEP) {
            point = Some(Instant::now());
            history.add(status.as_ref());
        }
        sender.send_replace(Arc::new(Seen {
            at: Utc::now(),
            status,
            unknown,
            history: history.clone(),
            is_read: true,
        }));
        let rest = if looked.borrow().elapsed() < LOOKS { WATCHED } else { UNWATCHED };
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = wake.notified() => {}
        }
    }
}

/// The state, and what is not known of it.
async fn read(config: &ConsoleConfig) -> (Option<Status>, Vec<String>) {
    let mut unknown = Vec::new();
    let mut whole: Option<Status> = None;
    for (index, database) in config.databases().enumerate() {
        let reading = Box::pin(status::status(&database, &config.nats, &config.naming));
        let problem = match tokio::time::timeout(LIMIT, reading).await {
            Ok(Ok(status)) => {
                match &mut whole {
                    None => whole = Some(status),
                    Some(whole) => add(whole, status),
                }
                continue;
            }
            Ok(Err(error)) => error.report(),
            Err(_) => format!("it has not answered within {LIMIT:?}"),
        };
        let which =
            if index == 0 { "the publisher's database".into() } else { format!("database {index} of subscribers") };
        unknown.push(format!("{which}: {problem}"));
        // Without the outbox there is no whole picture.
        if index == 0 {
            return (None, unknown);
        }
    }
    (whole, unknown)
}

/// Takes over what another database knows of its own subscribers.
fn add(whole: &mut Status, other: Status) {
    for (name, known) in other.subscribers {
        let serves = |status: &SubscriberStatus| status.active.is_some() || status.last_seen.is_some();
        match whole.subscribers.get_mut(&name) {
            Some(there) if serves(&known) && !serves(there) => *there = known,
            Some(_) => {}
            None => _ = whole.subscribers.insert(name, known),
        }
    }
    // What the first database said of subscribers that it does not know is answered by the others.
    let served = |place: &str| {
        let name = place.strip_prefix("subscriber ").unwrap_or(place);
        whole.subscribers.get(name).is_some_and(|status| status.active.is_some())
    };
    let mut problems: Vec<_> = whole.problems.drain(..).filter(|problem| !served(&problem.place)).collect();
    problems.extend(other.problems.into_iter().filter(|problem| problem.place.starts_with("subscriber ")));
    problems.sort_by_key(|problem| problem.severity);
    problems.dedup();
    whole.well = problems.is_empty();
    whole.problems = problems;
}

impl History {
    fn add(&mut self, status: Option<&Status>) {
        let push = |points: &mut VecDeque<Option<f64>>, value: Option<f64>| {
            points.push_back(value);
            if points.len() > POINTS {
                points.pop_front();
            }
        };
        push(&mut self.backlog, status.map(|status| status.backlog.events as f64));
        let names: Vec<&String> = status.map(|status| status.subscribers.keys().collect()).unwrap_or_default();
        for name in names {
            self.pending.entry(name.clone()).or_default();
        }
        for (name, points) in &mut self.pending {
            let pending = status.and_then(|status| status.subscribers.get(name)?.pending);
            push(points, pending.map(|pending| pending as f64));
        }
    }
}
