//! Faults of the store from beginning to end: services commit, a relay publishes, a worker handles in another database,
//! something is lost, and in the end every event took effect once, the keys in order, with findings that say what happened.

mod support;

use std::fs;
use std::time::Duration;

use aftercommit::reconciler::{Mode, Outcome, Scope};
use aftercommit::testing::eventually;
use support::{Copy, NAME, Random, SOON, Scenario};

fn finding(kind: &str, state: &str, count: u64) -> (String, String, i64) {
    (kind.into(), state.into(), i64::try_from(count).unwrap())
}

/// Waits for the relay to have noticed that the stream is not as it left it, and runs the reconciler.
async fn reconcile_when_rewound(scenario: &Scenario) {
    eventually(SOON, "a run comes to its end", async || {
        let summary = scenario.outbox_runner().run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
        matches!(summary.outcome, Outcome::Ran)
    })
    .await
    .unwrap();
}

/// Wipes the store. `behind` commits are not handled yet when that happens.
async fn survives_a_wiped_store(behind: u64) {
    let mut scenario = Scenario::start().await;
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    if behind > 0 {
        scenario.stop_worker().await;
        scenario.write(behind).await;
        scenario.published().await;
    }
    scenario.nats.stop().await.unwrap();
    fs::remove_dir_all(scenario.nats.store_directory()).unwrap();
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    scenario.provision().await;
    if behind > 0 {
        scenario.start_worker();
    }
    scenario.write(20).await;
    reconcile_when_rewound(&scenario).await;
    scenario.caught_up().await;
    scenario.reconcile_books().await;
    scenario.handled_in_order().await;
    // The relay has put it right by itself.
    assert_eq!(scenario.outbox_findings().await, []);
    assert_eq!(scenario.books_findings().await, [finding("consumer_recreated", "repaired", 1)]);
    scenario.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped_when_all_is_handled() {
    survives_a_wiped_store(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped_when_the_worker_is_behind() {
    survives_a_wiped_store(60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_goes_back_to_an_older_copy() {
    let mut scenario = Scenario::start().await;
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.nats.store_directory());
    scenario.nats.restart().await.unwrap();
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.nats.store_directory());
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    reconcile_when_rewound(&scenario).await;
    scenario.caught_up().await;
    scenario.reconcile_books().await;
    scenario.handled_in_order().await;
    assert_eq!(scenario.outbox_findings().await, []);
    scenario.nothing_is_left().await;
    println!("{:?}", scenario.books_findings().await);
}

/// The stream's messages go back to an older copy, and what the server knows of the consumer does not. New events come
/// into places that the consumer counts as acked.
async fn survives_a_lost_tail(worker_runs: bool) {
    let mut scenario = Scenario::start().await;
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    if !worker_runs {
        scenario.stop_worker().await;
    }
    scenario.stop_relay().await;
    scenario.write(30).await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    println!("after restart: {:?}", scenario.stream().await.consumer_info(NAME).await.unwrap());
    println!("books: {}", scenario.reconcile_books().await);
    println!("books: {:?}", scenario.books_findings().await);
    scenario.start_relay();
    reconcile_when_rewound(&scenario).await;
    if !worker_runs {
        scenario.start_worker();
    }
    scenario.published().await;
    println!("books: {}", scenario.reconcile_books().await);
    println!("books: {:?}", scenario.books_findings().await);
    scenario.handled_in_order().await;
    assert_eq!(scenario.outbox_findings().await, []);
    println!("books: {:?}", scenario.books_findings().await);
    scenario.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_is_lost_behind_a_consumer() {
    survives_a_lost_tail(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_is_lost_behind_a_running_worker() {
    survives_a_lost_tail(true).await;
}

/// The same while everything runs and the reconcilers come later: new events have come into the lost places.
#[tokio::test(flavor = "multi_thread")]
async fn the_tail_is_lost_while_all_are_busy() {
    let mut scenario = Scenario::start().await;
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    scenario.write(60).await;
    scenario.caught_up().await;
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.stream_directory().join("msgs"));
    scenario.write(30).await;
    scenario.nats.restart().await.unwrap();
    scenario.write(100).await;
    reconcile_when_rewound(&scenario).await;
    scenario.published().await;
    println!("books: {}", scenario.reconcile_books().await);
    println!("books: {:?}", scenario.books_findings().await);
    scenario.handled_in_order().await;
}

async fn flip(kill: bool, last: bool) {
    let mut scenario = Scenario::start().await;
    scenario.write(100).await;
    scenario.caught_up().await;
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    scenario.stop_worker().await;
    scenario.write(50).await;
    scenario.published().await;
    println!("{:?}", scenario.stream().await.cached_info().state);
    scenario.stop_relay().await;
    if kill { scenario.nats.kill().await.unwrap() } else { scenario.nats.stop().await.unwrap() }
    let messages = scenario.stream_directory().join("msgs");
    for entry in fs::read_dir(&messages).unwrap() { let e = entry.unwrap(); println!("{:?} {}", e.path(), e.metadata().unwrap().len()); }
    let block = messages.join("1.blk");
    let mut bytes = fs::read(&block).unwrap();
    let at = if last { bytes.len() - 20 } else { bytes.len() / 2 };
    bytes[at] ^= 1;
    fs::write(&block, bytes).unwrap();
    scenario.nats.restart().await.unwrap();
    println!("kill {kill} last {last}: {:?}", scenario.stream().await.cached_info().state);
    scenario.start_relay();
    scenario.start_worker();
    scenario.write(20).await;
    println!("{}", scenario.outbox_runner().run_now("outbox", Scope::Full, Mode::Repair).await.unwrap());
    println!("{:?}", scenario.stream().await.cached_info().state);
    println!("books: {}", scenario.reconcile_books().await);
    println!("books: {:?}", scenario.books_findings().await);
    println!("outbox: {:?}", scenario.outbox_findings().await);
    scenario.handled_in_order().await;
}
#[tokio::test(flavor = "multi_thread")]
async fn flip1() { flip(false, false).await }
#[tokio::test(flavor = "multi_thread")]
async fn flip2() { flip(false, true).await }
#[tokio::test(flavor = "multi_thread")]
async fn flip3() { flip(true, false).await }
#[tokio::test(flavor = "multi_thread")]
async fn flip4() { flip(true, true).await }
