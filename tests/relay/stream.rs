//! G1, G2, G3 at the relay: the stream holds exactly what was committed, each event once, each key in commit order.

use crate::support::{Outbox, SOON, Writers};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_as_it_was_written() {
    let outbox = shared().await;
    let relay = outbox.relay();
    outbox.publish("order.placed", r#"{"n": 12345678901234567890.10}"#, Some("order 1/ä")).await;
    let messages = outbox.assert_complete().await;
    let message = &messages[0];
    assert_eq!(message.subject, format!("{}.order.placed", outbox.naming.prefix));
    assert_eq!(message.payload, br#"{"n": 12345678901234567890.10}"#);
    assert_eq!(message.headers["Nats-Msg-Id"], message.headers["ce-id"]);
    assert_eq!(message.headers["ce-type"], "order.placed");
    assert_eq!(message.headers["ce-source"], "/test");
    assert_eq!(message.headers["ce-partitionkey"], "order%201/%C3%A4");
    assert_eq!(message.headers["ce-sequence"], "1");
    assert_eq!(message.headers["ce-datacontenttype"], "application/json");
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn large_events_and_small_ones_keep_their_order() {
    let outbox = shared().await;
    for size in [10, 900_000, 20, 5_000, 990_000, 30] {
        sqlx::query("insert into aftercommit.outbox (event_id, type, payload, content_type) values (aftercommit.new_event_id(), 'blob', $1, 'application/octet-stream')")
            .bind(vec![7_u8; size])
            .execute(&outbox.pool).await.unwrap();
    }
    let relay = outbox.relay();
    let messages = outbox.assert_complete().await;
    let sizes: Vec<_> = messages.iter().map(|message| message.payload.len()).collect();
    assert_eq!(sizes, [10, 900_000, 20, 5_000, 990_000, 30]);
    relay.stop().await.unwrap();
}

/// 16 writers, savepoints, rollbacks, one transaction open all the time, one open and rolled back at the end, while the
/// relay's process is killed again and again and another takes over.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_doubled_or_reordered_while_relays_are_killed() {
    let outbox = shared().await;
    let (mut held, mut undone) = (outbox.pool.begin().await.unwrap(), outbox.pool.begin().await.unwrap());
    for tx in [&mut held, &mut undone] {
        sqlx::query("select aftercommit.publish('held.open', '{}')").execute(&mut **tx).await.unwrap();
    }
    let writers = Writers::start(&outbox.pool, 16, 20).await;
    let mut relay = outbox.relay_process();
    for _ in 0..5 {
        writers.more(300).await;
        let before = outbox.stored().await;
        eventually(SOON, "the relay publishes", async || outbox.stored().await > before).await.unwrap();
        outbox.kill(relay).await;
        relay = outbox.relay_process();
    }
    writers.more(300).await;
    writers.stop().await;
    let early = outbox.assert_complete().await;
    assert!(early.iter().all(|message| message.headers["ce-type"] != "held.open"), "not committed yet");
    held.commit().await.unwrap();
    undone.rollback().await.unwrap();
    let messages = outbox.assert_complete().await;
    assert_eq!(messages.iter().filter(|message| message.headers["ce-type"] == "held.open").count(), 1);
    assert!(messages.iter().all(|message| message.headers["ce-type"] != "noise.undone"), "a savepoint was rolled back");
    assert!(messages.iter().any(|message| message.headers["ce-type"] == "noise.kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_doubled_or_reordered_while_nats_is_killed() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 16, 20).await;
    for _ in 0..3 {
        writers.more(300).await;
        nats.kill().await.unwrap();
        writers.more(100).await;
        nats.restart().await.unwrap();
        outbox.goes_on().await;
    }
    writers.stop().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_doubled_or_reordered_while_postgres_crashes() {
    let mut postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let database = postgres.create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 16, 20).await;
    for _ in 0..3 {
        writers.more(300).await;
        postgres.kill().await.unwrap();
        postgres.restart().await.unwrap();
        outbox.goes_on().await;
    }
    writers.stop().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}
