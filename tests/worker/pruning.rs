//! The inbox forgets what is old, and nothing that can come again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};

use crate::support::{Act, Number, Record, SOON, Work};
use aftercommit::ErrorKind;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};

/// Rejects number 3 and succeeds with all others.
fn subscriber() -> Subscriber {
    let act = |delivery: &Delivery<Number>| match delivery.event.n {
        3 => Act::Fail(HandlerError::reject("not this one")),
        _ => Act::Succeed,
    };
    Subscriber::new("pruned").on::<Number>(Record::new(act))
}

async fn execute(work: &Work, sql: &'static str) {
    sqlx::raw_sql(sql).execute(&work.outbox.pool).await.unwrap();
}

/// The stream sequences of the subscriber's rows.
async fn rows(work: &Work, subscriber: &str) -> Vec<i64> {
    let query = "select stream_seq from aftercommit.inbox where subscriber = $1 order by stream_seq";
    sqlx::query_scalar(query).bind(subscriber).fetch_all(&work.outbox.pool).await.unwrap()
}

/// Writes a row that may be removed, and waits until it is: then all others had their chance too. Twice, because the
/// first time the pruner may have looked at the stream before.
async fn wait_for_pruning(work: &Work) {
    for _ in 0..2 {
        execute(
            work,
            "insert into aftercommit.inbox (subscriber, event_id, stream_seq, handled_at)
             values ('pruned', gen_random_uuid(), 0, '2020-01-01')",
        )
        .await;
        let gone = eventually(SOON, "a row is pruned", async || !rows(work, "pruned").await.contains(&0));
        gone.await.unwrap();
    }
}

async fn delete_messages_below(work: &Work, sequence: u64) {
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.purge().sequence(sequence).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_stream_holds_is_remembered_whatever_the_retention() {
    let work = Work::shared().await;
    work.without_max_age().await;
    work.send_many(&["a"], 10).await;
    let worker = work.run(subscriber().inbox_retention(Duration::from_secs(1))).await;
    work.wait_for(9).await;
    work.wait_until_acked("pruned").await;
    execute(&work, "insert into aftercommit.inbox select 'other', event_id, stream_seq from aftercommit.inbox").await;
    // Older than the retention, and for the clocks older than the messages: these are still there.
    execute(&work, "update aftercommit.inbox set handled_at = now() - interval '1 day'").await;
    wait_for_pruning(&work).await;
    assert_eq!(rows(&work, "pruned").await, Vec::from_iter(1..=10));

    delete_messages_below(&work, 7).await;
    // For the sequence before all messages, but handled later than the oldest of them: of a stream that was made anew.
    execute(
        &work,
        "insert into aftercommit.inbox (subscriber, event_id, stream_seq) values ('pruned', gen_random_uuid(), 2);
         select pg_sleep(1.1)",
    )
    .await;
    wait_for_pruning(&work).await;
    assert_eq!(rows(&work, "pruned").await, [2, 3, 7, 8, 9, 10], "3 is a dead letter");
    assert_eq!(rows(&work, "other").await, Vec::from_iter(1..=10));
    execute(&work, "delete from aftercommit.dead_letter").await;
    wait_for_pruning(&work).await;
    assert_eq!(rows(&work, "pruned").await, [2, 7, 8, 9, 10]);

    // Everything that can come again comes again.
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.delete_consumer("pruned").await.unwrap();
    worker.stop().await;
    work.send("a", 11).await;
    let worker = work.run(subscriber().inbox_retention(Duration::from_secs(1))).await;
    work.wait_for(10).await;
    work.wait_until_acked("pruned").await;
    worker.stop().await;
    assert_eq!(work.numbers("a").await, [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_stay_for_thirty_days() {
    let work = Work::shared().await;
    execute(
        &work,
        "insert into aftercommit.inbox (subscriber, event_id, stream_seq, handled_at)
         select 'pruned', gen_random_uuid(), n, now() - make_interval(days => n) from generate_series(28, 32) as n;
         insert into aftercommit.inbox (subscriber, event_id, stream_seq, handled_at)
         select 'pruned', gen_random_uuid(), 33, now() - interval '33 days' from generate_series(1, 2500)",
    )
    .await;
    let worker = work.run(subscriber()).await;
    eventually(SOON, "old rows are gone", async || rows(&work, "pruned").await == [28, 29]).await.unwrap();
    worker.stop().await;
}

/// The rule of docs/worker.md, as far as whoever provisions can tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_retention_that_is_too_short_is_refused() {
    let work = Work::shared().await;
    let days = |days: u64| subscriber().inbox_retention(Duration::from_hours(24 * days));
    let error = work.worker_with(days(14)).provision().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    let stream = &work.outbox.naming.stream;
    let told =
        format!("subscriber pruned: inbox_retention is 14 days, and the stream {stream} keeps events for 14 days: ");
    assert!(error.to_string().starts_with(&told), "{error}");
    assert_eq!(work.context.get_stream(stream).await.unwrap().get_info().await.unwrap().state.consumer_count, 0);
    work.worker_with(days(15)).provision().await.unwrap();
    work.without_max_age().await;
    work.worker_with(days(1)).provision().await.unwrap();
}

/// Old rows lie between new ones, as they do once new ones have filled the space of those that were forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_old_is_not_read_again_and_again() {
    let work = Work::shared().await;
    execute(
        &work,
        "insert into aftercommit.inbox (subscriber, event_id, stream_seq, handled_at)
         select 'pruned', gen_random_uuid(), case when n % 50 = 0 then n / 50 else 10000 + n end,
                now() - case when n % 50 = 0 then interval '40 days' else interval '1 day' end
           from generate_series(1, 200000) as n;
         analyze aftercommit.inbox",
    )
    .await;
    let read = async || -> i64 {
        sqlx::query_scalar(
            "select (coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables where relname = 'inbox'",
        )
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap()
    };
    // What the set-up came to is on record once its sessions have told it.
    let mut before = -1;
    eventually(SOON, "the counts stand still", async || {
        let now = read().await;
        std::mem::replace(&mut before, now) == now
    })
    .await
    .unwrap();
    let worker = work.run(subscriber()).await;
    // The last of them, which is found without reading others.
    let last = "select exists (select from aftercommit.inbox where subscriber = 'pruned' and stream_seq = 4000)";
    let left = async || sqlx::query_scalar::<_, bool>(last).fetch_one(&work.outbox.pool).await.unwrap();
    eventually(SOON, "old rows are gone", async || !left().await).await.unwrap();
    worker.stop().await;
    let looks = async || read().await - before;
    eventually(SOON, "what was read is on record", async || looks().await >= 4000).await.unwrap();
    let looks = looks().await;
    assert!(looks < 100_000, "{looks} rows were read to remove 4000 of 200000");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_knows_the_place_in_the_outbox() {
    let work = Work::shared().await;
    for sequence in [0, 41, 42] {
        let mut event = work.envelope(Some("a"), if sequence == 42 { 3 } else { sequence });
        event.sequence = sequence;
        work.put(&event).await;
    }
    let worker = work.run(subscriber()).await;
    work.wait_until_acked("pruned").await;
    worker.stop().await;
    let places: Vec<(Option<i64>, String)> =
        sqlx::query_as("select sequence, outcome from aftercommit.inbox order by stream_seq")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    assert_eq!(places, [(None, "handled".into()), (Some(41), "handled".into()), (Some(42), "dead".into())]);
}

/// More events of a key wait than the worker keeps in memory, and the stream drops them meanwhile. What was let go
/// comes from the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_stream_drops_while_it_waits_comes_from_the_outbox() {
    const EVENTS: i64 = 1200;
    let work = Work::shared().await;
    let relay = work.outbox.relay();
    let subject = format!("aftercommit.outbox.{}", work.outbox.naming.stream);
    let mut questions = work.context.client().subscribe(subject).await.unwrap();
    let closed = Arc::new(AtomicBool::new(true));
    let open = Arc::clone(&closed);
    let handler = Record::new(move |_| match closed.load(Ordering::SeqCst) {
        true => Act::Fail(HandlerError::Unavailable { error: "closed".into(), after: Some(Duration::from_secs(2)) }),
        false => Act::Succeed,
    });
    // So it keeps 500 of them.
    let worker = work.run(Subscriber::new("patient").on::<Number>(handler).max_batch(10)).await;
    let publish = "select aftercommit.publish('test.number', jsonb_build_object('key', 'k', 'n', n), 'k')
                     from generate_series(1, $1) as n order by n";
    sqlx::query(publish).bind(EVENTS).execute(&work.outbox.pool).await.unwrap();
    eventually(SOON, "all of them were delivered and wait", async || {
        let consumer = work.consumer("patient").await;
        let info = consumer.cached_info();
        info.num_pending == 0 && i64::try_from(info.num_ack_pending).unwrap() == EVENTS
    })
    .await
    .unwrap();
    // By their age, so to say: the newest one is still there.
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.purge().sequence(EVENTS.cast_unsigned()).await.unwrap();
    open.store(false, Ordering::SeqCst);
    work.wait_for(EVENTS).await;
    work.assert_in_order(&["k"], EVENTS).await;
    assert!(questions.next().now_or_never().is_some(), "the relay was asked");
    worker.stop().await;
    relay.stop().await.unwrap();
}
