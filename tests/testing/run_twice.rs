//! `run_twice` tells handlers that may run again from those that must not.

use crate::support::{Database, Number};
use aftercommit::testing::run_twice;
use aftercommit::worker::{Delivery, Handler, HandlerError};
use aftercommit::{Error, ErrorKind, outbox};
use sqlx::{AssertSqlSafe, PgPool, PgTransaction};

/// A handler that runs these statements with the event's number as `{n}`.
struct Sql(&'static str);

impl Handler<Number> for Sql {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        let sql = self.0.replace("{n}", &delivery.event.n.to_string());
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut **tx).await?;
        Ok(())
    }
}

async fn pool() -> PgPool {
    let database = Database::migrated().await;
    database
        .execute(
            "create table total (n bigint not null); insert into total values (0);
             create table seen (n bigint primary key, at timestamptz default clock_timestamp(), what jsonb);
             create schema \"Other\"; create table \"Other\".\"a log\" (line text);
             create table parts (n bigint) partition by range (n);
             create table parts_low partition of parts for values from (0) to (100)",
        )
        .await;
    database.pool().await
}

async fn twice(pool: &PgPool, handler: impl Handler<Number>) -> Result<(), Error> {
    let mut tx = pool.begin().await.unwrap();
    run_twice(&mut tx, &handler, &Delivery::new(Number { key: None, n: 7 })).await
}

#[tokio::test]
async fn handlers_that_may_run_again_pass() {
    let pool = pool().await;
    for sql in [
        "update total set n = {n}",
        "insert into seen (n, what) values ({n}, '{\"a\": 1}') on conflict do nothing",
        "insert into parts select {n} where not exists (select from parts where n = {n})",
        "delete from total",
        "insert into seen (n, at) values ({n}, now()) on conflict (n) do update set at = excluded.at",
    ] {
        twice(&pool, Sql(sql)).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

#[tokio::test]
async fn handlers_that_must_not_run_again_are_found_with_their_tables() {
    let pool = pool().await;
    for (sql, found) in [
        ("update total set n = n + {n}", "total (1 rows, other values)"),
        ("insert into \"Other\".\"a log\" values ('done')", "Other.a log (1 rows, then 2)"),
        ("insert into parts values ({n})", "parts_low (1 rows, then 2)"),
        (
            "insert into seen (n) values ({n}) on conflict (n) do update set at = clock_timestamp()",
            "seen (1 rows, other values)",
        ),
        ("select aftercommit.publish('number.seen', '{n}')", "aftercommit.outbox (1 rows, then 2)"),
        ("insert into seen (n) values ({n})", "the handler's second run failed: duplicate key"),
        ("create table if not exists made (); drop table total", "second run failed: table \"total\" does not exist"),
    ] {
        let error = twice(&pool, Sql(sql)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Integrity, "{sql}");
        assert!(error.to_string().contains(found), "{sql}: {error}");
    }
}

#[tokio::test]
async fn a_test_that_tests_nothing_fails() {
    let pool = pool().await;
    let idle = twice(&pool, Sql("update total set n = {n} where n > {n}")).await.unwrap_err();
    assert!(idle.to_string().contains("nothing was tested"), "{idle}");
    let failing = twice(&pool, Sql("select 1 / 0")).await.unwrap_err();
    assert!(failing.to_string().contains("first run failed: division by zero"), "{failing}");
}

#[tokio::test]
async fn tables_can_be_left_out() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    let delivery = Delivery::new(Number { key: None, n: 7 });
    let handler = Sql("update total set n = {n}; insert into \"Other\".\"a log\" values ('done')");
    let error = run_twice(&mut tx, &handler, &delivery).ignoring("total").await.unwrap_err();
    assert!(error.to_string().ends_with("changed Other.a log (1 rows, then 2)"), "{error}");
    run_twice(&mut tx, &handler, &delivery).ignoring("Other.a log").await.unwrap();
}

#[tokio::test]
async fn the_callers_transaction_is_as_before() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("insert into seen (n) values (7)").execute(&mut *tx).await.unwrap();
    outbox::publish(&mut tx, &Number { key: None, n: 1 }).await.unwrap();
    let delivery = Delivery::new(Number { key: None, n: 7 });
    run_twice(&mut tx, &Sql("delete from seen where n = {n}"), &delivery).await.unwrap();
    // Nor does one that fails spoil it.
    run_twice(&mut tx, &Sql("insert into seen (n) values ({n})"), &delivery).await.unwrap_err();
    let counts: (i64, i64) =
        sqlx::query_as("select (select count(*) from seen), (select count(*) from aftercommit.outbox)")
            .fetch_one(&mut *tx)
            .await
            .unwrap();
    assert_eq!(counts, (1, 1));
}
