//! An event that kills the worker's process is found, run alone and given up; a process that dies of something else
//! costs no event anything.

use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Random, Record, SOON, Work, child_worker};
use aftercommit::operator::dead::{self, Filter};
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const KILLER: i64 = 666;

/// Writes an effect; the killer ends the process instead until it is healed, and says how many handlers ran while it did.
struct Fragile;

impl Handler<Number> for Fragile {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let running = RUNNING.fetch_add(1, Ordering::SeqCst) + 1;
        MOST.fetch_max(running, Ordering::SeqCst);
        sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, $4)")
            .bind(delivery.id.as_uuid())
            .bind(&delivery.key)
            .bind(delivery.event.n)
            .bind(i32::try_from(delivery.attempt)?)
            .execute(&mut **tx)
            .await?;
        let healed: bool =
            sqlx::query_scalar("select to_regclass('public.healed') is not null").fetch_one(&mut **tx).await?;
        if delivery.event.n == KILLER && !healed {
            MOST.store(running, Ordering::SeqCst);
            // Time for others to begin, of another subscriber too.
            tokio::time::sleep(Duration::from_millis(300)).await;
            eprintln!("{} running", MOST.load(Ordering::SeqCst));
            std::process::abort();
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
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
    let Some(worker) = child_worker() else { return };
    worker.subscriber(fragile()).run(CancellationToken::new()).await.unwrap();
}

/// Takes longer than the killer needs.
fn patient() -> Subscriber {
    let slowly = |_: &Delivery<Number>| Act::Sleep(Duration::from_millis(800));
    Subscriber::new("patient").on::<Number>(Record::new(slowly)).concurrency(1).max_batch(1)
}

/// Not a test: a process with two subscribers.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the worker of another test"]
async fn worker_process_of_two() {
    let Some(worker) = child_worker() else { return };
    worker.subscriber(fragile()).subscriber(patient()).run(CancellationToken::new()).await.unwrap();
}

fn start(work: &Work) -> Child {
    work.child("crashes::worker_process").stderr(Stdio::piped()).spawn().unwrap()
}

/// Starts the process after a death, once PostgreSQL has noticed that: before, its successor could not count it.
async fn start_after_death(work: &Work) -> Child {
    eventually(SOON, "what the dead process did is over", async || {
        let open = "select (select count(*) from aftercommit.running)
                        = (select count(*) from (select from aftercommit.running for update skip locked) as over)";
        sqlx::query_scalar(open).fetch_one(&work.outbox.pool).await.unwrap()
    })
    .await
    .unwrap();
    start(work)
}

async fn markers(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.running").fetch_one(&work.outbox.pool).await.unwrap()
}

/// How often the process died while events ran that are not done.
async fn crashes(work: &Work) -> Vec<i32> {
    sqlx::query_scalar("select crashes from aftercommit.attempt").fetch_all(&work.outbox.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_kills_the_process_becomes_a_dead_letter() {
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
            let next = start_after_death(&work).await;
            let dead = std::mem::replace(&mut process, next).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&dead.stderr).into_owned();
            deaths.push(said.lines().find_map(|line| line.strip_suffix(" running")?.parse::<usize>().ok()));
            work.expire_leases().await;
        }
        deaths.len() > 6 || !work.dead_letters().await.is_empty()
    });
    given_up.await.unwrap();
    work.wait_for(6 * 20).await;
    work.wait_until_acked("fragile").await;
    let reason = "the worker's process died 5 times while this event ran".to_string();
    assert_eq!(work.dead_letters().await, [(KILLER, 0, reason)]);
    work.assert_in_order(&KEYS, 20).await;
    assert_eq!(work.count().await, 6 * 20);
    assert_eq!(deaths.len(), 5, "{deaths:?}");
    assert!(deaths[0] > Some(1), "at first it runs beside others: {deaths:?}");
    assert_eq!(deaths[2..], [Some(1); 3], "in the end it runs alone: {deaths:?}");
    assert_eq!((markers(&work).await, crashes(&work).await), (0, vec![]));
    process.kill().unwrap();
    process.wait().unwrap();
}

/// Starts the process again as often as it dies, until `done`; how often that was.
async fn restart_until(work: &Work, process: &mut Child, done: impl AsyncFn() -> bool) -> usize {
    let mut deaths = 0;
    let waited = eventually(SOON, "the end of the deaths", async || {
        if process.try_wait().unwrap().is_some() {
            deaths += 1;
            *process = start_after_death(work).await;
            work.expire_leases().await;
        }
        deaths > 6 || done().await
    });
    waited.await.unwrap();
    deaths
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_killer_is_counted_anew_and_runs_once_healed() {
    let work = Work::shared().await;
    work.worker_with(fragile()).provision().await.unwrap();
    work.send_many(&["a"], 3).await;
    work.send("a", KILLER).await;
    work.send_many(&["b"], 3).await;
    let given_up = async || work.dead_letters().await.len() == 1;
    let mut process = start(&work);
    assert_eq!(restart_until(&work, &mut process, given_up).await, 5);
    work.wait_for(6).await;

    let send_back = async || {
        let filter = Filter { subscriber: Some("fragile".into()), ..Filter::default() };
        let sent = dead::retry(&work.outbox.postgres, "test", &filter).await.unwrap();
        assert_eq!(sent.len(), 1);
    };
    send_back().await;
    // It kills from its row as it did from the stream, and what comes meanwhile is handled all the same.
    work.send_many(&["c"], 3).await;
    assert_eq!(restart_until(&work, &mut process, given_up).await, 5);
    work.wait_for(9).await;

    sqlx::raw_sql("create table healed ()").execute(&work.outbox.pool).await.unwrap();
    send_back().await;
    let healed = async || work.numbers("a").await == [1, 2, 3, KILLER];
    assert_eq!(restart_until(&work, &mut process, healed).await, 0);
    work.assert_in_order(&["b", "c"], 3).await;
    assert!(work.dead_letters().await.is_empty());
    assert_eq!((markers(&work).await, crashes(&work).await), (0, vec![]));
    process.kill().unwrap();
    process.wait().unwrap();
}

/// Another subscriber of the same process is no shelter: what only happens to run there is not blamed.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_event_beside_another_subscribers_killer_is_not_given_up() {
    let work = Work::shared().await;
    for subscriber in [fragile(), patient()] {
        work.worker_with(subscriber).provision().await.unwrap();
    }
    work.send("a", KILLER).await;
    let start = || work.child("crashes::worker_process_of_two").spawn().unwrap();
    let mut process = start();
    let mut deaths = 0;
    let settled = eventually(SOON, "the killer is given up and the slow event handled", async || {
        if process.try_wait().unwrap().is_some() {
            deaths += 1;
            process = start();
            work.expire_leases().await;
        }
        deaths > 8 || work.dead_letters().await.len() + usize::try_from(work.count().await).unwrap() >= 2
    });
    settled.await.unwrap();
    let dead: Vec<String> = sqlx::query_scalar("select subscriber from aftercommit.dead_letter")
        .fetch_all(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!((dead, work.count().await, deaths), (vec!["fragile".to_string()], 1, 5));
    process.kill().unwrap();
    process.wait().unwrap();
}

/// Takes until it is told to end.
struct Endless;

impl Handler<Number> for Endless {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        while !sqlx::query_scalar::<_, bool>("select to_regclass('public.healed') is not null")
            .fetch_one(&mut **tx)
            .await?
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn endless() -> Subscriber {
    Subscriber::new("endless").on::<Number>(Endless).ack_wait(Duration::from_secs(2))
}

/// Not a test: a process with a handler that takes long.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the worker of another test"]
async fn worker_process_that_takes_long() {
    let Some(worker) = child_worker() else { return };
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        term.recv().await;
        stopping.cancel();
    });
    worker.subscriber(endless()).run(stop).await.unwrap();
}

/// Kills the process while the handler runs, several times; before that it may ask it to stop.
async fn outlives(kills: usize, orderly: bool) {
    let work = Work::shared().await;
    work.worker_with(endless()).provision().await.unwrap();
    work.send("a", 1).await;
    for _ in 0..kills {
        let mut process = work.child("crashes::worker_process_that_takes_long").spawn().unwrap();
        let marked = async |query: &'static str| -> bool {
            sqlx::query_scalar(query).fetch_one(&work.outbox.pool).await.unwrap()
        };
        let runs = "select exists (select from aftercommit.running where lane >= 0
                                     and epoch = (select epoch from aftercommit.lease))";
        eventually(SOON, "it runs", async || marked(runs).await).await.unwrap();
        if orderly {
            std::process::Command::new("kill").args(["-TERM", &process.id().to_string()]).status().unwrap();
            let stops = "select exists (select from aftercommit.running where lane = -1
                                          and epoch = (select epoch from aftercommit.lease))";
            eventually(SOON, "it stops", async || marked(stops).await).await.unwrap();
        }
        process.kill().unwrap();
        process.wait().unwrap();
        work.expire_leases().await;
    }
    sqlx::raw_sql("create table healed ()").execute(&work.outbox.pool).await.unwrap();
    let worker = work.run(endless()).await;
    work.wait_for(1).await;
    work.wait_until_acked("endless").await;
    worker.stop().await;
    work.assert_nothing_failed().await;
    assert_eq!(markers(&work).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_handler_outlives_kills_from_outside() {
    outlives(4, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_handler_outlives_any_number_of_deploys() {
    outlives(7, true).await;
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
        work.expire_leases().await;
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
async fn records_of_events_that_never_come_again_keep_nobody_waiting() {
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
    // It was done by a worker that was thought dead.
    sqlx::raw_sql(
        "with done as (
            insert into aftercommit.inbox (subscriber, event_id, stream_seq)
            values ('fragile', aftercommit.new_event_id(), 1) returning event_id)
         insert into aftercommit.attempt (subscriber, event_id, crashes, last_error)
         select 'fragile', event_id, 5, '' from done",
    )
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
