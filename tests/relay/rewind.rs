//! G1, G3 over a stream that has lost its end: the relay goes back by itself and publishes again what is missing, each
//! event once and every key in order.

use std::time::Duration;

use crate::support::{Copy, Outbox, RunningRelay, SOON, Writers};
use aftercommit::operator;
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::jetstream::stream::Config;

async fn private() -> (Nats, Outbox) {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    outbox.forget_message_ids().await;
    (nats, outbox)
}

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

async fn write(outbox: &Outbox, commits: u64) {
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    writers.more(commits).await;
    writers.stop().await;
}

/// Everything is in the stream, and the window over it is closed.
async fn complete(outbox: &Outbox) {
    outbox.assert_complete().await;
    outbox.settled().await;
}

/// Several windows, so that there are states to go back to.
async fn several_windows(outbox: &Outbox) {
    for _ in 0..3 {
        write(outbox, 60).await;
        complete(outbox).await;
    }
}

async fn config(outbox: &Outbox) -> Config {
    outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone()
}

/// The store is wiped while the server is stopped; the relay runs all the time, or comes back later.
async fn survives_a_wiped_store(relay_runs: bool) {
    let (mut nats, outbox) = private().await;
    let mut relay = Some(outbox.relay());
    several_windows(&outbox).await;
    if !relay_runs {
        relay.take().unwrap().stop().await.unwrap();
    }
    nats.stop().await.unwrap();
    std::fs::remove_dir_all(nats.store_directory()).unwrap();
    nats.restart().await.unwrap();
    write(&outbox, 30).await;
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    let relay = relay.unwrap_or_else(|| outbox.relay());
    complete(&outbox).await;
    write(&outbox, 30).await;
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped_under_a_running_relay() {
    survives_a_wiped_store(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_wiped_while_no_relay_runs() {
    survives_a_wiped_store(false).await;
}

/// The store is put back to an older copy, twice, and relays die at every step of going back.
#[tokio::test(flavor = "multi_thread")]
async fn the_store_goes_back_to_an_older_copy() {
    let (mut nats, outbox) = private().await;
    let relay = outbox.relay_process();
    several_windows(&outbox).await;
    nats.stop().await.unwrap();
    let copy = Copy::of(&nats.store_directory());
    nats.restart().await.unwrap();
    for round in 0..2 {
        let relay = if round == 0 { None } else { Some(outbox.relay_process()) };
        several_windows(&outbox).await;
        drop(relay);
    }
    outbox.kill(relay).await;
    nats.stop().await.unwrap();
    copy.replace(&nats.store_directory());
    nats.restart().await.unwrap();
    let left = outbox.stored().await;
    assert!(left > 100 && left + 100 < outbox.committed().await.len() as u64);
    for fault in ["relay-rewound:1", "relay-after-barrier:1", "relay-acknowledged:30", "relay-window-done:1"] {
        outbox.dies_at(fault).await;
    }
    let relay = outbox.relay();
    complete(&outbox).await;
    // What the log said of the lost part is gone; a later loss must not lead back to it.
    let falls: i64 = sqlx::query_scalar(
        "select count(*) from (select base_sequence - lag(base_sequence) over (order by seq) as step
                                 from aftercommit.relay_log) as steps where step < 0",
    )
    .fetch_one(&outbox.pool)
    .await
    .unwrap();
    assert_eq!(falls, 0);
    several_windows(&outbox).await;
    nats.stop().await.unwrap();
    copy.replace(&nats.store_directory());
    nats.restart().await.unwrap();
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

/// The log was thinned out and does not reach back to what is left of the stream; the outbox was pruned, too.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_does_not_reach_back() {
    let (mut nats, outbox) = private().await;
    let relay = outbox.relay();
    write(&outbox, 60).await;
    complete(&outbox).await;
    nats.stop().await.unwrap();
    let copy = Copy::of(&nats.store_directory());
    nats.restart().await.unwrap();
    several_windows(&outbox).await;
    relay.stop().await.unwrap();
    sqlx::raw_sql(
        "delete from aftercommit.relay_log where seq < (select max(seq) from aftercommit.relay_log);
         delete from aftercommit.outbox where id <= 30",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    nats.stop().await.unwrap();
    copy.replace(&nats.store_directory());
    nats.restart().await.unwrap();
    let relay = outbox.relay();
    let committed = outbox.committed().await;
    let count = async || {
        let messages = outbox.messages().await;
        let times = |id: &String| messages.iter().filter(|message| message.headers["ce-id"] == *id).count();
        committed.iter().map(times).collect::<Vec<_>>()
    };
    eventually(SOON, "everything that the outbox has is in the stream", async || {
        count().await.iter().all(|times| *times > 0)
    })
    .await
    .unwrap();
    outbox.settled().await;
    assert!(count().await.iter().all(|times| *times == 1), "each once");
    relay.stop().await.unwrap();
}

/// Somebody deletes the stream and makes it anew while the relay is idle. It notices without a new event.
#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_recreated_under_an_idle_relay() {
    let outbox = shared().await;
    let relay = outbox.relay();
    several_windows(&outbox).await;
    outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    complete(&outbox).await;
    write(&outbox, 30).await;
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_recreated_under_a_busy_relay() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    for _ in 0..3 {
        writers.more(200).await;
        outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
        writers.more(50).await;
        operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
        eventually(SOON, "the relay publishes again", async || outbox.stored().await > 0).await.unwrap();
    }
    writers.stop().await;
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

/// While everything is published again, the stream refuses a part of what is in flight. What was in flight behind that is
/// not stored either, though events behind it wait to be sent.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_stream_refused_in_flight_is_published() {
    let outbox = shared().await;
    let config_of_relay = || RelayConfig { max_in_flight: 20, ..outbox.relay_config() };
    let relay = RunningRelay::start(config_of_relay());
    write(&outbox, 60).await;
    complete(&outbox).await;
    relay.stop().await.unwrap();
    let js = outbox.js().await;
    js.delete_stream(&outbox.naming.stream).await.unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    let room = config(&outbox).await;
    js.update_stream(Config { max_messages: 10, ..room.clone() }).await.unwrap();
    let relay = RunningRelay::start(config_of_relay());
    eventually(SOON, "the stream is full", async || outbox.stored().await == 10).await.unwrap();
    write(&outbox, 10).await;
    js.update_stream(room).await.unwrap();
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

/// The new stream goes on counting where the old one ended, so its end does not tell that it is another one.
#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_recreated_with_the_old_numbers() {
    let outbox = shared().await;
    let relay = outbox.relay();
    several_windows(&outbox).await;
    relay.stop().await.unwrap();
    let js = outbox.js().await;
    let end = outbox.stored().await;
    let again = Config { first_sequence: Some(end + 1), ..config(&outbox).await };
    js.delete_stream(&outbox.naming.stream).await.unwrap();
    js.create_stream(again).await.unwrap();
    let relay = outbox.relay();
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

/// The server still remembers the ids of messages that are gone, and takes what is published again for a repeat.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_remembers_what_it_has_lost() {
    let outbox = shared().await;
    let relay = outbox.relay();
    write(&outbox, 30).await;
    complete(&outbox).await;
    relay.stop().await.unwrap();
    let js = outbox.js().await;
    let stream = js.get_stream(&outbox.naming.stream).await.unwrap();
    let end = stream.cached_info().state.last_sequence;
    for sequence in end / 2..=end {
        stream.delete_message(sequence).await.unwrap();
    }
    // A stream does not forget its end with its messages; a log that knows a later end looks like a stream that did.
    sqlx::query("update aftercommit.relay_log set base_sequence = base_sequence + 1000 where base_sequence > 0")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let relay = outbox.relay();
    complete(&outbox).await;
    relay.stop().await.unwrap();
}

/// An event that was parked, released and published is lost with the stream's end: it is published again, and so are
/// the later events of its key, behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_event_is_lost_and_comes_back() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let limit = |bytes| {
        let outbox = &outbox;
        async move {
            let config = Config { max_message_size: bytes, ..config(outbox).await };
            outbox.js().await.update_stream(config).await.unwrap();
        }
    };
    outbox.publish("first", "{}", Some("a")).await;
    complete(&outbox).await;
    limit(2_000).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    outbox.publish("large", &large, Some("a")).await;
    outbox.publish("behind", "{}", Some("a")).await;
    eventually(SOON, "both are parked", async || {
        operator::relay::parked(&outbox.postgres, 10).await.unwrap().len() == 2
    })
    .await
    .unwrap();
    limit(-1).await;
    let parked = operator::relay::parked(&outbox.postgres, 10).await.unwrap();
    assert_eq!(operator::relay::release(&outbox.postgres, "test", parked[0].event_id).await.unwrap(), 2);
    complete(&outbox).await;
    outbox.publish("later", "{}", Some("a")).await;
    complete(&outbox).await;
    outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    outbox.publish("last", "{}", Some("a")).await;
    let messages = outbox.assert_complete().await;
    let types: Vec<_> = messages.iter().map(|message| message.headers["ce-type"].as_str()).collect();
    assert_eq!(types, ["first", "large", "behind", "later", "last"]);
    tokio::time::timeout(Duration::from_secs(10), relay.stop()).await.unwrap().unwrap();
}
