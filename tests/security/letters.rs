//! What is done to dead letters stands in the audit trail, with the tool or with SQL by hand.

use serde_json::Value;
use sqlx::{Connection, PgConnection};

use crate::stage::{Stage, succeeded};

async fn letters(stage: &Stage, count: i64) {
    stage
        .database
        .execute(&format!(
            "insert into aftercommit.dead_letter (subscriber, event_id, type, version, key, source, time, headers, payload,
                    content_type, stream, stream_seq, attempts, reason, first_failed_at)
             select 'receipts', gen_random_uuid(), 'test.number', 1, 'a', '/test', now(), '{{\"h\": \"1\"}}', 'abc',
                    'text/plain', 'EVENTS', n, 1, 'no', now() from generate_series(1, {count}) as n;
             insert into aftercommit.inbox (subscriber, event_id, stream_seq, outcome)
             select subscriber, event_id, stream_seq, 'dead' from aftercommit.dead_letter"
        ))
        .await;
}

/// Who, as which role, did what, and how much of the event is kept.
async fn trail(stage: &Stage) -> Vec<(String, String, String, Option<String>)> {
    let rows: Vec<(String, String, String, Value)> =
        sqlx::query_as("select who, role, action, detail from aftercommit.audit order by id")
            .fetch_all(&stage.database.pool().await)
            .await
            .unwrap();
    rows.into_iter()
        .map(|(who, role, action, detail)| (who, role, action, detail["payload_base64"].as_str().map(str::to_string)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_or_changing_a_letter_leaves_an_entry_with_the_event() {
    let stage = Stage::new().await;
    letters(&stage, 5).await;
    let login = stage.login("operator");
    let mut operator = PgConnection::connect(&stage.url_of("operator")).await.unwrap();
    for sql in [
        "delete from aftercommit.dead_letter where id = 1",
        "update aftercommit.dead_letter set payload = 'x' where id = 2",
        // Whoever says what it is leaves the event all the same.
        "select set_config('aftercommit.action', 'dead retry', false), set_config('aftercommit.who', 'anna', false)",
        "delete from aftercommit.dead_letter where id = 3",
    ] {
        sqlx::query(sql).execute(&mut operator).await.unwrap();
    }
    let kept = Some("YWJj".to_string());
    let entry = |who: &str, action: &str, kept: &Option<String>| {
        (who.to_string(), login.clone(), action.to_string(), kept.clone())
    };
    let mut expected = vec![
        entry(&login, "dead delete", &kept),
        entry(&login, "dead edit", &kept),
        entry("anna", "dead retry", &kept),
    ];
    assert_eq!(trail(&stage).await, expected);

    // With the tool: what is redriven is kept where it waits, and when it is taken away there, in the trail.
    succeeded(&stage.run("aftercommit", "operator", "operator", &["dead", "retry", "4", "--as", "bert"]));
    succeeded(&stage.run("aftercommit", "operator", "operator", &["dead", "discard", "5", "--as", "bert"]));
    expected.extend([entry("bert", "dead retry", &None), entry("bert", "dead discard", &kept)]);
    assert_eq!(trail(&stage).await, expected);
    let mut operator = PgConnection::connect(&stage.url_of("operator")).await.unwrap();
    sqlx::query("delete from aftercommit.redrive").execute(&mut operator).await.unwrap();
    expected.push(entry(&login, "redrive delete", &kept));
    assert_eq!(trail(&stage).await, expected);
}

/// A worker that has run what was redriven leaves none.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_sent_back_and_is_done_leaves_no_further_entry() {
    let stage = Stage::new().await;
    letters(&stage, 1).await;
    succeeded(&stage.run("aftercommit", "operator", "operator", &["dead", "retry", "1"]));
    let mut worker = PgConnection::connect(&stage.url_of("worker")).await.unwrap();
    let mut tx = worker.begin().await.unwrap();
    sqlx::raw_sql(
        "with taken as (delete from aftercommit.redrive returning subscriber, event_id)
         insert into aftercommit.inbox (subscriber, event_id, stream_seq) select subscriber, event_id, 1 from taken",
    )
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    assert_eq!(trail(&stage).await.len(), 1);
}
