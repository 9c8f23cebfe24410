//! G6: poison of every kind among good events. Each ends as a dead letter that tells why, and costs nobody else anything.

use std::time::{Duration, Instant};

use crate::support::{Number, Record, SOON, Work, WorkerProcess, child_worker};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;
use tokio_util::sync::CancellationToken;

const GOOD: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
const EACH: i64 = 40;
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

/// What a handler can do wrong, by key, and what the reason of the dead letter then says. The second event of each key
/// is poison.
const HANDLED_BADLY: [(&str, &str); 7] = [
    ("error", "out of paper"),
    ("zero", "out of paper"),
    ("panic", "the handler panicked: as told"),
    ("reject", "not for me"),
    ("statement", "division by zero"),
    ("swallow", "current transaction is aborted"),
    ("hang", "time limit of 1s"),
];
/// What a message can have wrong, the same way.
const UNREADABLE: [(&str, &str); 6] = [
    ("undecodable", "cannot be read as test.number"),
    ("other-shape", "cannot be read as test.number"),
    ("too-new", "version 2"),
    ("deep", "cannot be read as test.number"),
    ("huge", "cannot be read as test.number"),
    ("header", "cannot be read as test.number"),
];
const KILLER: (&str, &str) = ("abort", "the worker's process died 5 times while this event ran");

/// Writes the effect, and for the second event of a key does what the key says.
struct Zoo;

impl Handler<Number> for Zoo {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        tokio::time::sleep(Duration::from_millis(3)).await;
        match delivery.key.as_deref().filter(|_| delivery.event.n == 2) {
            Some("error") => Err(HandlerError::retry("out of paper")),
            Some("zero") => Err(HandlerError::retry("out of\0 paper")),
            Some("panic") => panic!("as told"),
            Some("reject") => Err(HandlerError::reject("not for me")),
            Some("statement") => Ok(sqlx::query("select 1 / 0").execute(&mut **tx).await.map(drop)?),
            Some("swallow") => {
                let _ = sqlx::query("select 1 / 0").execute(&mut **tx).await;
                Ok(())
            }
            Some("hang") => std::future::pending().await,
            Some("abort") => std::process::abort(),
            _ => Ok(()),
        }
    }
}

fn zoo() -> Subscriber {
    let subscriber = Subscriber::new("zoo").on::<Number>(Zoo).concurrency(6).max_batch(10).max_attempts(2);
    subscriber.backoff(QUICK).time_limit(Duration::from_secs(1)).ack_wait(Duration::from_secs(2))
}

/// Not a test: the process that the tests start.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the worker of the other tests"]
async fn worker_process() {
    let Some(worker) = child_worker() else { return };
    worker.subscriber(zoo()).run(CancellationToken::new()).await.unwrap();
}

/// The second event of a key, spoilt as the key says.
async fn put_unreadable(work: &Work, key: &str) {
    let mut event = work.envelope(Some(key), 2);
    match key {
        "undecodable" => event.payload = vec![0xff, 0, 0xfe].into(),
        "other-shape" => event.payload = r#"{"order": 7, "customer": {"name": "Ann"}}"#.into(),
        "too-new" => event.version = 2,
        "deep" => event.payload = "[".repeat(100_000).into(),
        "huge" => event.payload = format!(r#"{{"n": "{}"}}"#, "x".repeat(900_000)).into(),
        _ => {
            event.payload = "1".into();
            event.headers.insert("X-Tenant".into(), "a\0b".into());
        }
    }
    work.put(&event).await;
}

/// Good events of many keys, and among the first of them three of each bad key.
async fn send_zoo(work: &Work, badly: &[(&str, &str)]) {
    for n in 1..=EACH {
        for key in GOOD {
            work.send(key, n).await;
        }
        if n <= 3 {
            for (key, _) in badly {
                work.send(key, n).await;
            }
            for (key, _) in UNREADABLE {
                match n {
                    2 => put_unreadable(work, key).await,
                    _ => work.send(key, n).await,
                }
            }
        }
    }
}

async fn assert_reasons(work: &Work, badly: &[(&str, &str)]) {
    let dead: Vec<(String, String)> =
        sqlx::query_as("select key, reason from aftercommit.dead_letter").fetch_all(&work.outbox.pool).await.unwrap();
    for (key, reason) in badly.iter().chain(&UNREADABLE) {
        let found: Vec<_> = dead.iter().filter(|(of, _)| of == key).collect();
        assert!(matches!(found[..], [(_, found)] if found.contains(reason)), "{key}: {found:?}");
        assert_eq!(work.numbers(key).await, [1, 3], "key {key}");
    }
    assert_eq!(dead.len(), badly.len() + UNREADABLE.len(), "{dead:?}");
    work.assert_in_order(&GOOD, EACH).await;
    assert!(work.attempts().await.is_empty());
}

/// How long it takes until the good events are handled.
async fn good_ones_done(work: &Work) -> Duration {
    let started = Instant::now();
    eventually(SOON, "the good events", async || {
        let done: i64 = sqlx::query_scalar("select count(*) from effect where key = any($1)")
            .bind(GOOD.map(String::from).to_vec())
            .fetch_one(&work.outbox.pool)
            .await
            .unwrap();
        done == GOOD.len() as i64 * EACH
    })
    .await
    .unwrap();
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zoo_of_poison_ends_as_dead_letters_and_delays_nobody_else() {
    let control = Work::shared().await;
    control.send_many(&GOOD, EACH).await;
    let worker = control.run(zoo()).await;
    let undisturbed = good_ones_done(&control).await;
    worker.stop().await;

    let work = Work::shared().await;
    send_zoo(&work, &HANDLED_BADLY).await;
    let worker = work.run(zoo()).await;
    let took = good_ones_done(&work).await;
    eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 13).await.unwrap();
    work.wait_until_acked("zoo").await;
    worker.stop().await;
    assert_reasons(&work, &HANDLED_BADLY).await;
    // One run of the hanging event in a batch with others, which then run again.
    assert!(took < undisturbed * 2 + Duration::from_secs(3), "{took:?}, without poison {undisturbed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_event_that_kills_the_process_among_them_too() {
    let badly: Vec<_> = HANDLED_BADLY.into_iter().chain([KILLER]).collect();
    let work = Work::shared().await;
    work.worker_with(zoo()).provision().await.unwrap();
    send_zoo(&work, &badly).await;
    let start = || WorkerProcess(work.child("poison::worker_process").spawn().unwrap());
    let mut process = start();
    let mut deaths = 0;
    let waited = eventually(SOON, "the dead letters", async || {
        if process.0.try_wait().unwrap().is_some() {
            deaths += 1;
            process = start();
            work.expire_leases().await;
        }
        deaths > 8 || work.dead_letters().await.len() == 14
    });
    waited.await.unwrap();
    good_ones_done(&work).await;
    work.wait_until_acked("zoo").await;
    assert_reasons(&work, &badly).await;
    assert_eq!(deaths, 5);
    drop(process);
}
