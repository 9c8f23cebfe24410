//! G3, G6: what a subscriber may choose: whether a failed event holds back its key, batches in one call, and waiting for
//! more events of a key.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Act, Number, Random, Record, SOON, Work};
use aftercommit::Event;
use aftercommit::backoff::Backoff;
use aftercommit::envelope::Envelope;
use aftercommit::testing::eventually;
use aftercommit::worker::{BatchError, BatchHandler, Delivery, FailurePolicy, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;

const KEYS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

#[tokio::test(flavor = "multi_thread")]
async fn with_skip_a_failed_event_lets_its_key_pass() {
    let work = Work::shared().await;
    work.send_many(&["a", "b"], 5).await;
    let fail = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fail);
    let act = move |delivery: &Delivery<Number>| match (delivery.key.as_deref(), delivery.event.n) {
        (Some("a"), 1) if failing.load(Ordering::SeqCst) => {
            Act::Fail(HandlerError::retry_after(Duration::from_millis(50), "not today"))
        }
        _ => Act::Succeed,
    };
    let subscriber = Subscriber::new("skip").on::<Number>(Record::new(act)).max_attempts(u32::MAX);
    let worker = work.run(subscriber.failure_policy(FailurePolicy::Skip)).await;
    work.wait_for(9).await;
    assert_eq!(work.numbers("a").await, [2, 3, 4, 5]);
    fail.store(false, Ordering::SeqCst);
    work.wait_for(10).await;
    assert_eq!(work.numbers("a").await, [2, 3, 4, 5, 1]);
    work.assert_in_order(&["b"], 5).await;
    assert!(work.effects().await.iter().all(|(_, n, attempt)| (*n == 1) || *attempt == 1), "it failed alone");
    work.wait_until_acked("skip").await;
    work.assert_nothing_failed().await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_skip_a_snoozed_event_still_holds_back_its_key() {
    let work = Work::shared().await;
    work.send_many(&["a"], 5).await;
    // Until the message comes again, so also alone, after the batch was split.
    let act = |delivery: &Delivery<Number>| match (delivery.event.n, delivery.delivery_count) {
        (2, 1) => Act::Fail(HandlerError::snooze(Duration::from_millis(100))),
        _ => Act::Succeed,
    };
    let subscriber = Subscriber::new("skip").on::<Number>(Record::new(act));
    let worker = work.run(subscriber.failure_policy(FailurePolicy::Skip)).await;
    work.wait_for(5).await;
    worker.stop().await;
    work.assert_in_order(&["a"], 5).await;
}

/// Fails at random, and notices another run for the same key beside it.
struct Alone {
    running: Mutex<HashSet<Option<String>>>,
    beside: Arc<AtomicBool>,
    random: Mutex<Random>,
    record: Record,
}

impl Default for Alone {
    fn default() -> Self {
        Self {
            running: Mutex::default(),
            beside: Arc::default(),
            random: Mutex::new(Random(20)),
            record: Record::good(),
        }
    }
}

impl Handler<Number> for Alone {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        if !self.running.lock().unwrap().insert(delivery.key.clone()) {
            self.beside.store(true, Ordering::SeqCst);
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
        self.record.handle(tx, delivery).await?;
        self.running.lock().unwrap().remove(&delivery.key);
        match self.random.lock().unwrap().below(6) {
            0 => Err(HandlerError::retry("told to")),
            1 => Err(HandlerError::snooze(Duration::from_millis(3))),
            _ => Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_skip_no_two_events_of_a_key_run_at_once() {
    let work = Work::shared().await;
    let alone = Alone::default();
    let beside = Arc::clone(&alone.beside);
    work.send_many(&KEYS, 30).await;
    let subscriber = Subscriber::new("skip").on::<Number>(alone).concurrency(16).max_batch(7);
    let subscriber = subscriber.max_attempts(100).backoff(QUICK).failure_policy(FailurePolicy::Skip);
    let worker = work.run(subscriber).await;
    work.wait_for(8 * 30).await;
    work.wait_until_acked("skip").await;
    worker.stop().await;
    let mut times: HashMap<(Option<String>, i64), usize> = HashMap::new();
    for (key, n, _) in work.effects().await {
        *times.entry((key, n)).or_default() += 1;
    }
    assert!(times.len() == 8 * 30 && times.values().all(|times| *times == 1), "{times:?}");
    assert!(!beside.load(Ordering::SeqCst), "two events of a key ran at once");
}

/// What a batch handler got: keys and numbers.
type Call = Vec<(String, i64)>;

/// Records what it gets, call by call, and then does as it is told.
struct Batches {
    calls: Arc<Mutex<Vec<Call>>>,
    act: fn(&[Delivery<Number>]) -> Result<(), BatchError>,
}

impl Batches {
    fn new(act: fn(&[Delivery<Number>]) -> Result<(), BatchError>) -> Self {
        Self { calls: Arc::default(), act }
    }
}

impl BatchHandler<Number> for Batches {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deliveries: &[Delivery<Number>]) -> Result<(), BatchError> {
        let call = deliveries.iter().map(|delivery| (delivery.key.clone().unwrap_or_default(), delivery.event.n));
        self.calls.lock().unwrap().push(call.collect());
        for delivery in deliveries {
            sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, $4)")
                .bind(delivery.id.as_uuid())
                .bind(&delivery.key)
                .bind(delivery.event.n)
                .bind(i32::try_from(delivery.attempt).unwrap())
                .execute(&mut **tx)
                .await?;
        }
        (self.act)(deliveries)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_handler_gets_the_events_of_a_transaction_at_once() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 50).await;
    let handler = Batches::new(|_| Ok(()));
    let calls = Arc::clone(&handler.calls);
    // The first commits wait until everything has arrived.
    let gate = "create table gate (open bool);
                create function wait() returns trigger language plpgsql as $$
                    begin perform from public.gate; return null; end $$;
                create constraint trigger wait after insert on effect initially deferred for each row execute function wait()";
    sqlx::raw_sql(gate).execute(&work.outbox.pool).await.unwrap();
    let mut slow = work.outbox.pool.begin().await.unwrap();
    sqlx::query("lock table gate").execute(&mut *slow).await.unwrap();
    let worker = work.run(Subscriber::new("batch").on_batch::<Number>(handler)).await;
    eventually(SOON, "everything is delivered", async || {
        work.consumer("batch").await.cached_info().delivered.stream_sequence == 8 * 50
    })
    .await
    .unwrap();
    slow.commit().await.unwrap();
    work.wait_for(8 * 50).await;
    work.wait_until_acked("batch").await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 50).await;
    let calls = calls.lock().unwrap();
    assert_eq!(calls.iter().map(Vec::len).sum::<usize>(), 8 * 50);
    // Not a call for each, however busy the machine is.
    assert!(calls.len() <= 200, "{} calls", calls.len());
}

/// One event that fails among good ones: whatever the handler says about it, only it is given up.
async fn only_the_poison_dies(act: fn(&[Delivery<Number>]) -> Result<(), BatchError>) -> Vec<Call> {
    let work = Work::shared().await;
    work.send_many(&["a", "b"], 10).await;
    let handler = Batches::new(act);
    let calls = Arc::clone(&handler.calls);
    let subscriber = Subscriber::new("batch").on_batch::<Number>(handler).max_attempts(3).backoff(QUICK);
    let worker = work.run(subscriber.concurrency(1)).await;
    work.wait_for(19).await;
    work.wait_until_acked("batch").await;
    worker.stop().await;
    work.assert_in_order(&["b"], 10).await;
    assert_eq!(work.numbers("a").await, [1, 2, 3, 4, 5, 6, 8, 9, 10]);
    assert_eq!(work.dead_letters().await, [(7, 3, "seven is refused".into())]);
    calls.lock().unwrap().clone()
}

fn seven(deliveries: &[Delivery<Number>]) -> Option<usize> {
    deliveries.iter().position(|delivery| (delivery.key.as_deref(), delivery.event.n) == (Some("a"), 7))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_batch_is_halved_until_the_culprit_is_alone() {
    let calls = only_the_poison_dies(|deliveries| match seven(deliveries) {
        Some(_) => Err(HandlerError::retry("seven is refused").into()),
        None => Ok(()),
    });
    let alone = calls.await.iter().filter(|call| **call == [("a".to_string(), 7)]).count();
    assert_eq!(alone, 3, "only a run on its own counts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_handler_may_name_the_culprit() {
    let calls = only_the_poison_dies(|deliveries| match seven(deliveries) {
        Some(at) => Err(BatchError::at(at, HandlerError::retry("seven is refused"))),
        None => Ok(()),
    })
    .await;
    let failed = calls.iter().filter(|call| call.contains(&("a".into(), 7))).count();
    assert!(failed <= 2 * 3, "each time with the others at most, then alone: {calls:?}");
}

/// The other type of these tests.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Mark {
    n: i64,
}

impl Event for Mark {
    const TYPE: &'static str = "test.mark";
}

struct RecordMark;

impl Handler<Mark> for RecordMark {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Mark>) -> Result<(), HandlerError> {
        sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, 1)")
            .bind(delivery.id.as_uuid())
            .bind(&delivery.key)
            .bind(delivery.event.n)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_and_single_events_keep_the_order_of_a_key() {
    let work = Work::shared().await;
    for n in 1..=40 {
        for key in KEYS {
            let event = work.envelope(Some(key), n);
            // Every third one of a key, and each key at other places.
            let mark = (n + key.len() as i64 + i64::from(key.as_bytes()[0])) % 3 == 0;
            let event_type = if mark { Mark::TYPE.into() } else { event.event_type.clone() };
            work.put(&Envelope { event_type, ..event }).await;
        }
    }
    let handler = Batches::new(|_| Ok(()));
    let calls = Arc::clone(&handler.calls);
    let subscriber = Subscriber::new("mixed").on_batch::<Number>(handler).on::<Mark>(RecordMark);
    let worker = work.run(subscriber.concurrency(1)).await;
    work.wait_for(8 * 40).await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 40).await;
    assert!(calls.lock().unwrap().iter().any(|call| call.len() > 3), "there were batches");
}

#[tokio::test(flavor = "multi_thread")]
async fn debounced_events_of_a_key_run_in_one_batch() {
    let work = Work::shared().await;
    for n in 1..=100 {
        work.send("a", n).await;
    }
    work.send_many(&["b", "c"], 60).await;
    work.put(&work.envelope(None, 1)).await;
    let handler = Batches::new(|_| Ok(()));
    let calls = Arc::clone(&handler.calls);
    let subscriber = Subscriber::new("debounce").on_batch::<Number>(handler).debounce(Duration::from_secs(2));
    let started = Instant::now();
    // With one executor, the windows of b and c end while a runs.
    let worker = work.run(subscriber.concurrency(1)).await;
    work.wait_for(221).await;
    assert!(started.elapsed() >= Duration::from_secs(2));
    work.wait_until_acked("debounce").await;
    work.send("a", 101).await;
    work.wait_for(222).await;
    worker.stop().await;
    work.assert_in_order(&["a"], 101).await;
    work.assert_in_order(&["b", "c"], 60).await;
    let calls = calls.lock().unwrap();
    assert_eq!(calls[0], [(String::new(), 1)], "without a key it does not wait");
    let sizes: Vec<(&str, usize)> = calls[1..].iter().map(|call| (call[0].0.as_str(), call.len())).collect();
    assert_eq!(sizes, [("a", 100), ("b", 60), ("c", 60), ("a", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_window_survives_a_stop_and_a_crash() {
    let work = Work::shared().await;
    let handler = || Batches::new(|_| Ok(()));
    let subscriber = |window| {
        Subscriber::new("debounce").on_batch::<Number>(handler()).debounce(window).ack_wait(Duration::from_secs(2))
    };
    let hour = Duration::from_secs(3600);
    work.send_many(&["a", "b"], 10).await;
    let delivered = async || {
        eventually(SOON, "everything is delivered", async || {
            work.consumer("debounce").await.cached_info().num_ack_pending == 20
        })
        .await
        .unwrap();
    };
    let worker = work.run(subscriber(hour)).await;
    delivered().await;
    drop(worker);
    sqlx::raw_sql("update aftercommit.lease set expires_at = '-infinity'").execute(&work.outbox.pool).await.unwrap();
    let worker = work.run(subscriber(hour)).await;
    delivered().await;
    worker.stop().await;
    assert_eq!(work.count().await, 0, "an hour has not passed");
    let worker = work.run(subscriber(Duration::from_millis(200))).await;
    work.wait_for(20).await;
    work.wait_until_acked("debounce").await;
    worker.stop().await;
    work.assert_in_order(&["a", "b"], 10).await;
}
