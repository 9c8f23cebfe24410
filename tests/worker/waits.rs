//! What an event waits for is remembered: restarts, pauses and take-overs neither spend attempts nor let it come early.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Record, RunningWorker, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::operator::worker::{Which, pause, resume};
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, FailurePolicy, HandlerError, Subscriber};

const WAITS: Which<'_> = Which::Subscriber("waits");
const LONG: Duration = Duration::from_secs(300);

/// What makes an event wait for five minutes.
#[derive(Clone, Copy, PartialEq)]
enum Cause {
    Fails,
    Snoozes,
    Unavailable,
}

/// Makes the first event of the key `waits` wait.
struct Waits {
    work: Work,
    runs: Arc<AtomicUsize>,
    cause: Cause,
    policy: FailurePolicy,
}

impl Waits {
    async fn new(cause: Cause, policy: FailurePolicy) -> Self {
        Self { work: Work::shared().await, runs: Arc::default(), cause, policy }
    }

    fn subscriber(&self) -> Subscriber {
        let (cause, runs) = (self.cause, Arc::clone(&self.runs));
        let handler = Record::new(move |delivery: &Delivery<Number>| {
            if delivery.key.as_deref() != Some("waits") || delivery.event.n != 1 {
                return Act::Succeed;
            }
            match (runs.fetch_add(1, Ordering::SeqCst), cause) {
                (1.., _) => Act::Succeed,
                (_, Cause::Fails) => Act::Fail(HandlerError::retry("out of paper")),
                (_, Cause::Snoozes) => Act::Fail(HandlerError::snooze(LONG)),
                (_, Cause::Unavailable) => Act::Fail(HandlerError::unavailable("the printer is off")),
            }
        });
        let subscriber = Subscriber::new("waits")
            .on::<Number>(handler)
            .failure_policy(self.policy)
            .max_batch(1)
            .ack_wait(Duration::from_secs(2));
        subscriber.max_attempts(2).backoff(Backoff { first: LONG, max: LONG })
    }

    async fn start(&self) -> RunningWorker {
        self.work.run(self.subscriber()).await
    }

    fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    async fn until_it_waits(&self) {
        let waits = async || {
            let query =
                "select exists (select from aftercommit.attempt where not_before > now() + interval '1 minute')";
            sqlx::query_scalar(query).fetch_one(&self.work.outbox.pool).await.unwrap()
        };
        eventually(SOON, "it waits", waits).await.unwrap();
    }

    /// Another event goes through, which is behind the one that waits in the stream.
    async fn until_another_is_handled(&self, n: i64) {
        self.work.send("other", n).await;
        let done = async || self.work.numbers("other").await.last() == Some(&n);
        eventually(SOON, "another one is handled", done).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_waits_through_restarts_pauses_and_take_overs() {
    for cause in [Cause::Fails, Cause::Snoozes, Cause::Unavailable] {
        let waits = Waits::new(cause, FailurePolicy::Block).await;
        let postgres = &waits.work.outbox.postgres;
        waits.work.send("waits", 1).await;
        waits.work.send("waits", 2).await;
        let worker = waits.start().await;
        waits.until_it_waits().await;
        worker.stop().await;
        // A restart, a pause, and a successor of a worker that died.
        let worker = waits.start().await;
        waits.until_another_is_handled(1).await;
        pause(postgres, WAITS, "test", None).await.unwrap();
        let paused = async || format!("{:?}", worker.report()).contains("Paused");
        eventually(SOON, "it is paused", paused).await.unwrap();
        resume(postgres, WAITS, "test").await.unwrap();
        waits.until_another_is_handled(2).await;
        drop(worker);
        waits.work.expire_leases().await;
        let worker = waits.start().await;
        waits.until_another_is_handled(3).await;
        assert_eq!(waits.runs(), 1);
        assert_eq!(waits.work.attempts().await, if cause == Cause::Fails { vec![1] } else { vec![] });
        worker.stop().await;
        // Its time comes.
        sqlx::query("update aftercommit.attempt set not_before = now()")
            .execute(&waits.work.outbox.pool)
            .await
            .unwrap();
        let worker = waits.start().await;
        waits.work.wait_for(5).await;
        waits.work.wait_until_acked("waits").await;
        worker.stop().await;
        assert_eq!(waits.runs(), 2);
        waits.work.assert_in_order(&["waits"], 2).await;
        waits.work.assert_nothing_failed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_a_key_still_passes_a_skipped_event() {
    let waits = Waits::new(Cause::Fails, FailurePolicy::Skip).await;
    waits.work.send("waits", 1).await;
    let worker = waits.start().await;
    waits.until_it_waits().await;
    worker.stop().await;
    let worker = waits.start().await;
    waits.work.send("waits", 2).await;
    waits.work.wait_for(1).await;
    assert_eq!((waits.work.numbers("waits").await, waits.runs()), (vec![2], 1));
    worker.stop().await;
}
