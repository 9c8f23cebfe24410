//! The worker's protocol holds within these scopes, and without any one of its parts it does not.
//! With `AFTERCOMMIT_MODEL=long` a larger scope is checked too.

mod search;

use aftercommit_model::inbox::{Broken, Faults, IN_ORDER, NOTHING_LOST, ONCE, SENT_BACK_FIRST, Scope};
use search::holds;
use stateright::{Checker, HasDiscoveries, Model};

const NONE: Faults = Faults {
    crashes: 0,
    expiries: 0,
    lost_deliveries: 0,
    lost_acks: 0,
    redeliveries: 0,
    failures: 0,
    killed_transactions: 0,
    unknown_commits: 0,
    redrives: 0,
};

/// Two events of a key, two instances.
fn scope(faults: Faults) -> Scope {
    Scope { stream: vec![0, 1], keys: vec![1, 1], instances: 2, max_attempts: 2, faults, broken: None }
}

/// A process dies, the lease runs out under a living one, acks and deliveries are lost.
fn instances() -> Scope {
    scope(Faults { crashes: 1, expiries: 1, lost_deliveries: 1, lost_acks: 1, ..NONE })
}

/// Commits of which nothing is heard, transactions that are ended, deliveries that come again.
fn transactions() -> Scope {
    scope(Faults { expiries: 1, killed_transactions: 1, unknown_commits: 1, redeliveries: 1, ..NONE })
}

/// Handlers that fail until the event is a dead letter, which is sent back.
fn dead_letters() -> Scope {
    scope(Faults { expiries: 1, failures: 2, redrives: 1, ..NONE })
}

/// An event that is in the stream twice, and one of another key.
fn doubled() -> Scope {
    Scope { stream: vec![0, 1, 0], keys: vec![1, 2], ..scope(Faults { crashes: 1, lost_acks: 1, ..NONE }) }
}

fn is_caught(broken: Broken, mut scope: Scope, property: &'static str) {
    scope.broken = Some(broken);
    let started = std::time::Instant::now();
    let checker = scope.checker().finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{broken:?} was not caught"));
    println!("{broken:?}: caught in {} steps, {:?}", path.into_actions().len(), started.elapsed());
}

#[test]
fn the_protocol_holds() {
    holds("instances", instances());
    holds("transactions", transactions());
    holds("dead letters", dead_letters());
    holds("doubled", doubled());
    if std::env::var("AFTERCOMMIT_MODEL").is_ok_and(|size| size == "long") {
        holds("all faults", scope(Faults { crashes: 1, lost_acks: 1, failures: 2, redrives: 1, expiries: 1, ..NONE }));
    }
}

#[test]
fn without_an_inbox_events_take_effect_twice() {
    is_caught(Broken::NoInbox, instances(), ONCE);
}

#[test]
fn an_inbox_that_is_not_locked_lets_two_instances_run_an_event() {
    is_caught(Broken::CheckThenAct, transactions(), ONCE);
}

#[test]
fn an_inbox_row_before_the_effect_loses_the_effect() {
    is_caught(Broken::InboxBeforeEffect, instances(), NOTHING_LOST);
}

#[test]
fn an_ack_before_the_commit_loses_the_effect() {
    is_caught(Broken::AckBeforeCommit, instances(), NOTHING_LOST);
}

#[test]
fn waiting_for_redelivery_breaks_the_order_of_keys() {
    is_caught(Broken::NoStreamRead, instances(), IN_ORDER);
}

#[test]
fn running_a_key_side_by_side_breaks_its_order() {
    is_caught(Broken::NoKeys, transactions(), IN_ORDER);
}

#[test]
fn live_events_overtake_what_was_sent_back_unless_they_look() {
    is_caught(Broken::NoHold, dead_letters(), SENT_BACK_FIRST);
}
