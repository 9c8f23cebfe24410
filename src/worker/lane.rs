//! Runs one batch of events: transaction, inbox, handlers, commit, and what becomes of those that fail.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::time::timeout;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::envelope::Envelope;
use crate::fault;
use crate::jetstream::stored::Source;
use crate::postgres::connections::Connections;
use crate::postgres::dead_letter::{self, DeadLetter};
use crate::postgres::lease::Tenure;
use crate::postgres::session::{Session, Tx};
use crate::postgres::{self, function, inbox};

use super::handler::HandlerError;
use super::span;
use super::subscriber::{Subscriber, Try, Work};
use super::trouble::{Trouble, clip, database_text, describe, panic_text, timed_out, trouble};

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
}

/// One event to run.
pub(super) struct Item {
    pub(super) sequence: u64,
    /// None when it has to be read from the stream again.
    pub(super) event: Option<Arc<Envelope>>,
    pub(super) deliveries: u64,
}

/// What became of an event.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// Handled, now or before.
    Done,
    /// Given up.
    Dead(String),
    /// It failed, or asked for it: not before this time has passed.
    Later(Duration),
    /// Something that its handler needs is away, for this reason.
    Interrupted(String),
    /// It did not come to a decision.
    NotRun,
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct Report {
    pub(super) verdicts: Vec<(u64, Verdict)>,
    /// The subscriber's database is away, for this reason.
    pub(super) outage: Option<String>,
    /// Another instance has taken over.
    pub(super) fenced: bool,
    /// How long one event took.
    pub(super) pace: Option<Duration>,
}

/// The lane cannot go on with its batch.
enum Halt {
    Outage(String),
    Fenced,
}

impl Lane {
    /// Runs the events, which are in stream order.
    pub(super) async fn run(self, items: Vec<Item>) -> Report {
        let mut report = Report::default();
        let mut events = Vec::with_capacity(items.len());
        for completed in join_all(items.into_iter().map(|item| self.complete(item))).await {
            match completed {
                Ok(event) => events.push(event),
                Err(verdict) => report.verdicts.push(verdict),
            }
        }
        if let Err(halt) = self.run_events(&events, &mut report).await {
            match halt {
                Halt::Outage(reason) => report.outage = Some(reason),
                Halt::Fenced => report.fenced = true,
            }
            let settled: HashSet<u64> = report.verdicts.iter().map(|(sequence, _)| *sequence).collect();
            let rest = events.iter().map(|event| event.sequence).filter(|sequence| !settled.contains(sequence));
            let rest: Vec<_> = rest.map(|sequence| (sequence, Verdict::NotRun)).collect();
            report.verdicts.extend(rest);
        }
        report
    }

    /// Reads an event again whose payload was let go to save memory.
    async fn complete(&self, item: Item) -> Result<Queued, (u64, Verdict)> {
        let Item { sequence, event, deliveries } = item;
        if let Some(event) = event {
            return Ok(Queued::new(sequence, event, deliveries));
        }
        match self.source.read(sequence).await {
            Ok(Some(event)) => Ok(Queued::new(sequence, Arc::new(event), deliveries)),
            Ok(None) => {
                tracing::error!(
                    subscriber = self.subscriber.name,
                    sequence,
                    "the stream dropped an event before it could be handled: its retention is too short"
                );
                Err((sequence, Verdict::Dead("the stream dropped it before it could be handled".into())))
            }
            Err(error) => Err((sequence, Verdict::Interrupted(error.report()))),
        }
    }

    async fn run_events(&self, events: &[Queued], report: &mut Report) -> Result<(), Halt> {
        let mut blocked: HashSet<&str> = HashSet::new();
        let mut groups: VecDeque<Vec<&Queued>> = VecDeque::from([events.iter().collect()]);
        while let Some(mut group) = groups.pop_front() {
            group.retain(|queued| {
                let free = queued.event.key.as_deref().is_none_or(|key| !blocked.contains(key));
                if !free {
                    report.verdicts.push((queued.sequence, Verdict::NotRun));
                }
                free
            });
            let started = Instant::now();
            match group.as_slice() {
                [] => {}
                [single] => {
                    let verdict = self.run_alone(single).await?;
                    if verdict != Verdict::Done {
                        blocked.extend(single.event.key.as_deref().filter(|_| !matches!(verdict, Verdict::Dead(_))));
                    }
                    report.verdicts.push((single.sequence, verdict));
                    report.pace = Some(started.elapsed());
                }
                many => match self.transact(many).await {
                    Ok(()) => {
                        report.verdicts.extend(many.iter().map(|queued| (queued.sequence, Verdict::Done)));
                        report.pace = Some(started.elapsed() / u32::try_from(many.len()).unwrap_or(u32::MAX));
                    }
                    Err(Trouble::Outage(reason)) => return Err(Halt::Outage(reason)),
                    Err(trouble) => split(group, trouble.culprit(), &mut groups),
                },
            }
        }
        Ok(())
    }

    /// Runs one event in a transaction of its own; this run decides about it.
    async fn run_alone(&self, queued: &Queued) -> Result<Verdict, Halt> {
        let started = Instant::now();
        let mut conflicts = 0;
        loop {
            let error = match self.transact(&[queued]).await {
                Ok(()) => return Ok(Verdict::Done),
                Err(Trouble::Outage(reason)) => return Err(Halt::Outage(reason)),
                Err(Trouble::Interrupted { error, .. }) => return Ok(Verdict::Interrupted(describe(&error))),
                Err(Trouble::Conflict { .. }) if conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                    tokio::time::sleep(CONFLICT.after(conflicts)).await;
                    continue;
                }
                Err(Trouble::Conflict { error, .. } | Trouble::Failed { error, .. }) => error,
            };
            return self.decide(queued, error, started.elapsed()).await;
        }
    }

    /// What becomes of an event whose handler failed.
    async fn decide(&self, queued: &Queued, error: HandlerError, took: Duration) -> Result<Verdict, Halt> {
        match error {
            HandlerError::Snooze(wait) => Ok(Verdict::Later(wait)),
            HandlerError::Reject { reason } => self.give_up(queued, &clip(&reason)).await,
            HandlerError::Retry { after, .. } => {
                let text = describe(&error);
                if queued.failures.load(Ordering::Relaxed) + 1 >= self.subscriber.settings.max_attempts {
                    return self.give_up(queued, &text).await;
                }
                let attempts = self.count_failure(queued, &text).await?;
                let wait = after.unwrap_or_else(|| self.subscriber.settings.backoff.after(attempts));
                tracing::warn!(
                    subscriber = self.subscriber.name,
                    event_id = %queued.event.id,
                    event_type = queued.event.event_type,
                    attempt = attempts,
                    delivery_count = queued.deliveries.max(1),
                    latency_ms = took.as_millis(),
                    retry_in = ?wait,
                    error = text,
                    "event failed"
                );
                Ok(Verdict::Later(wait))
            }
        }
    }

    async fn count_failure(&self, queued: &Queued, error: &str) -> Result<u32, Halt> {
        let id = queued.event.id.as_uuid();
        let counted = self.connections.run(async |connection| {
            inbox::count_failure(connection, &self.tenure, &self.subscriber.name, id, error).await
        });
        let attempts = self.own(counted).await.map_err(Halt::Outage)?;
        fault::point("worker-failure-counted");
        attempts.map(|attempts| attempts.unsigned_abs()).ok_or(Halt::Fenced)
    }

    async fn give_up(&self, queued: &Queued, reason: &str) -> Result<Verdict, Halt> {
        let letter = DeadLetter {
            subscriber: &self.subscriber.name,
            stream: self.source.stream(),
            stream_seq: queued.position(),
            event: &queued.event,
            reason,
        };
        let written =
            self.connections.run(async |connection| dead_letter::insert(connection, &self.tenure, &letter).await);
        if !self.own(written).await.map_err(Halt::Outage)? {
            return Err(Halt::Fenced);
        }
        fault::point("worker-given-up");
        tracing::error!(
            subscriber = self.subscriber.name,
            event_id = %queued.event.id,
            event_type = queued.event.event_type,
            attempt = queued.failures.load(Ordering::Relaxed) + 1,
            delivery_count = queued.deliveries.max(1),
            error = reason,
            "event became a dead letter"
        );
        Ok(Verdict::Dead(reason.to_string()))
    }

    /// One transaction: inbox rows, handlers of the events that were new, commit.
    async fn transact(&self, group: &[&Queued]) -> Result<(), Trouble> {
        let mut connection = self.own(self.connections.take()).await.map_err(Trouble::Outage)?;
        let result = self.transact_on(&mut connection, group).await;
        match &result {
            Err(Trouble::Outage(_)) => self.connections.forget_idle(),
            _ => self.connections.give_back(connection),
        }
        result
    }

    async fn transact_on(&self, connection: &mut Session, group: &[&Queued]) -> Result<(), Trouble> {
        let limit = self.subscriber.settings.time_limit;
        let mut tx = self.own(inbox::begin(connection, limit)).await.map_err(Trouble::Outage)?;
        match self.fill(&mut tx, group).await {
            Ok(()) => {
                fault::point("worker-handled");
                self.own_or_conflict(tx.commit()).await?;
                fault::point("worker-committed");
                Ok(())
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

    async fn fill(&self, tx: &mut Tx<'_>, group: &[&Queued]) -> Result<(), Trouble> {
        let rows: Vec<(Uuid, i64)> =
            group.iter().map(|queued| (queued.event.id.as_uuid(), queued.position())).collect();
        let fresh = self.own_or_conflict(inbox::insert(tx, &self.subscriber.name, &rows)).await;
        // Nothing of the events has run yet, so none of them is to blame.
        let fresh = fresh.map_err(|trouble| match trouble {
            Trouble::Failed { at, error } if timed_out(&error) => Trouble::Interrupted { at, error },
            Trouble::Failed { error, .. } => Trouble::Outage(describe(&error)),
            other => other,
        })?;
        fault::point("worker-inserted");
        let mut fresh: HashMap<Uuid, i32> = fresh.into_iter().collect();
        for queued in group {
            let failures = fresh.get(&queued.event.id.as_uuid()).map_or(0, |failures| failures.unsigned_abs());
            queued.failures.store(failures, Ordering::Relaxed);
        }
        let failed: Vec<Uuid> = fresh.iter().filter(|(_, attempts)| **attempts > 0).map(|(id, _)| *id).collect();
        match &self.subscriber.work {
            Work::Function { function, .. } => {
                // `remove`, because one event may be in the stream twice.
                let new = group.iter().filter(|queued| fresh.remove(&queued.event.id.as_uuid()).is_some());
                let new: Vec<&Queued> = new.copied().collect();
                if !new.is_empty() {
                    let events: Vec<String> = new.iter().map(|queued| queued.event.to_json()).collect();
                    let call = span::told(self.limited(function::call(tx, function, &events)));
                    call.instrument(self.span(&new)).await.map_err(|error| trouble(None, error))?;
                }
            }
            Work::Handlers(_) => {
                for (at, queued) in group.iter().enumerate() {
                    if fresh.remove(&queued.event.id.as_uuid()).is_some() {
                        let run = span::told(self.handle(tx, queued, queued.this_try()));
                        run.instrument(self.span(&[queued])).await.map_err(|error| trouble(Some(at), error))?;
                    }
                }
                self.own_or_conflict(inbox::check_alive(tx)).await?;
            }
        }
        if !failed.is_empty() {
            self.own_or_conflict(inbox::clear_attempts(tx, &self.subscriber.name, &failed)).await?;
        }
        Ok(())
    }

    async fn handle(&self, tx: &mut Tx<'_>, queued: &Queued, this: Try) -> Result<(), HandlerError> {
        let Work::Handlers(routes) = &self.subscriber.work else { return Ok(()) };
        let Some(route) = routes.get(queued.event.event_type.as_str()) else {
            return Err(HandlerError::reject(format!("the subscriber has no handler for {}", queued.event.event_type)));
        };
        let run = AssertUnwindSafe((route.run)(tx.for_others(), &queued.event, this)).catch_unwind();
        match timeout(self.subscriber.settings.time_limit, run).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(HandlerError::retry(format!("the handler panicked: {}", panic_text(&*panic)))),
            Err(_) => Err(self.too_slow()),
        }
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
    async fn own<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, String> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(result) => result.map_err(|error| database_text(&error)),
            Err(_) => Err("PostgreSQL does not answer".into()),
        }
    }

    /// Runs a statement of our own that fails when a handler left the transaction in a bad state.
    async fn own_or_conflict<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Trouble> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) if postgres::is_outage(&error) => Err(Trouble::Outage(database_text(&error))),
            Ok(Err(error)) => Err(trouble(None, error.into())),
            Err(_) => Err(Trouble::Outage("PostgreSQL does not answer".into())),
        }
    }
}

/// An event with its payload.
struct Queued {
    sequence: u64,
    event: Arc<Envelope>,
    deliveries: u64,
    /// The attempts that had failed when it was looked at last.
    failures: AtomicU32,
}

impl Queued {
    fn new(sequence: u64, event: Arc<Envelope>, deliveries: u64) -> Self {
        Self { sequence, event, deliveries, failures: AtomicU32::new(0) }
    }

    /// As of when it was looked at last.
    fn this_try(&self) -> Try {
        Try { attempt: self.failures.load(Ordering::Relaxed) + 1, delivery_count: self.deliveries.max(1) }
    }

    fn position(&self) -> i64 {
        i64::try_from(self.sequence).unwrap_or(i64::MAX)
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

    fn parts(culprit: Option<usize>) -> Vec<Vec<u64>> {
        let event = Envelope::from_headers(
            [("ce-id", "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), ("ce-type", "a"), ("ce-source", "/")].into_iter(),
            bytes::Bytes::new(),
        );
        let event = Arc::new(event.unwrap());
        let events: Vec<_> = (1..=5).map(|sequence| Queued::new(sequence, Arc::clone(&event), 1)).collect();
        let mut groups = VecDeque::new();
        split(events.iter().collect(), culprit, &mut groups);
        groups.iter().map(|group| group.iter().map(|queued| queued.sequence).collect()).collect()
    }

    #[test]
    fn a_failed_group_is_split_around_its_culprit_in_order() {
        assert_eq!(parts(Some(0)), [vec![], vec![1], vec![2, 3, 4, 5]]);
        assert_eq!(parts(Some(2)), [vec![1, 2], vec![3], vec![4, 5]]);
        assert_eq!(parts(Some(4)), [vec![1, 2, 3, 4], vec![5], vec![]]);
        assert_eq!(parts(None), [vec![1, 2], vec![3, 4, 5]]);
    }
}
