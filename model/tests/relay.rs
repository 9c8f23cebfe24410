//! The relay's protocol holds within these scopes, and without any one of its parts it does not.

mod search;

use aftercommit_model::relay::{Broken, Faults, IN_ORDER, NO_GHOST, NOTHING_LOST, ONCE, Scope, Transaction};
use search::holds;
use stateright::{Checker, HasDiscoveries, Model};

const NONE: Faults = Faults {
    database_crashes: 0,
    promotions: 0,
    relay_crashes: 0,
    expiries: 0,
    timeouts: 0,
    lost_publishes: 0,
    lost_acks: 0,
    foreign: 0,
};

fn scope(transactions: &[Transaction], relays: usize, faults: Faults) -> Scope {
    Scope {
        transactions: transactions.to_vec(),
        unfit: Vec::new(),
        relays,
        in_flight: 2,
        faults,
        ids_in_advance: false,
        broken: None,
    }
}

/// Two transactions of a key, and one of nothing whose number shifts those of the others.
fn windows() -> Scope {
    scope(&[Transaction::durable(&[1]), Transaction::durable(&[2]), Transaction::durable(&[])], 1, NONE)
}

/// The same where sessions take ids in advance, as with a sequence that has a cache.
fn ids_in_advance() -> Scope {
    Scope { ids_in_advance: true, ..windows() }
}

/// A transaction that does not wait for the disk, and one that does.
fn database_crash() -> Scope {
    let transactions = [Transaction::asynchronous(&[1]), Transaction::durable(&[1])];
    scope(&transactions, 1, Faults { database_crashes: 1, ..NONE })
}

/// Two relays, of which one loses its lease and goes on; acknowledgements are lost or late.
fn two_relays() -> Scope {
    scope(&[Transaction::durable(&[1, 1])], 2, Faults { expiries: 1, timeouts: 1, lost_acks: 1, ..NONE })
}

/// A message is lost, a relay dies, others write.
fn bad_stream() -> Scope {
    let faults = Faults { relay_crashes: 1, timeouts: 1, lost_publishes: 1, foreign: 1, ..NONE };
    scope(&[Transaction::durable(&[1, 1])], 1, faults)
}

/// An event that is parked and one behind it; the database crashes, or a standby that lacks any end of its log is promoted.
fn parking(faults: Faults) -> Scope {
    Scope { unfit: vec![0], ..scope(&[Transaction::durable(&[1, 2])], 1, faults) }
}

const CRASH: Faults = Faults { database_crashes: 1, ..NONE };
const PROMOTION: Faults = Faults { promotions: 1, ..NONE };

/// Two transactions and two relays that take over from each other: too much to be gone through whole.
fn take_over() -> Scope {
    scope(&[Transaction::durable(&[1]), Transaction::durable(&[2])], 2, Faults { expiries: 1, ..NONE })
}

fn is_caught(broken: Broken, mut scope: Scope, property: &'static str) {
    scope.broken = Some(broken);
    let wanted = HasDiscoveries::AnyOf([property].into());
    let started = std::time::Instant::now();
    let checker = scope.checker().finish_when(wanted);
    // Where the shortest way is long, any way is found sooner depth first.
    let path = match broken {
        Broken::NoLogFence => checker.spawn_dfs().join().discovery(property),
        _ => checker.spawn_bfs().join().discovery(property),
    };
    let path = path.unwrap_or_else(|| panic!("{broken:?} was not caught"));
    println!("{broken:?}: caught in {} steps, {:?}", path.into_actions().len(), started.elapsed());
}

#[test]
fn the_protocol_holds() {
    holds("windows", windows());
    holds("ids in advance", ids_in_advance());
    holds("database crash", database_crash());
    holds("two relays", two_relays());
    holds("bad stream", bad_stream());
}

#[test]
fn it_holds_with_parked_events() {
    holds("parking, database crash", parking(CRASH));
    holds("parking, promotion", parking(Faults { relay_crashes: 1, ..PROMOTION }));
}

#[test]
fn a_cursor_on_the_last_id_loses_events() {
    is_caught(Broken::LastIdCursor, windows(), NOTHING_LOST);
}

#[test]
fn a_cursor_below_xmin_loses_events() {
    is_caught(Broken::XminCursor, windows(), NOTHING_LOST);
}

#[test]
fn a_mark_of_the_snapshots_list_alone_loses_events() {
    is_caught(Broken::SnapshotListOnly, windows(), NOTHING_LOST);
}

#[test]
fn without_late_rows_an_id_that_is_taken_in_advance_is_lost() {
    is_caught(Broken::NoLateRows, ids_in_advance(), NOTHING_LOST);
}

#[test]
fn without_a_barrier_ghosts_get_out() {
    is_caught(Broken::NoBarrier, database_crash(), NO_GHOST);
}

#[test]
fn parking_that_does_not_wait_for_the_disk_loses_events() {
    is_caught(Broken::ParkingNotDurable, parking(CRASH), NOTHING_LOST);
}

#[test]
fn without_a_timeline_a_promoted_standby_loses_parked_events() {
    is_caught(Broken::NoTimeline, parking(PROMOTION), NOTHING_LOST);
}

#[test]
fn without_a_fence_in_the_log_two_leaders_do_harm() {
    is_caught(Broken::NoLogFence, take_over(), NOTHING_LOST);
}

#[test]
fn without_an_expected_sequence_events_are_doubled() {
    is_caught(Broken::NoExpectedSequence, two_relays(), ONCE);
}

#[test]
fn with_the_sequence_alone_a_foreign_message_makes_a_hole() {
    is_caught(Broken::SequenceOnly, bad_stream(), NOTHING_LOST);
}

#[test]
fn without_the_streams_tail_events_are_doubled() {
    is_caught(Broken::NoTail, two_relays(), ONCE);
}

#[test]
fn a_chain_that_begins_at_a_later_end_doubles_events() {
    is_caught(Broken::LateEnd, two_relays(), ONCE);
}

#[test]
fn without_an_expected_sequence_keys_lose_their_order() {
    is_caught(Broken::NoExpectedSequence, two_relays(), IN_ORDER);
}
