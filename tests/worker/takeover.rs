//! G5: a successor is at work soon, however much the subscriber has done above the first message without ack, and however
//! many types it has.

use std::time::{Duration, Instant};

use crate::support::{RunningWorker, SOON, Work, get};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::worker::{Start, Subscriber};
use futures_util::StreamExt;
use uuid::Uuid;

const TYPES: usize = 400;
const MESSAGES: usize = 100_000;
const OTHERS: usize = 100;

/// The messages that the server got from all its clients.
async fn received(nats: &Nats) -> u64 {
    let address = nats.monitor_url().replace("http://", "");
    let (_, body) = get(&address, "/varz").await.unwrap();
    let (_, rest) = body.split_once("\"in_msgs\":").unwrap();
    rest.trim_start().split_once(',').unwrap().0.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_reads_what_was_done_once_and_works_in_seconds() {
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

    // Beside a hundred others, each of which takes four of the types from now on.
    let worker = (0..OTHERS).fold(worker, |worker, n| {
        let types: Vec<String> = types.iter().skip(n * 4).take(4).cloned().collect();
        worker.subscriber(Subscriber::sql(format!("narrow-{n}"), "apply", types).unwrap().start(Start::New))
    });
    worker.provision().await.unwrap();
    let (before, began) = (received(&nats).await, Instant::now());
    let worker = RunningWorker::start(worker);
    for n in 0..OTHERS {
        put(MESSAGES + n * 4).await;
    }
    // The one that was left, and the new ones, which come behind all of them: at one subscriber and at the other.
    let all = i64::try_from(1 + 2 * OTHERS).unwrap();
    eventually(Duration::from_secs(180), "all of them", async || work.count().await == all).await.unwrap();
    let (asked, took) = (received(&nats).await - before, began.elapsed());
    println!("{MESSAGES} messages of {TYPES} types: at work after {took:?}, with {asked} messages to the server");
    assert!(asked < 2_000 + 50 * OTHERS as u64, "{asked} messages to the server");
    worker.stop().await;
    work.assert_nothing_failed().await;
}
