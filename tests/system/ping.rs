//! The ping example: what it promises, end to end, and what its repository does when things go wrong.

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/ping.rs"]
mod example;

use std::process::Command;

use crate::support::Database;
use example::behaviours::{self, Stage};
use example::{Error, PingRepository};
use sqlx::PgPool;

/// Runs a behaviour of the example on a stage of its own.
async fn show<F: Future<Output = Result<(), Error>>>(behaviour: impl FnOnce(Stage) -> F) {
    behaviour(Stage::new().await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn commit() {
    show(behaviours::commit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback() {
    show(behaviours::rollback).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoint() {
    show(behaviours::savepoint).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn order() {
    show(behaviours::order).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pre_commit_assertion() {
    show(behaviours::pre_commit_assertion).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_switch() {
    show(behaviours::kill_switch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn marker() {
    show(behaviours::marker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn event_id() {
    show(behaviours::event_id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_subscriber() {
    show(behaviours::no_subscriber).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_commit() {
    let mut publisher = Command::new(std::env::current_exe().unwrap());
    publisher.args(["--ignored", "--exact", "ping::sends_and_dies"]);
    show(|stage| behaviours::crash_after_commit(stage, Ok(publisher))).await;
}

/// Not a test: the process that dies in the test above.
#[tokio::test]
#[ignore = "run by another test"]
async fn sends_and_dies() {
    behaviours::send_and_die().await;
}

async fn publisher() -> PgPool {
    let database = Database::migrated().await;
    database.execute(PingRepository::TABLE).await;
    database.pool().await
}

/// The messages of the events that everybody can see, in the order of the log.
async fn published(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select data ->> 'message' from aftercommit.events order by id").fetch_all(pool).await.unwrap()
}

#[tokio::test]
async fn a_lost_connection_publishes_nothing() {
    let pool = publisher().await;
    let mut tx = pool.begin().await.unwrap();
    PingRepository::send(&mut tx, "a", "never").await.unwrap();
    let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let gone: bool =
        sqlx::query_scalar("select pg_terminate_backend($1, 10000)").bind(backend).fetch_one(&pool).await.unwrap();
    assert!(gone);
    assert!(tx.commit().await.is_err());
    assert!(published(&pool).await.is_empty());
    let pings: i64 = sqlx::query_scalar("select count(*) from host").fetch_one(&pool).await.unwrap();
    assert_eq!(pings, 0, "the change is gone too");
}

/// The repository locks the host's row before it publishes, so the log has the order of the commits.
#[tokio::test]
async fn a_key_keeps_its_commit_order_under_its_row_lock() {
    let pool = publisher().await;
    let writers = (0..8).map(|writer| {
        let pool = pool.clone();
        tokio::spawn(async move {
            for turn in 0..40 {
                let mut tx = pool.begin().await.unwrap();
                // Whatever the transaction did before it took the lock must not matter.
                sqlx::query("select pg_current_xact_id()").execute(&mut *tx).await.unwrap();
                PingRepository::send(&mut tx, &format!("{}", (writer + turn) % 3), "hello").await.unwrap();
                if turn % 5 == 0 { tx.rollback().await } else { tx.commit().await }.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let log: Vec<(i32, i64)> =
        sqlx::query_as("select (data ->> 'host')::int, (data ->> 'n')::bigint from aftercommit.events order by id")
            .fetch_all(&pool)
            .await
            .unwrap();
    let mut last = [0_i64; 3];
    for (host, n) in log {
        let last = &mut last[usize::try_from(host).unwrap()];
        assert_eq!(n, *last + 1, "host {host}");
        *last = n;
    }
    assert_eq!(last.iter().sum::<i64>(), 8 * 32);
}
