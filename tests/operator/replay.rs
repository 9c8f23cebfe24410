//! `aftercommit replay`: events run at one subscriber that it has missed, or once more, also those that the stream does not
//! hold any more; in order, once, and with a line in the audit trail.

use std::process::{Command, Output};

use crate::support::{Number, Outbox, Record, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::Subscriber;
use serde_json::Value;

const KEYS: [&str; 2] = ["a", "b"];

fn subscriber() -> Subscriber {
    Subscriber::new("back").on::<Number>(Record::good())
}

/// A publisher with a running relay, and a subscriber in another database.
async fn apart() -> (Outbox, Work) {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let publisher = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let work = Work::beside(&publisher).await;
    (publisher, work)
}

async fn publish(publisher: &Outbox, numbers: std::ops::RangeInclusive<i64>) {
    let stored = publisher.stored().await;
    let more = (numbers.end() - numbers.start() + 1) as u64 * 2;
    sqlx::query(
        "select aftercommit.publish('test.number', jsonb_build_object('key', key, 'n', n), key)
           from generate_series($1, $2) as n, unnest($3::text[]) as key order by n, key",
    )
    .bind(*numbers.start())
    .bind(*numbers.end())
    .bind(KEYS.as_slice())
    .execute(&publisher.pool)
    .await
    .unwrap();
    eventually(SOON, "it is published", async || publisher.stored().await == stored + more).await.unwrap();
    publisher.settled().await;
}

async fn run_until(work: &Work, count: i64) {
    let worker = work.run(subscriber()).await;
    work.wait_for(count).await;
    work.wait_until_acked("back").await;
    worker.stop().await;
}

fn replay(work: &Work, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["replay", "--subscriber", "back", "--as", "anna"])
        .args(arguments)
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .env("NATS_URL", &work.outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", work.outbox.naming.prefix.to_string())
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handled_runs_once_more_only_when_that_is_said() {
    let (publisher, work) = apart().await;
    let relay = publisher.relay();
    publish(&publisher, 1..=4).await;
    publish(&publisher, 5..=10).await;
    run_until(&work, 20).await;
    let stream = work.context.get_stream(&publisher.naming.stream).await.unwrap();
    stream.purge().sequence(12).await.unwrap();

    let nothing = replay(&work, &["--key", "a", "--yes"]);
    assert!(nothing.status.success() && said(&nothing) == "0 events sent to back\n", "{}", said(&nothing));
    let refused = replay(&work, &["--key", "a", "--again"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("10 events would be sent"), "{}", said(&refused));
    let shown = replay(&work, &["--key", "a", "--again", "--dry-run"]);
    assert!(
        said(&shown).starts_with("10 events would be sent to back:\n") && said(&shown).contains("outbox"),
        "{}",
        said(&shown)
    );
    let rows = async || -> i64 {
        sqlx::query_scalar("select count(*) from aftercommit.redrive").fetch_one(&work.outbox.pool).await.unwrap()
    };
    assert_eq!(rows().await, 0, "nothing was sent");

    let sent = replay(&work, &["--key", "a", "--again", "--yes"]);
    assert!(sent.status.success() && said(&sent) == "10 events sent to back\n", "{}", said(&sent));
    run_until(&work, 30).await;
    let once: Vec<i64> = (1..=10).collect();
    assert_eq!(work.numbers("a").await, [once.clone(), once.clone()].concat());
    assert_eq!(work.numbers("b").await, once, "the other key did not run again");
    let audit: Vec<(String, String, i64)> =
        sqlx::query_as("select who, action, count(*) from aftercommit.audit group by who, action order by action")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    assert_eq!(audit[1], ("anna".into(), "replay again".into(), 10));
    assert!(audit[0].0 == "anna" && audit[0].1 == "replay", "{audit:?}");
    assert_eq!(rows().await, 0);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_runs_and_nothing_else() {
    let (publisher, work) = apart().await;
    let relay = publisher.relay();
    publish(&publisher, 1..=10).await;
    run_until(&work, 20).await;
    // Half of it is forgotten, and of that half the stream holds one part.
    sqlx::raw_sql("delete from aftercommit.inbox where stream_seq % 4 < 2; delete from effect")
        .execute(&work.outbox.pool)
        .await
        .unwrap();
    let stream = work.context.get_stream(&publisher.naming.stream).await.unwrap();
    stream.purge().sequence(9).await.unwrap();
    relay.stop().await.unwrap();
    let deaf = replay(&work, &["--type", "test.number", "--yes"]);
    assert!(!deaf.status.success() && said(&deaf).contains("no relay answers"), "{}", said(&deaf));
    let relay = publisher.relay();
    let only = replay(&work, &["--type", "test.number", "--yes", "--stream-only", "--json"]);
    let found: Value = serde_json::from_slice(&only.stdout).unwrap_or_else(|_| panic!("{}", said(&only)));
    assert_eq!(found["events"], 6);
    let ids: Vec<uuid::Uuid> = sqlx::query_scalar("select event_id from aftercommit.outbox where id in (1, 3)")
        .fetch_all(&publisher.pool)
        .await
        .unwrap();
    let ids = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let named = replay(&work, &["--ids", &ids]);
    assert!(said(&named).starts_with("1 event sent to back; 1 left out, "), "{}", said(&named));
    let past = replay(&work, &["--until", "2020-01-01T00:00:00Z", "--yes"]);
    assert!(said(&past) == "0 events sent to back\n", "{}", said(&past));
    let rest = replay(&work, &["--since", "2020-01-01T00:00:00Z", "--yes"]);
    assert!(said(&rest) == "3 events sent to back\n", "{}", said(&rest));
    run_until(&work, 10).await;
    // In key order, although they were sent in three parts.
    for key in KEYS {
        let numbers = work.numbers(key).await;
        assert!(numbers.len() == 5 && numbers.is_sorted(), "{numbers:?}");
    }
    relay.stop().await.unwrap();
}

/// The relay is away, and so is what the stream held: whoever may read the outbox's database goes there.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_relay_it_reads_the_outboxs_database() {
    let (publisher, work) = apart().await;
    let relay = publisher.relay();
    publish(&publisher, 1..=10).await;
    run_until(&work, 20).await;
    relay.stop().await.unwrap();
    sqlx::raw_sql("delete from aftercommit.inbox where stream_seq % 4 < 2; delete from effect")
        .execute(&work.outbox.pool)
        .await
        .unwrap();
    work.context.get_stream(&publisher.naming.stream).await.unwrap().purge().sequence(9).await.unwrap();
    let url = publisher.postgres.url.as_str();
    let shown = replay(&work, &["--type", "test.number", "--dry-run", "--outbox-database", url]);
    assert!(said(&shown).starts_with("10 events would be sent to back:\n"), "{}", said(&shown));
    let file = std::env::temp_dir().join(format!("{}-outbox-url", publisher.naming.stream));
    std::fs::write(&file, url).unwrap();
    let file = file.to_str().unwrap();
    let twice = replay(&work, &["--key", "a", "--yes", "--outbox-database", url, "--outbox-database-file", file]);
    assert_eq!(twice.status.code(), Some(2), "{}", said(&twice));
    assert!(said(&twice).contains("OUTBOX_DATABASE_URL_FILE"), "{}", said(&twice));
    let wrong = replay(&work, &["--key", "a", "--yes", "--outbox-database", "nonsense"]);
    assert!(wrong.status.code() == Some(2) && said(&wrong).contains("--outbox-database"), "{}", said(&wrong));
    let sent = replay(&work, &["--key", "a", "--yes", "--outbox-database-file", file]);
    assert!(said(&sent) == "5 events sent to back\n", "{}", said(&sent));
    let again = replay(&work, &["--key", "b", "--again", "--yes", "--outbox-database", url]);
    assert!(said(&again) == "10 events sent to back\n", "{}", said(&again));
    run_until(&work, 15).await;
    let numbers = work.numbers("a").await;
    assert!(numbers.len() == 5 && numbers.is_sorted(), "{numbers:?}");
    assert_eq!(work.numbers("b").await, (1..=10).collect::<Vec<_>>());
    let audit: Vec<(String, String, i64)> =
        sqlx::query_as("select who, action, count(*) from aftercommit.audit group by who, action order by action")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    assert!(audit.contains(&("anna".into(), "replay again".into(), 5)), "{audit:?}");
}
