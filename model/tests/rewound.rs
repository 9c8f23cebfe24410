//! A stream that loses its end costs no key its order and no event, and without any one of the protocol's parts it does.

mod search;

use aftercommit_model::rewound::{Broken, FOUND_RIGHTLY, IN_ORDER, Scope};
use search::holds;
use stateright::{Checker, HasDiscoveries, Model};

/// Two events of a key and one of another, which commits late and comes in front of them when the stream is filled again.
fn scope(clamps: bool) -> Scope {
    Scope { keys: vec![2, 1, 1], late: 1, clamps, cuts: 1, stops: 1, runs: 1, broken: None }
}

/// Two events of a key commit late.
fn two_late(clamps: bool) -> Scope {
    Scope { keys: vec![2, 2, 1], late: 2, ..scope(clamps) }
}

fn is_caught(broken: Broken, mut scope: Scope, property: &'static str) {
    scope.broken = Some(broken);
    let checker = scope.checker().finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{broken:?} was not caught"));
    println!("{broken:?}: caught in {:?}", path.into_actions());
}

#[test]
fn the_protocol_holds() {
    for clamps in [true, false] {
        holds("one late event", scope(clamps));
        holds("two late events", two_late(clamps));
    }
}

#[test]
fn a_repair_that_goes_by_sequences_breaks_the_order_of_keys() {
    is_caught(Broken::BareSequences, scope(true), IN_ORDER);
}

#[test]
fn a_run_that_trusts_the_stream_calls_waiting_events_missed() {
    is_caught(Broken::NoMoment, scope(true), FOUND_RIGHTLY);
}

#[test]
fn beginning_where_the_consumer_stands_breaks_the_order() {
    is_caught(Broken::TrustsConsumer, two_late(false), IN_ORDER);
}
