//! Which events may run now. A pure state machine: no IO, no clock of its own.
//!
//! Per key only the event with the lowest place that is not done may run; events without a key run freely. Events are
//! known here by their place alone, from the moment they arrive until they are done.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

/// Where an event comes from, and its place in the order there. What an operator sends back goes before live events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    /// The id of a row of `aftercommit.redrive`.
    Redrive(i64),
    /// A sequence of the stream.
    Stream(u64),
}

const FIRST_LIVE: Place = Place::Stream(0);

/// The oldest live event, or the oldest of the others.
fn first(events: &BTreeSet<Place>, live: bool) -> Option<Place> {
    match live {
        true => events.range(FIRST_LIVE..).next().copied(),
        false => events.first().copied().filter(|event| *event < FIRST_LIVE),
    }
}

/// All events of one subscriber that are not done.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    events: HashMap<Place, Slot>,
    keys: HashMap<Arc<str>, Queue>,
    /// Events that may start: those without a key, and the oldest of each key that nothing runs of.
    ready: BTreeSet<Place>,
    /// The same of those that do not bear any company, in the order in which they get their turn.
    suspects: BTreeSet<(Company, Place)>,
    /// How many events run.
    running: usize,
    /// The company that the suspect which runs bears: there is never more than one.
    suspect: Option<Company>,
    /// Events that wait for a point in time.
    held: BTreeSet<(Instant, Place)>,
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
    /// In a batch with others, beside any.
    Any,
}

impl Company {
    /// What an event bears that ran so often when the process died.
    pub(super) fn of(crashes: u32) -> Self {
        match crashes {
            0 => Self::Any,
            // The first time it may well have been another one.
            1 => Self::Unsuspected,
            _ => Self::None,
        }
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
    Suspect(Place),
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
    events: BTreeSet<Place>,
    running: usize,
}

impl Scheduler {
    /// Takes note of an event. False when it is known already.
    pub(super) fn add(&mut self, event: Place, key: Option<&str>) -> bool {
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

    fn enqueue(&mut self, event: Place, key: &Arc<str>) {
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
    pub(super) fn delay(&mut self, event: Place, until: Instant) {
        let Some(slot) = self.events.get_mut(&event).filter(|slot| slot.state == State::Waiting) else { return };
        slot.due = Some(until);
        if self.let_wait(event) {
            self.held.insert((until, event));
        }
    }

    /// Says what company an event bears that does not run. Without this it is any.
    pub(super) fn bears(&mut self, event: Place, company: Company) {
        let was_ready = self.let_wait(event);
        if let Some(slot) = self.events.get_mut(&event) {
            slot.company = company;
        }
        if was_ready {
            self.let_start(event);
        }
    }

    fn company(&self, event: Place) -> Company {
        self.events.get(&event).map_or(Company::Any, |slot| slot.company)
    }

    fn let_start(&mut self, event: Place) {
        match self.company(event) {
            Company::Any => self.ready.insert(event),
            company => self.suspects.insert((company, event)),
        };
    }

    fn let_wait(&mut self, event: Place) -> bool {
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

    /// How many lanes could be given something at the same time.
    pub(super) fn ready(&self) -> usize {
        match self.turn() {
            Turn::Nothing => 0,
            Turn::Suspect(event) if self.company(event) == Company::None => 1,
            Turn::Suspect(_) => 1 + self.ready.len(),
            Turn::Ready => self.ready.len(),
        }
    }

    /// How many events wait for a point in time.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Gives out up to `max` events for one lane, oldest first: the first `heads` ready ones and what follows them
    /// with the same key. Until all events of a key are settled no other lane gets one of it. A suspect comes first.
    /// Live events and those that were sent back take turns, so that many of the latter do not keep other keys waiting.
    pub(super) fn take(&mut self, heads: usize, max: usize) -> Vec<Place> {
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

    fn take_ready(&mut self, heads: usize, max: usize) -> Vec<Place> {
        let mut batch = Vec::new();
        let mut heads = heads.min(self.ready.len());
        // The successors of events in this batch: only this lane may have them.
        let mut next: BTreeSet<Place> = BTreeSet::new();
        while batch.len() < max {
            let ready = if heads > 0 { &self.ready } else { &BTreeSet::new() };
            let oldest = |live| first(ready, live).into_iter().chain(first(&next, live)).min();
            let Some(event) = oldest(self.live_next).or_else(|| oldest(!self.live_next)) else { break };
            self.live_next = event < FIRST_LIVE;
            if !next.remove(&event) {
                self.ready.remove(&event);
                heads -= 1;
            }
            batch.push(event);
            next.extend(self.start(event));
        }
        batch
    }

    /// Lets an event run, and returns the next one of its key if that may run in the same batch.
    fn start(&mut self, event: Place) -> Option<Place> {
        let slot = self.events.get_mut(&event)?;
        slot.state = State::Running;
        slot.due = None;
        self.running += 1;
        if slot.company != Company::Any {
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
        if company != Company::Any {
            self.suspect = None;
        }
    }

    /// A given-out event is done for good.
    pub(super) fn done(&mut self, event: Place) {
        if self.events.get(&event).is_none_or(|slot| slot.state != State::Running) {
            return;
        }
        let Some(slot) = self.events.remove(&event) else { return };
        self.ended(slot.company);
        if let Some(key) = slot.key {
            self.dequeue(event, &key);
        }
    }

    fn dequeue(&mut self, event: Place, key: &Arc<str>) {
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
    pub(super) fn put_back(&mut self, event: Place) {
        self.settle(event, State::Waiting);
    }

    /// A given-out event must not run again before `until`; its key waits with it.
    pub(super) fn hold(&mut self, event: Place, until: Instant) {
        self.settle(event, State::Held(until));
    }

    /// A given-out event must not run again before `until`; its key goes on without it.
    pub(super) fn set_aside(&mut self, event: Place, until: Instant) {
        let Some(slot) = self.events.get_mut(&event).filter(|slot| slot.state == State::Running) else { return };
        slot.state = State::Held(until);
        let (key, company) = (slot.key.clone(), slot.company);
        self.ended(company);
        self.held.insert((until, event));
        if let Some(key) = key {
            self.dequeue(event, &key);
        }
    }

    fn settle(&mut self, event: Place, state: State) {
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
    pub(super) fn idle(&self) -> Vec<Place> {
        let ready =
            |event: Place, slot: &Slot| self.ready.contains(&event) || self.suspects.contains(&(slot.company, event));
        let resting = |(event, slot): &(&Place, &Slot)| slot.state != State::Running && !ready(**event, slot);
        self.events.iter().filter(resting).map(|(event, _)| *event).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::Place::{Redrive, Stream};
    use super::*;

    fn stream<const N: usize>(sequences: [u64; N]) -> [Place; N] {
        sequences.map(Stream)
    }

    fn scheduler(events: &[(u64, &str)]) -> Scheduler {
        let mut scheduler = Scheduler::default();
        for (event, key) in events {
            assert!(scheduler.add(Stream(*event), Some(key).filter(|key| !key.is_empty()).copied()));
        }
        scheduler
    }

    #[test]
    fn a_key_is_never_in_two_lanes() {
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "a")]);
        assert_eq!(scheduler.take(9, 2), stream([1, 2]));
        assert_eq!(scheduler.take(9, 9), stream([3]));
        scheduler.done(Stream(1));
        assert!(scheduler.take(9, 9).is_empty(), "2 still runs");
        scheduler.done(Stream(2));
        assert_eq!(scheduler.take(9, 9), stream([4]));
    }

    #[test]
    fn a_held_event_holds_its_key_and_nothing_else() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "")]);
        assert_eq!(scheduler.take(9, 1), stream([1]));
        scheduler.hold(Stream(1), later);
        let mut idle = scheduler.idle();
        idle.sort_unstable();
        assert_eq!(idle, stream([1, 2]));
        assert_eq!(scheduler.take(9, 9), stream([3, 4]));
        assert_eq!(scheduler.next_wake(), Some(later));
        scheduler.wake(now);
        assert!(scheduler.take(9, 9).is_empty());
        scheduler.wake(later);
        assert_eq!(scheduler.take(9, 9), stream([1, 2]));
    }

    #[test]
    fn an_older_event_that_comes_late_goes_first() {
        let now = Instant::now();
        let mut scheduler = scheduler(&[(5, "a"), (6, "a")]);
        assert!(scheduler.add(Stream(4), Some("a")));
        assert_eq!(scheduler.take(9, 1), stream([4]));
        assert!(scheduler.add(Stream(3), Some("a")));
        assert!(scheduler.take(9, 9).is_empty(), "4 runs already");
        scheduler.hold(Stream(4), now);
        assert_eq!(scheduler.take(9, 9), stream([3]), "it does not wait with 4");
        scheduler.wake(now);
        assert!(scheduler.take(9, 9).is_empty());
        scheduler.done(Stream(3));
        assert_eq!(scheduler.take(9, 9), stream([4, 5, 6]));
    }

    #[test]
    fn what_is_sent_back_goes_before_live_events_and_never_beside_one() {
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b")]);
        assert!(scheduler.add(Redrive(8), Some("a")));
        assert!(scheduler.add(Redrive(7), Some("a")));
        assert_eq!(scheduler.take(1, 2), [Redrive(7), Redrive(8)]);
        assert_eq!(scheduler.take(9, 9), [Stream(3)], "the live ones of the key wait");
        assert!(scheduler.add(Redrive(9), Some("b")));
        assert!(scheduler.take(9, 9).is_empty(), "one of b runs already");
        scheduler.put_back(Stream(3));
        scheduler.done(Redrive(7));
        scheduler.done(Redrive(8));
        assert_eq!(scheduler.take(9, 9), [Redrive(9), Stream(1), Stream(2), Stream(3)]);
    }

    #[test]
    fn an_event_that_is_set_aside_lets_its_key_pass_and_comes_back_first() {
        let now = Instant::now();
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "a"), (4, "a")]);
        assert_eq!(scheduler.take(9, 1), stream([1]));
        scheduler.set_aside(Stream(1), now);
        assert_eq!(scheduler.take(9, 1), stream([2]));
        scheduler.wake(now);
        assert!(scheduler.take(9, 9).is_empty(), "2 still runs");
        scheduler.done(Stream(2));
        assert_eq!(scheduler.take(9, 2), stream([1, 3]));
        scheduler.set_aside(Stream(3), now);
        scheduler.done(Stream(1));
        assert_eq!(scheduler.ready(), 1, "4");
        scheduler.wake(now);
        assert_eq!(scheduler.take(9, 9), stream([3, 4]));
    }

    #[test]
    fn a_delayed_event_waits_until_others_of_its_key_have_gathered() {
        let now = Instant::now();
        let later = |seconds| now + Duration::from_secs(seconds);
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "c")]);
        for (event, seconds) in [(1, 1), (2, 2), (3, 3)] {
            scheduler.delay(Stream(event), later(seconds));
        }
        assert_eq!(scheduler.take(9, 9), stream([4]), "others do not wait");
        assert_eq!(scheduler.next_wake(), Some(later(1)));
        scheduler.wake(later(1));
        assert_eq!(scheduler.take(9, 9), stream([1, 2]), "2 goes with 1");
        assert!(scheduler.add(Stream(5), Some("a")));
        scheduler.delay(Stream(5), later(5));
        scheduler.done(Stream(1));
        scheduler.done(Stream(2));
        scheduler.wake(later(3));
        assert_eq!(scheduler.take(9, 9), stream([3]), "5 waits anew");
        scheduler.wake(later(5));
        assert_eq!(scheduler.take(9, 9), stream([5]));
    }

    #[test]
    fn a_suspect_runs_in_a_batch_of_its_own_and_one_at_a_time() {
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "c")]);
        scheduler.bears(Stream(2), Company::Unsuspected);
        scheduler.bears(Stream(5), Company::Unsuspected);
        assert_eq!(scheduler.ready(), 3);
        assert_eq!(scheduler.take(9, 9), stream([5]));
        assert_eq!(scheduler.take(9, 9), stream([1, 4]), "2 is not one of a batch");
        scheduler.done(Stream(1));
        assert_eq!(scheduler.ready(), 0, "5 still runs");
        scheduler.done(Stream(5));
        assert_eq!(scheduler.take(9, 9), stream([2]));
        scheduler.done(Stream(2));
        assert_eq!(scheduler.take(9, 9), stream([3]));
    }

    #[test]
    fn nothing_runs_beside_an_event_that_bears_no_company() {
        let now = Instant::now();
        let mut scheduler = scheduler(&[(1, ""), (2, ""), (3, ""), (4, "")]);
        assert_eq!(scheduler.take(1, 1), stream([1]));
        scheduler.bears(Stream(2), Company::Unsuspected);
        scheduler.bears(Stream(3), Company::None);
        assert_eq!((scheduler.ready(), scheduler.take(9, 9)), (0, Vec::new()), "1 still runs");
        scheduler.done(Stream(1));
        assert_eq!((scheduler.ready(), scheduler.take(9, 9)), (1, vec![Stream(3)]));
        assert_eq!((scheduler.ready(), scheduler.take(9, 9)), (0, Vec::new()));
        // One that waits for its time keeps nobody waiting, and one that is gone neither.
        scheduler.hold(Stream(3), now);
        scheduler.bears(Stream(77), Company::None);
        assert_eq!((scheduler.take(9, 9), scheduler.take(9, 9)), (vec![Stream(2)], vec![Stream(4)]));
        scheduler.wake(now);
        scheduler.done(Stream(2));
        assert!(scheduler.take(9, 9).is_empty(), "4 still runs");
        scheduler.put_back(Stream(4));
        assert_eq!(scheduler.take(9, 9), stream([3]));
        scheduler.done(Stream(3));
        assert_eq!(scheduler.take(9, 9), stream([4]));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(Place, Option<u8>, bool, Company),
        Take(usize, usize),
        Settle(usize, Verdict),
        Wake,
    }

    #[derive(Debug, Clone, Copy)]
    enum Verdict {
        Done,
        PutBack,
        Hold,
        SetAside,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let verdict = prop_oneof![3 => Just(Verdict::Done), 1 => Just(Verdict::PutBack), 1 => Just(Verdict::Hold), 1 => Just(Verdict::SetAside)];
        let company = prop_oneof![8 => Just(Company::Any), 1 => Just(Company::Unsuspected), 1 => Just(Company::None)];
        let place = prop_oneof![3 => (0..200u64).prop_map(Stream), 1 => (0..60i64).prop_map(Redrive)];
        let step = prop_oneof![
            4 => (place, proptest::option::of(0..4u8), proptest::bool::ANY, company)
                .prop_map(|(event, key, delayed, company)| Step::Add(event, key, delayed, company)),
            3 => (1..4usize, 1..6usize).prop_map(|(heads, max)| Step::Take(heads, max)),
            3 => (0..8usize, verdict).prop_map(|(lane, verdict)| Step::Settle(lane, verdict)),
            1 => Just(Step::Wake),
        ];
        proptest::collection::vec(step, 1..300)
    }

    /// What lanes do: they settle their events in order, and after one of a key that is not done they put back the rest
    /// of that key.
    fn settle(scheduler: &mut Scheduler, model: &mut Model, batch: Vec<Place>, verdict: Verdict, now: Instant) {
        let mut blocked: Vec<u8> = Vec::new();
        for (n, event) in batch.iter().enumerate() {
            let key = model.keys[event];
            let verdict = if key.is_some_and(|key| blocked.contains(&key)) {
                Verdict::PutBack
            } else if n % 2 == 0 {
                verdict
            } else {
                Verdict::Done
            };
            model.running.remove(event);
            match verdict {
                Verdict::Done => {
                    scheduler.done(*event);
                    model.open.remove(event);
                }
                Verdict::PutBack => scheduler.put_back(*event),
                Verdict::Hold => scheduler.hold(*event, now + Duration::from_secs(1)),
                Verdict::SetAside => {
                    scheduler.set_aside(*event, now + Duration::from_secs(1));
                    model.aside.insert(*event);
                }
            }
            if let (Some(key), false) = (key, matches!(verdict, Verdict::Done | Verdict::SetAside)) {
                blocked.push(key);
            }
        }
    }

    #[derive(Default)]
    struct Model {
        keys: HashMap<Place, Option<u8>>,
        suspects: HashMap<Place, Company>,
        open: BTreeSet<Place>,
        running: BTreeSet<Place>,
        /// Those that others of their key may overtake at present.
        aside: BTreeSet<Place>,
    }

    impl Model {
        fn check_company(&self, batch: &[Place]) {
            let suspects: Vec<_> = self.running.iter().filter_map(|event| self.suspects.get(event)).collect();
            assert!(suspects.is_empty() || !suspects.contains(&&Company::None), "{batch:?} beside {suspects:?}");
            match batch.iter().filter_map(|event| self.suspects.get(event)).collect::<Vec<_>>()[..] {
                [] => {}
                [Company::None] => assert!(batch.len() == 1 && self.running.is_empty(), "{batch:?}"),
                [_] => assert!(batch.len() == 1 && suspects.is_empty(), "{batch:?} beside {suspects:?}"),
                _ => panic!("several suspects in {batch:?}"),
            }
        }

        fn check_taken(&self, batch: &[Place]) {
            if !batch.is_empty() {
                self.check_company(batch);
            }
            for (n, event) in batch.iter().enumerate() {
                assert!(self.open.contains(event) && !self.running.contains(event), "{event:?} given out twice");
                if let Some(key) = self.keys[event] {
                    let same = |other: &&Place| self.keys[*other] == Some(key);
                    assert_eq!(self.running.iter().find(same), None, "the key of {event:?} runs elsewhere");
                    let older = self.open.difference(&self.aside).filter(|other| *other < event).filter(same);
                    for older in older {
                        assert!(batch[..n].contains(older), "{event:?} overtakes {older:?}");
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn keys_are_serial_and_everything_ends(steps in steps()) {
            let mut scheduler = Scheduler::default();
            let mut model = Model::default();
            let mut lanes: Vec<Vec<Place>> = Vec::new();
            let mut now = Instant::now();
            for step in steps {
                match step {
                    Step::Add(event, key, delayed, company) => {
                        // A place belongs to one event for ever.
                        if model.keys.contains_key(&event) && !model.open.contains(&event) {
                            continue;
                        }
                        let new = scheduler.add(event, key.map(|key| key.to_string()).as_deref());
                        prop_assert_eq!(new, model.open.insert(event));
                        if new {
                            model.keys.insert(event, key);
                            if company != Company::Any {
                                model.suspects.insert(event, company);
                                scheduler.bears(event, company);
                            }
                            if delayed {
                                scheduler.delay(event, now + Duration::from_secs(1));
                            }
                        }
                    }
                    Step::Take(heads, max) => {
                        let ready = scheduler.ready();
                        let batch = scheduler.take(heads, max);
                        prop_assert!(batch.len() <= max && batch.is_empty() == (ready == 0));
                        model.check_taken(&batch);
                        model.running.extend(&batch);
                        if !batch.is_empty() {
                            lanes.push(batch);
                        }
                    }
                    Step::Settle(lane, verdict) => {
                        if lane < lanes.len() {
                            let batch = lanes.swap_remove(lane);
                            settle(&mut scheduler, &mut model, batch, verdict, now);
                        }
                    }
                    Step::Wake => {
                        now += Duration::from_secs(2);
                        scheduler.wake(now);
                        model.aside.clear();
                    }
                }
                prop_assert_eq!(scheduler.events.len(), model.open.len());
            }
            for batch in lanes {
                settle(&mut scheduler, &mut model, batch, Verdict::Hold, now);
            }
            model.aside.clear();
            loop {
                scheduler.wake(now + Duration::from_secs(2));
                let batch = scheduler.take(2, 3);
                if batch.is_empty() {
                    break;
                }
                model.check_taken(&batch);
                settle(&mut scheduler, &mut model, batch, Verdict::Done, now);
            }
            prop_assert!(model.open.is_empty() && scheduler.events.is_empty(), "left over: {:?}", model.open);
            prop_assert!(scheduler.keys.is_empty() && scheduler.held.is_empty() && scheduler.ready.is_empty());
            prop_assert!(scheduler.suspects.is_empty() && scheduler.suspect.is_none() && scheduler.running == 0);
        }
    }
}
