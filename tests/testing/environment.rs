//! An environment is everything that an integration test needs, and nothing of another test's.

use crate::support::{Act, Number, Record};
use aftercommit::ErrorKind;
use aftercommit::config::{NatsConfig, PostgresConfig};
use aftercommit::outbox;
use aftercommit::testing::Environment;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::{HandlerError, Subscriber};

async fn publish(environment: &Environment, n: i64) -> aftercommit::EventId {
    sqlx::raw_sql("create table if not exists effect (id bigint generated always as identity, event_id uuid, key text, n bigint, attempt int)")
        .execute(environment.pool())
        .await
        .unwrap();
    let mut tx = environment.pool().begin().await.unwrap();
    let id = outbox::publish(&mut tx, &Number { key: None, n }).await.unwrap();
    tx.commit().await.unwrap();
    id
}

fn numbers() -> Subscriber {
    Subscriber::new("numbers").on::<Number>(Record::new(|number| match number.event.n {
        0 => Act::Fail(HandlerError::reject("there is no order 0")),
        _ => Act::Succeed,
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_environments_share_nothing_but_the_servers() {
    let (one, other) = (Environment::start().await.unwrap(), Environment::start().await.unwrap());
    let (one_relay, one_worker) = (one.relay(), one.worker([numbers()]).await.unwrap());
    let _other = (other.relay(), other.worker([numbers()]).await.unwrap());
    let first = publish(&one, 1).await;
    let elsewhere = publish(&other, 2).await;
    one.handled("numbers", first).await.unwrap();
    other.handled("numbers", elsewhere).await.unwrap();

    // What is stopped can be started again.
    one_worker.stop().await.unwrap();
    one_relay.stop().await.unwrap();
    let second = publish(&one, 3).await;
    let _one = (one.relay(), one.worker([numbers()]).await.unwrap());
    one.handled("numbers", second).await.unwrap();
    let effects: Vec<i64> = sqlx::query_scalar("select n from effect order by id").fetch_all(one.pool()).await.unwrap();
    assert_eq!(effects, [1, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_an_event_that_died_says_why() {
    // The servers may be anybody's.
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let nats = NatsConfig { url: Nats::shared().await.unwrap().url(), ..NatsConfig::default() };
    let environment = Environment::on(PostgresConfig::new(database), nats).await.unwrap();
    let _running = (environment.relay(), environment.worker([numbers()]).await.unwrap());
    let id = publish(&environment, 0).await;
    let error = environment.handled("numbers", id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Integrity);
    let text = error.to_string();
    assert!(text.contains(&id.to_string()) && text.ends_with("it is dead: there is no order 0"), "{text}");
}
