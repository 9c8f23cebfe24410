//! Which events may run now. A pure state machine: no IO, no clock of its own.
//!
//! Per key only the event with the lowest place that is not done may run; events without a key run freely. Events are
//! known here by their place alone, from the moment they arrive until they are done.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

/// Where an event comes from, and its place in the order there. What an operator redrives goes before live events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum EventPlace {
    /// The id of a row of `aftercommit.redrive`.
    Redrive(i64),
    /// A sequence of the stream.
    Stream(u64),
}

const FIRST_LIVE: EventPlace = EventPlace::Stream(0);

/// The oldest live event, or the oldest of the others.
fn first(events: &BTreeSet<EventPlace>, live: bool) -> Option<EventPlace> {
    match live {
        true => events.range(FIRST_LIVE..).next().copied(),
        false => events.first().copied().filter(|event| *event < FIRST_LIVE),
    }
}

/// All events of one subscriber that are not done.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    events: HashMap<EventPlace, Slot>,
    keys: HashMap<Arc<str>, Queue>,
    /// Events that may start: those without a key, and the oldest of each key that nothing runs of.
    ready: BTreeSet<EventPlace>,
    /// The same of suspects, which do not bear one another, in the order in which they get their turn.
    suspects: BTreeSet<(Company, EventPlace)>,
    /// How many events run.
    running: usize,
    /// The company that the suspect which runs bears: there is never more than one.
    suspect: Option<Company>,
    /// Events that wait for a point in time.
    held: BTreeSet<(Instant, EventPlace)>,
    /// Whether a live event is next, if there is one.
    live_next: bool,
}

/// Beside which others an event may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Company {
    /// Beside none. While such an event is ready, nothing else starts.
    None,
    /// In a batch of its own, beside others that bear any company.
    Unsuspected,
    /// In a batch of its own, beside any.
    Apart,
    /// In a batch with others, beside any.
    Any,
}

impl Company {
    /// Whether only one event like it may run at a time.
    fn is_suspect(self) -> bool {
        matches!(self, Self::None | Self::Unsuspected)
    }
}

#[derive(Debug)]
struct Slot {
    key: Option<Arc<str>>,
    state: State,
    company: Company,
    /// Not before this time may it start; behind another one of its key it may.
    due: Option<Instant>,
}

/// What may start next.
enum Turn {
    Suspect(EventPlace),
    Ready,
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Running,
    Held(Instant),
}

/// The events of one key.
#[derive(Debug, Default)]
struct Queue {
    events: BTreeSet<EventPlace>,
    running: usize,
}

impl Scheduler {
    /// Takes note of an event. False when it is known already.
    pub(super) fn add(&mut self, event: EventPlace, key: Option<&str>) -> bool {
        if self.events.contains_key(&event) {
            return false;
        }
        let key = key.map(|key| match self.keys.get_key_value(key) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::from(key),
        });
        self.events.insert(event, Slot { key: key.clone(), state: State::Waiting, company: Company::Any, due: None });
        match key {
            None => self.let_start(event),
            Some(key) => self.enqueue(event, &key),
        }
        true
    }

    fn enqueue(&mut self, event: EventPlace, key: &Arc<str>) {
        let queue = self.keys.entry(Arc::clone(key)).or_default();
        let overtaken = queue.events.first().filter(|oldest| event < **oldest).copied();
        queue.events.insert(event);
        if let Some(overtaken) = overtaken {
            self.let_wait(overtaken);
        }
        self.promote(key);
    }

    /// A waiting event must not start before `until`, so that others of its key gather behind it. When an older one of
    /// the key starts before, it goes with that one.
    pub(super) fn delay(&mut self, event: EventPlace, until: Instant) {
        let Some(slot) = self.events.get_mut(&event).filter(|slot| slot.state == State::Waiting) else { return };
        slot.due = Some(until);
        if self.let_wait(event) {
            self.held.insert((until, event));
        }
    }

    /// Lets an event that was just added wait until then, with its key or, when that passes it, without.
    pub(super) fn postpone(&mut self, event: EventPlace, until: Instant, key_passes: bool) {
        self.let_wait(event);
        let Some(slot) = self.events.get_mut(&event).filter(|slot| slot.state == State::Waiting) else { return };
        slot.state = State::Held(until);
        self.held.insert((until, event));
        if key_passes && let Some(key) = slot.key.clone() {
            if let Some(queue) = self.keys.get_mut(&key) {
                queue.events.remove(&event);
                if queue.events.is_empty() {
                    self.keys.remove(&key);
                }
            }
            self.promote(&key);
        }
    }

    /// Says what company an event bears that does not run. Without this it is any.
    pub(super) fn bears(&mut self, event: EventPlace, company: Company) {
        let was_ready = self.let_wait(event);
        if let Some(slot) = self.events.get_mut(&event) {
            slot.company = company;
        }
        if was_ready {
            self.let_start(event);
        }
    }

    fn company(&self, event: EventPlace) -> Company {
        self.events.get(&event).map_or(Company::Any, |slot| slot.company)
    }

    fn let_start(&mut self, event: EventPlace) {
        match self.company(event) {
            company if company.is_suspect() => self.suspects.insert((company, event)),
            _ => self.ready.insert(event),
        };
    }

    fn let_wait(&mut self, event: EventPlace) -> bool {
        self.ready.remove(&event) || self.suspects.remove(&(self.company(event), event))
    }

    fn turn(&self) -> Turn {
        match (self.suspect, self.suspects.first()) {
            (Some(Company::None), _) => Turn::Nothing,
            (_, Some((Company::None, _))) if self.running > 0 => Turn::Nothing,
            (None, Some((_, event))) => Turn::Suspect(*event),
            _ => Turn::Ready,
        }
    }

    /// How many executors could be given something at the same time.
    pub(super) fn ready(&self) -> usize {
        match self.turn() {
            Turn::Nothing => 0,
            Turn::Suspect(event) if self.company(event) == Company::None => 1,
            Turn::Suspect(_) => 1 + self.ready.len(),
            Turn::Ready => self.ready.len(),
        }
    }

    /// Whether an event is given out.
    pub(super) fn runs(&self, event: EventPlace) -> bool {
        self.events.get(&event).is_some_and(|slot| slot.state == State::Running)
    }

    /// How many events wait for a point in time.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether there is an event that waits for nothing but its turn.
    pub(super) fn any_ready(&self) -> bool {
        !self.ready.is_empty() || !self.suspects.is_empty()
    }

    /// Gives out up to `max` events for one executor, oldest first: the first `heads` ready ones and what follows them
    /// with the same key. Until all events of a key are settled no other executor gets one of it. A suspect comes first.
    /// Live and redriven events take turns, so that many redriven ones do not keep other keys waiting.
    pub(super) fn take(&mut self, heads: usize, max: usize) -> Vec<EventPlace> {
        match self.turn() {
            Turn::Nothing => Vec::new(),
            Turn::Suspect(event) => {
                self.let_wait(event);
                self.start(event);
                vec![event]
            }
            Turn::Ready => self.take_ready(heads, max),
        }
    }

    fn take_ready(&mut self, heads: usize, max: usize) -> Vec<EventPlace> {
        let mut batch = Vec::new();
        let mut heads = heads.min(self.ready.len());
        // The successors of events in this batch: only this executor may have them.
        let mut next: BTreeSet<EventPlace> = BTreeSet::new();
        while batch.len() < max {
            let ready = if heads > 0 { &self.ready } else { &BTreeSet::new() };
            let oldest = |live| first(ready, live).into_iter().chain(first(&next, live)).min();
            let Some(event) = oldest(self.live_next).or_else(|| oldest(!self.live_next)) else { break };
            let apart = self.company(event) == Company::Apart;
            if apart && !batch.is_empty() {
                break;
            }
            self.live_next = event < FIRST_LIVE;
            if !next.remove(&event) {
                self.ready.remove(&event);
                heads -= 1;
            }
            batch.push(event);
            let follower = self.start(event);
            if apart {
                break;
            }
            next.extend(follower);
        }
        batch
    }

    /// Lets an event run, and returns the next one of its key if that may run in the same batch.
    fn start(&mut self, event: EventPlace) -> Option<EventPlace> {
        let slot = self.events.get_mut(&event)?;
        slot.state = State::Running;
        slot.due = None;
        self.running += 1;
        if slot.company.is_suspect() {
            self.suspect = Some(slot.company);
        }
        let queue = self.keys.get_mut(slot.key.as_ref()?)?;
        queue.running += 1;
        let follower = queue.events.range((Bound::Excluded(event), Bound::Unbounded)).next().copied()?;
        let fits = |slot: &Slot| slot.state == State::Waiting && slot.company == Company::Any;
        self.events.get(&follower).is_some_and(fits).then_some(follower)
    }

    /// The opposite, for its slot.
    fn ended(&mut self, company: Company) {
        self.running -= 1;
        if company.is_suspect() {
            self.suspect = None;
        }
    }

    /// A given-out event is done for good.
    pub(super) fn done(&mut self, event: EventPlace) {
        if self.events.get(&event).is_none_or(|slot| slot.state != State::Running) {
            return;
        }
        let Some(slot) = self.events.remove(&event) else { return };
        self.ended(slot.company);
        if let Some(key) = slot.key {
            self.dequeue(event, &key);
        }
    }

    fn dequeue(&mut self, event: EventPlace, key: &Arc<str>) {
        if let Some(queue) = self.keys.get_mut(key) {
            queue.events.remove(&event);
            queue.running -= 1;
            if queue.events.is_empty() {
                self.keys.remove(key);
            }
        }
        self.promote(key);
    }

    /// A given-out event was not run, or must run again at once.
    pub(super) fn put_back(&mut self, event: EventPlace) {
        self.settle(event, State::Waiting);
    }

    /// A given-out event must not run again before `until`; its key waits with it.
    pub(super) fn hold(&mut self, event: EventPlace, until: Instant) {
        self.settle(event, State::Held(until));
    }

    /// A given-out event must not run again before `until`; the later events of its key run meanwhile.
    pub(super) fn skip(&mut self, event: EventPlace, until: Instant) {
        let Some(slot) = self.events.get_mut(&event).filter(|slot| slot.state == State::Running) else { return };
        slot.state = State::Held(until);
        let (key, company) = (slot.key.clone(), slot.company);
        self.ended(company);
        self.held.insert((until, event));
        if let Some(key) = key {
            self.dequeue(event, &key);
        }
    }

    fn settle(&mut self, event: EventPlace, state: State) {
        let Some(slot) = self.events.get_mut(&event) else { return };
        if slot.state != State::Running {
            return;
        }
        slot.state = state;
        let (key, company) = (slot.key.clone(), slot.company);
        self.ended(company);
        if let State::Held(until) = state {
            self.held.insert((until, event));
        }
        match key {
            Some(key) => {
                if let Some(queue) = self.keys.get_mut(&key) {
                    queue.running -= 1;
                }
                self.promote(&key);
            }
            None if state == State::Waiting => self.let_start(event),
            None => {}
        }
    }

    /// Lets the oldest event of a key start when nothing of the key runs.
    fn promote(&mut self, key: &Arc<str>) {
        let Some(queue) = self.keys.get(key) else { return };
        if queue.running > 0 {
            return;
        }
        let Some(oldest) = queue.events.first().copied() else { return };
        match self.events.get(&oldest) {
            Some(Slot { state: State::Waiting, due: None, .. }) => self.let_start(oldest),
            Some(Slot { state: State::Waiting, due: Some(due), .. }) => {
                self.held.insert((*due, oldest));
            }
            _ => {}
        }
    }

    /// When the next held event may run.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.held.first().map(|(until, _)| *until)
    }

    /// Frees the held events whose time has come.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(&(until, event)) = self.held.first() {
            if until > now {
                break;
            }
            self.held.pop_first();
            let Some(slot) = self.events.get_mut(&event) else { continue };
            let delayed = slot.state == State::Waiting && slot.due == Some(until);
            if slot.state != State::Held(until) && !delayed {
                continue;
            }
            slot.state = State::Waiting;
            slot.due = None;
            match slot.key.clone() {
                Some(key) => self.enqueue(event, &key),
                None => self.let_start(event),
            }
        }
    }

    /// The events that neither run nor could be given out now: held ones, and those behind another of their key.
    pub(super) fn idle(&self) -> Vec<EventPlace> {
        let ready = |event: EventPlace, slot: &Slot| {
            self.ready.contains(&event) || self.suspects.contains(&(slot.company, event))
        };
        let resting = |(event, slot): &(&EventPlace, &Slot)| slot.state != State::Running && !ready(**event, slot);
        self.events.iter().filter(resting).map(|(event, _)| *event).collect()
    }
}

#[cfg(test)]
mod tests;
