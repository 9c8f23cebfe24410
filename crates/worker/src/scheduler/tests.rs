//! Examples, and a model against which random schedules are compared.

use std::time::Duration;

use proptest::prelude::*;

use super::EventPlace::{Redrive, Stream};
use super::*;

fn stream<const N: usize>(sequences: [u64; N]) -> [EventPlace; N] {
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
fn a_key_is_never_at_two_executors() {
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
fn an_event_that_is_skipped_lets_its_key_pass_and_comes_back_first() {
    let now = Instant::now();
    let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "a"), (4, "a")]);
    assert_eq!(scheduler.take(9, 1), stream([1]));
    scheduler.skip(Stream(1), now);
    assert_eq!(scheduler.take(9, 1), stream([2]));
    scheduler.wake(now);
    assert!(scheduler.take(9, 9).is_empty(), "2 still runs");
    scheduler.done(Stream(2));
    assert_eq!(scheduler.take(9, 2), stream([1, 3]));
    scheduler.skip(Stream(3), now);
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
fn an_event_apart_has_a_batch_of_its_own_beside_any() {
    let mut scheduler = scheduler(&[(1, "a"), (2, "b"), (3, "c"), (4, "d")]);
    scheduler.bears(Stream(2), Company::Apart);
    scheduler.bears(Stream(3), Company::Apart);
    assert_eq!(scheduler.ready(), 4);
    assert_eq!(scheduler.take(9, 9), stream([1]));
    assert_eq!(scheduler.take(9, 9), stream([2]));
    assert_eq!(scheduler.take(9, 9), stream([3]));
    assert_eq!(scheduler.take(9, 9), stream([4]));
}

#[test]
fn an_event_that_came_to_wait_holds_its_key_unless_that_passes() {
    let now = Instant::now();
    let mut scheduler = scheduler(&[(1, "a"), (2, "a"), (3, "b"), (4, "b")]);
    scheduler.postpone(Stream(1), now, false);
    scheduler.postpone(Stream(3), now, true);
    assert_eq!(scheduler.take(9, 9), stream([4]));
    scheduler.done(Stream(4));
    assert_eq!(scheduler.ready(), 0);
    scheduler.wake(now);
    assert_eq!(scheduler.take(9, 9), stream([1, 2, 3]));
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
    /// With whether it waits at first: no, for others of its key, until its time, or that and its key passes.
    Add(EventPlace, Option<u8>, u8, Company),
    Take(usize, usize),
    Settle(usize, Ending),
    Wake,
}

#[derive(Debug, Clone, Copy)]
enum Ending {
    Done,
    PutBack,
    Hold,
    Skip,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let verdict = prop_oneof![3 => Just(Ending::Done), 1 => Just(Ending::PutBack), 1 => Just(Ending::Hold), 1 => Just(Ending::Skip)];
    let company = prop_oneof![
        8 => Just(Company::Any), 1 => Just(Company::Apart), 1 => Just(Company::Unsuspected), 1 => Just(Company::None)
    ];
    let place = prop_oneof![3 => (0..200u64).prop_map(Stream), 1 => (0..60i64).prop_map(Redrive)];
    let step = prop_oneof![
        4 => (place, proptest::option::of(0..4u8), 0..4u8, company)
            .prop_map(|(event, key, waits, company)| Step::Add(event, key, waits, company)),
        3 => (1..4usize, 1..6usize).prop_map(|(heads, max)| Step::Take(heads, max)),
        3 => (0..8usize, verdict).prop_map(|(executor, verdict)| Step::Settle(executor, verdict)),
        1 => Just(Step::Wake),
    ];
    proptest::collection::vec(step, 1..300)
}

/// What executors do: they settle their events in order, and after one of a key that is not done they put back the rest
/// of that key.
fn settle(scheduler: &mut Scheduler, model: &mut Model, batch: Vec<EventPlace>, verdict: Ending, now: Instant) {
    let mut blocked: Vec<u8> = Vec::new();
    for (n, event) in batch.iter().enumerate() {
        let key = model.keys[event];
        let verdict = if key.is_some_and(|key| blocked.contains(&key)) {
            Ending::PutBack
        } else if n % 2 == 0 {
            verdict
        } else {
            Ending::Done
        };
        model.running.remove(event);
        match verdict {
            Ending::Done => {
                scheduler.done(*event);
                model.open.remove(event);
            }
            Ending::PutBack => scheduler.put_back(*event),
            Ending::Hold => scheduler.hold(*event, now + Duration::from_secs(1)),
            Ending::Skip => {
                scheduler.skip(*event, now + Duration::from_secs(1));
                model.aside.insert(*event);
            }
        }
        if let (Some(key), false) = (key, matches!(verdict, Ending::Done | Ending::Skip)) {
            blocked.push(key);
        }
    }
}

#[derive(Default)]
struct Model {
    keys: HashMap<EventPlace, Option<u8>>,
    suspects: HashMap<EventPlace, Company>,
    apart: BTreeSet<EventPlace>,
    open: BTreeSet<EventPlace>,
    running: BTreeSet<EventPlace>,
    /// Those that others of their key may overtake at present.
    aside: BTreeSet<EventPlace>,
}

impl Model {
    fn check_company(&self, batch: &[EventPlace]) {
        let suspects: Vec<_> = self.running.iter().filter_map(|event| self.suspects.get(event)).collect();
        assert!(suspects.is_empty() || !suspects.contains(&&Company::None), "{batch:?} beside {suspects:?}");
        assert!(batch.len() == 1 || !batch.iter().any(|event| self.apart.contains(event)), "{batch:?}");
        match batch.iter().filter_map(|event| self.suspects.get(event)).collect::<Vec<_>>()[..] {
            [] => {}
            [Company::None] => assert!(batch.len() == 1 && self.running.is_empty(), "{batch:?}"),
            [_] => assert!(batch.len() == 1 && suspects.is_empty(), "{batch:?} beside {suspects:?}"),
            _ => panic!("several suspects in {batch:?}"),
        }
    }

    fn check_taken(&self, batch: &[EventPlace]) {
        if !batch.is_empty() {
            self.check_company(batch);
        }
        for (n, event) in batch.iter().enumerate() {
            assert!(self.open.contains(event) && !self.running.contains(event), "{event:?} given out twice");
            if let Some(key) = self.keys[event] {
                let same = |other: &&EventPlace| self.keys[*other] == Some(key);
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
        let mut executors: Vec<Vec<EventPlace>> = Vec::new();
        let mut now = Instant::now();
        for step in steps {
            match step {
                Step::Add(event, key, waits, company) => {
                    // A place belongs to one event for ever.
                    if model.keys.contains_key(&event) && !model.open.contains(&event) {
                        continue;
                    }
                    let new = scheduler.add(event, key.map(|key| key.to_string()).as_deref());
                    prop_assert_eq!(new, model.open.insert(event));
                    if new {
                        model.keys.insert(event, key);
                        scheduler.bears(event, company);
                        match company {
                            Company::Any => {}
                            Company::Apart => _ = model.apart.insert(event),
                            _ => _ = model.suspects.insert(event, company),
                        }
                        match waits {
                            1 => scheduler.delay(event, now + Duration::from_secs(1)),
                            2 => scheduler.postpone(event, now + Duration::from_secs(1), false),
                            3 => {
                                scheduler.postpone(event, now + Duration::from_secs(1), true);
                                model.aside.insert(event);
                            }
                            _ => {}
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
                        executors.push(batch);
                    }
                }
                Step::Settle(executor, verdict) => {
                    if executor < executors.len() {
                        let batch = executors.swap_remove(executor);
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
        for batch in executors {
            settle(&mut scheduler, &mut model, batch, Ending::Hold, now);
        }
        model.aside.clear();
        loop {
            scheduler.wake(now + Duration::from_secs(2));
            let batch = scheduler.take(2, 3);
            if batch.is_empty() {
                break;
            }
            model.check_taken(&batch);
            settle(&mut scheduler, &mut model, batch, Ending::Done, now);
        }
        prop_assert!(model.open.is_empty() && scheduler.events.is_empty(), "left over: {:?}", model.open);
        prop_assert!(scheduler.keys.is_empty() && scheduler.held.is_empty() && scheduler.ready.is_empty());
        prop_assert!(scheduler.suspects.is_empty() && scheduler.suspect.is_none() && scheduler.running == 0);
    }
}
