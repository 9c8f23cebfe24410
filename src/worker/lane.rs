//! Runs one batch of events: transaction, inbox, handlers, commit.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::Either;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::time::timeout;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::error::panic_text;
use crate::fault;
use crate::jetstream::stored::Source;
use crate::postgres::connections::Connections;
use crate::postgres::inbox::Entered;
use crate::postgres::lease::Tenure;
use crate::postgres::running::{self, Marker};
use crate::postgres::session::{Session, Tx};
use crate::postgres::{self, function, inbox, redrive};

use super::batch::{self, BatchError};
use super::handler::HandlerError;
use super::load::{Item, Queued, redrive_ids};
use super::pace::Took;
use super::progress::{Outcome, Progress};
use super::scheduler::{Company, Place};
use super::span;
use super::subscriber::{FailurePolicy, Subscriber, Work};
use super::trouble::{Trouble, describe, timed_out, trouble};
use super::verdict::{Halt, Report, Verdict, Wait};

/// How often a conflict with other transactions is answered with another run before it counts as a failure.
const MAX_CONFLICTS: u32 = 10;
/// How much longer than the time limit this process waits for PostgreSQL to enforce it.
const GRACE: Duration = Duration::from_secs(5);

/// What a lane needs.
#[derive(Clone)]
pub(super) struct Lane {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) source: Source,
    pub(super) tenure: Arc<Tenure>,
    /// Locked by whatever runs in this process; exclusively by an event that must run with nothing beside it, because
    /// another subscriber's event may be the one that kills the process.
    pub(super) process: Arc<RwLock<()>>,
    pub(super) progress: Arc<Progress>,
    /// Tells it from the lanes beside it.
    pub(super) number: i64,
}

impl Lane {
    /// Runs the events, which are in order.
    pub(super) async fn run(self, items: Vec<Item>) -> Report {
        let alone = items.iter().any(|item| Company::of(item.crashes) == Company::None);
        let _beside = self.enter_process(alone).await;
        let mut report = Report::default();
        let result = match self.load(items, &mut report).await {
            Ok(events) => {
                let result = self.run_events(&events, &mut report).await;
                let settled: HashSet<Place> = report.verdicts.iter().map(|(place, _)| *place).collect();
                let rest = events.iter().map(|event| event.place).filter(|place| !settled.contains(place));
                report.verdicts.extend(rest.map(|place| (place, Verdict::NotRun)));
                result
            }
            Err(halt) => Err(halt),
        };
        match result {
            Ok(()) => {}
            Err(Halt::Outage(reason)) => report.outage = Some(format!("the database is away: {reason}")),
            Err(Halt::Unreachable(reason)) => report.outage = Some(reason),
            Err(Halt::Fenced) => report.fenced = true,
        }
        // A commit has removed it; after an outage it cannot be, and the next batch of this lane replaces it.
        if report.outage.is_none() && report.verdicts.iter().any(|(_, verdict)| *verdict != Verdict::Done) {
            let cleared = self.connections.run(async |connection| running::clear(connection, self.marker()).await);
            if let Err(error) = self.own(cleared).await {
                tracing::debug!(subscriber = self.subscriber.name, error, "a marker stays behind");
            }
        }
        report
    }

    /// Waits until the batch may run beside what other subscribers run. A handler that does not end keeps nobody waiting
    /// for longer than the time limit.
    async fn enter_process(&self, alone: bool) -> Either<RwLockWriteGuard<'_, ()>, RwLockReadGuard<'_, ()>> {
        if alone && let Ok(guard) = timeout(self.subscriber.settings.time_limit, self.process.write()).await {
            return Either::Left(guard);
        }
        Either::Right(self.process.read().await)
    }

    fn marker(&self) -> Marker<'_> {
        Marker { subscriber: &self.subscriber.name, epoch: self.tenure.epoch, lane: self.number }
    }

    async fn run_events(&self, events: &[Queued], report: &mut Report) -> Result<(), Halt> {
        let mut blocked: HashSet<&str> = HashSet::new();
        let mut groups: VecDeque<Vec<&Queued>> = VecDeque::from([events.iter().collect()]);
        while let Some(mut group) = groups.pop_front() {
            group.retain(|queued| {
                let free = queued.event.key.as_deref().is_none_or(|key| !blocked.contains(key));
                if !free {
                    report.verdicts.push((queued.place, Verdict::NotRun));
                }
                free
            });
            let mut took = Took::start();
            match group.as_slice() {
                [] => {}
                [single] => {
                    let verdict = self.run_alone(single, &mut took).await?;
                    if self.holds_key(&verdict) {
                        blocked.extend(single.event.key.as_deref());
                    }
                    report.verdicts.push((single.place, verdict));
                    report.ran = Some(took.end());
                }
                many => match self.transact(many, &mut took).await {
                    Ok(held) => {
                        let held: HashSet<Uuid> = held.into_iter().collect();
                        for queued in many {
                            let held = held.contains(&queued.event.id.as_uuid());
                            if held {
                                blocked.extend(queued.event.key.as_deref());
                            }
                            report.verdicts.push((queued.place, if held { Verdict::Held } else { Verdict::Done }));
                        }
                        report.ran = Some(took.end());
                    }
                    Err(Trouble::Outage(reason)) => return Err(Halt::Outage(reason)),
                    Err(Trouble::Unreachable(reason)) => return Err(Halt::Unreachable(reason)),
                    Err(trouble) => split(group, trouble.culprit(), &mut groups),
                },
            }
        }
        Ok(())
    }

    /// Whether the later events of the key wait.
    fn holds_key(&self, verdict: &Verdict) -> bool {
        match verdict {
            Verdict::Done | Verdict::Dead(_) => false,
            Verdict::Failed(_) => self.subscriber.settings.failure_policy == FailurePolicy::Block,
            Verdict::Later(_) | Verdict::Held | Verdict::Interrupted { .. } | Verdict::NotRun => true,
        }
    }

    /// Runs one event in a transaction of its own; this run decides about it.
    async fn run_alone(&self, queued: &Queued, took: &mut Took) -> Result<Verdict, Halt> {
        if queued.crashes > self.subscriber.settings.max_crashes {
            let reason = format!("the worker's process died {} times while this event ran", queued.crashes);
            return self.give_up(queued, &reason, false).await;
        }
        let mut conflicts = 0;
        loop {
            let error = match self.transact(&[queued], took).await {
                Ok(held) if held.is_empty() => return Ok(Verdict::Done),
                Ok(_) => return Ok(Verdict::Held),
                Err(Trouble::Outage(reason)) => return Err(Halt::Outage(reason)),
                Err(Trouble::Unreachable(reason)) => return Err(Halt::Unreachable(reason)),
                Err(Trouble::Interrupted { error, .. }) => {
                    let wait = match error {
                        HandlerError::Unavailable { after: Some(wait), .. } => Wait::Exactly(wait),
                        HandlerError::Unavailable { .. } => Wait::Backoff,
                        _ => Wait::Soon,
                    };
                    return Ok(Verdict::Interrupted { reason: describe(&error), wait });
                }
                Err(Trouble::Conflict { .. }) if conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                    tokio::time::sleep(CONFLICT.after(conflicts)).await;
                    continue;
                }
                Err(Trouble::Conflict { error, .. } | Trouble::Failed { error, .. }) => error,
            };
            return self.decide(queued, error, took.elapsed()).await;
        }
    }

    /// One transaction: inbox rows, handlers of the events that were new, commit. Returns the events that may not run
    /// yet.
    async fn transact(&self, group: &[&Queued], took: &mut Took) -> Result<Vec<Uuid>, Trouble> {
        let mut connection = self.own(self.connections.take()).await.map_err(Trouble::Outage)?;
        let result = self.transact_on(&mut connection, group, took).await;
        match &result {
            Err(Trouble::Outage(_)) => self.connections.forget_idle(),
            _ => self.connections.give_back(connection),
        }
        result
    }

    async fn transact_on(
        &self,
        connection: &mut Session,
        group: &[&Queued],
        took: &mut Took,
    ) -> Result<Vec<Uuid>, Trouble> {
        let limit = self.subscriber.settings.time_limit;
        let events: Vec<Uuid> = group.iter().map(|queued| queued.event.id.as_uuid()).collect();
        let begun = inbox::begin_batch(connection, limit, self.marker(), &events);
        let mut tx = self.own(begun).await.map_err(Trouble::Outage)?;
        fault::point("worker-marked");
        match self.fill(&mut tx, group, took).await {
            Ok(held) => {
                fault::point("worker-handled");
                self.own_or_conflict(tx.commit()).await?;
                fault::point("worker-committed");
                self.count(group.iter().filter(|queued| !held.contains(&queued.event.id.as_uuid())));
                Ok(held)
            }
            Err(Trouble::Outage(reason)) => Err(Trouble::Outage(reason)),
            // Waits for a statement that still runs, so that its locks are gone when the event runs again.
            Err(trouble) => match self.own(tx.rollback()).await {
                Ok(()) => Err(trouble),
                // The connection is gone: whatever the handler made of that, it is no fault of the event.
                Err(reason) => Err(Trouble::Outage(reason)),
            },
        }
    }

    /// Counts events whose transaction is committed.
    fn count<'q>(&self, events: impl Iterator<Item = &'q &'q Queued>) {
        let mut committed = 0;
        for queued in events {
            committed += 1;
            if queued.fresh.load(Ordering::Relaxed) {
                self.progress.took_effect(queued.event.time);
            } else {
                self.progress.count(Outcome::Duplicate);
            }
        }
        self.progress.committed(committed);
    }

    async fn fill(&self, tx: &mut Tx<'_>, group: &[&Queued], took: &mut Took) -> Result<Vec<Uuid>, Trouble> {
        let entered = self.own_or_conflict(self.enter(tx, group)).await;
        // Nothing of the events has run yet, so none of them is to blame.
        let Entered { fresh, held, suspected } = entered.map_err(|trouble| match trouble {
            Trouble::Failed { at, error } if timed_out(&error) => Trouble::Interrupted { at, error },
            Trouble::Failed { error, .. } => Trouble::Outage(describe(&error)),
            other => other,
        })?;
        fault::point("worker-inserted");
        let mut fresh: HashMap<Uuid, Option<i32>> = fresh.into_iter().collect();
        if fault::broken("inbox") {
            group.iter().for_each(|queued| _ = fresh.entry(queued.event.id.as_uuid()).or_default());
        }
        for queued in group {
            let failures = fresh.get(&queued.event.id.as_uuid());
            queued.fresh.store(failures.is_some(), Ordering::Relaxed);
            queued.failures.store(failures.copied().flatten().map_or(0, i32::unsigned_abs), Ordering::Relaxed);
        }
        let on_record = fresh.iter().filter(|(_, record)| record.is_some()).map(|(id, _)| *id);
        let on_record: Vec<Uuid> = on_record.chain(suspected).collect();
        match &self.subscriber.work {
            Work::Function { function, .. } => {
                // `remove`, because one event may be in the stream twice.
                let new = group.iter().filter(|queued| fresh.remove(&queued.event.id.as_uuid()).is_some());
                let new: Vec<&Queued> = new.copied().collect();
                if !new.is_empty() {
                    let events: Vec<String> = new.iter().map(|queued| queued.event.to_json()).collect();
                    let call = self.told(self.limited(function::call(tx, function, &events)), new.len(), took);
                    call.instrument(self.span(&new)).await.map_err(|error| trouble(None, error))?;
                }
            }
            #[cfg(feature = "cli")]
            Work::Http { endpoint, .. } => {
                for (at, queued) in group.iter().enumerate() {
                    if fresh.remove(&queued.event.id.as_uuid()).is_some() {
                        let run = self.told(endpoint.post(&queued.event), 1, took);
                        run.instrument(self.span(&[queued])).await.map_err(|error| trouble(Some(at), error))?;
                    }
                }
            }
            Work::Handlers(routes) => {
                let new = group.iter().enumerate();
                let new = new.filter(|(_, queued)| fresh.remove(&queued.event.id.as_uuid()).is_some());
                let (places, new): (Vec<usize>, Vec<&Queued>) = new.map(|(at, queued)| (at, *queued)).unzip();
                let in_batches = |name: &str| routes.get(name).is_some_and(|route| route.in_batches);
                let runs = batch::runs(new.iter().map(|queued| {
                    let event_type = queued.event.event_type.as_str();
                    (Some(event_type).filter(|name| in_batches(name)), queued.event.key.as_deref())
                }));
                for run in runs {
                    let queued: Vec<&Queued> = run.iter().map(|at| new[*at]).collect();
                    let at = |culprit: usize| run.get(culprit).map(|at| places[*at]);
                    let mut culprit = None;
                    let handled = async {
                        self.handle(tx, &queued).await.map_err(|failed| {
                            culprit = failed.culprit;
                            failed.error
                        })
                    };
                    let handled = self.told(handled, queued.len(), took).instrument(self.span(&queued)).await;
                    handled.map_err(|error| trouble(culprit.and_then(at), error))?;
                }
                self.check_alive(tx, &new).await?;
            }
        }
        if !on_record.is_empty() {
            self.own_or_conflict(inbox::clear_attempts(tx, &self.subscriber.name, &on_record)).await?;
        }
        Ok(held)
    }

    /// Runs a handler for so many events, and measures how long that takes.
    async fn told(
        &self,
        run: impl Future<Output = Result<(), HandlerError>>,
        events: usize,
        took: &mut Took,
    ) -> Result<(), HandlerError> {
        let started = Instant::now();
        let result = span::told(run).await;
        let time = started.elapsed();
        self.progress.handled(time);
        took.handled(events, time);
        result
    }

    /// Writes the inbox rows. Of the events that were sent back only the ones whose rows are still there may run; the rows
    /// go with this transaction.
    async fn enter(&self, tx: &mut Tx<'_>, group: &[&Queued]) -> Result<Entered, sqlx::Error> {
        let ids = redrive_ids(group.iter().map(|queued| queued.place));
        let taken: HashSet<i64> = match ids.is_empty() {
            true => HashSet::new(),
            false => redrive::take(tx, &ids).await?.into_iter().collect(),
        };
        if !ids.is_empty() {
            fault::point("worker-redrive-taken");
        }
        let gone = |place| matches!(place, Place::Redrive(id) if !taken.contains(&id));
        let present = group.iter().filter(|queued| !gone(queued.place));
        let rows: Vec<inbox::Row> = present.map(|queued| queued.row()).collect();
        inbox::insert(tx, self.marker(), &rows).await
    }

    /// Fails when the handlers of these events left a transaction behind that would commit nothing.
    async fn check_alive(&self, tx: &mut Tx<'_>, new: &[&Queued]) -> Result<(), Trouble> {
        let Some(first) = new.first() else { return Ok(()) };
        let alive = inbox::still_has(tx, &self.subscriber.name, first.event.id.as_uuid());
        match self.own_or_conflict(alive).await? {
            true => Ok(()),
            false => Err(trouble(None, HandlerError::retry("the handler rolled the worker's transaction back"))),
        }
    }

    /// Runs the handler of events that have the same type.
    async fn handle(&self, tx: &mut Tx<'_>, events: &[&Queued]) -> Result<(), BatchError> {
        let Work::Handlers(routes) = &self.subscriber.work else { return Ok(()) };
        let event_type = events.first().map_or("", |queued| queued.event.event_type.as_str());
        let Some(route) = routes.get(event_type) else {
            let reason = format!("the subscriber has no handler for {event_type}");
            return Err(BatchError::at(0, HandlerError::reject(reason)));
        };
        let tries: Vec<_> = events.iter().map(|queued| (&*queued.event, queued.this_try())).collect();
        let run = AssertUnwindSafe((route.run)(tx.for_others(), &tries)).catch_unwind();
        let result = match timeout(self.subscriber.settings.time_limit, run).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(HandlerError::retry(format!("the handler panicked: {}", panic_text(&*panic))).into()),
            Err(_) => Err(self.too_slow().into()),
        };
        // Of a single event there is no doubt.
        result.map_err(|error| BatchError { culprit: error.culprit.or((events.len() == 1).then_some(0)), ..error })
    }

    fn span(&self, events: &[&Queued]) -> Span {
        let subscriber = &self.subscriber.name;
        match events {
            [single] => span::of_event(subscriber, &single.event, single.this_try()),
            many => span::of_batch(subscriber, many.iter().map(|queued| &*queued.event)),
        }
    }

    async fn limited(&self, statement: impl Future<Output = Result<(), sqlx::Error>>) -> Result<(), HandlerError> {
        match timeout(self.subscriber.settings.time_limit, statement).await {
            Ok(result) => result.map_err(HandlerError::from),
            Err(_) => Err(self.too_slow()),
        }
    }

    fn too_slow(&self) -> HandlerError {
        HandlerError::retry(format!(
            "the handler ran longer than the subscriber's time limit of {:?}",
            self.subscriber.settings.time_limit
        ))
    }

    /// Runs a statement of our own that no event can be blamed for.
    pub(super) async fn own<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, String> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(result) => result.map_err(|error| postgres::message(&error)),
            Err(_) => Err("PostgreSQL does not answer".into()),
        }
    }

    /// Runs a statement of our own that fails when a handler left the transaction in a bad state.
    async fn own_or_conflict<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Trouble> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) if postgres::is_outage(&error) => Err(Trouble::Outage(postgres::message(&error))),
            Ok(Err(error)) => Err(trouble(None, error.into())),
            Err(_) => Err(Trouble::Outage("PostgreSQL does not answer".into())),
        }
    }
}

const CONFLICT: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(100) };

/// Puts the parts of a failed group in front: those before the culprit, the culprit alone, the rest; or, when the
/// culprit is unknown, two halves.
fn split<'a>(mut group: Vec<&'a Queued>, culprit: Option<usize>, groups: &mut VecDeque<Vec<&'a Queued>>) {
    match culprit {
        Some(at) => {
            let rest = group.split_off((at + 1).min(group.len()));
            let culprit = group.split_off(at.min(group.len()));
            groups.push_front(rest);
            groups.push_front(culprit);
        }
        None => {
            let half = group.split_off(group.len() / 2);
            groups.push_front(half);
        }
    }
    groups.push_front(group);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::Envelope;

    fn parts(culprit: Option<usize>) -> Vec<Vec<i64>> {
        let event = Envelope::from_headers(
            [("ce-id", "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), ("ce-type", "a"), ("ce-source", "/")].into_iter(),
            bytes::Bytes::new(),
        );
        let event = Arc::new(event.unwrap());
        let item = |n| Item { place: Place::Redrive(n), event: None, deliveries: 1, crashes: 0 };
        let events: Vec<_> = (1..=5).map(|n| item(n).queued("s", n, Arc::clone(&event))).collect();
        let mut groups = VecDeque::new();
        split(events.iter().collect(), culprit, &mut groups);
        groups.iter().map(|group| group.iter().map(|queued| queued.stream_seq).collect()).collect()
    }

    #[test]
    fn a_failed_group_is_split_around_its_culprit_in_order() {
        assert_eq!(parts(Some(0)), [vec![], vec![1], vec![2, 3, 4, 5]]);
        assert_eq!(parts(Some(2)), [vec![1, 2], vec![3], vec![4, 5]]);
        assert_eq!(parts(Some(4)), [vec![1, 2, 3, 4], vec![5], vec![]]);
        assert_eq!(parts(None), [vec![1, 2], vec![3, 4, 5]]);
    }
}
