//! G1, G3, G4: several instances of a subscriber, of which the active one dies again and again while events flow.

use std::collections::BTreeSet;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Record, RunningWorker, SOON, Work, WorkerProcess};
use aftercommit::operator::dead::{self, Filter};
use aftercommit::testing::eventually;
use aftercommit::worker::{BatchError, BatchHandler, Delivery, Subscriber};
use sqlx::PgTransaction;

const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// Each step at which a worker may die, with how often it is passed before.
const STEPS: [(&str, u32); 15] = [
    ("worker-fetched", 1),
    ("worker-marked", 2),
    ("worker-inserted", 3),
    ("worker-handled", 3),
    ("worker-committed", 1),
    ("worker-committed", 4),
    ("worker-answered", 1),
    ("worker-answered", 9),
    ("worker-failure-counted", 1),
    ("worker-failure-counted", 2),
    ("worker-given-up", 1),
    ("worker-given-up", 2),
    ("worker-redrive-taken", 1),
    ("worker-redrive-taken", 2),
    ("worker-fetched", 30),
];

/// Every tenth event of a key fails until the table `healed` exists.
const REFUSE: &str = "if (event -> 'data' ->> 'n')::bigint % 10 = 7 and to_regclass('public.healed') is null then
        raise exception 'sevens are refused';
    end if;";

const FILE: &str = "[[subscriber]]\nname = \"steps\"\ntypes = [\"*\"]\nsql = { function = \"apply\" }\nmax_attempts = 2\n\
    max_crashes = 100\nmax_batch = 4\nconcurrency = 4\nbackoff = { first = \"20ms\", max = \"50ms\" }\nack_wait = \"2s\"\n";

async fn send_back(work: &Work) {
    let filter = Filter { subscriber: Some("steps".into()), ..Filter::default() };
    dead::retry(&work.outbox.postgres, "test", &filter).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_active_instance_dies_at_each_step_and_nothing_is_lost() {
    let work = Work::shared().await;
    work.create_apply(REFUSE).await;
    let doomed = |(step, times): (&str, u32)| -> Child {
        work.command(FILE).env("AFTERCOMMIT_FAULT", format!("{step}:{times}")).env("RUST_LOG", "off").spawn().unwrap()
    };
    let mut steps = STEPS.into_iter();
    let mut processes: Vec<(Child, &str)> = steps.by_ref().take(3).map(|step| (doomed(step), step.0)).collect();
    let mut sent = 0;
    let mut died = BTreeSet::new();
    while !processes.is_empty() {
        sent += 1;
        for key in KEYS {
            work.send(key, sent).await;
        }
        if sent % 10 == 0 {
            send_back(&work).await;
        }
        assert!(sent < 600, "these should die: {processes:?}");
        tokio::time::sleep(Duration::from_millis(30)).await;
        let mut alive = Vec::new();
        for (mut process, step) in processes {
            match process.try_wait().unwrap() {
                None => alive.push((process, step)),
                Some(status) => {
                    assert!(!status.success(), "{step}");
                    died.insert(step);
                    work.expire_leases().await;
                    alive.extend(steps.next().map(|step| (doomed(step), step.0)));
                }
            }
        }
        processes = alive;
    }
    assert_eq!(died, STEPS.iter().map(|(step, _)| *step).collect());

    let last = [WorkerProcess(doomed(("", 0))), WorkerProcess(doomed(("", 0)))];
    let good: Vec<i64> = (1..=sent).filter(|n| n % 10 != 7).collect();
    let sevens = sent - good.len() as i64;
    work.wait_for(6 * good.len() as i64).await;
    sqlx::raw_sql("create table healed ()").execute(&work.outbox.pool).await.unwrap();
    eventually(SOON, "the sevens", async || {
        send_back(&work).await;
        work.count().await >= 6 * sent
    })
    .await
    .unwrap();
    // Not for the acks: what a full memory let go comes again only after minutes when its worker has died.
    for key in KEYS {
        let numbers = work.numbers(key).await;
        let of_good: Vec<i64> = numbers.iter().copied().filter(|n| n % 10 != 7).collect();
        assert_eq!(of_good, good, "key {key}");
        let of_sevens: BTreeSet<i64> = numbers.iter().copied().filter(|n| n % 10 == 7).collect();
        assert_eq!((of_sevens.len() as i64, numbers.len() as i64), (sevens, sent), "key {key}");
    }
    for process in last {
        assert_eq!(process.stop(), Some(0));
    }
    let left: (i64, i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from aftercommit.dead_letter), (select count(*) from aftercommit.redrive),
                (select count(*) from aftercommit.attempt), (select count(*) from aftercommit.running)",
    )
    .fetch_one(&work.outbox.pool)
    .await
    .unwrap();
    assert_eq!(left, (0, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_deleted_paused_and_made_again_changes_nothing() {
    let work = Work::shared().await;
    let slowly = |delivery: &Delivery<Number>| Act::Sleep(Duration::from_millis(delivery.event.n as u64 % 3));
    let subscriber = || {
        let subscriber = Subscriber::new("moved").on::<Number>(Record::new(slowly)).max_attempts(1).max_batch(5);
        subscriber.ack_wait(Duration::from_secs(2))
    };
    let workers = [
        work.run(subscriber()).await,
        RunningWorker::start(work.worker_with(subscriber())),
        RunningWorker::start(work.worker_with(subscriber())),
    ];
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    let sending = async {
        for n in 1..=200 {
            for key in KEYS {
                work.send(key, n).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let meddling = async {
        for round in 0..3 {
            let progress = async |text| {
                let before = work.count().await;
                eventually(SOON, text, async || work.count().await > before + 20).await.unwrap();
            };
            progress("progress").await;
            stream.delete_consumer("moved").await.unwrap();
            assert_eq!(work.worker_with(subscriber()).provision().await.unwrap().len(), 1);
            progress("progress after it was made anew").await;
            let until = chrono::Utc::now() + Duration::from_secs(1 + round);
            let subject = format!("CONSUMER.PAUSE.{}.moved", work.outbox.naming.stream);
            let pause = serde_json::json!({ "pause_until": until.to_rfc3339() });
            let paused: serde_json::Value = work.context.request(subject, &pause).await.unwrap();
            assert_eq!(paused["paused"], true, "{paused}");
        }
    };
    tokio::join!(sending, meddling);
    work.wait_for(6 * 200).await;
    work.wait_until_acked("moved").await;
    for worker in workers {
        worker.stop().await;
    }
    work.assert_in_order(&KEYS, 200).await;
    assert_eq!(work.count().await, 6 * 200);
    work.assert_nothing_failed().await;
}

/// Sleeps past the ack wait, and counts its runs.
struct Slow(Arc<AtomicUsize>);

impl BatchHandler<Number> for Slow {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deliveries: &[Delivery<Number>]) -> Result<(), BatchError> {
        self.0.fetch_add(deliveries.len(), Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(3500)).await;
        for delivery in deliveries {
            sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, 1)")
                .bind(delivery.id.as_uuid())
                .bind(&delivery.key)
                .bind(delivery.event.n)
                .execute(&mut **tx)
                .await?;
        }
        Ok(())
    }
}

fn slow(runs: &Arc<AtomicUsize>) -> Subscriber {
    let subscriber = Subscriber::new("slow").on_batch::<Number>(Slow(Arc::clone(runs)));
    subscriber.ack_wait(Duration::from_secs(1)).concurrency(4)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_slower_than_the_ack_wait_runs_once_beside_standbys() {
    let work = Work::shared().await;
    let runs = Arc::default();
    work.send_many(&KEYS[..4], 3).await;
    let first = work.run(slow(&runs)).await;
    let others = [0, 1].map(|_| RunningWorker::start(work.worker_with(slow(&runs))));
    work.wait_for(12).await;
    work.wait_until_acked("slow").await;
    assert_eq!(runs.load(Ordering::SeqCst), 12);
    assert_eq!(work.consumer("slow").await.cached_info().delivered.consumer_sequence, 12, "a message came twice");
    first.stop().await;
    for other in others {
        other.stop().await;
    }
    work.assert_in_order(&KEYS[..4], 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_batch_runs_once_when_its_worker_stops() {
    let work = Work::shared().await;
    let runs = Arc::default();
    let first = work.run(slow(&runs)).await;
    let second = RunningWorker::start(work.worker_with(slow(&runs)));
    work.send_many(&["a"], 1).await;
    eventually(SOON, "it runs", async || runs.load(Ordering::SeqCst) == 1).await.unwrap();
    first.stop().await;
    // Whichever of the two ran it.
    second.stop().await;
    let third = work.run(slow(&runs)).await;
    work.wait_for(1).await;
    work.wait_until_acked("slow").await;
    third.stop().await;
    assert_eq!((runs.load(Ordering::SeqCst), work.count().await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_batch_runs_once_more_after_a_crash() {
    let work = Work::shared().await;
    let runs = Arc::default();
    // So that all three are in the first batch.
    let gathered = |runs| slow(runs).debounce(Duration::from_millis(500));
    work.send_many(&["a"], 3).await;
    let first = work.run(gathered(&runs)).await;
    eventually(SOON, "it runs", async || runs.load(Ordering::SeqCst) == 3).await.unwrap();
    drop(first);
    work.expire_leases().await;
    // The messages come again to the successor while it runs what it read from the stream.
    let second = work.run(gathered(&runs)).await;
    work.wait_for(3).await;
    work.wait_until_acked("slow").await;
    second.stop().await;
    assert_eq!(runs.load(Ordering::SeqCst), 6);
    work.assert_in_order(&["a"], 3).await;
}
