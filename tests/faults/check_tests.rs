//! The checker itself: histories that are wrong in one way each, and each must be found.

use uuid::Uuid;

use super::check::{Invariant, check, story};
use super::history::{Act, Entry, Fate, What};

const SUBSCRIBERS: [(&str, bool); 2] = [("one", false), ("skip", true)];

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn key() -> Option<String> {
    Some("k".into())
}

fn wrote(n: u128, fate: Fate) -> What {
    What::Wrote { tx: id(100 + n), event: id(n), key: key(), version: n as i64, fate, oversize: false }
}

fn effect(subscriber: &str, n: u128) -> What {
    let digest = format!("d{n}");
    What::Effect { subscriber: subscriber.into(), event: id(n), key: key(), version: n as i64, digest }
}

/// Three events of a key, committed, stored and handled by both subscribers; the fourth was rolled back.
fn good() -> Vec<What> {
    let mut all = vec![wrote(4, Fate::new()), What::RolledBack { tx: id(104) }];
    for n in 1..=3 {
        all.extend([wrote(n, Fate::new()), What::Committed { tx: id(100 + n), durable: true }]);
    }
    all.push(What::Fault { name: "relay-killed".into(), detail: String::new() });
    all.push(What::Drained { seconds: Some(1.0) });
    for n in 1..=3 {
        all.push(What::Kept { event: id(n), key: key(), version: n as i64, digest: format!("d{n}") });
        all.push(What::Outboxed { event: id(n), bytes: n as u64 });
        all.push(What::Stored { sequence: n as u64, event: id(n), bytes: n as u64 });
        all.extend([effect("one", n), effect("skip", n)]);
    }
    all
}

fn entries(all: Vec<What>) -> Vec<Entry> {
    all.into_iter().enumerate().map(|(at, what)| Entry { at: at as i64, what }).collect()
}

/// What is found, and about which event.
fn found(all: Vec<What>) -> Vec<(Invariant, Option<Uuid>)> {
    let verdict = check(&entries(all), &SUBSCRIBERS);
    verdict.violations.iter().map(|violation| (violation.invariant, violation.event)).collect()
}

/// The good history without what is meant, and with this at its end.
fn changed(without: impl Fn(&What) -> bool, with: impl IntoIterator<Item = What>) -> Vec<(Invariant, Option<Uuid>)> {
    found(good().into_iter().filter(|what| !without(what)).chain(with).collect())
}

fn nothing(_: &What) -> bool {
    false
}

/// The history of an event that `one` must give up.
fn with_fate(n: u128, act: Act) -> What {
    wrote(n, Fate::from([("one".into(), act)]))
}

fn dead(n: u128) -> What {
    What::Dead { subscriber: "one".into(), event: id(n), reason: "it failed".into() }
}

#[test]
fn a_good_history_is_good() {
    assert_eq!(found(good()), []);
}

#[test]
fn a_lost_event_is_found_wherever_it_was_lost() {
    let lost = |n| vec![(Invariant::NothingLost, Some(id(n)))];
    assert_eq!(changed(|what| *what == effect("one", 2), []), lost(2), "at a subscriber");
    let not_stored = |what: &What| matches!(what, What::Stored { .. }) && what.event() == Some(id(2));
    assert_eq!(changed(not_stored, []), lost(2), "on the way into the stream");
    assert_eq!(changed(not_stored, [What::Removed { event: id(2) }]), [], "unless somebody removed it");
    assert_eq!(changed(not_stored, [What::Purged]), [], "or purged the stream");
    let before = [What::Purged].into_iter().chain(good().into_iter().filter(|what| !not_stored(what)));
    assert_eq!(found(before.collect()), lost(2), "but not before it was written");
    let not_outboxed =
        |what: &What| matches!(what, What::Outboxed { .. } | What::Stored { .. }) && what.event() == Some(id(2));
    assert_eq!(changed(not_outboxed, [])[0], lost(2)[0], "beside the business row");
    let forgotten = |what: &What| what.event() == Some(id(3)) && !matches!(what, What::Wrote { .. });
    assert_eq!(changed(forgotten, []), lost(3), "after its commit was confirmed");
}

#[test]
fn what_was_not_durable_may_be_gone_everywhere() {
    let third = |what: &What| {
        (what.event() == Some(id(3)) && !matches!(what, What::Wrote { .. })) || what.transaction() == Some(id(103))
    };
    assert_eq!(changed(third, [wrote(3, Fate::new()), What::Committed { tx: id(103), durable: false }]), []);
    assert_eq!(changed(third, [wrote(3, Fate::new()), What::Unknown { tx: id(103) }]), []);
}

#[test]
fn a_ghost_is_found_wherever_it_appears() {
    let ghost = [(Invariant::NoGhost, Some(id(4)))];
    assert_eq!(changed(nothing, [What::Stored { sequence: 4, event: id(4), bytes: 4 }]), ghost);
    assert_eq!(changed(nothing, [effect("one", 4)]), ghost);
    assert_eq!(changed(nothing, [What::Outboxed { event: id(4), bytes: 4 }]), ghost);
    assert_eq!(changed(nothing, [dead(4)]), ghost);
    let kept = What::Kept { event: id(3), key: key(), version: 3, digest: "d3".into() };
    assert!(
        changed(nothing, [What::Undone { tx: id(103), event: id(3) }, kept])
            .contains(&(Invariant::NoGhost, Some(id(3))))
    );
}

#[test]
fn effects_out_of_order_are_found() {
    let order = |subscriber: &'static str| {
        changed(
            move |what| [effect(subscriber, 1), effect(subscriber, 2)].contains(what),
            [effect(subscriber, 2), effect(subscriber, 1)],
        )
    };
    assert_eq!(order("one"), [(Invariant::KeyOrder, Some(id(1))), (Invariant::KeyOrder, Some(id(2)))]);
    assert_eq!(order("skip").len(), 2, "where failed events are passed, only those are late");
    let late = |act| {
        let fate = wrote(1, Fate::from([("skip".into(), act)]));
        changed(|what| *what == effect("skip", 1), [fate, effect("skip", 1)])
    };
    assert_eq!(late(Act::Flaky), []);
    assert_eq!(late(Act::Slow), [(Invariant::KeyOrder, Some(id(1)))]);
    assert_eq!(changed(|what| *what == effect("one", 1), [What::Removed { event: id(1) }, effect("one", 1)]), []);
}

#[test]
fn a_second_effect_is_found() {
    assert_eq!(changed(nothing, [effect("one", 2)]), [(Invariant::OneEffect, Some(id(2)))]);
    let both = [with_fate(2, Act::Poison), dead(2)];
    assert!(changed(nothing, both).contains(&(Invariant::OneEffect, Some(id(2)))));
}

#[test]
fn only_poison_may_be_given_up() {
    let given_up = |act: Option<Act>| {
        let fate = act.map(|act| with_fate(2, act));
        changed(|what| *what == effect("one", 2), fate.into_iter().chain([dead(2)]))
    };
    assert_eq!(given_up(Some(Act::Poison)), []);
    assert_eq!(given_up(Some(Act::Flaky)), [(Invariant::OnlyPoison, Some(id(2)))]);
    assert_eq!(given_up(None), [(Invariant::OnlyPoison, Some(id(2)))]);
    assert_eq!(changed(nothing, [with_fate(2, Act::Reject)]), [(Invariant::OnlyPoison, Some(id(2)))]);
    let parked = What::Parked { event: id(2), reason: "too large".into() };
    assert_eq!(changed(nothing, [parked]), [(Invariant::OnlyPoison, Some(id(2)))]);
}

#[test]
fn what_does_not_drain_is_found() {
    assert_eq!(
        changed(|what| matches!(what, What::Drained { .. }), [What::Drained { seconds: None }]),
        [(Invariant::Drains, None)]
    );
    let unwell = What::Unwell { who: "relay-0".into(), says: "the stream is full".into() };
    assert_eq!(changed(nothing, [unwell]), [(Invariant::Drains, None)]);
}

#[test]
fn changed_bytes_are_found() {
    let stored = |what: &What| matches!(what, What::Stored { sequence: 2, .. });
    let unchanged = [(Invariant::Unchanged, Some(id(2)))];
    assert_eq!(changed(stored, [What::Stored { sequence: 2, event: id(2), bytes: 77 }]), unchanged);
    let other = |digest: &str, key| What::Effect {
        subscriber: "skip".into(),
        event: id(3),
        key,
        version: 3,
        digest: digest.into(),
    };
    let third = |what: &What| *what == effect("skip", 3);
    assert_eq!(changed(third, [other("d9", key())]), [(Invariant::Unchanged, Some(id(3)))]);
    assert_eq!(changed(third, [other("d3", Some("another".into()))]), [(Invariant::Unchanged, Some(id(3)))]);
}

#[test]
fn the_story_of_the_first_broken_event_is_told() {
    let mut all = good();
    all.extend([effect("one", 3), effect("one", 2)]);
    let history = entries(all);
    let verdict = check(&history, &SUBSCRIBERS);
    assert_eq!(verdict.violations[0].event, Some(id(2)));
    let told = story(&history, id(2));
    for part in ["wrote", "committed", "relay-killed", "stored", "effect"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(told.matches("\"effect\"").count(), 3, "{told}");
}
