//! The main loop of a subscriber's active instance: takes messages from the feed, gives events to executors, answers.

mod ending;
mod room;
mod settling;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::fault;
use aftercommit_core::jetstream::ack::{Answer, Answers, Reply};
use aftercommit_core::jetstream::budget::{Budget, Permit};
use aftercommit_core::jetstream::feed::{Fed, Incoming};
use aftercommit_core::postgres::attempt::{Left, Record, Waits};
use aftercommit_core::postgres::redrive::Waiting;
use aftercommit_outbox::event::EventId;

use super::doubt;
use super::elsewhere::{self, Elsewhere};
use super::executor::Executor;
use super::gate::Gate;
use super::item::Item;
use super::loss::Loss;
use super::pace::Pace;
use super::progress::DispatcherLoad;
use super::reached::{self, Account};
use super::redrive::Redrives;
use super::scheduler::{Company, EventPlace, Scheduler};
use super::subscriber::{FailurePolicy, MAX_WAIT};
use super::verdict::BatchReport;
use room::Room;

/// The most payload bytes in memory, beside what is on its way.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// When JetStream shall send an event again whose payload was let go. The executor reads it from the stream before.
const LET_GO: Duration = Duration::from_secs(300);

/// How many messages are taken from the feed at a time.
const MAX_FED: usize = 1000;
/// When an event is tried again that waits for redriven events of its key.
const HELD: Duration = Duration::from_millis(250);

/// Why a dispatcher ended.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// The process stops, or the subscriber is paused.
    Stopped,
    /// Another instance has taken over.
    Fenced,
    /// Another dispatcher must begin, for this reason, such as a consumer that was made again.
    Broken(String),
}

/// Hands the events of one consumer to executors, each key in its order.
pub(super) struct Dispatcher {
    /// Every executor is a copy of it, with a number of its own.
    executor: Executor,
    scheduler: Scheduler,
    pending: HashMap<EventPlace, Pending>,
    redrives: Redrives,
    /// The executors that run.
    executors: JoinSet<(i64, BatchReport)>,
    /// Their numbers.
    numbers: BTreeSet<i64>,
    /// What is on record of events that have not come yet.
    on_record: HashMap<Uuid, Left>,
    elsewhere: Elsewhere,
    /// Sessions that were lost while events ran. The database must still be asked about them.
    losses: Vec<Loss>,
    /// Whether an executor asks the database about some of them now.
    looking: bool,
    answers: Answers,
    budget: Arc<Budget>,
    account: Account,
    gate: Gate,
    pace: Pace,
    room: Room,
    /// The wait until one more batch may run in this process, and the permit that came of it.
    admission: Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
    admitted: Option<OwnedSemaphorePermit>,
    /// Events whose handlers were interrupted by an outage and have not run since.
    interrupted: usize,
}

/// What is known of an event that is not done.
struct Pending {
    id: EventId,
    /// The event and its share of the memory; none when it was let go, or waits in the table of redriven events.
    event: Option<(Arc<Envelope>, Permit)>,
    reply: Option<Reply>,
    deliveries: u64,
    /// Whether the server must be told that the event is still worked on.
    alive: bool,
    /// How often in a row its handler was interrupted by an outage.
    interruptions: u32,
    /// What is on record of it.
    record: Record,
}

/// How many events a subscriber holds in memory: enough to keep all executors busy, and that again for what is on its way
/// there and back.
pub(super) fn budget(executor: &Executor) -> Arc<Budget> {
    let settings = &executor.subscriber.settings;
    Budget::new((settings.concurrency * settings.max_batch * 4).clamp(500, 5000), MAX_BYTES)
}

impl Dispatcher {
    pub(super) fn new(
        executor: Executor,
        (on_record, elsewhere): (HashMap<Uuid, Left>, Elsewhere),
        answers: Answers,
        budget: Arc<Budget>,
        account: Account,
    ) -> Self {
        executor.progress.notes.clear();
        Self {
            redrives: Redrives::new(Arc::clone(&executor.connections), &executor.subscriber.name),
            executor,
            scheduler: Scheduler::default(),
            pending: HashMap::new(),
            executors: JoinSet::new(),
            numbers: BTreeSet::new(),
            on_record,
            elsewhere,
            losses: Vec::new(),
            looking: false,
            answers,
            budget,
            account,
            gate: Gate::default(),
            pace: Pace::default(),
            room: Room::default(),
            admission: None,
            admitted: None,
            interrupted: 0,
        }
    }

    /// Works until `stop`, until `lost`, or until the feed ends. Signs of life go out three times per `ack_wait`. What runs then
    /// goes on until [`Dispatcher::finish`].
    pub(super) async fn run(
        &mut self,
        (mut feed, feeding): (mpsc::UnboundedReceiver<Fed>, AbortOnDropHandle<()>),
        ack_wait: Duration,
        stop: &CancellationToken,
        lost: &CancellationToken,
    ) -> End {
        let mut signs = tokio::time::interval(ack_wait / 3);
        signs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut writes = tokio::time::interval(reached::EVERY);
        writes.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut fed = Vec::new();
        let end = loop {
            if let Some(end) = self.catch_up(&mut feed, &mut fed) {
                break end;
            }
            self.give_out();
            self.make_room();
            let wake = self.next_wake();
            self.executor.progress.load(self.load());
            tokio::select! {
                biased;
                () = stop.cancelled() => break End::Stopped,
                () = lost.cancelled() => break End::Fenced,
                Some(report) = self.executors.join_next(), if !self.executors.is_empty() => {
                    if let Some(end) = self.settle(report) {
                        break end;
                    }
                }
                permit = admission(&mut self.admission) => {
                    self.admission = None;
                    self.admitted = permit;
                }
                _ = signs.tick() => self.send_signs(),
                _ = writes.tick() => self.account.write(),
                () = sleep_until(wake), if wake.is_some() => self.scheduler.wake(Instant::now()),
                rows = self.redrives.next() => self.take_redriven(rows),
                _ = feed.recv_many(&mut fed, MAX_FED) => match self.take_in_all(&mut fed) {
                    Ok(()) => {}
                    Err(reason) => break End::Broken(reason),
                },
            }
        };
        drop(feed);
        // It pulls no more before anything is given back. When the server does not answer, nothing can be given back.
        let _ = tokio::time::timeout(Duration::from_secs(1), feeding).await;
        if end == End::Stopped {
            self.give_back().await;
        }
        end
    }

    fn load(&self) -> DispatcherLoad {
        DispatcherLoad {
            ready: self.scheduler.ready(),
            executors: self.executors.len(),
            held: self.scheduler.held(),
            interrupted: self.interrupted,
        }
    }

    /// Takes in all that has happened, before executors get anything: so they get much at a time. Returns why the dispatcher
    /// ends, if it does.
    fn catch_up(&mut self, feed: &mut mpsc::UnboundedReceiver<Fed>, fed: &mut Vec<Fed>) -> Option<End> {
        while let Some(report) = self.executors.try_join_next() {
            if let Some(end) = self.settle(report) {
                return Some(end);
            }
        }
        feed.recv_many(fed, MAX_FED).now_or_never()?;
        self.take_in_all(fed).err().map(End::Broken)
    }

    /// Takes in what the feed has. An error when the feed has ended.
    fn take_in_all(&mut self, fed: &mut Vec<Fed>) -> Result<(), String> {
        if fed.is_empty() {
            return Err("the feed ended".into());
        }
        let ready = self.scheduler.ready();
        for fed in fed.drain(..) {
            match fed {
                Fed::Message(incoming) => self.take_in(*incoming)?,
                Fed::Complete(place) => self.account.saw(place),
                Fed::Refused(problem) => self.executor.progress.delivery(problem),
                Fed::Ended(reason) => return Err(reason),
            }
        }
        if self.scheduler.ready() > ready {
            self.room.paid();
        }
        Ok(())
    }

    /// Takes in a message. It cannot when another one is known under its sequence: then the stream has lost its end, and this
    /// came into the place of what was lost.
    fn take_in(&mut self, incoming: Incoming) -> Result<(), String> {
        let Incoming { place, deliveries, reply, event, permit } = incoming;
        let sequence = place.sequence;
        fault::point("worker-fetched");
        if deliveries > 1 {
            self.executor.progress.redelivered();
        }
        let event = match event {
            Ok(event) => event,
            Err(problem) => {
                tracing::warn!(
                    subscriber = self.executor.subscriber.name,
                    sequence,
                    error = %problem,
                    "a message is not an event, skipping it"
                );
                if let Some(reply) = reply {
                    self.answers.send(&reply, &Answer::Never(format!("not an event: {problem}")));
                }
                self.account.saw(place);
                return Ok(());
            }
        };
        let id = event.id;
        if let Some(known) = self.pending.get(&EventPlace::Stream(sequence)).filter(|known| known.id != id) {
            return Err(format!("the stream has lost its end: it has event {id} in the place of {}", known.id));
        }
        self.account.saw(place);
        let place = EventPlace::Stream(sequence);
        if let Some(record) = self.schedule(place, id, event.order_key()) {
            let event = Some((Arc::new(event), permit));
            let pending = Pending { id, event, reply, deliveries, alive: true, interruptions: 0, record };
            self.pending.insert(place, pending);
            self.account.opened(sequence);
        } else if let Some(known) = self.pending.get_mut(&place) {
            // It came again while it waits or runs: never a second run, but a fresh place for the answer.
            if reply.is_some() {
                known.reply = reply;
                known.alive = true;
                known.deliveries = known.deliveries.max(deliveries);
            }
            if known.event.is_none() {
                known.event = Some((Arc::new(event), permit));
            }
        }
        Ok(())
    }

    /// Takes note of redriven events. They stay in their table until an executor reads them.
    fn take_redriven(&mut self, rows: Vec<Waiting>) {
        for Waiting { id, event_id, key } in rows {
            let place = EventPlace::Redrive(id);
            let id = event_id.into();
            if let Some(record) = self.schedule(place, id, key.as_deref()) {
                self.redrives.added();
                let (event, reply) = (None, None);
                let pending = Pending { id, event, reply, deliveries: 0, alive: false, interruptions: 0, record };
                self.pending.insert(place, pending);
            }
        }
    }

    /// Gives an event to the scheduler and returns what is on record of it; none when it is known already.
    fn schedule(&mut self, place: EventPlace, id: EventId, key: Option<&str>) -> Option<Record> {
        let key = key.filter(|_| !fault::broken("order of keys"));
        if !self.scheduler.add(place, key) {
            return None;
        }
        // Once: an event that an operator redrives after it was given up starts without failed attempts.
        let Left { record, wait } = self.on_record.remove(&id.as_uuid()).unwrap_or_default();
        let company = doubt::company(&record);
        let company = if self.elsewhere.runs(id) { company.min(Company::Apart) } else { company };
        self.scheduler.bears(place, company);
        let settings = &self.executor.subscriber.settings;
        if let Some((waits, rest)) = wait {
            let passes = waits == Waits::Retry && settings.failure_policy == FailurePolicy::Skip;
            self.scheduler.postpone(place, Instant::now() + rest.min(MAX_WAIT), passes);
        } else if let (Some(_), Some(window)) = (key, settings.debounce) {
            self.scheduler.delay(place, Instant::now() + window);
        }
        Some(record)
    }

    /// When the memory is full of events that cannot run now and executors have had nothing to do for a while: keeps the places
    /// of those events and lets their payloads go, so that others can come in. Executors read them again when their time comes.
    fn make_room(&mut self) {
        let (busy, now) = (self.executors.len() >= self.executor.subscriber.settings.concurrency, Instant::now());
        self.room.idle(!busy && !self.scheduler.any_ready(), now);
        if !self.budget.is_full() || self.room.due().is_none_or(|due| due > now) {
            return;
        }
        self.room.made(now);
        for place in self.scheduler.idle() {
            let Some(pending) = self.pending.get_mut(&place) else { continue };
            if pending.event.take().is_some() && pending.alive {
                pending.alive = false;
                if let Some(reply) = &pending.reply {
                    self.answers.send(reply, &Answer::Later(LET_GO));
                }
            }
        }
    }

    /// Gives free executors something to do.
    fn give_out(&mut self) {
        let mut admitted = self.admitted.take();
        if !self.redrives.begun() || self.gate.closed_until.is_some_and(|until| until > Instant::now()) {
            self.admission = None;
            return;
        }
        if !self.losses.is_empty() {
            self.admission = None;
            return self.look_into_losses();
        }
        // After an outage one executor looks whether it is over.
        let most = if self.gate.failures > 0 { 1 } else { self.executor.subscriber.settings.concurrency };
        while self.executors.len() < most && self.scheduler.ready() > 0 {
            let Some(permit) = admitted.take().or_else(|| self.executor.connections.admit_now()) else {
                let connections = Arc::clone(&self.executor.connections);
                self.admission.get_or_insert_with(|| async move { connections.admit().await }.boxed());
                return;
            };
            let heads = match self.executor.subscriber.settings.debounce {
                // All that has gathered of one key, and nothing else, fits best into one transaction.
                Some(_) => 1,
                None => self.scheduler.ready().div_ceil(most - self.executors.len()),
            };
            let places = self.scheduler.take(heads, self.batch_limit());
            if let [single] = *places.as_slice()
                && self.waits_elsewhere(single)
            {
                admitted = Some(permit);
                continue;
            }
            let items = places.into_iter().map(|place| {
                let pending = self.pending.get(&place);
                Item {
                    place,
                    id: pending.map(|pending| pending.id),
                    event: pending.and_then(|pending| pending.event.as_ref()).map(|(event, _)| Arc::clone(event)),
                    deliveries: pending.map_or(0, |pending| pending.deliveries),
                    interruptions: pending.map_or(0, |pending| pending.interruptions),
                    record: pending.map(|pending| pending.record.clone()).unwrap_or_default(),
                }
            });
            let items: Vec<Item> = items.collect();
            if fault::broken("ack after commit") {
                let replies = items.iter().filter_map(|item| self.pending.get(&item.place)?.reply.as_ref());
                replies.for_each(|reply| self.answers.send(reply, &Answer::Done));
            }
            let (number, executor) = self.new_executor();
            self.executor.progress.notes.started(number, &items);
            self.executors.spawn(async move {
                let report = executor.run(items).await;
                drop(permit);
                (number, report)
            });
        }
        self.admission = None;
    }

    /// Puts an event back that still runs at a predecessor, or that must run apart from others since it ended there.
    fn waits_elsewhere(&mut self, place: EventPlace) -> bool {
        let Some(pending) = self.pending.get_mut(&place) else { return false };
        if self.elsewhere.runs(pending.id) {
            self.scheduler.hold(place, Instant::now() + elsewhere::LOOK);
            return true;
        }
        match self.elsewhere.left(pending.id).filter(|left| left.crashes > pending.record.crashes) {
            Some(left) => {
                pending.record = left;
                self.scheduler.put_back(place);
                self.scheduler.bears(place, doubt::company(&pending.record));
                true
            }
            None => false,
        }
    }

    fn new_executor(&mut self) -> (i64, Executor) {
        let number = (0..).find(|number| !self.numbers.contains(number)).unwrap_or_default();
        self.numbers.insert(number);
        (number, Executor { number, ..self.executor.clone() })
    }

    /// Asks the database about lost sessions, before anything else runs: that it answers ends the outage.
    fn look_into_losses(&mut self) {
        if !self.looking {
            self.looking = true;
            let losses = std::mem::take(&mut self.losses);
            let (number, executor) = self.new_executor();
            self.executors.spawn(async move { (number, executor.look_into(losses).await) });
        }
    }

    /// As many events as should be in one transaction; what was gathered is not torn apart.
    fn batch_limit(&self) -> usize {
        let settings = &self.executor.subscriber.settings;
        if settings.debounce.is_some() {
            return settings.max_batch;
        }
        self.pace.fit().min(settings.max_batch)
    }

    fn next_wake(&self) -> Option<Instant> {
        let lost = !self.losses.is_empty() && !self.looking;
        let waits_for_gate = lost || (self.executors.is_empty() && self.scheduler.ready() > 0);
        let room = self.room.due().filter(|_| self.budget.is_full());
        self.gate.next_look(waits_for_gate).into_iter().chain(self.scheduler.next_wake()).chain(room).min()
    }

    fn send_signs(&self) {
        for reply in self.pending.values().filter(|pending| pending.alive).filter_map(|pending| pending.reply.as_ref())
        {
            self.answers.send(reply, &Answer::Working);
        }
    }
}

/// The permit, when there is a wait for one and it is over.
async fn admission(
    waits: &mut Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
) -> Option<OwnedSemaphorePermit> {
    match waits {
        Some(waits) => waits.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(wake: Option<Instant>) {
    if let Some(wake) = wake {
        tokio::time::sleep_until(wake.into()).await;
    }
}
