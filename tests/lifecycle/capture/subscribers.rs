//! From a change of a row to the subscriber.

use std::collections::BTreeMap;

use aftercommit::testing::eventually;

use super::order::FAMILY;
use crate::support::{SOON, Work};

const WORKER: &str = r#"
[[subscriber]]
name = "seen"
types = ["*"]
sql = { function = "see" }
"#;

/// Neither the cascade nor the DELETE by hand goes through code of a service.
#[tokio::test(flavor = "multi_thread")]
async fn a_cascade_of_three_levels_and_a_raw_delete_reach_the_subscriber() {
    let work = Work::shared().await;
    let pool = &work.outbox.pool;
    sqlx::raw_sql(
        "create table seen (n bigint generated always as identity, type text, key text, old jsonb);
         create function see(event jsonb) returns void language sql as $$
             insert into seen (type, key, old) values (event->>'type', event->>'partitionkey', event->'data'->'old')
         $$",
    )
    .execute(pool)
    .await
    .unwrap();
    sqlx::raw_sql(FAMILY).execute(pool).await.unwrap();
    let _relay = work.outbox.relay_process();
    let _worker = work.process(WORKER);
    sqlx::raw_sql("delete from parent where id = 1").execute(pool).await.unwrap();
    sqlx::raw_sql("begin; delete from grandchild where id = 211; rollback").execute(pool).await.unwrap();
    sqlx::raw_sql("delete from grandchild where id = 212").execute(pool).await.unwrap();
    let mut seen: Vec<(String, String, serde_json::Value)> = Vec::new();
    let waited = eventually(SOON, "eight events", async || {
        seen = sqlx::query_as("select type, key, old from seen order by n").fetch_all(pool).await.unwrap();
        seen.len() >= 8
    })
    .await;
    assert!(waited.is_ok(), "{seen:?}");
    let mut counts = BTreeMap::new();
    for (event_type, key, old) in &seen {
        assert_eq!(&old["id"].to_string(), key);
        *counts.entry(event_type.as_str()).or_insert(0) += 1;
    }
    assert_eq!(counts, BTreeMap::from([("parent.deleted", 1), ("child.deleted", 2), ("grandchild.deleted", 5)]));
    assert!(seen.iter().any(|(_, key, _)| key == "212") && seen.iter().all(|(_, key, _)| key != "211"));
}
