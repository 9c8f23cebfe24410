//! The behaviours of the ping example, from the repository's call to the outbox.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../examples/ping.rs"]
mod ping;
mod support;

use aftercommit::{Event, EventId};
use ping::{PingEvent, PingRepository};
use sqlx::{Connection, PgPool, PgTransaction};
use support::Database;

async fn pings() -> PgPool {
    let database = Database::migrated().await;
    database.execute(PingRepository::TABLE).await;
    database.pool().await
}

async fn send(tx: &mut PgTransaction<'_>, message: &str) -> EventId {
    PingRepository::send(tx, message).await.unwrap()
}

/// The messages of the events that everybody can see, in the order of the log.
async fn published(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select data ->> 'message' from aftercommit.events order by id").fetch_all(pool).await.unwrap()
}

/// The messages in the table, of which the events tell.
async fn kept(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select message from ping order by id").fetch_all(pool).await.unwrap()
}

#[tokio::test]
async fn a_commit_publishes() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "hello").await;
    assert!(published(&pool).await.is_empty(), "nobody sees it before the commit");
    tx.commit().await.unwrap();
    assert_eq!(published(&pool).await, ["hello"]);
}

#[tokio::test]
async fn a_rollback_publishes_nothing() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "explicit").await;
    tx.rollback().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "dropped").await;
    drop(tx);
    // The same connections go on, and nothing of before comes along.
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "kept").await;
    tx.commit().await.unwrap();
    assert_eq!(published(&pool).await, ["kept"]);
}

#[tokio::test]
async fn a_lost_connection_publishes_nothing() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "never").await;
    let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let gone: bool =
        sqlx::query_scalar("select pg_terminate_backend($1, 10000)").bind(backend).fetch_one(&pool).await.unwrap();
    assert!(gone);
    assert!(tx.commit().await.is_err());
    assert!(published(&pool).await.is_empty());
    assert!(kept(&pool).await.is_empty());
}

#[tokio::test]
async fn a_released_savepoint_follows_the_outer_rollback() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "outer").await;
    let mut savepoint = tx.begin().await.unwrap();
    send(&mut savepoint, "inner").await;
    savepoint.commit().await.unwrap();
    assert!(published(&pool).await.is_empty(), "a released savepoint is no commit");
    tx.rollback().await.unwrap();
    assert!(published(&pool).await.is_empty());
}

#[tokio::test]
async fn a_rolled_back_savepoint_takes_only_its_own_events() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    send(&mut tx, "before").await;
    let mut savepoint = tx.begin().await.unwrap();
    send(&mut savepoint, "inner").await;
    let mut nested = savepoint.begin().await.unwrap();
    send(&mut nested, "innermost").await;
    nested.commit().await.unwrap();
    savepoint.rollback().await.unwrap();
    send(&mut tx, "after").await;
    tx.commit().await.unwrap();
    assert_eq!(published(&pool).await, ["before", "after"]);
    assert_eq!(kept(&pool).await, ["before", "after"]);
}

#[tokio::test]
async fn a_transaction_keeps_the_order_of_its_events() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    let mut messages = Vec::new();
    for n in 0..20 {
        messages.push(format!("ping {n}"));
        if n % 3 == 0 {
            let mut savepoint = tx.begin().await.unwrap();
            send(&mut savepoint, &messages[n]).await;
            savepoint.commit().await.unwrap();
        } else {
            send(&mut tx, &messages[n]).await;
        }
    }
    tx.commit().await.unwrap();
    assert_eq!(published(&pool).await, messages);
}

/// What a service's own tests do: look at the events of the open transaction, then roll back.
#[tokio::test]
async fn pending_events_can_be_asserted_before_the_commit() {
    let pool = pings().await;
    let mut tx = pool.begin().await.unwrap();
    let id = send(&mut tx, "pending").await;
    let pending: Vec<(sqlx::types::Uuid, String, Vec<u8>)> = sqlx::query_as(
        "select event_id, type, payload from aftercommit.outbox where xid = pg_current_xact_id() order by id",
    )
    .fetch_all(&mut *tx)
    .await
    .unwrap();
    let [(event_id, event_type, payload)] = &pending[..] else { panic!("{} events", pending.len()) };
    assert_eq!((EventId::from(*event_id), event_type.as_str()), (id, PingEvent::TYPE));
    assert_eq!(serde_json::from_slice::<PingEvent>(payload).unwrap().message, "pending");
    tx.rollback().await.unwrap();
    assert!(published(&pool).await.is_empty());
}

#[tokio::test]
async fn nobody_has_to_subscribe() {
    // There is neither relay nor broker here; the event waits in the log.
    let pool = pings().await;
    for message in ["one", "two"] {
        let mut tx = pool.begin().await.unwrap();
        send(&mut tx, message).await;
        tx.commit().await.unwrap();
    }
    assert_eq!(published(&pool).await, ["one", "two"]);
}

/// Each key's row is locked before its event is published, so the log has the order of the commits.
#[tokio::test]
async fn a_key_keeps_its_commit_order_under_its_row_lock() {
    let pool = pings().await;
    sqlx::query("create table counter (key text primary key, n bigint not null)").execute(&pool).await.unwrap();
    sqlx::query("insert into counter select 'key-' || k, 0 from generate_series(0, 2) k").execute(&pool).await.unwrap();
    let writers = (0..8).map(|writer| {
        let pool = pool.clone();
        tokio::spawn(async move {
            for turn in 0..40 {
                let mut tx = pool.begin().await.unwrap();
                let key = format!("key-{}", (writer + turn) % 3);
                // Whatever the transaction did before it took the lock must not matter.
                sqlx::query("select pg_current_xact_id()").execute(&mut *tx).await.unwrap();
                let n: i64 = sqlx::query_scalar("update counter set n = n + 1 where key = $1 returning n")
                    .bind(&key)
                    .fetch_one(&mut *tx)
                    .await
                    .unwrap();
                send(&mut tx, &format!("{key} {n}")).await;
                if turn % 5 == 0 { tx.rollback().await } else { tx.commit().await }.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let mut last = [0_i64; 3];
    for message in published(&pool).await {
        let (key, n) = message.rsplit_once(' ').unwrap();
        let key: usize = key["key-".len()..].parse().unwrap();
        let n: i64 = n.parse().unwrap();
        assert_eq!(n, last[key] + 1, "{message}");
        last[key] = n;
    }
    assert_eq!(last.iter().sum::<i64>(), 8 * 32);
}
