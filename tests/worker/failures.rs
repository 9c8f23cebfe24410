//! G6: a poison event blocks nothing but its own key. Retries, dead letters, snoozing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Act, Number, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};
use futures_util::StreamExt;

const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

/// Does `act` for the first event of key `bad`, and succeeds with all others.
fn poison(act: impl Fn(&Delivery<Number>) -> Act + Send + Sync + 'static) -> Subscriber {
    let handler = Record::new(move |delivery| match (delivery.key.as_deref(), delivery.event.n) {
        (Some("bad"), 1) => act(delivery),
        _ => Act::Succeed,
    });
    Subscriber::new("poison").on::<Number>(handler).backoff(QUICK)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_last_attempt_an_event_is_dead_and_its_key_goes_on() {
    let work = Work::shared().await;
    work.send_many(&["bad", "a"], 5).await;
    let client = async_nats::connect(&work.outbox.nats.url).await.unwrap();
    let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{}.poison", work.outbox.naming.stream);
    let mut advisories = client.subscribe(subject).await.unwrap();
    client.flush().await.unwrap();
    let failing = |_: &Delivery<Number>| Act::Fail(HandlerError::retry("the printer is on fire"));
    let worker = work.run(poison(failing).max_attempts(3)).await;
    work.wait_for(9).await;
    assert_eq!(work.dead_letters().await, [(1, 3, "the printer is on fire".to_string())]);
    assert_eq!(work.numbers("bad").await, [2, 3, 4, 5]);
    work.assert_in_order(&["a"], 5).await;
    assert!(work.attempts().await.is_empty());
    work.wait_until_acked("poison").await;
    let advisory = tokio::time::timeout(SOON, advisories.next()).await.unwrap().unwrap();
    let advisory: serde_json::Value = serde_json::from_slice(&advisory.payload).unwrap();
    assert_eq!(
        (advisory["reason"].as_str(), advisory["stream_seq"].as_u64()),
        (Some("the printer is on fire"), Some(1))
    );
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_holds_all_of_the_event() {
    let work = Work::shared().await;
    let mut event = work.envelope(Some("bad"), 1);
    event.sequence = 42;
    event.headers.insert("X-Tenant".into(), "t1".into());
    work.put(&event).await;
    let worker = work.run(poison(|_| Act::Fail(HandlerError::reject("no such printer")))).await;
    eventually(SOON, "the dead letter", async || !work.dead_letters().await.is_empty()).await.unwrap();
    let same: bool = sqlx::query_scalar(
        "select event_id = $1 and type = 'test.number' and version = 1 and key = 'bad' and source = '/test'
            and time = $2 and sequence = 42 and headers = '{\"X-Tenant\": \"t1\"}' and payload = $3
            and content_type = 'application/json' and stream = $4 and stream_seq = 1 and attempts = 1
            and reason = 'no such printer'
           from aftercommit.dead_letter",
    )
    .bind(event.id.as_uuid())
    .bind(event.time)
    .bind(event.payload.as_ref())
    .bind(&work.outbox.naming.stream)
    .fetch_one(&work.outbox.pool)
    .await
    .unwrap();
    assert!(same);
    let outcome: String =
        sqlx::query_scalar("select outcome from aftercommit.inbox").fetch_one(&work.outbox.pool).await.unwrap();
    assert_eq!(outcome, "dead");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_a_dead_letter_at_once() {
    let work = Work::shared().await;
    let mut garbage = work.envelope(Some("a"), 1);
    garbage.payload = r#"{"key":"a","n":{"pin":"secret"}}"#.into();
    let mut newer = work.envelope(Some("a"), 2);
    newer.version = 2;
    for event in [garbage, newer, work.envelope(Some("a"), 3)] {
        work.put(&event).await;
    }
    let subject = work.outbox.naming.prefix.subject("test.number");
    work.context.publish(subject, "not an event".into()).await.unwrap().await.unwrap();
    work.send("a", 4).await;
    let worker = work.run(Subscriber::new("strict").on::<Number>(Record::good())).await;
    work.wait_for(2).await;
    work.wait_until_acked("strict").await;
    assert_eq!(work.numbers("a").await, [3, 4]);
    let reasons: Vec<String> = work.dead_letters().await.into_iter().map(|(.., reason)| reason).collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("cannot be read as test.number") && !reasons[0].contains("secret"), "{reasons:?}");
    assert!(reasons[1].contains("version 2"), "{reasons:?}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_and_a_hidden_error_count_as_failures() {
    let work = Work::shared().await;
    let acts: [fn(&Delivery<Number>) -> Act; 3] = [|_| Act::Panic, |_| Act::Swallow, |_| Act::RollBack];
    for (n, act) in acts.into_iter().enumerate() {
        let name = format!("poison{n}");
        work.send("bad", 1).await;
        let handler = Record::new(
            move |delivery| if delivery.key.as_deref() == Some("bad") { act(delivery) } else { Act::Succeed },
        );
        let worker = work.run(Subscriber::new(name).on::<Number>(handler).backoff(QUICK).max_attempts(2)).await;
        eventually(SOON, "the dead letters", async || work.dead_letters().await.len() >= [1, 3, 6][n]).await.unwrap();
        worker.stop().await;
        if n < 2 {
            assert_eq!(work.count().await, 0);
        }
    }
    let reasons: Vec<String> = work.dead_letters().await.into_iter().map(|(.., reason)| reason).collect();
    assert_eq!(reasons[0], "the handler panicked: as told");
    assert!(reasons[1].contains("current transaction is aborted"), "{reasons:?}");
    // What a handler does behind its own `rollback` is out of anybody's hands, but the event does not pass for handled.
    assert_eq!(reasons[3..], ["the handler rolled the worker's transaction back"; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn snoozing_costs_no_attempt_and_holds_the_key() {
    let work = Work::shared().await;
    work.send_many(&["bad"], 3).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let snoozing = move |_: &Delivery<Number>| match counter.fetch_add(1, Ordering::SeqCst) {
        ..5 => Act::Fail(HandlerError::snooze(Duration::from_millis(10))),
        _ => Act::Succeed,
    };
    let worker = work.run(poison(snoozing).max_attempts(1)).await;
    work.wait_for(3).await;
    work.assert_in_order(&["bad"], 3).await;
    assert!(work.effects().await.iter().all(|(_, _, attempt)| *attempt == 1));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_hangs_runs_into_its_time_limit() {
    let work = Work::shared().await;
    work.send_many(&["bad", "a"], 3).await;
    let hanging = |_: &Delivery<Number>| Act::Sleep(Duration::from_secs(3600));
    let worker = work.run(poison(hanging).time_limit(Duration::from_secs(1)).max_attempts(1)).await;
    work.wait_for(5).await;
    let dead = work.dead_letters().await;
    assert!(dead[0].2.contains("time limit of 1s"), "{dead:?}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_hangs_runs_into_the_time_limit_too() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create function apply(event jsonb) returns void language plpgsql as $$
         begin
            if event -> 'data' ->> 'n' = '1' then
                perform pg_sleep(3600);
            end if;
            insert into effect (key, n, attempt) values (event ->> 'partitionkey', (event -> 'data' ->> 'n')::bigint, 1);
         end $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    work.send_many(&["bad"], 3).await;
    let subscriber = Subscriber::sql("sql", "apply", ["test.number"]).unwrap();
    let worker = work.run(subscriber.time_limit(Duration::from_secs(1)).max_attempts(2).backoff(QUICK)).await;
    work.wait_for(2).await;
    assert_eq!(work.numbers("bad").await, [2, 3]);
    assert_eq!(work.dead_letters().await.len(), 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_slower_than_the_ack_wait_runs_once() {
    let work = Work::shared().await;
    work.send_many(&["bad", "a"], 3).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let slow = move |_: &Delivery<Number>| {
        counter.fetch_add(1, Ordering::SeqCst);
        Act::Sleep(Duration::from_millis(3500))
    };
    let worker = work.run(poison(slow).ack_wait(Duration::from_secs(1)).max_batch(1)).await;
    work.wait_for(6).await;
    work.wait_until_acked("poison").await;
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert_eq!(work.consumer("poison").await.cached_info().delivered.consumer_sequence, 6, "a message came twice");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlocks_between_lanes_cost_no_attempt() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create table account (id int primary key, n bigint not null);
         insert into account select id, 0 from generate_series(0, 1) as id;
         create function apply(event jsonb) returns void language plpgsql as $$
         declare
            first int := (event -> 'data' ->> 'n')::int % 2;
         begin
            update account set n = n + 1 where id = first;
            perform pg_sleep(0.01);
            update account set n = n + 1 where id = 1 - first;
            insert into effect (key, n, attempt) values (event ->> 'partitionkey', (event -> 'data' ->> 'n')::bigint, 1);
         end $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "alter database {} set deadlock_timeout = '20ms'",
        work.outbox.postgres.url.rsplit('/').next().unwrap()
    )))
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    work.send_many(&["a", "b", "c", "d"], 10).await;
    let subscriber = Subscriber::sql("deadlock", "apply", ["*"]).unwrap().concurrency(4).max_attempts(1).max_batch(2);
    let worker = work.run(subscriber).await;
    work.wait_for(40).await;
    work.assert_in_order(&["a", "b", "c", "d"], 10).await;
    assert!(work.dead_letters().await.is_empty());
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_key_that_fills_the_memory_stops_no_other_key() {
    let work = Work::shared().await;
    let failing = Arc::new(AtomicUsize::new(1));
    let switch = Arc::clone(&failing);
    let act = move |_: &Delivery<Number>| match switch.load(Ordering::SeqCst) {
        1 => Act::Fail(HandlerError::retry_after(Duration::from_millis(200), "wait")),
        _ => Act::Succeed,
    };
    // 500 events fit into the memory of this subscriber.
    let subscriber = poison(act).concurrency(2).max_batch(10).max_attempts(u32::MAX);
    for n in 1..=1200 {
        work.send("bad", n).await;
    }
    work.send_many(&["a", "b"], 20).await;
    let worker = work.run(subscriber).await;
    let started = Instant::now();
    work.wait_for(40).await;
    assert!(started.elapsed() < Duration::from_secs(10), "others waited {:?}", started.elapsed());
    work.assert_in_order(&["a", "b"], 20).await;
    failing.store(0, Ordering::SeqCst);
    work.wait_for(1240).await;
    work.assert_in_order(&["bad"], 1200).await;
    work.wait_until_acked("poison").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_without_end_stops_nobody_but_its_own_key() {
    let work = Work::shared().await;
    let errors: [fn(Duration) -> HandlerError; 3] = [
        HandlerError::snooze,
        |wait| HandlerError::retry_after(wait, "one day"),
        |wait| HandlerError::Unavailable { error: "one day".into(), after: Some(wait) },
    ];
    for (n, error) in (1..).zip(errors) {
        let name = format!("poison{n}");
        let handler = Record::new(move |delivery| match delivery.key.as_deref() {
            Some("bad") => Act::Fail(error(Duration::MAX)),
            _ => Act::Succeed,
        });
        let worker = work.run(Subscriber::new(name).on::<Number>(handler)).await;
        work.send("bad", n).await;
        work.send("a", n).await;
        work.wait_for(n * (n + 1) / 2).await;
        worker.stop().await;
    }
    assert!(work.dead_letters().await.is_empty());
}
