//! An event that kills the worker's process is found, run alone and given up; a process that dies of something else
//! costs no event anything.

mod support;

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber, Worker};
use sqlx::PgTransaction;
use support::{Number, Random, Record, SOON, Work};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const KILLER: i64 = 666;

/// Writes an effect; the killer ends the process instead, and says how many handlers ran.
struct Fragile;

impl Handler<Number> for Fragile {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        RUNNING.fetch_add(1, Ordering::SeqCst);
        sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, $4)")
            .bind(delivery.id.as_uuid())
            .bind(&delivery.key)
            .bind(delivery.event.n)
            .bind(i32::try_from(delivery.attempt)?)
            .execute(&mut **tx)
            .await?;
        tokio::time::sleep(Duration::from_millis(3)).await;
        if delivery.event.n == KILLER {
            // Whoever may run beside it shall have begun.
            let beside = async || RUNNING.load(Ordering::SeqCst) > 1;
            let _ = eventually(Duration::from_millis(300), "another handler runs", beside).await;
            eprintln!("{} running", RUNNING.load(Ordering::SeqCst));
            std::process::abort();
        }
        RUNNING.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

fn fragile() -> Subscriber {
    Subscriber::new("fragile").on::<Number>(Fragile).concurrency(4).max_batch(5).ack_wait(Duration::from_secs(3))
}

/// Not a test: the process that the tests start.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the worker of the other tests"]
async fn worker_process() {
    let Ok(stream) = std::env::var("CRASHES_STREAM") else { return };
    let setting = |name| std::env::var(name).unwrap();
    let postgres = PostgresConfig::new(setting("CRASHES_DATABASE"));
    let nats = NatsConfig { url: setting("CRASHES_NATS"), ..NatsConfig::default() };
    let naming = Naming { stream, prefix: SubjectPrefix::new(setting("CRASHES_PREFIX")).unwrap(), ..Naming::default() };
    Worker::new(postgres, nats, naming).subscriber(fragile()).run(CancellationToken::new()).await.unwrap();
}

fn start(work: &Work) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["worker_process", "--exact", "--ignored", "--nocapture"])
        .env("CRASHES_STREAM", &work.outbox.naming.stream)
        .env("CRASHES_PREFIX", work.outbox.naming.prefix.to_string())
        .env("CRASHES_DATABASE", &work.outbox.postgres.url)
        .env("CRASHES_NATS", &work.outbox.nats.url)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What waiting for the lease to run out would do.
async fn expire_lease(work: &Work) {
    sqlx::raw_sql("update aftercommit.lease set expires_at = '-infinity'").execute(&work.outbox.pool).await.unwrap();
}

async fn markers(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.running").fetch_one(&work.outbox.pool).await.unwrap()
}

/// How often the process died while events ran that are not done.
async fn crashes(work: &Work) -> Vec<i32> {
    sqlx::query_scalar("select crashes from aftercommit.attempt").fetch_all(&work.outbox.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_kills_the_process_ends_as_a_dead_letter_and_its_neighbours_are_handled() {
    let work = Work::shared().await;
    work.worker_with(fragile()).provision().await.unwrap();
    for n in 1..=20 {
        for key in KEYS {
            work.send(key, n).await;
        }
        if n == 3 {
            work.send("a", KILLER).await;
        }
    }
    let mut deaths = Vec::new();
    let mut process = start(&work);
    let given_up = eventually(SOON, "the killer is given up", async || {
        if process.try_wait().unwrap().is_some() {
            let dead = std::mem::replace(&mut process, start(&work)).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&dead.stderr).into_owned();
            deaths.push(said.lines().find_map(|line| line.strip_suffix(" running")?.parse::<usize>().ok()));
            expire_lease(&work).await;
        }
        deaths.len() > 6 || !work.dead_letters().await.is_empty()
    });
    given_up.await.unwrap();
    work.wait_for(6 * 20).await;
    work.wait_until_acked("fragile").await;
    let reason = "the worker's process died 4 times while this event ran".to_string();
    assert_eq!(work.dead_letters().await, [(KILLER, 0, reason)]);
    work.assert_in_order(&KEYS, 20).await;
    assert_eq!(work.count().await, 6 * 20);
    assert_eq!(deaths.len(), 4, "{deaths:?}");
    assert!(deaths[0] > Some(1), "at first it runs beside others: {deaths:?}");
    assert_eq!(deaths[2..], [Some(1), Some(1)], "in the end it runs alone: {deaths:?}");
    assert_eq!((markers(&work).await, crashes(&work).await), (0, vec![]));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_killed_at_random_times_cost_good_events_nothing() {
    let work = Work::shared().await;
    work.worker_with(fragile()).provision().await.unwrap();
    work.send_many(&KEYS, 100).await;
    let mut random = Random(3);
    let mut suspected = 0;
    for _ in 0..8 {
        let before = work.count().await;
        let mut process = start(&work);
        eventually(SOON, "some progress", async || work.count().await > before).await.unwrap();
        tokio::time::sleep(Duration::from_millis(random.below(60))).await;
        process.kill().unwrap();
        process.wait().unwrap();
        suspected += markers(&work).await;
        expire_lease(&work).await;
    }
    assert!(suspected > 0, "no process died while events ran, so nothing was tested");
    let worker = work.run(fragile()).await;
    work.wait_for(6 * 100).await;
    work.wait_until_acked("fragile").await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 100).await;
    assert_eq!(work.count().await, 6 * 100);
    assert!(work.dead_letters().await.is_empty());
    assert_eq!((markers(&work).await, crashes(&work).await), (0, vec![]), "all is forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_events_that_never_come_again_keeps_nobody_waiting() {
    let work = Work::shared().await;
    sqlx::query(
        "with ran as (
            insert into aftercommit.running (subscriber, epoch, lane, events)
            values ('fragile', 0, 0, array[$1]), ('fragile', 0, 1, array[$2]), ('other', 0, 0, array[$1]))
         insert into aftercommit.attempt (subscriber, event_id, crashes, last_error)
         values ('fragile', $2, 2, ''), ('fragile', $3, 7, '')",
    )
    .bind(Uuid::now_v7())
    .bind(Uuid::now_v7())
    .bind(Uuid::now_v7())
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    work.send_many(&KEYS, 20).await;
    let worker = work.run(Subscriber::new("fragile").on::<Number>(Record::good())).await;
    work.wait_for(6 * 20).await;
    work.wait_until_acked("fragile").await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 20).await;
    let mut left = crashes(&work).await;
    left.sort_unstable();
    assert_eq!((markers(&work).await, left), (1, vec![1, 3, 7]), "the other subscriber's marker stays");
}
