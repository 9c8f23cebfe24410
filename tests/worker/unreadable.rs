//! G4, G6: an SQL function gets JSON where an event says that it is JSON. What it could not read is a dead letter at once.

use crate::support::{SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::Subscriber;

/// What no JSON is, and what PostgreSQL's is not.
fn unreadable() -> [Vec<u8>; 8] {
    [
        b"\xef\xbb\xbf{}".to_vec(),
        br#"{"n": 1"#.to_vec(),
        b"{\"s\": \"M\xfcller\"}".to_vec(),
        br#"{"n": NaN}"#.to_vec(),
        br#"{"s": "\u0000"}"#.to_vec(),
        br#"{"s": "\ud800"}"#.to_vec(),
        br#"{"n": 1e200000}"#.to_vec(),
        [vec![b'['; 20_000], vec![b']'; 20_000]].concat(),
    ]
}

async fn put(work: &Work, key: &str, payload: Vec<u8>) {
    let mut event = work.envelope(Some(key), 1);
    event.payload = payload.into();
    work.put(&event).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_a_dead_letter_at_once_with_the_reason() {
    let work = Work::shared().await;
    work.create_apply("").await;
    for (n, payload) in unreadable().into_iter().enumerate() {
        put(&work, &format!("bad-{n}"), payload).await;
        work.send(&format!("good-{n}"), 1).await;
    }
    let worker = work.run(Subscriber::sql("reader", "apply", ["test.number"]).unwrap()).await;
    work.wait_for(8).await;
    eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 8).await.unwrap();
    let letters: Vec<(String, i32, String)> =
        sqlx::query_as("select key, attempts, reason from aftercommit.dead_letter order by key")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    for (key, attempts, reason) in letters {
        let no_json = key.as_str() < "bad-4";
        let words = if no_json { "no JSON, although it is application/json" } else { "PostgreSQL cannot hold" };
        assert!(attempts == 1 && reason.contains(words) && !reason.contains("ller"), "{key}: {attempts}: {reason}");
    }
    assert_eq!(work.count().await, 8, "the good ones");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_wants_bytes_gets_them() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create function apply(event jsonb) returns void language sql as $$
            insert into effect (key, n, attempt) values (convert_from(decode(event ->> 'data_base64', 'base64'), 'UTF8'), 1, 1)
        $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    put(&work, "raw", br#"{"n": 1"#.to_vec()).await;
    let worker = work.run(Subscriber::sql("reader", "apply", ["test.number"]).unwrap().raw_payloads()).await;
    work.wait_for(1).await;
    assert_eq!(work.numbers(r#"{"n": 1"#).await, [1]);
    assert_eq!(work.dead_letters().await, []);
    worker.stop().await;
}
