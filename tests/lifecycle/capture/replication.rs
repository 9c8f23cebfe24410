//! What another server sends is captured where it is applied.

use aftercommit::config::PostgresConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::SOON;

/// A server that applies changes fires no triggers of statements.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_logical_replication_applies_are_told() {
    let settings = vec![("wal_level".into(), "logical".into())];
    let server = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
    let (from, to) = (server.create_database().await.unwrap(), server.create_database().await.unwrap());
    aftercommit::operator::migrate(&PostgresConfig::new(&to)).await.unwrap();
    let (from, to, source) = (PgPool::connect(&from).await.unwrap(), PgPool::connect(&to).await.unwrap(), from);
    let run = async |pool: &PgPool, sql: &str| {
        sqlx::raw_sql(AssertSqlSafe(sql.to_string()))
            .execute(pool)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    };
    let table = "create table orders (id int primary key, state text, note text)";
    run(&from, &format!("{table}; create publication orders for table orders")).await;
    // On one server the slot has to be there before.
    sqlx::query("select pg_create_logical_replication_slot('orders', 'pgoutput')").execute(&from).await.unwrap();
    run(&to, &format!("{table}; select aftercommit.capture('orders', type => 'order')")).await;
    let subscribe = format!(
        "create subscription orders connection '{source}' publication orders with (create_slot = false, copy_data = false, slot_name = orders)"
    );
    run(&to, &subscribe).await;
    run(&from, "insert into orders values (1, 'new', repeat('x', 9000))").await;
    run(&from, "update orders set state = 'paid'").await;
    run(&from, "update orders set state = 'paid'").await;
    run(&from, "delete from orders").await;
    run(&from, "truncate orders").await;
    let expected = ["order.inserted", "order.updated", "order.deleted", "order.truncated"];
    eventually(SOON, "the changes are told", async || {
        let types: Vec<String> =
            sqlx::query_scalar("select type from aftercommit.outbox order by id").fetch_all(&to).await.unwrap();
        types == expected
    })
    .await
    .unwrap();
    let carried: bool = sqlx::query_scalar(
        "select data->'new'->>'note' = repeat('x', 9000) from aftercommit.events where type = 'order.updated'",
    )
    .fetch_one(&to)
    .await
    .unwrap();
    assert!(carried, "what was not sent again, because it had not changed");
    run(
        &to,
        "alter subscription orders disable; alter subscription orders set (slot_name = none); drop subscription orders",
    )
    .await;
}
