//! G1 to G4 and G9 together: from concurrent transactions in one database to a subscriber's effects in another one.

use std::collections::{BTreeMap, HashMap};

use crate::support::{Outbox, SOON, Work, Writers};
use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use sqlx::PgPool;

/// The function fails for one event in a hundred, which is tried again.
const WORKER: &str = r#"
[[subscriber]]
name = "seen"
types = ["*"]
sql = { function = "see" }
max_attempts = 100
ack_wait = "2s"
backoff = { first = "5ms", max = "50ms" }
"#;

async fn outbox() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

/// The subscriber's side: a database of its own, with a function that writes down what it gets.
async fn subscriber_of(outbox: &Outbox) -> Work {
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let postgres = PostgresConfig::new(url);
    operator::migrate(&postgres).await.unwrap();
    let pool = PgPool::connect(&postgres.url).await.unwrap();
    sqlx::raw_sql(
        "create table seen (
            n bigint generated always as identity, event_id uuid, type text, key text, sequence bigint, version int);
         create function see(event jsonb) returns void language plpgsql as $$
         begin
            insert into seen (event_id, type, key, sequence, version)
            values ((event ->> 'id')::uuid, event ->> 'type', event ->> 'partitionkey',
                    (event ->> 'sequence')::bigint, (event -> 'data' ->> 'version')::int);
            if random() < 0.01 then
                raise exception 'now and then';
            end if;
         end $$",
    )
    .execute(&pool)
    .await
    .unwrap();
    let side = Outbox { postgres, pool, nats: outbox.nats.clone(), naming: outbox.naming.clone() };
    Work { context: side.js().await, outbox: side }
}

async fn seen(subscriber: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from seen").fetch_one(&subscriber.outbox.pool).await.unwrap()
}

/// Relays and workers are killed while 16 writers commit, roll back, and roll back to savepoints; handlers fail.
#[tokio::test(flavor = "multi_thread")]
async fn every_committed_event_takes_effect_once_and_in_order() {
    let outbox = outbox().await;
    let subscriber = subscriber_of(&outbox).await;
    let writers = Writers::start(&outbox.pool, 16, 20).await;
    let mut relay = outbox.relay_process();
    let mut worker = subscriber.process(WORKER);
    for round in 0..4 {
        writers.more(200).await;
        let before = seen(&subscriber).await;
        eventually(SOON, "some effects", async || seen(&subscriber).await > before).await.unwrap();
        if round % 2 == 0 {
            relay.kill();
            relay = outbox.relay_process();
        } else {
            worker.kill();
            worker = subscriber.process(WORKER);
        }
    }
    writers.stop().await;
    let messages = outbox.assert_complete().await;
    let committed = outbox.committed().await;
    eventually(SOON, "every event takes effect", async || seen(&subscriber).await >= committed.len() as i64)
        .await
        .unwrap();
    subscriber.wait_until_acked("seen").await;
    assert_eq!(worker.stop(), Some(0));

    type Effect = (String, String, Option<String>, i64, Option<i32>);
    let effects: Vec<Effect> =
        sqlx::query_as("select event_id::text, type, key, sequence, version from seen order by n")
            .fetch_all(&subscriber.outbox.pool)
            .await
            .unwrap();
    let mut times: HashMap<&str, usize> = HashMap::new();
    for (id, ..) in &effects {
        *times.entry(id).or_default() += 1;
    }
    assert!(times.values().all(|times| *times == 1), "an event took effect twice");
    assert!(committed.iter().all(|id| times.contains_key(id.as_str())), "an event took no effect");
    assert_eq!(times.len(), committed.len(), "an event took effect that was never committed");
    // The writers roll this one back to a savepoint, within transactions that commit.
    assert!(effects.iter().all(|(_, event_type, ..)| event_type != "noise.undone"));
    assert!(effects.iter().any(|(_, event_type, ..)| event_type == "noise.kept"));

    let mut versions: BTreeMap<&str, i32> = BTreeMap::new();
    for (_, _, key, sequence, version) in &effects {
        let (Some(key), Some(version)) = (key, version) else { continue };
        let last = versions.entry(key).or_default();
        assert_eq!(*version, *last + 1, "key {key} out of order at outbox id {sequence}");
        *last = *version;
    }
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from aftercommit.dead_letter) + (select count(*) from aftercommit.attempt)",
    )
    .fetch_one(&subscriber.outbox.pool)
    .await
    .unwrap();
    assert_eq!(left, 0, "attempts or dead letters are left");
    println!("{} events, {} messages, each took effect once", committed.len(), messages.len());
}
