//! The main loop of a subscriber's active instance: takes messages from the feed, gives events to lanes, answers.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::envelope::Envelope;
use crate::event::EventId;
use crate::fault;
use crate::jetstream::ack::{Answer, Answers, Reply};
use crate::jetstream::feed::{Budget, Fed, Incoming, Permit};
use crate::postgres::redrive::Waiting;

use super::lane::Lane;
use super::load::Item;
use super::pace::Pace;
use super::progress::{Load, Outcome};
use super::redrive::Redrives;
use super::scheduler::{Company, Place, Scheduler};
use super::subscriber::{FailurePolicy, MAX_WAIT};
use super::verdict::{Report, Verdict, Wait};

/// The most payload bytes in memory, beside what is on its way.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// When JetStream shall send an event again whose payload was let go. The lane reads it from the stream before.
const LET_GO: Duration = Duration::from_secs(300);

/// How many messages are taken from the feed at a time.
const MAX_FED: usize = 1000;
/// When an event is tried again that waits for others of its key that were sent back.
const HELD: Duration = Duration::from_millis(250);

/// Why a session ended.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// It was asked to.
    Stopped,
    /// Another instance has taken over.
    Fenced,
    /// It has to begin anew: the consumer is not the one that it began with.
    Broken(String),
}

/// One stretch of work on one consumer.
pub(super) struct Session {
    lane: Lane,
    scheduler: Scheduler,
    pending: HashMap<Place, Pending>,
    redrives: Redrives,
    lanes: JoinSet<(i64, Report)>,
    /// The numbers of the lanes that run.
    numbers: BTreeSet<i64>,
    /// Events that ran when the process of a predecessor died, with how often it did.
    suspects: HashMap<Uuid, u32>,
    answers: Answers,
    budget: Arc<Budget>,
    gate: Gate,
    pace: Pace,
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
    /// How often the process died while it ran.
    crashes: u32,
}

/// Closed while the database is away, or where all events go.
#[derive(Default)]
struct Gate {
    failures: u32,
    closed_until: Option<Instant>,
}

/// How many events a subscriber holds in memory: enough to keep all lanes busy, and that again for what is on its way
/// there and back.
pub(super) fn budget(lane: &Lane) -> Arc<Budget> {
    let settings = &lane.subscriber.settings;
    Budget::new((settings.concurrency * settings.max_batch * 4).clamp(500, 5000), MAX_BYTES)
}

impl Session {
    pub(super) fn new(lane: Lane, suspects: HashMap<Uuid, u32>, answers: Answers, budget: Arc<Budget>) -> Self {
        Self {
            redrives: Redrives::new(Arc::clone(&lane.connections), &lane.subscriber.name),
            lane,
            scheduler: Scheduler::default(),
            pending: HashMap::new(),
            lanes: JoinSet::new(),
            numbers: BTreeSet::new(),
            suspects,
            answers,
            budget,
            gate: Gate::default(),
            pace: Pace::default(),
            interrupted: 0,
        }
    }

    /// Works until `stop`, until `lost`, or until the feed ends. Signs of life go out three times per `ack_wait`.
    pub(super) async fn run(
        mut self,
        (mut feed, feeding): (mpsc::UnboundedReceiver<Fed>, AbortOnDropHandle<()>),
        ack_wait: Duration,
        stop: &CancellationToken,
        lost: &CancellationToken,
    ) -> End {
        let mut signs = tokio::time::interval(ack_wait / 3);
        signs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // All that has arrived is taken in before lanes get anything, so that they get much at a time.
        let mut fed = Vec::new();
        let end = loop {
            self.give_out();
            self.make_room();
            let wake = self.next_wake();
            self.lane.progress.load(self.load());
            tokio::select! {
                biased;
                () = stop.cancelled() => break End::Stopped,
                () = lost.cancelled() => break End::Fenced,
                Some(report) = self.lanes.join_next(), if !self.lanes.is_empty() => {
                    if let Some(end) = self.settle(report) {
                        break end;
                    }
                }
                _ = signs.tick() => self.send_signs(),
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
        self.finish(end).await
    }

    fn load(&self) -> Load {
        Load {
            ready: self.scheduler.ready(),
            lanes: self.lanes.len(),
            held: self.scheduler.held(),
            interrupted: self.interrupted,
        }
    }

    /// Takes in what the feed has, and says when that is its end.
    fn take_in_all(&mut self, fed: &mut Vec<Fed>) -> Result<(), String> {
        if fed.is_empty() {
            return Err("the feed ended".into());
        }
        for fed in fed.drain(..) {
            match fed {
                Fed::Message(incoming) => self.take_in(*incoming),
                Fed::Ended(reason) => return Err(reason),
            }
        }
        Ok(())
    }

    fn take_in(&mut self, incoming: Incoming) {
        let Incoming { sequence, deliveries, reply, event, permit } = incoming;
        fault::point("worker-fetched");
        if deliveries > 1 {
            self.lane.progress.redelivered();
        }
        let event = match event {
            Ok(event) => event,
            Err(problem) => {
                tracing::warn!(
                    subscriber = self.lane.subscriber.name,
                    sequence,
                    error = %problem,
                    "a message is not an event, skipping it"
                );
                if let Some(reply) = reply {
                    self.answers.send(&reply, &Answer::Never(format!("not an event: {problem}")));
                }
                return;
            }
        };
        let place = Place::Stream(sequence);
        let id = event.id;
        if let Some(crashes) = self.schedule(place, id, event.key.as_deref()) {
            let event = Some((Arc::new(event), permit));
            let pending = Pending { id, event, reply, deliveries, alive: true, interruptions: 0, crashes };
            self.pending.insert(place, pending);
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
    }

    /// Takes note of events that were sent back. They stay in their table until a lane reads them.
    fn take_redriven(&mut self, rows: Vec<Waiting>) {
        for Waiting { id, event_id, key } in rows {
            let place = Place::Redrive(id);
            let id = event_id.into();
            if let Some(crashes) = self.schedule(place, id, key.as_deref()) {
                self.redrives.added();
                let (event, reply) = (None, None);
                let pending = Pending { id, event, reply, deliveries: 0, alive: false, interruptions: 0, crashes };
                self.pending.insert(place, pending);
            }
        }
    }

    /// Gives an event to the scheduler and returns how often the process died while it ran; none when it is known
    /// already.
    fn schedule(&mut self, place: Place, id: EventId, key: Option<&str>) -> Option<u32> {
        let key = key.filter(|_| !fault::broken("order of keys"));
        if !self.scheduler.add(place, key) {
            return None;
        }
        // Once: an event that an operator sends back after it was given up begins anew.
        let crashes = self.suspects.remove(&id.as_uuid()).unwrap_or(0);
        if crashes > 0 {
            self.scheduler.bears(place, Company::of(crashes));
        }
        if let (Some(_), Some(window)) = (key, self.lane.subscriber.settings.debounce) {
            self.scheduler.delay(place, Instant::now() + window);
        }
        Some(crashes)
    }

    /// When the memory is full of events that cannot run now and lanes have nothing to do: keeps the places of those
    /// events and lets their payloads go, so that others can come in. Lanes read them again when their time comes.
    fn make_room(&mut self) {
        let busy = self.lanes.len() >= self.lane.subscriber.settings.concurrency;
        if busy || !self.budget.is_full() || self.scheduler.any_ready() {
            return;
        }
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

    /// Gives free lanes something to do.
    fn give_out(&mut self) {
        if !self.redrives.begun() || self.gate.closed_until.is_some_and(|until| until > Instant::now()) {
            return;
        }
        // After an outage one lane looks whether it is over.
        let lanes = if self.gate.failures > 0 { 1 } else { self.lane.subscriber.settings.concurrency };
        while self.lanes.len() < lanes && self.scheduler.ready() > 0 {
            let heads = match self.lane.subscriber.settings.debounce {
                // All that has gathered of one key, and nothing else, fits best into one transaction.
                Some(_) => 1,
                None => self.scheduler.ready().div_ceil(lanes - self.lanes.len()),
            };
            let items = self.scheduler.take(heads, self.batch_limit()).into_iter().map(|place| {
                let pending = self.pending.get(&place);
                Item {
                    place,
                    event: pending.and_then(|pending| pending.event.as_ref()).map(|(event, _)| Arc::clone(event)),
                    deliveries: pending.map_or(0, |pending| pending.deliveries),
                    crashes: pending.map_or(0, |pending| pending.crashes),
                }
            });
            let items: Vec<Item> = items.collect();
            if fault::broken("ack after commit") {
                let replies = items.iter().filter_map(|item| self.pending.get(&item.place)?.reply.as_ref());
                replies.for_each(|reply| self.answers.send(reply, &Answer::Done));
            }
            let number = (0..).find(|number| !self.numbers.contains(number)).unwrap_or_default();
            self.numbers.insert(number);
            let lane = Lane { number, ..self.lane.clone() };
            self.lanes.spawn(async move { (number, lane.run(items).await) });
        }
    }

    /// As many events as should be in one transaction; what was gathered is not torn apart.
    fn batch_limit(&self) -> usize {
        let settings = &self.lane.subscriber.settings;
        if settings.debounce.is_some() {
            return settings.max_batch;
        }
        self.pace.fit().min(settings.max_batch)
    }

    fn next_wake(&self) -> Option<Instant> {
        let waits_for_gate = self.lanes.is_empty() && self.scheduler.ready() > 0;
        self.gate.next_look(waits_for_gate).into_iter().chain(self.scheduler.next_wake()).min()
    }

    /// Takes the outcome of a batch, and says when the session cannot go on.
    fn settle(&mut self, report: Result<(i64, Report), JoinError>) -> Option<End> {
        let report = match report {
            Ok((number, report)) => {
                self.numbers.remove(&number);
                report
            }
            // Handlers' panics are caught in the lane: this is a defect of ours, and its events are still given out.
            Err(error) => return Some(End::Broken(format!("a lane broke down: {error}"))),
        };
        for (place, verdict) in report.verdicts {
            self.settle_event(place, verdict);
        }
        if let Some(ran) = report.ran {
            self.pace.ran(ran);
            self.gate.open(&self.lane.subscriber.name);
        }
        if let Some(reason) = report.outage {
            self.lane.progress.trouble(&reason);
            self.gate.close(&self.lane.subscriber.name, &reason);
        }
        report.fenced.then_some(End::Fenced)
    }

    fn settle_event(&mut self, place: Place, verdict: Verdict) {
        let Some(pending) = self.pending.get_mut(&place) else { return };
        let answer = match verdict {
            Verdict::NotRun => return self.scheduler.put_back(place),
            // The rows go before it as soon as they are known.
            Verdict::Held => {
                self.redrives.look_now();
                return self.scheduler.hold(place, Instant::now() + HELD);
            }
            Verdict::Interrupted { reason, wait } => {
                self.interrupted += usize::from(pending.interruptions == 0);
                self.lane.progress.count(Outcome::Interrupted);
                self.lane.progress.trouble(format!("what an event needs is away: {reason}"));
                pending.interruptions += 1;
                // The first one and then ever more rarely.
                if pending.interruptions.is_power_of_two() {
                    tracing::warn!(
                        subscriber = self.lane.subscriber.name,
                        event_id = %pending.id,
                        ?place,
                        times = pending.interruptions,
                        error = reason,
                        "what an event needs is away, waiting"
                    );
                }
                let wait = match wait {
                    Wait::Soon => Backoff::RECONNECT.after(pending.interruptions),
                    Wait::Backoff => self.lane.subscriber.settings.backoff.after(pending.interruptions),
                    Wait::Exactly(wait) => wait,
                };
                return self.scheduler.hold(place, Instant::now() + wait.min(MAX_WAIT));
            }
            Verdict::Failed(wait) | Verdict::Later(wait) => {
                pending.alive = false;
                let wait = wait.min(MAX_WAIT);
                let until = Instant::now() + wait;
                match (&verdict, self.lane.subscriber.settings.failure_policy) {
                    (Verdict::Failed(_), FailurePolicy::Skip) => self.scheduler.set_aside(place, until),
                    _ => self.scheduler.hold(place, until),
                }
                Answer::Later(wait)
            }
            Verdict::Done => Answer::Done,
            Verdict::Dead(reason) => Answer::Never(reason),
        };
        self.interrupted -= usize::from(pending.interruptions > 0);
        pending.interruptions = 0;
        self.lane.progress.settled();
        if let Some(reply) = &pending.reply {
            self.answers.send(reply, &answer);
        }
        fault::point("worker-answered");
        if !matches!(answer, Answer::Later(_)) {
            self.scheduler.done(place);
            self.pending.remove(&place);
            if let Place::Redrive(_) = place {
                self.redrives.done();
            }
        }
    }

    fn send_signs(&self) {
        for reply in self.pending.values().filter(|pending| pending.alive).filter_map(|pending| pending.reply.as_ref())
        {
            self.answers.send(reply, &Answer::Working);
        }
    }

    /// Ends in an orderly way: what runs may finish, the rest goes back.
    async fn finish(mut self, end: End) -> End {
        if end == End::Fenced {
            // The successor waits for the locks of what still runs here.
            self.lanes.shutdown().await;
            return end;
        }
        while let Some(report) = self.lanes.join_next().await {
            if end == End::Stopped {
                self.settle(report);
            }
        }
        if end == End::Stopped {
            for reply in self.pending.values().filter_map(|pending| pending.reply.as_ref()) {
                self.answers.send(reply, &Answer::Again);
            }
            self.answers.finish(Duration::from_secs(2)).await;
        }
        end
    }
}

impl Gate {
    /// When a lane looks whether the outage is over; none when nothing waits for that. Whoever waits for a time that is
    /// past comes to nothing else.
    fn next_look(&self, waits: bool) -> Option<Instant> {
        self.closed_until.filter(|_| waits && self.failures > 0)
    }

    fn close(&mut self, subscriber: &str, reason: &str) {
        if self.failures == 0 {
            tracing::warn!(subscriber, error = reason, "the subscriber cannot work, waiting");
        }
        self.failures += 1;
        self.closed_until = Some(Instant::now() + Backoff::RECONNECT.after(self.failures));
    }

    fn open(&mut self, subscriber: &str) {
        if self.failures > 0 {
            tracing::info!(subscriber, "the subscriber works again");
        }
        *self = Self::default();
    }
}

async fn sleep_until(wake: Option<Instant>) {
    if let Some(wake) = wake {
        tokio::time::sleep_until(wake.into()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_looked_after_only_for_events_that_wait() {
        let mut gate = Gate::default();
        assert_eq!(gate.next_look(true), None, "there is none");
        gate.close("subscriber", "the database is away");
        assert!(gate.next_look(true).is_some_and(|look| look > Instant::now() - Duration::from_secs(5)));
        // What waited is gone from the stream, say. What comes next finds the gate's time past.
        assert_eq!(gate.next_look(false), None);
        gate.open("subscriber");
        assert_eq!(gate.next_look(true), None);
    }
}
