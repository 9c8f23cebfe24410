//! Runs one batch of events: what goes into which transaction, and what becomes of each event.

mod decide;
mod load;
mod lost_session;
mod transact;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::Either;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::time::timeout;
use uuid::Uuid;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::jetstream::stored::Source;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::lease::Tenure;
use aftercommit_core::postgres::running::{self, Marker};
use aftercommit_core::postgres::{self, attempt};

use super::doubt;
use super::handler::HandlerError;
use super::item::{Item, Queued};
use super::loss::Loss;
use super::pace::Took;
use super::progress::Progress;
use super::scheduler::{Company, EventPlace};
use super::subscriber::{FailurePolicy, Subscriber};
use super::transaction_error::{TransactionError, classify, describe, timed_out};
use super::verdict::{BatchReport, Halt, OutageWait, Verdict};

/// How often a conflict with other transactions is answered with another run before it counts as a failure.
const MAX_CONFLICTS: u32 = 10;
/// How much longer than the time limit this process waits for PostgreSQL to enforce it.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// How long a batch that must run alone in the process waits for that. Then it runs beside others, and a crash proves
/// nothing against it.
const ALONE: Duration = Duration::from_secs(5);

/// The error of a statement that PostgreSQL does not answer.
pub(super) const SILENT: &str = "PostgreSQL does not answer";

/// Runs one batch of events at a time.
#[derive(Clone)]
pub(super) struct Executor {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) source: Source,
    pub(super) tenure: Arc<Tenure>,
    /// Locked by whatever runs in this process; exclusively by an event that must run with nothing beside it, because
    /// another subscriber's event may be the one that kills the process.
    pub(super) process: Arc<RwLock<()>>,
    pub(super) progress: Arc<Progress>,
    /// Tells it from the executors beside it. The column `lane` of `aftercommit.running` has it.
    pub(super) number: i64,
    /// Whether nothing else runs in this process meanwhile.
    pub(super) alone: bool,
}

impl Executor {
    /// Runs the events, which are in order.
    pub(super) async fn run(mut self, items: Vec<Item>) -> BatchReport {
        let alone = items.iter().any(|item| doubt::company(&item.record) == Company::None);
        let process = Arc::clone(&self.process);
        let beside = enter_process(&process, alone).await;
        self.alone = matches!(beside, Either::Left(_));
        let mut report = BatchReport::default();
        let result = match self.load(items, &mut report).await {
            Ok(events) => {
                let result = self.run_events(&events, &mut report).await;
                let lost = report.losses.iter().flat_map(Loss::places);
                let settled: HashSet<EventPlace> =
                    report.verdicts.iter().map(|(place, _)| *place).chain(lost).collect();
                let rest = events.iter().map(|event| event.place).filter(|place| !settled.contains(place));
                report.verdicts.extend(rest.map(|place| (place, Verdict::NotRun)));
                result
            }
            Err(halt) => Err(halt),
        };
        report.halted(result);
        // A commit has removed it; after an outage it cannot be, and the next batch of this executor replaces it.
        if report.outage.is_none() && report.verdicts.iter().any(|(_, verdict)| *verdict != Verdict::Done) {
            let cleared = self.connections.run(async |connection| running::clear(connection, self.marker()).await);
            if let Err(error) = self.own(cleared).await {
                tracing::debug!(
                    subscriber = self.subscriber.name,
                    error,
                    "the marker of a batch that has ended was not removed"
                );
            }
        }
        report
    }

    pub(super) fn marker(&self) -> Marker<'_> {
        Marker { subscriber: &self.subscriber.name, epoch: self.tenure.epoch, lane: self.number, alone: self.alone }
    }

    async fn run_events(&self, events: &[Queued], report: &mut BatchReport) -> Result<(), Halt> {
        let mut blocked: HashSet<&str> = HashSet::new();
        let mut groups: VecDeque<Vec<&Queued>> = VecDeque::from([events.iter().collect()]);
        while let Some(mut group) = groups.pop_front() {
            group.retain(|queued| {
                let free = queued.event.order_key().is_none_or(|key| !blocked.contains(key));
                if !free {
                    report.verdicts.push((queued.place, Verdict::NotRun));
                }
                free
            });
            let mut took = Took::start();
            match group.as_slice() {
                [] => {}
                [single] => {
                    let verdict = match self.run_alone(single, &mut took, report).await? {
                        Ok(verdict) => verdict,
                        Err(loss) => {
                            blocked.extend(single.event.order_key());
                            self.find_out(loss, report).await?;
                            continue;
                        }
                    };
                    if self.holds_key(&verdict) {
                        blocked.extend(single.event.order_key());
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
                                blocked.extend(queued.event.order_key());
                            }
                            report.verdicts.push((queued.place, if held { Verdict::Held } else { Verdict::Done }));
                        }
                        report.ran = Some(took.end());
                    }
                    Err(TransactionError::Outage(reason) | TransactionError::Ended(reason)) => {
                        return Err(Halt::Outage(reason));
                    }
                    Err(TransactionError::Unreachable(reason)) => return Err(Halt::Unreachable(reason)),
                    Err(TransactionError::Lost(loss)) => {
                        blocked.extend(many.iter().filter_map(|queued| queued.event.order_key()));
                        self.find_out(loss, report).await?;
                    }
                    // One that hangs would do so in every half that it is in, and so would one that changes the session.
                    Err(TransactionError::Changed) => single_out(group, &mut groups),
                    Err(TransactionError::Failed { at: None, error }) if timed_out(&error) => {
                        single_out(group, &mut groups)
                    }
                    Err(failure) => split(group, failure.culprit(), &mut groups),
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
            Verdict::Later(_) | Verdict::Suspect(_) | Verdict::Held | Verdict::Interrupted { .. } | Verdict::NotRun => {
                true
            }
        }
    }

    /// Runs one event in a transaction of its own; this run decides about it, unless its session is lost.
    async fn run_alone(
        &self,
        queued: &Queued,
        took: &mut Took,
        report: &mut BatchReport,
    ) -> Result<Result<Verdict, Loss>, Halt> {
        let settings = &self.subscriber.settings;
        if let Some(reason) = doubt::exhausted(&queued.record, settings.max_attempts, settings.max_crashes) {
            return self.give_up(queued, &reason, false).await.map(Ok);
        }
        let mut conflicts = 0;
        loop {
            let error = match self.transact(&[queued], took).await {
                Ok(held) if held.is_empty() => return Ok(Ok(Verdict::Done)),
                Ok(_) => return Ok(Ok(Verdict::Held)),
                Err(TransactionError::Outage(reason) | TransactionError::Ended(reason)) => {
                    return Err(Halt::Outage(reason));
                }
                Err(TransactionError::Unreachable(reason)) => return Err(Halt::Unreachable(reason)),
                Err(TransactionError::Changed) => return Ok(Ok(Verdict::NotRun)),
                Err(TransactionError::Lost(loss)) => return Ok(Err(loss)),
                Err(TransactionError::Interrupted { error, .. }) => {
                    return self.interrupted(queued, &error).await.map(Ok);
                }
                Err(TransactionError::Conflict { .. }) if conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                    tokio::time::sleep(CONFLICT.after(conflicts)).await;
                    continue;
                }
                Err(TransactionError::Doubtful { error, .. }) if !doubt::is_suspect(&queued.record) => {
                    return self.suspect(queued, &error, report).await.map(Ok);
                }
                Err(
                    TransactionError::Conflict { error, .. }
                    | TransactionError::Doubtful { error, .. }
                    | TransactionError::Failed { error, .. },
                ) => error,
            };
            return self.decide(queued, error, took.elapsed()).await.map(Ok);
        }
    }

    /// Decides about an event whose handler needs a service that is not available.
    async fn interrupted(&self, queued: &Queued, error: &HandlerError) -> Result<Verdict, Halt> {
        let wait = match error {
            HandlerError::Unavailable { after: Some(wait), .. } => OutageWait::Exactly(*wait),
            HandlerError::Unavailable { .. } => {
                OutageWait::Exactly(self.subscriber.settings.backoff.after(queued.interruptions + 1))
            }
            _ => OutageWait::Soon,
        };
        let reason = describe(error);
        if let OutageWait::Exactly(wait) = wait {
            self.postpone(queued, (attempt::Waits::Unavailable, wait), &reason).await?;
        }
        Ok(Verdict::Interrupted { reason, wait })
    }

    /// Either the event or something around it broke the transaction: the event runs once more, alone, to show which.
    async fn suspect(&self, queued: &Queued, error: &HandlerError, report: &mut BatchReport) -> Result<Verdict, Halt> {
        let (name, id, reason) = (&self.subscriber.name, queued.event.id.as_uuid(), describe(error));
        let marked = self
            .connections
            .run(async |connection| attempt::suspect(connection, &self.tenure, name, id, &reason).await);
        let record = self.own(marked).await.map_err(Halt::Outage)?.ok_or(Halt::Fenced)?;
        tracing::warn!(subscriber = name, event_id = %queued.event.id, error = reason, "an event may be at fault: it runs alone next time");
        report.records.push((queued.place, record));
        Ok(Verdict::Suspect(Backoff::RECONNECT.after(1)))
    }

    /// Runs a statement of our own that no event can be blamed for.
    pub(super) async fn own<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, String> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(result) => result.map_err(|error| postgres::message(&error)),
            Err(_) => Err(SILENT.into()),
        }
    }

    /// Runs a statement of our own that fails when a handler left the transaction in a bad state.
    pub(super) async fn own_or_conflict<T>(
        &self,
        statement: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, TransactionError> {
        match timeout(self.subscriber.settings.time_limit + GRACE, statement).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) if postgres::ends_session(&error) => Err(TransactionError::Ended(postgres::message(&error))),
            Ok(Err(error)) if postgres::is_outage(&error) && !postgres::is_doubtful(&error) => {
                Err(TransactionError::Outage(postgres::message(&error)))
            }
            Ok(Err(error)) => Err(classify(None, error.into())),
            Err(_) => Err(TransactionError::Ended(SILENT.into())),
        }
    }
}

const CONFLICT: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(100) };

/// Waits until the batch may run beside what other subscribers run. One that shall run alone keeps them waiting for a
/// moment only, when a handler does not end.
async fn enter_process(process: &RwLock<()>, alone: bool) -> Either<RwLockWriteGuard<'_, ()>, RwLockReadGuard<'_, ()>> {
    if alone && let Ok(guard) = timeout(ALONE, process.write()).await {
        return Either::Left(guard);
    }
    Either::Right(process.read().await)
}

/// Puts the events of a group in front, each alone.
fn single_out<'a>(group: Vec<&'a Queued>, groups: &mut VecDeque<Vec<&'a Queued>>) {
    group.into_iter().rev().for_each(|single| groups.push_front(vec![single]));
}

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
    use aftercommit_core::envelope::Envelope;
    use aftercommit_core::postgres::attempt::Record;

    fn parts(culprit: Option<usize>) -> Vec<Vec<i64>> {
        let event = Envelope::from_headers(
            [("ce-id", "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), ("ce-type", "a"), ("ce-source", "/")].into_iter(),
            bytes::Bytes::new(),
        );
        let event = Arc::new(event.unwrap());
        let item = |n| Item {
            place: EventPlace::Redrive(n),
            id: None,
            event: None,
            deliveries: 1,
            interruptions: 0,
            record: Record::default(),
        };
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
