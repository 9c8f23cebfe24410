//! Whatever becomes of the stream, and whatever a run was wrong about: a repair at one subscriber runs no event before an
//! earlier one of its key that is not handled and can be had.

use aftercommit::reconciler::{Mode, Scope};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions};
use futures_util::TryStreamExt;

use crate::inbox::{Apart, KEYS, findings, ran, reconcile_command, subscriber};
use crate::support::{Copy, SOON, get};

/// The subscriber's consumer delivers the next messages, and they are handled and acked.
async fn handle_by_hand(apart: &Apart, messages: usize) {
    let work = &apart.work;
    let mut batch = work.consumer("back").await.fetch().max_messages(messages).messages().await.unwrap();
    while let Some(message) = batch.try_next().await.unwrap() {
        let header = |name: &str| message.headers.as_ref().unwrap().get(name).unwrap().as_str().to_string();
        let place = i64::try_from(message.info().unwrap().stream_sequence).unwrap();
        let n = serde_json::from_slice::<serde_json::Value>(&message.payload).unwrap()["n"].as_i64();
        let done = "with handled as (insert into aftercommit.inbox (subscriber, event_id, stream_seq, sequence)
                                    values ('back', $1::uuid, $2, $3) returning event_id)
                    insert into effect (event_id, key, n, attempt) select event_id, $4, $5, 1 from handled";
        sqlx::query(done)
            .bind(header("ce-id"))
            .bind(place)
            .bind(header("ce-sequence").parse::<i64>().unwrap())
            .bind(header("ce-partitionkey"))
            .bind(n)
            .execute(&work.outbox.pool)
            .await
            .unwrap();
        message.double_ack().await.unwrap();
    }
}

/// A run asks the relay how far the stream goes, and the stream loses its end before it is read. Then the relay fills it
/// again. What had been lost at that moment is no more missed by the subscriber than the earlier events of its keys, which
/// wait in the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_end_lost_during_a_comparison_keeps_the_order() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let apart = Apart::on(nats.url()).await;
    apart.publisher.forget_message_ids().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    apart.publish(11..=15).await;
    nats.stop().await.unwrap();
    let streams = nats.store_directory().join("jetstream/$G/streams");
    let messages = streams.join(&apart.publisher.naming.stream).join("msgs");
    let copy = Copy::of(&messages);
    nats.restart().await.unwrap();
    apart.publish(16..=20).await;
    handle_by_hand(&apart, 4).await;

    let file = |of: &str| std::env::temp_dir().join(format!("{of}-{}", apart.publisher.naming.stream));
    let (asked, read) = (file("asked"), file("read"));
    let hold = format!("reconciler-inbox-edge:{},reconciler-inbox-waiting:{}", asked.display(), read.display());
    let mut running = reconcile_command(work, "").env("AFTERCOMMIT_HOLD", hold).spawn().unwrap();
    eventually(SOON, "the run has asked the relay", async || asked.exists()).await.unwrap();
    relay.stop().await.unwrap();
    nats.stop().await.unwrap();
    copy.replace(&messages);
    nats.restart().await.unwrap();
    let monitor = nats.monitor_url().replace("http://", "");
    let reconnected =
        async || get(&monitor, "/connz").await.is_some_and(|page| page.1.contains("aftercommit-reconciler"));
    eventually(SOON, "the run is connected again", reconnected).await.unwrap();
    std::fs::remove_file(&asked).unwrap();
    eventually(SOON, "the run has read the stream", async || read.exists()).await.unwrap();
    let relay = apart.publisher.relay();
    eventually(SOON, "the stream is filled again", async || apart.publisher.stored().await == 80).await.unwrap();
    std::fs::remove_file(&read).unwrap();
    let code = tokio::task::spawn_blocking(move || running.wait().unwrap().code()).await.unwrap();
    assert_eq!(code, Some(1), "the run has failed: the stream is another one now");
    assert_eq!(findings(work).await, [], "nothing is lost");

    let worker = work.run(subscriber()).await;
    eventually(SOON, "everything is handled", async || {
        ran(work, Scope::New, Mode::Repair).await;
        work.count().await == 80
    })
    .await
    .unwrap();
    worker.stop().await;
    work.assert_in_order(&KEYS, 20).await;
    relay.stop().await.unwrap();
}

/// What an earlier run has found counts no more than what is found now: before it runs, everything of its key does that comes
/// before it and can be had, from wherever.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_runs_nothing_before_an_earlier_event_of_its_key() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    apart.publish(11..=20).await;
    // As a run writes it down that was wrong about one event.
    sqlx::query(
        "insert into aftercommit.finding (name, kind, item, event_id, outbox_id, key, first_run, last_run)
                 values ('inbox:back', 'not_handled', $1::text, $1, $2, 'b', 0, 0)",
    )
    .bind(event_id(&apart, "b", 17).await.0)
    .bind(event_id(&apart, "b", 17).await.1)
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let repaired = ran(work, Scope::New, Mode::Repair).await;
    assert_eq!(repaired.repaired, 7, "{repaired}");
    apart.run_worker_until(80).await;
    work.assert_in_order(&KEYS, 20).await;
    assert_eq!(ran(work, Scope::Full, Mode::Repair).await.found, 0);
    relay.stop().await.unwrap();
}

/// The id of an event and its place in the outbox.
async fn event_id(apart: &Apart, key: &str, n: i64) -> (uuid::Uuid, i64) {
    sqlx::query_as(
        "select event_id, id from aftercommit.outbox
          where key = $1 and (convert_from(payload, 'UTF8')::jsonb ->> 'n')::bigint = $2",
    )
    .bind(key)
    .bind(n)
    .fetch_one(&apart.publisher.pool)
    .await
    .unwrap()
}
