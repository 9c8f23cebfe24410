//! Forgetting with the roles and users as they are shipped, beside a relay and a worker that have theirs.

use aftercommit::testing::eventually;

use crate::stage::{Stage, started, succeeded};
use crate::support::SOON;

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_rights_suffice_to_forget() {
    let stage = Stage::provisioned().await;
    let outbox = stage.outbox().await;
    let relay = started(stage.command("aftercommit-relay", "relay", "relay"), &stage.log("relay"));
    let mut worker = stage.command("aftercommit-worker", "worker", "receipts");
    worker.args(["--config", &stage.toml()]);
    let worker = started(worker, &stage.log("worker"));
    outbox.publish("test.number", "{\"key\": \"a\", \"n\": 1}", Some("a")).await;
    outbox.publish("test.number", "{\"key\": \"b\", \"n\": 1}", Some("b")).await;
    let count = async |sql: &str| {
        sqlx::query_scalar::<_, i64>(sqlx::AssertSqlSafe(format!("select count(*) from {sql}")))
            .fetch_one(&outbox.pool)
            .await
            .unwrap()
    };
    let handled = async || count("aftercommit.inbox").await == 2;
    eventually(SOON, "both are handled", handled).await.unwrap();
    outbox.settled().await;
    let forget = ["forget", "--key", "a", "--why", "request 1", "--yes"];
    let told = succeeded(&stage.run("aftercommit", "eraser", "eraser", &forget));
    assert_eq!(told, "request 1: 1 event forgotten; 1 message of the stream erased\n");
    assert_eq!(count("aftercommit.outbox where content_type = 'application/vnd.aftercommit-tombstone+json'").await, 1);
    // In a transaction of a service that has the role, too.
    let pool = sqlx::PgPool::connect(&stage.url_of("eraser")).await.unwrap();
    let forgotten = "select aftercommit.forget('orders', 'request 2', key => 'b')";
    sqlx::query(forgotten).execute(&pool).await.unwrap();
    let told = succeeded(&stage.run("aftercommit", "eraser", "eraser", &["forget", "--resume"]));
    assert_eq!(told, "request 2: 1 event forgotten; 1 message of the stream erased\n");
    eventually(SOON, "the worker takes the tombstones", async || {
        let messages = outbox.stored().await;
        let consumer = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
        let info = consumer.consumer_info("receipts").await.unwrap();
        messages == 2 && info.num_pending == 0 && info.num_ack_pending == 0
    })
    .await
    .unwrap();
    // The relay and the worker may not.
    for (login, user) in [("relay", "relay"), ("worker", "receipts"), ("operator", "operator")] {
        let refused = stage.run("aftercommit", login, user, &forget);
        assert!(!refused.status.success(), "{login}");
    }
    let refused = stage.run("aftercommit", "eraser", "operator", &["forget", "--key", "c", "--why", "x", "--yes"]);
    assert!(refused.status.success(), "nothing had to be erased");
    for name in ["relay", "worker"] {
        let log = std::fs::read_to_string(stage.log(name)).unwrap();
        assert!(!log.contains("permission denied") && !log.contains("Permissions Violation"), "{name}: {log}");
    }
    drop((relay, worker));
}
