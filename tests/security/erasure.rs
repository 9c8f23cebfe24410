//! An erasure with the roles of roles.sql: each does its part, and nobody a part of another.

use aftercommit::erase::operate::{self, ErasureStatus};
use aftercommit::erase::{self, Coordinator, Outcome, Request, Requested, Rows, Subject, Tables};
use aftercommit::worker::{Delivery, Handler};
use aftercommit::{Event, config::PostgresConfig};
use sqlx::PgPool;

use crate::stage::Stage;

/// Hands the last event of a type to a handler, as a worker with this login does.
async fn hand<E: Event>(stage: &Stage, login: &str, handler: &impl Handler<E>) {
    let payload: Vec<u8> =
        sqlx::query_scalar("select payload from aftercommit.outbox where type = $1 order by id desc limit 1")
            .bind(E::TYPE)
            .fetch_one(&stage.database.pool().await)
            .await
            .unwrap();
    let event: E = serde_json::from_slice(&payload).unwrap();
    let pool = PgPool::connect(&stage.url_of(login)).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    handler.handle(&mut tx, &Delivery::new(event)).await.unwrap_or_else(|error| panic!("{login}: {error:?}"));
    tx.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_does_its_part_of_an_erasure() {
    let stage = Stage::new().await;
    for (login, granted) in [
        ("asks", &["publisher", "requester"][..]),
        ("counts", &["publisher", "requester", "worker"]),
        ("erases", &["publisher", "worker"]),
    ] {
        stage.roles.login(&stage.database, login, granted).await;
    }
    let erases = stage.login("erases");
    stage
        .database
        .execute(&format!(
            "create table public.orders (id bigint primary key, tenant bigint); insert into public.orders select n, n % 2 from generate_series(1, 10) n;
             grant select, update, delete on public.orders to {erases}"
        ))
        .await;
    let config = PostgresConfig::new(stage.url_of("asks"));
    let request = Request::new(Subject::new("tenant", 1), "ann").participants(["orders"]);
    let job = operate::ask(&config, request).await.unwrap().job;
    let orders = || {
        let tables = Tables::new("orders").of("tenant", [Rows::of("public.orders").column("tenant")]);
        erase::participant(tables)
    };
    let now = || Coordinator::new().verify_after(std::time::Duration::ZERO);
    for _ in 0..2 {
        hand::<Requested>(&stage, "erases", &orders()).await;
        hand::<Outcome>(&stage, "counts", &now()).await;
    }
    let status: ErasureStatus = operate::status(&PostgresConfig::new(stage.url_of("reader")), job).await.unwrap();
    assert_eq!((status.status.as_str(), status.total_items_deleted), ("completed", Some(5)));
    // Whoever asks does not answer, and whoever erases does not ask.
    let request = Request::new(Subject::new("tenant", 0), "eve").participants(["orders"]);
    let refused = operate::ask(&PostgresConfig::new(stage.url_of("erases")), request).await.unwrap_err();
    assert!(refused.report().contains("permission denied"), "{}", refused.report());
}
