//! One transaction of an executor: inbox rows, handlers of the events that were new, commit.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures_util::FutureExt;
use tokio::time::timeout;
use tracing::{Instrument, Span};
use uuid::Uuid;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::panic_text;
use aftercommit_core::fault;
use aftercommit_core::postgres::function::FunctionName;
use aftercommit_core::postgres::inbox::Entered;
use aftercommit_core::postgres::pins::Server;
use aftercommit_core::postgres::session::{Session, Tx};
use aftercommit_core::postgres::{forget, function, handling, inbox, redrive};
use aftercommit_core::trace::Consumer;

use super::{Executor, GRACE, SILENT};
use crate::batch::{self, BatchError};
use crate::handler::HandlerError;
use crate::item::{Queued, redrive_ids};
use crate::loss::Loss;
use crate::pace::Took;
use crate::progress::EventOutcome;
use crate::scheduler::EventPlace;
use crate::span::{self, FunctionCalls};
use crate::subscriber::Work;
use crate::transaction_error::{TooSlow, TransactionError, classify, describe, timed_out};

/// What became of a transaction, and whether its session can be used again.
type Ended = (Result<Vec<Uuid>, TransactionError>, bool);

impl Executor {
    /// Runs these events in one transaction and returns those that may not run yet.
    pub(super) async fn transact(&self, group: &[&Queued], took: &mut Took) -> Result<Vec<Uuid>, TransactionError> {
        let mut connection = self.own(self.connections.take_for_others()).await.map_err(TransactionError::Outage)?;
        let (result, usable) =
            match AssertUnwindSafe(self.transact_on(&mut connection, group, took)).catch_unwind().await {
                Ok(ended) => ended,
                // Where a handler's panic is not caught beside it, as when what it left behind is dropped.
                Err(panic) => {
                    let error = HandlerError::retry(format!("the handler panicked: {}", panic_text(&*panic)));
                    (Err(TransactionError::Failed { at: None, error }), false)
                }
            };
        match &result {
            Err(TransactionError::Outage(_) | TransactionError::Ended(_) | TransactionError::Lost(_)) => {
                self.connections.forget_idle()
            }
            _ if usable => self.give_back(connection),
            _ => {}
        }
        match self.connections.is_pooled() {
            true => result.map_err(TransactionError::behind_pooler),
            false => result,
        }
    }

    /// Keeps a session for the next events once nothing of these is left in it.
    fn give_back(&self, connection: Session) {
        self.connections.give_back_to_clean(connection, async |mut connection| {
            let cleaned = timeout(GRACE, handling::reset(&mut connection)).await;
            matches!(cleaned, Ok(Ok(()))).then_some(connection)
        });
    }

    async fn transact_on(&self, connection: &mut Session, group: &[&Queued], took: &mut Took) -> Ended {
        let limit = self.subscriber.settings.time_limit;
        let events: Vec<Uuid> = group.iter().map(|queued| queued.event.id.as_uuid()).collect();
        let server = connection.server().clone();
        let state = connection.state().map(String::from);
        let begun = inbox::begin_batch(connection, limit, self.marker(), &events);
        let mut tx = match self.own(begun).await {
            Ok(tx) => tx,
            Err(reason) => return (Err(TransactionError::Outage(reason)), false),
        };
        fault::point("worker-marked");
        match self.fill(&mut tx, group, state.as_deref(), took).await {
            Ok(held) => {
                fault::point("worker-handled");
                match self.own_or_conflict(tx.commit()).await {
                    Ok(()) => {
                        fault::point("worker-committed");
                        self.count(group.iter().filter(|queued| !held.contains(&queued.event.id.as_uuid())));
                        (Ok(held), true)
                    }
                    Err(TransactionError::Ended(reason)) => (Err(self.lost(group, server, reason)), false),
                    Err(failure) => (Err(failure), true),
                }
            }
            Err(TransactionError::Ended(reason)) => (Err(self.lost(group, server, reason)), false),
            Err(TransactionError::Outage(reason)) => (Err(TransactionError::Outage(reason)), false),
            Err(failure) => self.undo(tx, group, server, failure).await,
        }
    }

    /// Rolls back. Waits for a statement that still runs, so that its locks are gone when the event runs again.
    async fn undo(&self, tx: Tx<'_>, group: &[&Queued], server: Server, failure: TransactionError) -> Ended {
        // What runs behind a handler that was given up has used up its time: without a client it ends on the server.
        let gave_up = failure.gave_up();
        let patience = if gave_up { GRACE } else { self.subscriber.settings.time_limit + GRACE };
        match timeout(patience, tx.rollback()).await {
            Ok(Ok(())) => {
                let usable = !failure.is_stale();
                (Err(failure), usable)
            }
            _ if gave_up => (Err(failure), false),
            // The session is gone: whatever the handler made of that, it may be no fault of the event.
            failed => {
                let rollback = failed.map_or_else(|_| SILENT.to_string(), |_| "the session is gone".to_string());
                (Err(self.lost(group, server, failure.told().unwrap_or(rollback))), false)
            }
        }
    }

    fn lost(&self, group: &[&Queued], server: Server, reason: String) -> TransactionError {
        let event =
            |queued: &&Queued| (queued.place, queued.event.id.as_uuid(), queued.failures.load(Ordering::Relaxed));
        TransactionError::Lost(Loss {
            executor: self.number,
            events: group.iter().map(event).collect(),
            server,
            reason,
        })
    }

    /// Counts events whose transaction is committed.
    fn count<'q>(&self, events: impl Iterator<Item = &'q &'q Queued>) {
        let mut committed = 0;
        for queued in events {
            committed += 1;
            if queued.fresh.load(Ordering::Relaxed) {
                self.progress.took_effect(queued.event.time);
            } else {
                self.progress.count(EventOutcome::Duplicate);
            }
        }
        self.progress.committed(committed);
    }

    async fn fill(
        &self,
        tx: &mut Tx<'_>,
        group: &[&Queued],
        state: Option<&str>,
        took: &mut Took,
    ) -> Result<Vec<Uuid>, TransactionError> {
        let entered = self.own_or_conflict(self.enter(tx, group)).await;
        // Nothing of the events has run yet, so none of them is to blame.
        let Entered { fresh, held, suspected, transaction } = entered.map_err(|failure| match failure {
            TransactionError::Failed { at, error } if timed_out(&error) => TransactionError::Interrupted { at, error },
            TransactionError::Failed { error, .. } | TransactionError::Doubtful { error, .. } => {
                TransactionError::Outage(describe(&error))
            }
            TransactionError::Ended(reason) => TransactionError::Outage(reason),
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
        let replaced = replaced(group);
        let mut new: Vec<(usize, &Queued)> = Vec::new();
        for (at, queued) in group.iter().enumerate() {
            let id = queued.event.id.as_uuid();
            // `remove`, because one event may be in the stream twice.
            if !replaced.contains(&(id, queued.stream_seq)) && fresh.remove(&id).is_some() {
                new.push((at, queued));
            }
        }
        self.take_tombstones(tx, group, &mut new).await?;
        self.work(tx, &new, took).await?;
        self.close(tx, new.len(), (state, transaction)).await?;
        if !on_record.is_empty() {
            self.own_or_conflict(inbox::clear_attempts(tx, &self.subscriber.name, &on_record)).await?;
        }
        Ok(held)
    }

    /// No handler gets the tombstone of an event that was forgotten; and what this database has of the event is forgotten, too.
    async fn take_tombstones(
        &self,
        tx: &mut Tx<'_>,
        group: &[&Queued],
        new: &mut Vec<(usize, &Queued)>,
    ) -> Result<(), TransactionError> {
        let id = |queued: &Queued| queued.event.id.as_uuid();
        let all: Vec<Uuid> =
            group.iter().filter(|queued| queued.event.is_tombstone()).map(|queued| id(queued)).collect();
        if all.is_empty() {
            return Ok(());
        }
        let fresh: Vec<Uuid> =
            new.iter().filter(|(_, queued)| queued.event.is_tombstone()).map(|(_, queued)| id(queued)).collect();
        new.retain(|(_, queued)| !queued.event.is_tombstone());
        self.own_or_conflict(forget::take_tombstones(tx, &self.subscriber.name, &all, &fresh)).await?;
        for event_id in &all {
            let handled = !fresh.contains(event_id);
            tracing::info!(subscriber = self.subscriber.name, %event_id, handled, "the event was forgotten by its publisher");
        }
        Ok(())
    }

    /// Runs the handlers of these events, each with its place in the group.
    async fn work(&self, tx: &mut Tx<'_>, new: &[(usize, &Queued)], took: &mut Took) -> Result<(), TransactionError> {
        match &self.subscriber.work {
            _ if new.is_empty() => Ok(()),
            Work::Function { function, raw, .. } => {
                let mut events = Vec::with_capacity(new.len());
                for (at, Queued { event, .. }) in new {
                    let json = if *raw { Ok(event.to_json()) } else { event.to_json_strictly() };
                    events.push(json.map_err(|problem| classify(Some(*at), HandlerError::reject(problem)))?);
                }
                let new: Vec<&Queued> = new.iter().map(|(_, queued)| *queued).collect();
                let span = self.span(&new);
                let envelopes: Vec<&Envelope> = new.iter().map(|queued| &*queued.event).collect();
                let calls = FunctionCalls::of(&span, self.consumer(&new), &envelopes);
                let call = self.limited(function::call(tx, function, &events, &calls.contexts));
                let result = self.told(call, new.len(), took).instrument(span).await;
                calls.end(&result);
                match result {
                    Ok(()) => Ok(()),
                    Err(error) => Err(self.explained(function, &events, classify(None, error)).await),
                }
            }
            #[cfg(feature = "cli")]
            Work::Http { endpoint, .. } => {
                for (at, queued) in new {
                    let run = self.told(endpoint.post(&queued.event), 1, took);
                    run.instrument(self.span(&[queued])).await.map_err(|error| classify(Some(*at), error))?;
                }
                Ok(())
            }
            Work::Handlers(routes) => {
                let in_batches = |name: &str| routes.get(name).is_some_and(|route| route.in_batches);
                let runs = batch::runs(new.iter().map(|(_, queued)| {
                    let event_type = queued.event.event_type.as_str();
                    (Some(event_type).filter(|name| in_batches(name)), queued.event.key.as_deref())
                }));
                for run in runs {
                    let queued: Vec<&Queued> = run.iter().map(|at| new[*at].1).collect();
                    let at = |culprit: usize| run.get(culprit).map(|at| new[*at].0);
                    let mut culprit = None;
                    let handled = async {
                        self.handle(tx, &queued).await.map_err(|failed| {
                            culprit = failed.culprit;
                            failed.error
                        })
                    };
                    let handled = self.told(handled, queued.len(), took).instrument(self.span(&queued)).await;
                    handled.map_err(|error| classify(culprit.and_then(at), error))?;
                }
                Ok(())
            }
        }
    }

    /// Looks into a call that failed. A function that is gone, or that may not be called any more, is no fault of an event:
    /// all of them wait for it, as they do at the start. An event that PostgreSQL cannot hold as jsonb never reaches the
    /// function, and trying again is of no use.
    async fn explained(
        &self,
        function: &FunctionName,
        events: &[String],
        failure: TransactionError,
    ) -> TransactionError {
        if failure.is_about_the_function(function) {
            let obstacle = self.connections.run_for_others(async |other| function::obstacle(other, function).await);
            return match (timeout(GRACE, obstacle).await, failure) {
                (Ok(Ok(Some(obstacle))), _) => {
                    TransactionError::Unreachable(format!("the function {function}(jsonb) {obstacle}"))
                }
                // It is there again.
                (_, TransactionError::Failed { at, error }) => TransactionError::Conflict { at, error },
                (_, failure) => failure,
            };
        }
        if let [event] = events
            && failure.is_about_the_json()
        {
            let problem = self.connections.run(async |other| function::unreadable(other, event).await);
            if let Ok(Ok(Some(problem))) = timeout(GRACE, problem).await {
                let reason = format!("the payload is JSON that PostgreSQL cannot hold: {problem}");
                return TransactionError::Failed { at: Some(0), error: HandlerError::reject(reason) };
            }
        }
        failure
    }

    /// Ends what handlers may do in the transaction. It fails when they left one behind that would commit nothing, or, of
    /// several events, when one has changed the session that the others ran in.
    async fn close(
        &self,
        tx: &mut Tx<'_>,
        new: usize,
        (state, transaction): (Option<&str>, Option<u64>),
    ) -> Result<(), TransactionError> {
        let limit = self.subscriber.settings.time_limit;
        let left = self.own_or_conflict(handling::close(tx, state, transaction, limit)).await;
        // The handler has set a limit of its own for its session, under which this statement began: on a busy machine it
        // comes to nothing, and that is no fault of the event.
        let left = left.map_err(|failure| match failure {
            TransactionError::Failed { at, error } if timed_out(&error) => TransactionError::Conflict { at, error },
            other => other,
        })?;
        match left {
            handling::Left { has_rows: false, .. } => {
                Err(classify(None, HandlerError::retry("the handler rolled the worker's transaction back")))
            }
            handling::Left { changed: true, .. } if new > 1 => Err(TransactionError::Changed),
            _ => Ok(()),
        }
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

    /// Writes the inbox rows. Of the redriven events only the ones whose rows are still there may run; the rows
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
        let gone = |place| matches!(place, EventPlace::Redrive(id) if !taken.contains(&id));
        let replaced = replaced(group);
        let present = group.iter().filter(|queued| {
            !gone(queued.place) && !replaced.contains(&(queued.event.id.as_uuid(), queued.stream_seq))
        });
        let rows: Vec<inbox::Row> = present.map(|queued| queued.row()).collect();
        let mut entered = inbox::insert(tx, self.marker(), &rows).await?;
        for queued in group.iter().filter(|queued| !queued.event.replaces.is_empty()) {
            let id = queued.event.id.as_uuid();
            if entered.fresh.iter().any(|(fresh, _)| *fresh == id) || entered.held.contains(&id) {
                continue;
            }
            // What was handled under this event's id may be a message that somebody else has written.
            let forged: Vec<i64> = queued.event.replaces.iter().map(|sequence| sequence.cast_signed()).collect();
            if inbox::forget_forgery(tx, &self.subscriber.name, id, &forged).await? {
                tracing::error!(
                    subscriber = self.subscriber.name, event_id = %id, sequence = queued.stream_seq,
                    "a message with this event's id and other contents was handled before it: the event is handled now, and \
                     what the other one did stays"
                );
                let again = inbox::insert(tx, self.marker(), &[queued.row()]).await?;
                entered.fresh.extend(again.fresh);
                entered.held.extend(again.held);
                entered.transaction = entered.transaction.or(again.transaction);
            }
        }
        Ok(entered)
    }

    /// Runs the handler of events that have the same type.
    async fn handle(&self, tx: &mut Tx<'_>, events: &[&Queued]) -> Result<(), BatchError> {
        let Work::Handlers(routes) = &self.subscriber.work else { return Ok(()) };
        let event_type = events.first().map_or("", |queued| queued.event.event_type.as_str());
        let Some(route) = routes.get(event_type) else {
            // The consumer delivers what the newest version of the subscriber takes, and an older one may still be active.
            let reason = format!("this instance has no handler for {event_type}: it waits for one that has");
            return Err(BatchError::at(0, HandlerError::unavailable(reason)));
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

    fn consumer<'e>(&'e self, events: &[&'e Queued]) -> Consumer<'e> {
        let stream = events.first().map_or("", |queued| queued.stream.as_str());
        Consumer { subscriber: &self.subscriber.name, stream }
    }

    fn span(&self, events: &[&Queued]) -> Span {
        let consumer = self.consumer(events);
        match events {
            [single] => span::of_event(consumer, &single.event, single.this_try()),
            many => span::of_batch(consumer, &many.iter().map(|queued| &*queued.event).collect::<Vec<_>>()),
        }
    }

    async fn limited(&self, statement: impl Future<Output = Result<(), sqlx::Error>>) -> Result<(), HandlerError> {
        match timeout(self.subscriber.settings.time_limit, statement).await {
            Ok(result) => result.map_err(HandlerError::from),
            Err(_) => Err(self.too_slow()),
        }
    }

    fn too_slow(&self) -> HandlerError {
        HandlerError::retry(TooSlow(self.subscriber.settings.time_limit))
    }
}

/// The messages of which events of the group say that they have their ids and are not them.
fn replaced(group: &[&Queued]) -> HashSet<(Uuid, i64)> {
    let of = |queued: &&Queued| {
        let id = queued.event.id.as_uuid();
        queued.event.replaces.iter().map(move |sequence| (id, sequence.cast_signed())).collect::<Vec<_>>()
    };
    group.iter().filter(|queued| !queued.event.replaces.is_empty()).flat_map(of).collect()
}
