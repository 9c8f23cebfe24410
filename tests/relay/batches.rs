//! G1, G3 with atomic batches: a server that writes each message to disk before it answers gets them.

use crate::support::{Outbox, RunningRelay, SOON, Writers};
use aftercommit::operator;
use aftercommit::relay::{PublishMethod, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};

async fn durable() -> (Nats, Outbox) {
    let nats =
        Nats::start(NatsOptions { jetstream: "sync_interval: always".into(), ..NatsOptions::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    (nats, outbox)
}

async fn write(outbox: &Outbox, events: i32) {
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, key, payload)
         select aftercommit.new_event_id(), 'many', 'k', convert_to('{\"version\": ' || n || '}', 'UTF8')
           from generate_series(1, $1) n",
    )
    .bind(events)
    .execute(&outbox.pool)
    .await
    .unwrap();
}

/// The relay and the server are killed while batches are on their way.
#[tokio::test(flavor = "multi_thread")]
async fn batches_keep_order_through_kills() {
    let (mut nats, outbox) = durable().await;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let start = || RunningRelay::start(RelayConfig { publish: PublishMethod::Batched, ..outbox.relay_config() });
    let mut relay = start();
    for round in 0..4 {
        writers.more(150).await;
        if round % 2 == 0 {
            drop(relay);
            relay = start();
        } else {
            nats.kill().await.unwrap();
            writers.more(50).await;
            nats.restart().await.unwrap();
        }
        outbox.goes_on().await;
    }
    writers.stop().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// One event in the middle of a batch that the stream cannot take: it alone is parked.
#[tokio::test(flavor = "multi_thread")]
async fn one_bad_event_does_not_spoil_its_batch() {
    let (_nats, outbox) = durable().await;
    let relay = RunningRelay::start(RelayConfig { publish: PublishMethod::Batched, ..outbox.relay_config() });
    write(&outbox, 1).await;
    outbox.assert_complete().await;
    let js = outbox.js().await;
    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    config.max_message_size = 3_000;
    js.update_stream(config).await.unwrap();
    let mut tx = outbox.pool.begin().await.unwrap();
    for n in 0..100 {
        let text = if n == 50 { "x".repeat(5_000) } else { "x".into() };
        sqlx::query("select aftercommit.publish('some', jsonb_build_object('text', $1::text), 'key-' || $2)")
            .bind(text)
            .bind(n.to_string())
            .execute(&mut *tx)
            .await
            .unwrap();
    }
    tx.commit().await.unwrap();
    eventually(SOON, "the good ones are stored", async || outbox.stored().await == 100).await.unwrap();
    let parked = operator::relay::parked(&outbox.postgres, 10).await.unwrap();
    assert_eq!(parked.iter().map(|event| event.key.as_deref()).collect::<Vec<_>>(), [Some("key-50")]);
    relay.stop().await.unwrap();
}

/// An event that the server takes for a repeat fails its batch; one by one it is found, and the rest goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_inside_a_batch_is_looked_into() {
    let (_nats, outbox) = durable().await;
    write(&outbox, 30).await;
    let ids = outbox.committed().await;
    // Its id is known to the server from a message that was removed since.
    let js = outbox.js().await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", ids[10].as_str());
    let subject = format!("{}.many", outbox.naming.prefix);
    let ack = js.publish_with_headers(subject, headers, "gone".into()).await.unwrap().await.unwrap();
    js.get_stream(&outbox.naming.stream).await.unwrap().delete_message(ack.sequence).await.unwrap();
    let relay = RunningRelay::start(RelayConfig { publish: PublishMethod::Batched, ..outbox.relay_config() });
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// Left to itself the relay finds out that the server waits for its disk, and changes to batches.
#[tokio::test(flavor = "multi_thread")]
async fn the_method_follows_what_is_measured() {
    let (nats, outbox) = durable().await;
    write(&outbox, 6_000).await;
    let relay = outbox.relay();
    outbox.assert_complete().await;
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, payload)
         select aftercommit.new_event_id(), 'more', '{}' from generate_series(1, 2000)",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let messages = outbox.assert_complete().await;
    let batched: Vec<bool> = messages.iter().map(|message| message.headers.contains_key("Nats-Batch-Id")).collect();
    let singles = batched.iter().take_while(|batched| !**batched).count();
    println!("nats-server {}: {singles} of {} messages came before the first batch", nats.version(), messages.len());
    assert!(singles >= 256, "at first it does not know");
    assert!(batched[singles..].iter().all(|batched| *batched), "once it knows it stays with batches");
    relay.stop().await.unwrap();
}
