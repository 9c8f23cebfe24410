//! G4 on a wire that repeats itself: each way in which an event could come into a stream twice, made to happen. See
//! docs/guarantees.md.

use crate::support::{Number, Outbox, Record, RelayProcess, RunningWorker, SOON, Work};
use aftercommit::config::Naming;
use aftercommit::operator;
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::Subscriber;

/// Numbers of one key, committed to the outbox.
async fn publish(work: &Work, numbers: std::ops::RangeInclusive<i64>) {
    for n in numbers {
        work.outbox.publish("test.number", &format!(r#"{{"key": "a", "n": {n}}}"#), Some("a")).await;
    }
}

fn subscriber() -> Subscriber {
    Subscriber::new("once").on::<Number>(Record::good())
}

/// A relay publishes everything and dies before it writes down that it has: the window stays open.
async fn relay_dies_behind_its_window(outbox: &Outbox) {
    outbox.dies_at("relay-window-done:1").await;
}

async fn is_stored(outbox: &Outbox, messages: u64) {
    eventually(SOON, &format!("{messages} messages are in the stream"), async || outbox.stored().await >= messages)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_died_behind_its_window_publishes_nothing_again() {
    let work = Work::shared().await;
    publish(&work, 1..=5).await;
    relay_dies_behind_its_window(&work.outbox).await;
    let relay = work.outbox.relay();
    publish(&work, 6..=6).await;
    assert_eq!(work.outbox.assert_complete().await.len(), 6);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_from_an_open_window_is_published_again() {
    let work = Work::shared().await;
    publish(&work, 1..=5).await;
    relay_dies_behind_its_window(&work.outbox).await;
    let worker = work.run(subscriber()).await;
    work.wait_for(5).await;
    work.wait_until_acked("once").await;
    work.context.get_stream(&work.outbox.naming.stream).await.unwrap().purge().await.unwrap();

    let relay = work.outbox.relay();
    is_stored(&work.outbox, 5).await;
    publish(&work, 6..=6).await;
    is_stored(&work.outbox, 6).await;
    let messages = work.outbox.messages().await;
    for (message, sequence) in messages[..5].iter().zip(1..) {
        // The server remembers the old id, so it would swallow the event under that one.
        assert_eq!(message.headers["Nats-Msg-Id"], format!("{}:r{sequence}", message.headers["ce-id"]));
    }
    work.wait_for(6).await;
    work.wait_until_acked("once").await;
    work.assert_in_order(&["a"], 6).await;
    worker.stop().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn under_another_source_the_server_recognises_the_events() {
    let work = Work::shared().await;
    publish(&work, 1..=5).await;
    relay_dies_behind_its_window(&work.outbox).await;
    let mut relay = work.outbox.relay_command();
    let _relay = RelayProcess(relay.env("AFTERCOMMIT_SOURCE", "/another").spawn().unwrap());
    publish(&work, 6..=6).await;
    assert_eq!(work.outbox.assert_complete().await.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_another_stream_the_inbox_recognises_the_events() {
    let mut work = Work::shared().await;
    publish(&work, 1..=5).await;
    relay_dies_behind_its_window(&work.outbox).await;
    let worker = work.run(subscriber()).await;
    work.wait_for(5).await;
    worker.stop().await;

    let name = unique_name("another");
    let prefix = SubjectPrefix::new(name.clone()).unwrap();
    work.outbox.naming = Naming { stream: name.to_uppercase(), prefix, source: "/test".into() };
    operator::provision(&work.outbox.nats, &work.outbox.naming).await.unwrap();
    let relay = work.outbox.relay();
    publish(&work, 6..=6).await;
    assert_eq!(work.outbox.assert_complete().await.len(), 6, "the open window went out again, whole");
    let worker: RunningWorker = work.run(subscriber()).await;
    work.wait_until_acked("once").await;
    work.assert_in_order(&["a"], 6).await;
    worker.stop().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_released_event_goes_out_once_when_its_relay_dies() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let limit = async |bytes| {
        let mut config = work.context.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
        config.max_message_size = bytes;
        work.context.update_stream(config).await.unwrap();
    };
    let relay = outbox.relay();
    outbox.publish("first", "{}", None).await;
    is_stored(outbox, 1).await;
    limit(2_000).await;
    outbox.publish("large", &format!("\"{}\"", "x".repeat(5_000)), None).await;
    let parked = async || operator::relay::parked(&outbox.postgres, 1).await.unwrap();
    eventually(SOON, "it is parked", async || parked().await.len() == 1).await.unwrap();
    limit(-1).await;
    operator::relay::release(&outbox.postgres, "test", parked().await[0].event_id).await.unwrap();
    eventually(SOON, "it is published", async || parked().await.is_empty()).await.unwrap();
    assert_eq!(outbox.stored().await, 2);
    relay.stop().await.unwrap();

    // What a crash between the publish and its record leaves.
    sqlx::query("update aftercommit.parked set state = 'released', sequence = null")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let relay = outbox.relay();
    eventually(SOON, "it is settled", async || parked().await.is_empty()).await.unwrap();
    assert_eq!(outbox.stored().await, 2);
    let sequence: i64 =
        sqlx::query_scalar("select sequence from aftercommit.parked").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!(sequence, 2);
    relay.stop().await.unwrap();
}
