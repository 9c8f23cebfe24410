//! Losses from beginning to end: services commit, a relay publishes, a worker handles in another database, something is
//! lost, and in the end every event took effect once, the keys in order, with findings that say what happened.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::{Copy, Dump, NAME, Random, SOON, Scenario, WorkerProcess, Writers, is_before};
use aftercommit::relay::PublishMethod;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use sqlx::Transaction;

type Found = Vec<(String, String, i64)>;

fn finding(kind: &str, state: &str, count: u64) -> (String, String, i64) {
    (kind.into(), state.into(), i64::try_from(count).unwrap())
}

/// Everything that was written is handled, and known to the reconcilers.
async fn reconciled(scenario: &Scenario, commits: u64) {
    scenario.write(commits).await;
    scenario.caught_up().await;
    scenario.nothing_is_left().await;
}

/// The worker stops, and something is published that it has not seen.
async fn fall_behind(scenario: &mut Scenario, commits: u64) {
    scenario.stop_worker().await;
    scenario.write(commits).await;
    scenario.published().await;
}

/// All reconcilers run, and after that the worker, if it does not run yet.
async fn repair(scenario: &mut Scenario, worker_stopped: bool) {
    scenario.reconcile_outbox().await;
    scenario.reconcile_books().await;
    if worker_stopped {
        scenario.start_worker();
    }
    scenario.write(10).await;
    scenario.caught_up().await;
    scenario.handled_in_order().await;
    scenario.nothing_is_left().await;
}

async fn survives_a_wiped_store(behind: bool) {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    if behind {
        fall_behind(&mut scenario, 60).await;
    }
    scenario.nats.stop().await.unwrap();
    fs::remove_dir_all(scenario.nats.store_directory()).unwrap();
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    scenario.provision().await;
    scenario.write(20).await;
    repair(&mut scenario, behind).await;
    // The relay has put it right by itself.
    assert_eq!(scenario.outbox_findings().await, []);
    assert_eq!(scenario.books_findings().await, [finding("consumer_recreated", "repaired", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped() {
    survives_a_wiped_store(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped_when_the_worker_is_behind() {
    survives_a_wiped_store(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_goes_back_to_an_older_copy() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.nats.store_directory());
    scenario.nats.restart().await.unwrap();
    reconciled(&scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.nats.store_directory());
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    repair(&mut scenario, false).await;
    assert_eq!((scenario.outbox_findings().await, scenario.books_findings().await), (vec![], vec![]));
}

/// The stream's messages go back to an older copy, and what the server knows of the consumer does not: new events come
/// into places that the consumer counts as acked.
async fn loses_its_tail(scenario: &mut Scenario, meanwhile: u64) {
    reconciled(scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    let messages = scenario.stream_directory().join("msgs");
    let copy = Copy::of(&messages);
    scenario.nats.restart().await.unwrap();
    reconciled(scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&messages);
    scenario.write(meanwhile).await;
    scenario.nats.restart().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_loses_its_tail_under_a_consumer() {
    let mut scenario = Scenario::start().await;
    loses_its_tail(&mut scenario, 30).await;
    scenario.write(60).await;
    repair(&mut scenario, false).await;
    assert_eq!((scenario.outbox_findings().await, scenario.books_findings().await), (vec![], vec![]));
}

const OLD: &str = "select aftercommit.publish('key.changed', jsonb_build_object('version', $1::int), 'old')";

/// Transactions that began before what will be lost; and the stream's messages without what will be lost.
async fn old_transactions(scenario: &mut Scenario) -> (Vec<Transaction<'static, sqlx::Postgres>>, Copy) {
    reconciled(scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    let mut old = Vec::new();
    for version in 1..=2 {
        let mut transaction = scenario.outbox.pool.begin().await.unwrap();
        sqlx::query(OLD).bind(version).execute(&mut *transaction).await.unwrap();
        old.push(transaction);
    }
    reconciled(scenario, 60).await;
    scenario.stop_relay().await;
    (old, copy)
}

/// They commit after the loss, and come into lost places: the relay fills them in the order of the outbox.
async fn commit_into_the_lost_tail(scenario: &mut Scenario, old: Vec<Transaction<'static, sqlx::Postgres>>) {
    for transaction in old {
        transaction.commit().await.unwrap();
    }
    // Behind the consumer's place.
    sqlx::query(OLD).bind(3).execute(&scenario.outbox.pool).await.unwrap();
    scenario.start_relay();
    scenario.published().await;
}

async fn with_nats(version: Option<&str>) -> Scenario {
    let options = NatsOptions { version: version.map(str::to_string), ..NatsOptions::default() };
    Scenario::on(Nats::start(options).await.unwrap(), PublishMethod::Auto).await
}

/// Before 2.14 the server takes the messages in the lost places for acked, and delivers what follows; the worker reads them
/// from the stream.
async fn old_transactions_commit_into_the_lost_tail(version: Option<&str>) {
    let mut scenario = with_nats(version).await;
    let (old, copy) = old_transactions(&mut scenario).await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    commit_into_the_lost_tail(&mut scenario, old).await;
    scenario.handled_in_order().await;
    repair(&mut scenario, false).await;
    assert_eq!((scenario.outbox_findings().await, scenario.books_findings().await), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_transaction_commits_into_the_lost_tail() {
    old_transactions_commit_into_the_lost_tail(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_transaction_commits_into_a_lost_tail() {
    old_transactions_commit_into_the_lost_tail(Some("2.12.8")).await;
}

/// The worker asks for its last message, which is lost. Before it asks where the stream ends, the relay has filled the lost
/// places again: that the stream reaches beyond that place does not mean that it is as it was.
#[tokio::test(flavor = "multi_thread")]
async fn the_lost_tail_is_filled_while_the_worker_asks_for_it() {
    let mut scenario = with_nats(Some("2.12.8")).await;
    scenario.stop_worker().await;
    let asked = std::env::temp_dir().join(format!("asked-{}", scenario.outbox.naming.stream));
    let hold = format!("witness-missing:{}", asked.display());
    let worker = WorkerProcess(scenario.worker_command().env("AFTERCOMMIT_HOLD", hold).spawn().unwrap());
    let (old, copy) = old_transactions(&mut scenario).await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    eventually(SOON, "the worker has asked for its last message", async || asked.exists()).await.unwrap();
    commit_into_the_lost_tail(&mut scenario, old).await;
    std::fs::remove_file(&asked).unwrap();
    scenario.handled_in_order().await;
    worker.stop();
}

/// Whether the server lets a consumer stand behind the end of its stream.
fn ahead_is_skipped(scenario: &Scenario) -> bool {
    is_before(scenario.nats.version(), (2, 14))
}

/// Before the relay has filled the lost places, a consumer that stands behind the stream's end is found and made anew.
/// Servers from 2.14 on put it back themselves.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_ahead_of_the_stream_is_found() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    scenario.nats.stop().await.unwrap();
    let copy = Copy::of(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    reconciled(&scenario, 60).await;
    scenario.stop_relay().await;
    scenario.stop_worker().await;
    scenario.nats.stop().await.unwrap();
    copy.replace(&scenario.stream_directory().join("msgs"));
    scenario.nats.restart().await.unwrap();
    let summary = scenario.reconcile_consumer().await;
    let found: Found = match ahead_is_skipped(&scenario) {
        true => vec![finding("consumer_ahead", "repaired", 1)],
        false => vec![],
    };
    assert_eq!(scenario.books_findings().await, found, "{summary}");
    scenario.start_relay();
    scenario.write(30).await;
    repair(&mut scenario, true).await;
    assert_eq!(scenario.outbox_findings().await, []);
    assert_eq!(scenario.books_findings().await, found);
}

/// Changes one bit of a message in the second half: in its length, or in its payload.
fn flip_a_bit(block: &Path, in_length: bool) {
    let mut bytes = fs::read(block).unwrap();
    let (mut begin, mut end) = (0, 0);
    while end < bytes.len() * 3 / 4 {
        begin = end;
        // A record begins with its length, whose highest bit says that there are headers, and ends with a checksum.
        let length = u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) & 0x7fff_ffff;
        end += usize::try_from(length).unwrap();
    }
    bytes[if in_length { begin } else { end - 10 }] ^= 1;
    fs::write(block, bytes).unwrap();
}

/// One bit of the stream's file changes. `killed` says how the server ended before.
async fn survives_a_flipped_bit(killed: bool, behind: bool) -> Scenario {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    if behind {
        fall_behind(&mut scenario, 100).await;
    }
    match killed {
        true => scenario.nats.kill().await.unwrap(),
        false => scenario.nats.stop().await.unwrap(),
    }
    flip_a_bit(&scenario.stream_directory().join("msgs/1.blk"), false);
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    repair(&mut scenario, behind).await;
    scenario
}

/// After an orderly stop the server relies on its index: it counts the message as there and cannot read it.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flips_in_a_handled_message() {
    let scenario = survives_a_flipped_bit(false, false).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", 1)]);
    assert_eq!(scenario.books_findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flips_in_a_message_that_waits() {
    let scenario = survives_a_flipped_bit(false, true).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", 1)]);
    assert_eq!(scenario.books_findings().await, [finding("not_handled", "repaired", 1)]);
}

/// After a crash the server reads its file again and drops everything from the damaged message on.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flips_before_a_crashed_server_comes_back() {
    let scenario = survives_a_flipped_bit(true, true).await;
    assert_eq!((scenario.outbox_findings().await, scenario.books_findings().await), (vec![], vec![]));
}

/// The server cannot tell where messages begin, and notices that late: it needs a restart, and then it has lost its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flips_in_a_length() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    fall_behind(&mut scenario, 100).await;
    scenario.nats.stop().await.unwrap();
    flip_a_bit(&scenario.stream_directory().join("msgs/1.blk"), true);
    scenario.nats.restart().await.unwrap();
    scenario.write(20).await;
    // Whoever reads it makes the server notice.
    let last = scenario.stream().await.cached_info().state.last_sequence;
    for sequence in 1..=last {
        drop(scenario.stream().await.get_raw_message(sequence).await);
    }
    scenario.nats.restart().await.unwrap();
    repair(&mut scenario, true).await;
    assert_eq!((scenario.outbox_findings().await, scenario.books_findings().await), (vec![], vec![]));
}

/// Some sequences between two.
fn some(random: &mut Random, from: u64, to: u64, count: usize) -> BTreeSet<u64> {
    let mut chosen = BTreeSet::new();
    while chosen.len() < count {
        chosen.insert(from + random.below(to - from + 1));
    }
    chosen
}

/// Within the time in which the server takes the same message id for a repeat.
#[tokio::test(flavor = "multi_thread")]
async fn handled_messages_are_removed() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    let info = scenario.stream().await.cached_info().clone();
    assert!(info.config.duplicate_window.as_secs() >= 60);
    scenario.delete(some(&mut Random(1), 1, info.state.last_sequence, 9)).await;
    repair(&mut scenario, false).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", 9)]);
    assert_eq!(scenario.books_findings().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_wait_are_removed() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    let handled = scenario.stream().await.cached_info().state.last_sequence;
    fall_behind(&mut scenario, 100).await;
    let last = scenario.stream().await.cached_info().state.last_sequence;
    scenario.delete(some(&mut Random(2), handled + 1, last, 9)).await;
    repair(&mut scenario, true).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", 9)]);
    assert_eq!(scenario.books_findings().await, [finding("not_handled", "repaired", 9)]);
}

async fn survives_a_purge(keep: u64) {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    let handled = scenario.stream().await.cached_info().state.messages;
    fall_behind(&mut scenario, 60).await;
    let stream = scenario.stream().await;
    let all = stream.cached_info().state.messages;
    stream.purge().keep(keep).await.unwrap();
    repair(&mut scenario, true).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", all - keep)]);
    assert_eq!(scenario.books_findings().await, [finding("not_handled", "repaired", all - handled - keep)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_purged() {
    survives_a_purge(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_purged_but_for_the_newest() {
    survives_a_purge(20).await;
}

/// It goes back behind what its consumer counts as acked.
#[tokio::test(flavor = "multi_thread")]
async fn the_subscribers_database_goes_back() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    scenario.stop_worker().await;
    let dump = Dump::of(&scenario.database.url);
    let before = scenario.outbox.committed().await.len();
    scenario.start_worker();
    reconciled(&scenario, 60).await;
    let forgotten = scenario.outbox.committed().await.len() - before;
    fall_behind(&mut scenario, 20).await;
    let restored = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&restored);
    scenario.move_books(restored).await;
    repair(&mut scenario, true).await;
    assert_eq!(scenario.outbox_findings().await, []);
    assert_eq!(scenario.books_findings().await, [finding("acked_not_handled", "repaired", forgotten as u64)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_is_made_anew_at_the_end_of_the_stream() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    fall_behind(&mut scenario, 40).await;
    let stream = scenario.stream().await;
    let filter_subject = stream.consumer_info(NAME).await.unwrap().config.filter_subject;
    stream.delete_consumer(NAME).await.unwrap();
    let durable_name = Some(NAME.to_string());
    let config =
        pull::Config { durable_name, filter_subject, deliver_policy: DeliverPolicy::New, ..pull::Config::default() };
    stream.create_consumer(config).await.unwrap();
    scenario.write(20).await;
    scenario.published().await;
    repair(&mut scenario, true).await;
    assert_eq!(scenario.outbox_findings().await, []);
    let found = ["consumer_recreated", "consumer_settings"].map(|kind| finding(kind, "repaired", 1));
    assert_eq!(scenario.books_findings().await, found);
}

/// Handled messages are removed again and again, under writers, a relay and a worker that do not stop. Two reconcilers of
/// the outbox race each other and the subscriber's; one of them is killed, and so are relays and workers.
#[tokio::test(flavor = "multi_thread")]
async fn reconcilers_race_all_the_others_and_are_killed() {
    let mut scenario = Scenario::start().await;
    reconciled(&scenario, 60).await;
    let writers = Writers::start(&scenario.outbox.pool, 1, 6).await;
    let mut random = Random(11);
    let mut removed = BTreeSet::new();
    for round in 0..4 {
        let handled = scenario.stream().await.consumer_info(NAME).await.unwrap().ack_floor.stream_sequence;
        for sequence in some(&mut random, 1, handled, 6) {
            // One that was removed in an earlier round is not there any more.
            if let Ok(message) = scenario.stream().await.get_raw_message(sequence).await {
                removed.insert(message.headers.get("ce-id").unwrap().to_string());
                scenario.delete([sequence]).await;
            }
        }
        let mut killed = scenario.reconcile_command().spawn().unwrap();
        let mut other = scenario.reconcile_command().spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(random.below(400))).await;
        match round % 3 {
            0 => scenario.kill_relay(),
            1 => scenario.kill_worker(),
            _ => {}
        }
        killed.kill().unwrap();
        killed.wait().unwrap();
        writers.more(10).await;
        scenario.reconcile_books().await;
        tokio::task::spawn_blocking(move || other.wait()).await.unwrap().unwrap();
    }
    writers.stop().await;
    repair(&mut scenario, false).await;
    assert_eq!(scenario.outbox_findings().await, [finding("missing_from_stream", "repaired", removed.len() as u64)]);
    assert_eq!(scenario.books_findings().await, []);
    let repairs = scenario.stream().await.cached_info().state.messages;
    assert_eq!(repairs, scenario.outbox.committed().await.len() as u64, "nothing is in the stream twice");
}
