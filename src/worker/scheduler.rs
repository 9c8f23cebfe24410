//! Which events may run now. A pure state machine: no IO, no clock of its own.
//!
//! Per key only the event with the lowest stream sequence that is not done may run; events without a key run freely.
//! Events are known here by their stream sequence alone, from the moment they arrive until they are done.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// All events of one subscriber that are not done.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    events: HashMap<u64, Slot>,
    keys: HashMap<Arc<str>, Queue>,
    /// Events that may start: those without a key, and the oldest of each key that nothing runs of.
    ready: BTreeSet<u64>,
    /// Events that wait for a point in time.
    held: BTreeSet<(Instant, u64)>,
}

#[derive(Debug)]
struct Slot {
    key: Option<Arc<str>>,
    state: State,
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
    events: BTreeSet<u64>,
    running: usize,
}

impl Scheduler {
    /// Takes note of an event. False when it is known already.
    pub(super) fn add(&mut self, event: u64, key: Option<&str>) -> bool {
        if self.events.contains_key(&event) {
            return false;
        }
        let key = key.map(|key| match self.keys.get_key_value(key) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::from(key),
        });
        self.events.insert(event, Slot { key: key.clone(), state: State::Waiting });
        match key {
            None => {
                self.ready.insert(event);
            }
            Some(key) => {
                let queue = self.keys.entry(Arc::clone(&key)).or_default();
                if let Some(overtaken) = queue.events.first().filter(|oldest| event < **oldest) {
                    self.ready.remove(overtaken);
                }
                queue.events.insert(event);
                self.promote(&key);
            }
        }
        true
    }

    /// How many lanes could be given something at the same time.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// How many events wait for a point in time.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Gives out up to `max` events for one lane, oldest first: the first `heads` ready ones and what follows them
    /// with the same key. Until all events of a key are settled no other lane gets one of it.
    pub(super) fn take(&mut self, heads: usize, max: usize) -> Vec<u64> {
        let mut batch = Vec::new();
        let mut heads = heads.min(self.ready.len());
        // The successors of events in this batch: only this lane may have them.
        let mut next: BTreeSet<u64> = BTreeSet::new();
        while batch.len() < max {
            let head = self.ready.first().copied().filter(|_| heads > 0);
            let event = match (head, next.first().copied()) {
                (Some(head), follower) if follower.is_none_or(|follower| head < follower) => {
                    heads -= 1;
                    self.ready.remove(&head);
                    head
                }
                (_, Some(follower)) => {
                    next.remove(&follower);
                    follower
                }
                _ => break,
            };
            let Some(slot) = self.events.get_mut(&event) else { continue };
            slot.state = State::Running;
            batch.push(event);
            if let Some(queue) = slot.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
                queue.running += 1;
                let waits = |event: &&u64| self.events.get(*event).is_some_and(|slot| slot.state == State::Waiting);
                next.extend(queue.events.range(event + 1..).next().filter(waits));
            }
        }
        batch
    }

    /// A given-out event is done for good.
    pub(super) fn done(&mut self, event: u64) {
        let Some(slot) = self.events.remove(&event) else { return };
        if let Some(key) = slot.key {
            if let Some(queue) = self.keys.get_mut(&key) {
                queue.events.remove(&event);
                queue.running -= usize::from(slot.state == State::Running);
                if queue.events.is_empty() {
                    self.keys.remove(&key);
                }
            }
            self.promote(&key);
        }
    }

    /// A given-out event was not run, or must run again at once.
    pub(super) fn put_back(&mut self, event: u64) {
        self.settle(event, State::Waiting);
    }

    /// A given-out event must not run again before `until`; its key waits with it.
    pub(super) fn hold(&mut self, event: u64, until: Instant) {
        self.settle(event, State::Held(until));
    }

    fn settle(&mut self, event: u64, state: State) {
        let Some(slot) = self.events.get_mut(&event) else { return };
        if slot.state != State::Running {
            return;
        }
        slot.state = state;
        if let State::Held(until) = state {
            self.held.insert((until, event));
        }
        match slot.key.clone() {
            Some(key) => {
                if let Some(queue) = self.keys.get_mut(&key) {
                    queue.running -= 1;
                }
                self.promote(&key);
            }
            None if state == State::Waiting => {
                self.ready.insert(event);
            }
            None => {}
        }
    }

    /// Lets the oldest event of a key start when nothing of the key runs.
    fn promote(&mut self, key: &Arc<str>) {
        let Some(queue) = self.keys.get(key) else { return };
        if queue.running > 0 {
            return;
        }
        let waits = |event: &&u64| self.events.get(*event).is_some_and(|slot| slot.state == State::Waiting);
        self.ready.extend(queue.events.first().filter(waits));
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
            if slot.state != State::Held(until) {
                continue;
            }
            slot.state = State::Waiting;
            match slot.key.clone() {
                Some(key) => self.promote(&key),
                None => {
                    self.ready.insert(event);
                }
            }
        }
    }

    /// The events that neither run nor could be given out now: held ones, and those behind another of their key.
    pub(super) fn idle(&self) -> Vec<u64> {
        let resting = |(event, slot): &(&u64, &Slot)| slot.state != State::Running && !self.ready.contains(*event);
        self.events.iter().filter(resting).map(|(event, _)| *event).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn scheduler(events: &[(u64, &str)]) -> Scheduler {
        let mut scheduler = Scheduler::default();
        for (event, key) in events {
            assert!(scheduler.add(*event, Some(key).filter(|key| !key.is_empty()).copied()));
        }
        scheduler
    }

    #[test]
    fn a_key_is_never_in_two_lanes() {
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "a")]);
        assert_eq!(scheduler.take(9, 2), [1, 2]);
        assert_eq!(scheduler.take(9, 9), [3]);
        scheduler.done(1);
        assert!(scheduler.take(9, 9).is_empty(), "2 still runs");
        scheduler.done(2);
        assert_eq!(scheduler.take(9, 9), [4]);
    }

    #[test]
    fn a_held_event_holds_its_key_and_nothing_else() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "")]);
        assert_eq!(scheduler.take(9, 1), [1]);
        scheduler.hold(1, later);
        let mut idle = scheduler.idle();
        idle.sort_unstable();
        assert_eq!(idle, [1, 2]);
        assert_eq!(scheduler.take(9, 9), [3, 4]);
        assert_eq!(scheduler.next_wake(), Some(later));
        scheduler.wake(now);
        assert!(scheduler.take(9, 9).is_empty());
        scheduler.wake(later);
        assert_eq!(scheduler.take(9, 9), [1, 2]);
    }

    #[test]
    fn an_older_event_that_comes_late_goes_first() {
        let now = Instant::now();
        let mut scheduler = scheduler(&[(5, "a"), (6, "a")]);
        assert!(scheduler.add(4, Some("a")));
        assert_eq!(scheduler.take(9, 1), [4]);
        assert!(scheduler.add(3, Some("a")));
        assert!(scheduler.take(9, 9).is_empty(), "4 runs already");
        scheduler.hold(4, now);
        assert_eq!(scheduler.take(9, 9), [3], "it does not wait with 4");
        scheduler.wake(now);
        assert!(scheduler.take(9, 9).is_empty());
        scheduler.done(3);
        assert_eq!(scheduler.take(9, 9), [4, 5, 6]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(u64, Option<u8>),
        Take(usize, usize),
        Settle(usize, Verdict),
        Wake,
    }

    #[derive(Debug, Clone, Copy)]
    enum Verdict {
        Done,
        PutBack,
        Hold,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let verdict = prop_oneof![3 => Just(Verdict::Done), 1 => Just(Verdict::PutBack), 1 => Just(Verdict::Hold)];
        let step = prop_oneof![
            4 => (0..200u64, proptest::option::of(0..4u8)).prop_map(|(event, key)| Step::Add(event, key)),
            3 => (1..4usize, 1..6usize).prop_map(|(heads, max)| Step::Take(heads, max)),
            3 => (0..8usize, verdict).prop_map(|(lane, verdict)| Step::Settle(lane, verdict)),
            1 => Just(Step::Wake),
        ];
        proptest::collection::vec(step, 1..300)
    }

    /// What lanes do: they settle their events in order, and after one of a key that is not done they put back the rest
    /// of that key.
    fn settle(scheduler: &mut Scheduler, model: &mut Model, batch: Vec<u64>, verdict: Verdict, now: Instant) {
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
            }
            if let (Some(key), false) = (key, matches!(verdict, Verdict::Done)) {
                blocked.push(key);
            }
        }
    }

    #[derive(Default)]
    struct Model {
        keys: HashMap<u64, Option<u8>>,
        open: BTreeSet<u64>,
        running: BTreeSet<u64>,
    }

    impl Model {
        fn check_taken(&self, batch: &[u64]) {
            for (n, event) in batch.iter().enumerate() {
                assert!(self.open.contains(event) && !self.running.contains(event), "{event} given out twice");
                if let Some(key) = self.keys[event] {
                    let same = |other: &&u64| self.keys[*other] == Some(key);
                    assert_eq!(self.running.iter().find(same), None, "the key of {event} runs elsewhere");
                    let older = self.open.iter().filter(|other| *other < event).filter(same);
                    for older in older {
                        assert!(batch[..n].contains(older), "{event} overtakes {older}");
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
            let mut lanes: Vec<Vec<u64>> = Vec::new();
            let mut now = Instant::now();
            for step in steps {
                match step {
                    Step::Add(event, key) => {
                        // A sequence belongs to one message for ever.
                        if model.keys.contains_key(&event) && !model.open.contains(&event) {
                            continue;
                        }
                        let new = scheduler.add(event, key.map(|key| key.to_string()).as_deref());
                        prop_assert_eq!(new, model.open.insert(event));
                        if new {
                            model.keys.insert(event, key);
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
                    }
                }
                prop_assert_eq!(scheduler.events.len(), model.open.len());
            }
            for batch in lanes {
                settle(&mut scheduler, &mut model, batch, Verdict::Hold, now);
            }
            scheduler.wake(now + Duration::from_secs(2));
            loop {
                let batch = scheduler.take(2, 3);
                if batch.is_empty() {
                    break;
                }
                model.check_taken(&batch);
                settle(&mut scheduler, &mut model, batch, Verdict::Done, now);
            }
            prop_assert!(model.open.is_empty() && scheduler.events.is_empty(), "left over: {:?}", model.open);
            prop_assert!(scheduler.keys.is_empty() && scheduler.held.is_empty() && scheduler.ready.is_empty());
        }
    }
}
