//! G5: a successor is at work soon, however much the subscriber has done above the first message without ack, and however
//! many types it has.

use std::time::Instant;

use crate::support::{RunningWorker, SOON, Work, get};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::worker::Subscriber;
use futures_util::StreamExt;
use uuid::Uuid;

const TYPES: usize = 400;
const MESSAGES: usize = 100_000;

/// The messages that the server got from all its clients.
async fn received(nats: &Nats) -> u64 {
    let address = nats.monitor_url().replace("http://", "");
    let (_, body) = get(&address, "/varz").await.unwrap();
    let (_, rest) = body.split_once("\"in_msgs\":").unwrap();
    rest.trim_start().split_once(',').unwrap().0.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_reads_what_its_predecessor_did_once_and_is_at_work_within_seconds() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let work = Work::on(database, nats.url()).await;
    work.create_apply("").await;
    let types: Vec<String> = (0..TYPES).map(|n| format!("wide.t{n}")).collect();
    let worker = work.worker_with(Subscriber::sql("wide", "apply", types.clone()).unwrap());
    worker.provision().await.unwrap();
    let put = async |n: usize| {
        let mut event = work.envelope(Some(&format!("key-{n}")), 1);
        event.event_type.clone_from(&types[n % TYPES]);
        (event.id.as_uuid(), i64::try_from(work.put(&event).await).unwrap())
    };
    let sent: Vec<(Uuid, i64)> =
        futures_util::stream::iter(0..MESSAGES).map(&put).buffer_unordered(500).collect().await;

    // All of them are done but for the first, as after a failed attempt.
    let (ids, sequences): (Vec<Uuid>, Vec<i64>) = sent.into_iter().filter(|(_, sequence)| *sequence > 1).unzip();
    sqlx::query(
        "insert into aftercommit.inbox (subscriber, event_id, stream_seq)
         select 'wide', * from unnest($1::uuid[], $2::bigint[])",
    )
    .bind(ids)
    .bind(sequences)
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let consumer = work.consumer("wide").await;
    let mut delivered = 0;
    while delivered < MESSAGES {
        let mut batch = consumer.fetch().max_messages(10_000).messages().await.unwrap();
        while let Some(message) = batch.next().await {
            let message = message.unwrap();
            delivered += 1;
            if message.info().unwrap().stream_sequence > 1 {
                message.ack().await.unwrap();
            }
        }
    }
    eventually(SOON, "acks", async || work.consumer("wide").await.cached_info().num_ack_pending == 1).await.unwrap();

    let (before, began) = (received(&nats).await, Instant::now());
    let worker = RunningWorker::start(worker);
    put(MESSAGES).await;
    // The one that was left, and the new one, which comes behind all of them.
    work.wait_for(2).await;
    let (asked, took) = (received(&nats).await - before, began.elapsed());
    println!("{MESSAGES} messages of {TYPES} types: at work after {took:?}, with {asked} messages to the server");
    assert!(asked < 2_000, "{asked} messages to the server");
    worker.stop().await;
}
