//! G3, G6: what a subscriber may choose: whether a failed event holds back its key, batches in one call, and waiting for
//! more events of a key.

mod support;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aftercommit::backoff::Backoff;
use aftercommit::worker::{Delivery, FailurePolicy, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;
use support::{Act, Number, Random, Record, Work};

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
    assert!(work.dead_letters().await.is_empty() && work.attempts().await.is_empty());
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
