//! Runs a subscriber for events at hand: the worker's own executor, without a stream and without waiting.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::stored::Source;
use aftercommit_core::postgres::attempt::Record;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::lease::{self, Tenure};
use aftercommit_core::postgres::{database_error, function, inbox, testing};
use aftercommit_outbox::event::EventId;

use super::executor::Executor;
use super::item::Item;
use super::progress::Progress;
use super::scheduler::EventPlace;
use super::subscriber::{Subscriber, Work};
use super::subscriber_run::LEASE;
use super::verdict::Verdict;
use aftercommit_core::subscription::lease_name;

/// Where dead letters and inbox rows say that their event came from; its place there is the outbox id.
const SOURCE: &str = "outbox";

/// What became of the events that were delivered to one subscriber.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Outcome {
    /// The events that took effect, in the order in which they did.
    pub handled: Vec<EventId>,
    /// The attempts that failed and were followed by another one, in their order.
    pub failed: Vec<Failed>,
    /// The events that were given up: they are dead letters now.
    pub dead: Vec<Dead>,
    /// The events that shall come again after this time. They are not waited for: drain again when their time has come.
    pub snoozed: Vec<(EventId, Duration)>,
    /// The events that did not run, because an earlier one of their key is snoozed.
    pub waiting: Vec<EventId>,
}

/// A failed attempt.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Failed {
    /// The event.
    pub id: EventId,
    /// Which attempt it was; the first is 1.
    pub attempt: u32,
    /// The error.
    pub error: String,
}

/// An event that was given up.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Dead {
    /// The event.
    pub id: EventId,
    /// Why: the last error, or the handler's reason.
    pub reason: String,
}

/// Runs the subscriber for those of `events` (in outbox order) that it takes and is not done with.
pub async fn drain(
    subscriber: Subscriber,
    connections: &Arc<Connections>,
    events: &[Arc<Envelope>],
) -> Result<Outcome, Error> {
    let tenure = acquire(&subscriber.name, connections).await?;
    subscriber.prepare()?;
    let executor = Executor {
        progress: Arc::new(Progress::new(&subscriber)),
        subscriber: Arc::new(subscriber),
        connections: Arc::clone(connections),
        source: Source::none(SOURCE),
        tenure: Arc::new(tenure.clone()),
        process: Arc::default(),
        number: 0,
        alone: false,
    };
    let mut run = Drain {
        executor,
        left: Vec::new(),
        records: HashMap::new(),
        attempts: HashMap::new(),
        outcome: Outcome::default(),
    };
    let drained = match run.begin(events).await {
        Ok(()) => run.run().await,
        Err(error) => Err(error),
    };
    let released = connections.run(async |connection| tenure.release(connection).await).await;
    drained?;
    released.map_err(|error| database_error("the subscriber's lease cannot be given back", error))?;
    Ok(run.outcome)
}

/// The subscriber's lease, so that no worker runs it at the same time. One of a drain that was cut off runs out.
async fn acquire(subscriber: &str, connections: &Connections) -> Result<Tenure, Error> {
    let (name, holder) = (lease_name(subscriber), lease::new_holder());
    let mut tenure = None;
    let acquired = tokio::time::timeout(LEASE + LEASE / 4, async {
        while tenure.is_none() {
            tenure =
                connections.run(async |connection| lease::acquire(connection, &name, &holder, LEASE).await).await?;
            if tenure.is_none() {
                tokio::time::sleep(LEASE / 40).await;
            }
        }
        Ok(())
    });
    if let Ok(result) = acquired.await {
        result.map_err(|error| {
            database_error(format!("asking for the lease of subscriber {subscriber} failed"), error)
        })?;
    }
    tenure.ok_or_else(|| {
        Error::new(
            ErrorKind::NotReady,
            format!("a worker runs the subscriber {subscriber} in this database: stop it before draining"),
        )
    })
}

/// One stretch of work.
struct Drain {
    executor: Executor,
    /// The events that are not done, in their order.
    left: Vec<Arc<Envelope>>,
    /// What is on record of suspects.
    records: HashMap<EventPlace, Record>,
    /// How many attempts of them have failed.
    attempts: HashMap<Uuid, i32>,
    outcome: Outcome,
}

impl Drain {
    async fn begin(&mut self, events: &[Arc<Envelope>]) -> Result<(), Error> {
        let Executor { subscriber, connections, .. } = &self.executor;
        let failed =
            |error| database_error(format!("looking what subscriber {} has done failed", subscriber.name), error);
        if let Work::Function { function, .. } = &subscriber.work {
            let obstacle =
                connections.run_for_others(async |connection| function::obstacle(connection, function).await).await;
            if let Some(obstacle) = obstacle.map_err(failed)? {
                let problem = format!("subscriber {}: the function {function}(jsonb) {obstacle}", subscriber.name);
                return Err(Error::new(ErrorKind::NotReady, problem));
            }
        }
        let taken: Vec<&Arc<Envelope>> = events.iter().filter(|event| subscriber.takes(&event.event_type)).collect();
        let ids: Vec<Uuid> = taken.iter().map(|event| event.id.as_uuid()).collect();
        let name = &subscriber.name;
        let done = connections.run(async |connection| inbox::done(connection, name, &ids).await);
        let done: HashSet<Uuid> = done.await.map_err(failed)?.into_iter().collect();
        self.left = taken.into_iter().filter(|event| !done.contains(&event.id.as_uuid())).cloned().collect();
        self.failures(&ids).await.map(|counted| self.attempts = counted.into_iter().map(|(id, n, _)| (id, n)).collect())
    }

    /// Runs batch after batch until nothing is left that may run now.
    async fn run(&mut self) -> Result<(), Error> {
        let mut snoozed: HashSet<EventPlace> = HashSet::new();
        loop {
            let mut blocked: HashSet<&str> = HashSet::new();
            let mut batch = Vec::new();
            for event in &self.left {
                let key = event.order_key();
                if snoozed.contains(&place(event)) {
                    blocked.extend(key);
                } else if key.is_none_or(|key| !blocked.contains(key)) {
                    batch.push(Arc::clone(event));
                }
            }
            batch.truncate(self.executor.subscriber.settings.max_batch);
            if batch.is_empty() {
                let waiting = self.left.iter().filter(|event| !snoozed.contains(&place(event)));
                self.outcome.waiting = waiting.map(|event| event.id).collect();
                return Ok(());
            }
            snoozed.extend(self.run_batch(batch).await?);
        }
    }

    /// Runs one batch and returns the places of the events that were snoozed.
    async fn run_batch(&mut self, batch: Vec<Arc<Envelope>>) -> Result<Vec<EventPlace>, Error> {
        let name = &self.executor.subscriber.name;
        let items = batch.iter().map(|event| {
            let failed = self.attempts.get(&event.id.as_uuid()).copied().unwrap_or(0);
            Item {
                id: None,
                place: place(event),
                event: Some(Arc::clone(event)),
                deliveries: u64::from(failed.unsigned_abs()) + 1,
                interruptions: 0,
                record: self.records.get(&place(event)).cloned().unwrap_or_default(),
            }
        });
        let report = self.executor.clone().run(items.collect()).await;
        if let Some(reason) = report.outage {
            return Err(Error::new(ErrorKind::Database, format!("subscriber {name} cannot work: {reason}")));
        }
        if report.fenced {
            return Err(Error::new(ErrorKind::Fenced, format!("a worker took over the subscriber {name}")));
        }
        self.records.extend(report.records);
        let mut verdicts: HashMap<EventPlace, Verdict> = report.verdicts.into_iter().collect();
        let mut later = Vec::new();
        for event in batch {
            match verdicts.remove(&place(&event)) {
                Some(Verdict::Done) => self.outcome.handled.push(event.id),
                Some(Verdict::Dead(reason)) => self.outcome.dead.push(Dead { id: event.id, reason }),
                Some(Verdict::Failed(wait) | Verdict::Later(wait)) => {
                    later.push((event, wait));
                    continue;
                }
                Some(Verdict::Interrupted { reason, .. }) => {
                    let problem = format!(
                        "event {}: a service that subscriber {name} needs is not available: {reason}",
                        event.id
                    );
                    return Err(Error::new(ErrorKind::NotReady, problem));
                }
                Some(Verdict::Held) => {
                    let problem = format!(
                        "event {}: redriven events of its key come first at subscriber {name}, and only a worker \
                         runs those",
                        event.id
                    );
                    return Err(Error::new(ErrorKind::NotReady, problem));
                }
                Some(Verdict::NotRun | Verdict::Suspect(_)) | None => continue,
            }
            self.left.retain(|left| left.id != event.id);
        }
        self.tell_snoozed_from_failed(later).await
    }

    /// A failed attempt is counted, snoozing is not.
    async fn tell_snoozed_from_failed(
        &mut self,
        later: Vec<(Arc<Envelope>, Duration)>,
    ) -> Result<Vec<EventPlace>, Error> {
        if later.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<Uuid> = later.iter().map(|(event, _)| event.id.as_uuid()).collect();
        let mut counted: HashMap<Uuid, (i32, String)> =
            self.failures(&ids).await?.into_iter().map(|(id, attempts, error)| (id, (attempts, error))).collect();
        let mut snoozed = Vec::new();
        for (event, wait) in later {
            let known = self.attempts.entry(event.id.as_uuid()).or_default();
            match counted.remove(&event.id.as_uuid()) {
                Some((attempts, error)) if attempts > *known => {
                    *known = attempts;
                    self.outcome.failed.push(Failed { id: event.id, attempt: attempts.unsigned_abs(), error });
                }
                _ => {
                    self.outcome.snoozed.push((event.id, wait));
                    snoozed.push(place(&event));
                }
            }
        }
        Ok(snoozed)
    }

    async fn failures(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, i32, String)>, Error> {
        let Executor { subscriber, connections, .. } = &self.executor;
        connections.run(async |connection| testing::attempts(connection, &subscriber.name, ids).await).await.map_err(
            |error| database_error(format!("reading the attempts of subscriber {} failed", subscriber.name), error),
        )
    }
}

/// The event's place in the outbox, which stands for its place in a stream.
fn place(event: &Envelope) -> EventPlace {
    EventPlace::Stream(event.sequence.unsigned_abs())
}

impl Subscriber {
    /// Whether events of this type come to it.
    fn takes(&self, event_type: &str) -> bool {
        self.types().iter().any(|taken| *taken == "*" || *taken == event_type)
    }
}
