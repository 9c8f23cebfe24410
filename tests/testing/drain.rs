//! `drain` does with committed events what relay and worker do, without NATS.

use std::time::Duration;

use crate::support::{Act, Database, Number, Record};
use aftercommit::testing::{drain, drain_into};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{ErrorKind, EventId, outbox};
use futures_util::FutureExt;
use sqlx::{PgPool, PgTransaction};

const TABLE: &str =
    "create table effect (id bigint generated always as identity, event_id uuid, key text, n bigint, attempt int)";

async fn pool() -> PgPool {
    let database = Database::migrated().await;
    database.execute(TABLE).await;
    database.pool().await
}

/// Commits these numbers, each with its key.
async fn publish(pool: &PgPool, numbers: &[(&str, i64)]) -> Vec<EventId> {
    let numbers: Vec<Number> = numbers
        .iter()
        .map(|(key, n)| Number { key: Some(*key).filter(|key| !key.is_empty()).map(Into::into), n: *n })
        .collect();
    let mut tx = pool.begin().await.unwrap();
    let ids = outbox::publish_all(&mut tx, &numbers).await.unwrap();
    tx.commit().await.unwrap();
    ids
}

/// The numbers that took effect, each with the attempt that did it.
async fn effects(pool: &PgPool) -> Vec<(i64, i32)> {
    sqlx::query_as("select n, attempt from effect order by id").fetch_all(pool).await.unwrap()
}

async fn count(pool: &PgPool, table: &'static str) -> i64 {
    let sql = sqlx::AssertSqlSafe(format!("select count(*) from aftercommit.{table}"));
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

fn numbers(act: impl Fn(&Delivery<Number>) -> Act + Send + Sync + 'static) -> Subscriber {
    Subscriber::new("numbers").on::<Number>(Record::new(act))
}

fn good() -> Subscriber {
    numbers(|_| Act::Succeed)
}

#[tokio::test]
async fn what_is_committed_is_delivered_once_and_in_order() {
    let pool = pool().await;
    let mut ids = publish(&pool, &[("a", 1), ("", 2), ("a", 3)]).await;
    let mut open = pool.begin().await.unwrap();
    let late = outbox::publish(&mut open, &Number { key: None, n: 4 }).await.unwrap();
    let mut undone = pool.begin().await.unwrap();
    outbox::publish(&mut undone, &Number { key: None, n: 5 }).await.unwrap();
    undone.rollback().await.unwrap();
    ids.extend(publish(&pool, &[("a", 6)]).await);
    outbox::publish_raw(&mut open, outbox::RawEvent::new("for.others", "text/plain", "")).await.unwrap();

    let drained = drain(&pool, [good()]).await.unwrap();
    drained.assert_all_handled();
    assert_eq!(drained["numbers"].handled, ids);
    assert_eq!(effects(&pool).await, [(1, 1), (2, 1), (3, 1), (6, 1)]);
    assert!(drain(&pool, [good()]).await.unwrap()["numbers"].handled.is_empty(), "nothing is new");

    open.commit().await.unwrap();
    assert_eq!(drain(&pool, [good()]).await.unwrap()["numbers"].handled, [late]);
    assert_eq!((count(&pool, "inbox").await, count(&pool, "dead_letter").await), (5, 0));
}

/// A batch that is undone as a whole runs again without the event that failed, and that one runs until it succeeds.
#[tokio::test]
async fn failed_attempts_are_repeated_at_once_and_spoil_nothing() {
    let pool = pool().await;
    let ids = publish(&pool, &[("a", 1), ("b", 2), ("b", 3), ("c", 4)]).await;
    let failing = |delivery: &Delivery<Number>| match (delivery.event.n, delivery.attempt) {
        (2, 1) => Act::Fail(HandlerError::retry("not today")),
        (2, 2) => Act::Panic,
        (2, 3) => Act::Fail(HandlerError::retry_after(Duration::from_secs(3600), "an hour")),
        _ => Act::Succeed,
    };
    let drained = drain(&pool, [numbers(failing)]).await.unwrap();
    let outcome = &drained["numbers"];
    assert_eq!(outcome.handled, [ids[0], ids[3], ids[1], ids[2]], "the key of the failing event waits for it");
    let failed: Vec<_> =
        outcome.failed.iter().map(|failed| (failed.id, failed.attempt, failed.error.as_str())).collect();
    assert_eq!(
        failed,
        [(ids[1], 1, "not today"), (ids[1], 2, "the handler panicked: as told"), (ids[1], 3, "an hour")]
    );
    assert_eq!(effects(&pool).await, [(1, 1), (4, 1), (2, 4), (3, 1)]);
    assert_eq!(count(&pool, "attempt").await, 0);
    let panic = std::panic::catch_unwind(|| drained.assert_all_handled()).unwrap_err();
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(
        message.contains(&format!("subscriber numbers, event {}: attempt 1 failed: not today", ids[1])),
        "{message}"
    );
}

#[tokio::test]
async fn what_is_given_up_is_a_dead_letter() {
    let pool = pool().await;
    let ids = publish(&pool, &[("a", 1), ("a", 2), ("a", 3), ("", 4)]).await;
    let mut tx = pool.begin().await.unwrap();
    let unreadable = outbox::RawEvent::new("test.number", "application/json", r#"{"n": "four"}"#);
    let unreadable = outbox::publish_raw(&mut tx, unreadable).await.unwrap();
    tx.commit().await.unwrap();
    let act = |delivery: &Delivery<Number>| match delivery.event.n {
        1 => Act::Fail(HandlerError::reject("never")),
        2 => Act::Fail(HandlerError::retry("again")),
        _ => Act::Succeed,
    };
    let drained = drain(&pool, [numbers(act).max_attempts(3)]).await.unwrap();
    let outcome = &drained["numbers"];
    let dead: Vec<_> = outcome.dead.iter().map(|dead| (dead.id, dead.reason.as_str())).collect();
    assert_eq!(dead[0], (ids[0], "never"));
    assert!(dead.contains(&(ids[1], "again")) && dead.iter().any(|(id, _)| *id == unreadable), "{dead:?}");
    assert_eq!(outcome.failed.iter().map(|failed| failed.attempt).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(outcome.handled.len(), 2);
    let rows: Vec<(i32, String, String)> =
        sqlx::query_as("select attempts, reason, stream from aftercommit.dead_letter order by sequence")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(rows[0], (1, "never".into(), "outbox".into()));
    assert_eq!(rows[1], (3, "again".into(), "outbox".into()));
}

#[tokio::test]
async fn a_snoozed_event_is_reported_and_its_key_waits() {
    let pool = pool().await;
    let ids = publish(&pool, &[("a", 1), ("a", 2), ("b", 3), ("", 4), ("", 5)]).await;
    let hour = Duration::from_secs(3600);
    let act = move |delivery: &Delivery<Number>| match delivery.event.n {
        1 | 4 => Act::Fail(HandlerError::snooze(hour)),
        _ => Act::Succeed,
    };
    let drained = drain(&pool, [numbers(act)]).await.unwrap();
    let outcome = &drained["numbers"];
    assert_eq!(outcome.snoozed, [(ids[0], hour), (ids[3], hour)]);
    assert_eq!((&outcome.waiting[..], &outcome.handled[..]), (&[ids[1]][..], &[ids[2], ids[4]][..]));
    assert!(outcome.failed.is_empty() && count(&pool, "attempt where attempts > 0").await == 0);
    assert_eq!(drain(&pool, [good()]).await.unwrap()["numbers"].handled, [ids[0], ids[1], ids[3]]);
}

#[tokio::test]
async fn subscribers_do_not_hinder_each_other() {
    let pool = pool().await;
    let ids = publish(&pool, &[("a", 1), ("a", 2)]).await;
    let failing = Subscriber::new("failing").on::<Number>(Record::new(|_| Act::Fail(HandlerError::reject("no"))));
    let drained = drain(&pool, [failing, good()]).await.unwrap();
    assert_eq!(drained["numbers"].handled, ids);
    assert_eq!(drained["failing"].dead.len(), 2);
    assert_eq!(drained.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["failing", "numbers"]);
}

#[tokio::test]
async fn subscribers_may_have_a_database_of_their_own() {
    let (outbox, inbox) = (pool().await, pool().await);
    publish(&outbox, &[("a", 1)]).await;
    assert_eq!(drain_into(&outbox, &inbox, [good()]).await.unwrap()["numbers"].handled.len(), 1);
    assert_eq!((effects(&outbox).await, effects(&inbox).await), (vec![], vec![(1, 1)]));
}

/// A transaction that began first and commits last, and large events, which are read one by one.
#[tokio::test]
async fn events_come_in_the_order_of_the_outbox() {
    let pool = pool().await;
    let mut slow = pool.begin().await.unwrap();
    outbox::publish(&mut slow, &Number { key: None, n: 1 }).await.unwrap();
    publish(&pool, &[("", 2), (&"k".repeat(500), 3)]).await;
    slow.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    let large = format!(r#"{{"n": 4, "key": null, "more": "{}"}}"#, "x".repeat(100_000));
    outbox::publish_raw(&mut tx, outbox::RawEvent::new("test.number", "application/json", large)).await.unwrap();
    let many: Vec<Number> = (5..=2200).map(|n| Number { key: Some((n % 7).to_string()), n }).collect();
    outbox::publish_all(&mut tx, &many).await.unwrap();
    tx.commit().await.unwrap();
    drain(&pool, [good()]).await.unwrap().assert_all_handled();
    let found: Vec<i64> = effects(&pool).await.into_iter().map(|(n, _)| n).collect();
    assert_eq!(found, (1..=2200).collect::<Vec<_>>());
}

/// What a handler publishes belongs to its transaction.
#[tokio::test]
async fn what_handlers_publish_is_delivered_by_the_next_call() {
    struct CountDown;
    impl Handler<Number> for CountDown {
        async fn handle(&self, tx: &mut PgTransaction<'_>, number: &Delivery<Number>) -> Result<(), HandlerError> {
            if number.event.n > 0 {
                outbox::publish(tx, &Number { key: None, n: number.event.n - 1 }).await?;
            }
            if number.event.n == 2 && number.attempt == 1 {
                return Err(HandlerError::retry("what this attempt has published is undone"));
            }
            Ok(())
        }
    }
    let pool = pool().await;
    publish(&pool, &[("", 3)]).await;
    for _ in 0..4 {
        let drained = drain(&pool, [Subscriber::new("count-down").on::<Number>(CountDown)]).await.unwrap();
        assert_eq!(drained["count-down"].handled.len(), 1);
    }
    assert_eq!((count(&pool, "outbox").await, count(&pool, "inbox").await), (4, 4));
}

#[tokio::test]
async fn sql_functions_are_subscribers_too() {
    let pool = pool().await;
    publish(&pool, &[("a", 1), ("a", 2)]).await;
    let subscriber = || Subscriber::sql("numbers", "take_number", ["*"]).unwrap();
    let missing = drain(&pool, [subscriber()]).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotReady);
    assert!(missing.to_string().contains("take_number"), "{missing}");
    sqlx::raw_sql(
        "create function take_number(event jsonb) returns void language sql as $$
            insert into effect (n, attempt) values ((event -> 'data' ->> 'n')::bigint, 0) $$",
    )
    .execute(&pool)
    .await
    .unwrap();
    drain(&pool, [subscriber()]).await.unwrap().assert_all_handled();
    assert_eq!(effects(&pool).await, [(1, 0), (2, 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_runs_the_subscriber_is_told() {
    let pool = pool().await;
    sqlx::query(
        "insert into aftercommit.lease values ('subscriber:numbers', 'a worker', 1, now() + interval '30 seconds')",
    )
    .execute(&pool)
    .await
    .unwrap();
    let error = drain(&pool, [good()]).await.unwrap_err();
    assert!(error.to_string().contains("a worker runs the subscriber numbers"), "{error}");
    // One that takes over in between decides about everything that comes.
    sqlx::query("update aftercommit.lease set expires_at = now()").execute(&pool).await.unwrap();
    publish(&pool, &[("a", 1)]).await;
    let thief = pool.clone();
    let act = move |_: &Delivery<Number>| {
        let steal = sqlx::query("update aftercommit.lease set epoch = epoch + 1").execute(&thief);
        drop(tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(steal)));
        Act::Fail(HandlerError::reject("no"))
    };
    assert_eq!(drain(&pool, [numbers(act)]).await.unwrap_err().kind(), ErrorKind::Fenced);
}

#[tokio::test]
async fn what_is_away_is_an_error_and_no_attempt() {
    let pool = pool().await;
    publish(&pool, &[("a", 1)]).await;
    let away = || Act::Fail(sqlx::Error::PoolTimedOut.into());
    let error = drain(&pool, [numbers(move |_| away())]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotReady);
    assert_eq!(count(&pool, "attempt").await, 0);
    drain(&pool, [good()]).await.unwrap().assert_all_handled();
    assert!(drain(&pool, []).await.is_err() && drain(&pool, [good(), good()]).await.is_err());
    let unknown = std::panic::AssertUnwindSafe(async { drain(&pool, [good()]).await.unwrap()["other"].clone() });
    assert!(unknown.catch_unwind().await.is_err());
}
