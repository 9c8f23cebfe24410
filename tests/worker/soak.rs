//! Everything at once: subscribers of every kind on one stream, while workers, NATS and PostgreSQL are killed at random.
//!
//! `SOAK_SEED` repeats a run's choices, `SOAK_SECONDS` makes it longer.

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Number, Random, RunningWorker, Work, WorkerProcess, child_worker};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::{BatchError, BatchHandler, Delivery, FailurePolicy, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

const KEYS: [&str; 10] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
const LONG: Duration = Duration::from_secs(60);

/// Writes its effect in the name of a subscriber. Some runs fail, and some are slow; which ones is left to chance.
#[derive(Clone, Copy)]
struct Note(&'static str);

impl Note {
    async fn write(self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        sqlx::query("insert into note (subscriber, key, n) values ($1, $2, $3)")
            .bind(self.0)
            .bind(&delivery.key)
            .bind(delivery.event.n)
            .execute(&mut **tx)
            .await?;
        let pause = match uuid::Uuid::now_v7().as_bytes()[15] {
            0..3 => return Err(HandlerError::retry("bad luck")),
            3..6 => return Err(HandlerError::snooze(Duration::from_millis(20))),
            6..8 => panic!("worse luck"),
            8 => 1500,
            _ => 1,
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(())
    }
}

impl Handler<Number> for Note {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        self.write(tx, delivery).await
    }
}

impl BatchHandler<Number> for Note {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deliveries: &[Delivery<Number>]) -> Result<(), BatchError> {
        for (n, delivery) in deliveries.iter().enumerate() {
            self.write(tx, delivery).await.map_err(|error| BatchError::at(n, error))?;
        }
        Ok(())
    }
}

fn subscribers() -> [Subscriber; 6] {
    let on = |name: &'static str| Subscriber::new(name).on::<Number>(Note(name));
    let on_batch = |name: &'static str| Subscriber::new(name).on_batch::<Number>(Note(name));
    [
        on("block").concurrency(4),
        on("single").max_batch(1).concurrency(4),
        on("skip").failure_policy(FailurePolicy::Skip).concurrency(4).max_batch(5),
        on_batch("batch").concurrency(3).max_batch(10),
        on_batch("debounce").debounce(Duration::from_millis(100)).concurrency(3),
        on("lonely").concurrency(1),
    ]
    .map(|subscriber| {
        let backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };
        // Processes are killed here whatever runs, so nothing is to be given up for that.
        let subscriber = subscriber.max_attempts(1000).max_crashes(1000).backoff(backoff);
        subscriber.ack_wait(Duration::from_secs(1)).time_limit(Duration::from_secs(5))
    })
}

/// Not a test: the process that the test starts.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the worker of the other test"]
async fn worker_process() {
    let Some(worker) = child_worker() else { return };
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let mut term = signal(SignalKind::terminate()).unwrap();
    tokio::spawn(async move {
        term.recv().await;
        stopping.cancel();
    });
    worker.registry(subscribers().into_iter().collect::<Vec<_>>()).run(stop).await.unwrap();
}

/// What is disturbed.
struct Chaos {
    work: Work,
    nats: Nats,
    postgres: Postgres,
    workers: Vec<WorkerProcess>,
    random: Random,
    done: HashMap<&'static str, usize>,
}

impl Chaos {
    fn start_worker(work: &Work) -> WorkerProcess {
        WorkerProcess(work.child("soak::worker_process").spawn().unwrap())
    }

    fn signal(&self, signal: &str, worker: usize) {
        let id = self.workers[worker].0.id().to_string();
        Command::new("kill").args([signal, &id]).status().unwrap();
    }

    async fn disturb(&mut self) {
        let worker = self.random.below(self.workers.len() as u64) as usize;
        let pause = Duration::from_millis(self.random.below(800));
        let name = subscribers()[self.random.below(6) as usize].name().to_string();
        let what = match self.random.below(12) {
            0..4 => {
                // Dropping the old one kills it.
                self.workers[worker] = Self::start_worker(&self.work);
                "worker killed"
            }
            4 => {
                self.signal("-TERM", worker);
                self.workers[worker].0.wait().unwrap();
                self.workers[worker] = Self::start_worker(&self.work);
                "worker stopped"
            }
            5 => {
                self.signal("-STOP", worker);
                tokio::time::sleep(pause * 3).await;
                self.signal("-CONT", worker);
                "worker frozen"
            }
            6 => {
                self.nats.kill().await.unwrap();
                tokio::time::sleep(pause).await;
                self.nats.restart().await.unwrap();
                "nats killed"
            }
            7 => {
                self.postgres.kill().await.unwrap();
                tokio::time::sleep(pause).await;
                self.postgres.restart().await.unwrap();
                "postgres killed"
            }
            8 => {
                let stream = &self.work.outbox.naming.stream;
                let subject = format!("CONSUMER.DELETE.{stream}.{name}");
                let nothing = serde_json::json!({});
                let _: Result<serde_json::Value, _> = self.work.context.request(subject, &nothing).await;
                self.provision().await;
                "consumer made anew"
            }
            9 => {
                let subject = format!("CONSUMER.PAUSE.{}.{name}", self.work.outbox.naming.stream);
                let until = (chrono::Utc::now() + pause).to_rfc3339();
                let pause = serde_json::json!({ "pause_until": until });
                let _: Result<serde_json::Value, _> = self.work.context.request(subject, &pause).await;
                "consumer paused"
            }
            _ => {
                let expire = sqlx::raw_sql("update aftercommit.lease set expires_at = '-infinity'");
                let _ = expire.execute(&self.work.outbox.pool).await;
                "leases expired"
            }
        };
        *self.done.entry(what).or_default() += 1;
    }

    /// Until the stream has it, which may store it twice.
    async fn send(&self, key: &str, n: i64) {
        let event = self.work.envelope(Some(key), n);
        let sent = eventually(LONG, "a message is stored", async || {
            let mut headers = async_nats::HeaderMap::new();
            for (name, value) in event.to_headers().iter().filter(|(name, _)| name != "Nats-Msg-Id") {
                headers.append(name.as_ref(), value.as_ref());
            }
            let subject = self.work.outbox.naming.prefix.subject(&event.event_type);
            let published = self.work.context.publish_with_headers(subject, headers, event.payload.clone()).await;
            match published {
                Ok(ack) => ack.await.is_ok(),
                Err(_) => false,
            }
        });
        sent.await.unwrap();
    }

    async fn provision(&self) {
        let provisioned = eventually(LONG, "the consumers", async || {
            let worker = self.work.worker_with(Subscriber::new("none").on::<Number>(Note("none")));
            worker.registry(subscribers().into_iter().collect::<Vec<_>>()).provision().await.is_ok()
        });
        provisioned.await.unwrap();
    }
}

async fn count(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from note").fetch_one(&work.outbox.pool).await.unwrap_or(-1)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_each_event_is_handled_once_and_in_order() {
    let setting = |name, default| std::env::var(name).map_or(default, |value: String| value.parse().unwrap());
    let seed = setting("SOAK_SEED", uuid::Uuid::now_v7().as_u128() as u64 % 1_000_000);
    let length = Duration::from_secs(setting("SOAK_SECONDS", 8));
    println!("SOAK_SEED={seed}");
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let work = Work::on(postgres.create_database().await.unwrap(), nats.url()).await;
    let table = "create table note (id bigint generated always as identity, subscriber text, key text, n bigint)";
    sqlx::raw_sql(table).execute(&work.outbox.pool).await.unwrap();
    let workers = Vec::new();
    let mut chaos = Chaos { work, nats, postgres, workers, random: Random(seed), done: HashMap::new() };
    chaos.provision().await;
    chaos.workers = (0..3).map(|_| Chaos::start_worker(&chaos.work)).collect();

    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < length {
        for _ in 0..5 {
            sent += 1;
            for key in KEYS {
                chaos.send(key, sent).await;
            }
        }
        let wait = chaos.random.below(500);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        chaos.disturb().await;
    }
    let expected = sent * (KEYS.len() * subscribers().len()) as i64;
    let mut last = 0;
    let waited = eventually(LONG, "all effects", async || {
        last = count(&chaos.work).await;
        last >= expected
    });
    let waited = waited.await;
    println!("{} events, {:?}, {:?} in all", sent * KEYS.len() as i64, chaos.done, started.elapsed());
    check(&chaos.work, sent).await;
    assert!(waited.is_ok(), "{last} of {expected}");
    for worker in chaos.workers {
        assert_eq!(worker.stop(), Some(0));
    }
    // The next ones to take over find nothing to do, and forget what overlapping tenures left behind.
    let worker = chaos.work.worker_with(Subscriber::new("none").on::<Number>(Note("none")));
    let worker = RunningWorker::start(worker.registry(subscribers().into_iter().collect::<Vec<_>>()));
    let left = eventually(LONG, "nothing is left", async || {
        let left = "select (select count(*) from aftercommit.attempt) + (select count(*) from aftercommit.running)";
        sqlx::query_scalar::<_, i64>(left).fetch_one(&chaos.work.outbox.pool).await.unwrap() == 0
    });
    left.await.unwrap();
    worker.stop().await;
    check(&chaos.work, sent).await;
    assert_eq!(count(&chaos.work).await, expected);
    assert!(chaos.work.dead_letters().await.is_empty());
}

/// Nothing took effect twice, and nothing out of order.
async fn check(work: &Work, sent: i64) {
    let notes: Vec<(String, String, i64)> =
        sqlx::query_as("select subscriber, key, n from note order by id").fetch_all(&work.outbox.pool).await.unwrap();
    let mut numbers: HashMap<(String, String), Vec<i64>> = HashMap::new();
    for (subscriber, key, n) in notes {
        numbers.entry((subscriber, key)).or_default().push(n);
    }
    for ((subscriber, key), mut numbers) in numbers {
        if subscriber == "skip" {
            numbers.sort_unstable();
            assert!(numbers.is_sorted_by(|one, next| one < next), "{subscriber}, key {key}: {numbers:?}");
        } else {
            let should: Vec<i64> = (1..=sent).take(numbers.len()).collect();
            assert_eq!(numbers, should, "{subscriber}, key {key}");
        }
    }
}
