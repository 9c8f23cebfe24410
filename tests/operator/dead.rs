//! G1 and G6 at the operator: dead letters are found, looked at, changed, redriven and discarded, and each of these is
//! on record.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::support::{Database, succeeded};
use aftercommit::operator::audit::{self, AuditFilter};
use aftercommit::operator::dead::{self, Edit, Filter};
use aftercommit::{ErrorKind, EventId};
use serde_json::{Value, json};
use sqlx::PgPool;
use sqlx::types::Uuid;

/// A database with dead letters in it.
struct Letters {
    database: Database,
    pool: PgPool,
}

impl Letters {
    /// None yet.
    async fn none() -> Self {
        let database = Database::migrated().await;
        let pool = database.pool().await;
        Self { database, pool }
    }

    /// Six of two subscribers, types and reasons: letter ids 1 to 6, stream sequences 60 down to 10.
    async fn six() -> Self {
        let letters = Self::none().await;
        let sets = [
            ("mails", "order.placed", Some("a"), "the printer is on fire"),
            ("mails", "order.placed", Some("a"), "the printer is out of paper"),
            ("mails", "order.paid", Some("b"), "the printer is on fire"),
            ("mails", "order.paid", None, "unknown currency"),
            ("stock", "order.placed", Some("a"), "the printer is on fire"),
            ("stock", "order.paid", Some("b"), "unknown currency"),
        ];
        for (n, (subscriber, event_type, key, reason)) in (1..).zip(sets) {
            letters.add(subscriber, event_type, key, reason, 70 - n * 10).await;
        }
        letters
    }

    /// As a worker writes it when it gives up.
    async fn add(&self, subscriber: &str, event_type: &str, key: Option<&str>, reason: &str, sequence: i64) -> Uuid {
        sqlx::query_scalar(
            "with event as (select aftercommit.new_event_id() as id),
             done as (
                insert into aftercommit.inbox (subscriber, event_id, stream_seq, outcome)
                select $1, id, $5, 'dead' from event)
             insert into aftercommit.dead_letter
                    (subscriber, event_id, type, version, key, source, time, sequence, headers, payload, content_type,
                     stream, stream_seq, attempts, reason, first_failed_at)
             select $1, id, $2, 1, $3, '/shop', now(), $5, '{\"X-Tenant\": \"acme\", \"X-Old\": \"1\"}',
                    '{\"secret\": 4711}', 'application/json', 'EVENTS', $5, 3, $4, now() from event
             returning event_id",
        )
        .bind(subscriber)
        .bind(event_type)
        .bind(key)
        .bind(reason)
        .bind(sequence)
        .fetch_one(&self.pool)
        .await
        .unwrap()
    }

    /// `aftercommit` with this input.
    fn fed(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
            .args(arguments)
            .env("DATABASE_URL", &self.database.config.url)
            .env("AFTERCOMMIT_OPERATOR", "jane")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        program.stdin.take().unwrap().write_all(input).unwrap();
        program.wait_with_output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        succeeded(self.fed(arguments, b""))
    }

    /// The exit status and what went to standard error of a command that fails.
    fn refused(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.fed(arguments, b"");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(arguments)).unwrap()
    }

    /// The letters that a command lists, by id.
    fn listed(&self, filter: &[&str]) -> Vec<i64> {
        let letters = self.json(&[&["dead", "list", "--json"], filter].concat());
        letters.as_array().unwrap().iter().map(|letter| letter["id"].as_i64().unwrap()).collect()
    }

    fn dump(&self) -> String {
        self.database.pg_dump(&["--data-only", "--schema=aftercommit", "--inserts"])
    }

    async fn numbers(&self, sql: &'static str) -> Vec<i64> {
        sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap()
    }

    async fn outcomes(&self) -> Vec<(i64, String)> {
        sqlx::query_as("select stream_seq, outcome from aftercommit.inbox order by stream_seq")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn letters_are_found_by_what_they_are() {
    let letters = Letters::six().await;
    sqlx::query("update aftercommit.dead_letter set dead_at = now() - interval '2 hours' where id <= 2")
        .execute(&letters.pool)
        .await
        .unwrap();
    let event: Uuid = sqlx::query_scalar("select event_id from aftercommit.dead_letter where id = 3")
        .fetch_one(&letters.pool)
        .await
        .unwrap();
    let event = event.to_string();
    let cases: [(&[&str], &[i64]); 10] = [
        (&[], &[6, 5, 4, 3, 2, 1]),
        (&["--limit", "2"], &[6, 5]),
        (&["--subscriber", "stock"], &[6, 5]),
        (&["--type", "order.paid"], &[6, 4, 3]),
        (&["--key", "a"], &[5, 2, 1]),
        (&["--error", "on fire"], &[5, 3, 1]),
        (&["--older-than", "1h"], &[2, 1]),
        (&["--newer-than", "1h", "--error", "%"], &[]),
        (&["--newer-than", "1h", "--subscriber", "mails"], &[4, 3]),
        (&["1", "3", "--event", &event], &[3]),
    ];
    for (filter, expected) in cases {
        assert_eq!(letters.listed(filter), expected, "{filter:?}");
    }
    let text = letters.run(&["dead", "list", "--subscriber", "mails"]);
    assert!(text.starts_with("id") && text.contains("out of paper") && !text.contains("4711"), "{text}");
    let groups = letters.json(&["dead", "list", "--group", "--json", "--error", "on fire"]);
    let counts: Vec<_> = groups.as_array().unwrap().iter().map(|group| (&group["type"], &group["letters"])).collect();
    assert_eq!(
        counts,
        [(&json!("order.paid"), &json!(1)), (&json!("order.placed"), &json!(1)), (&json!("order.placed"), &json!(1))]
    );
}

#[tokio::test]
async fn show_tells_everything_and_the_payload_only_when_asked() {
    let letters = Letters::six().await;
    let text = letters.run(&["dead", "show", "1"]);
    for part in ["mails", "order.placed", "60 of stream EVENTS", "the printer is on fire", "X-Tenant: acme", "/shop"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("4711"), "people paste terminals into tickets: {text}");
    assert!(letters.run(&["dead", "show", "1", "--payload"]).ends_with("\n{\"secret\": 4711}\n"));
    let json = letters.json(&["dead", "show", "1", "--json"]);
    assert_eq!((&json["reason"], &json["payload"]), (&json!("the printer is on fire"), &Value::Null));
    assert_eq!(letters.json(&["dead", "show", "1", "--json", "--payload"])["payload"], "{\"secret\": 4711}");
    let (status, error) = letters.refused(&["dead", "show", "99"]);
    assert!(status == 1 && error.contains("no dead letter 99"), "{error}");
    let opened = dead::show(&letters.database.config, 1).await.unwrap();
    assert!(!format!("{opened:?}").contains("4711"));
}

#[tokio::test]
async fn a_retry_moves_the_letter_into_its_subscribers_queue() {
    let letters = Letters::six().await;
    assert_eq!(letters.run(&["dead", "retry", "2", "1"]), "2 dead letters redriven\n");
    assert_eq!(letters.listed(&[]), [6, 5, 4, 3]);
    type Row = (String, String, Option<String>, i64, Vec<u8>, Value, String);
    let queued: Vec<Row> = sqlx::query_as(
        "select subscriber, type, key, stream_seq, payload, headers, requested_by from aftercommit.redrive order by id",
    )
    .fetch_all(&letters.pool)
    .await
    .unwrap();
    let row = |sequence| {
        let headers = json!({"X-Tenant": "acme", "X-Old": "1"});
        let payload = b"{\"secret\": 4711}".to_vec();
        ("mails".into(), "order.placed".into(), Some("a".into()), sequence, payload, headers, "jane".into())
    };
    assert_eq!(queued, [row(50), row(60)], "in the order of the stream");
    let outcomes = letters.outcomes().await;
    assert_eq!(outcomes.len(), 4, "their inbox rows are gone, so that they may run: {outcomes:?}");
    assert!(outcomes.iter().all(|(_, outcome)| outcome == "dead"));

    let entries = letters.json(&["audit", "--subscriber", "mails", "--since", "1h", "--json"]);
    let entries = entries.as_array().unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!((&entries[0]["who"], &entries[0]["action"]), (&json!("jane"), &json!("dead retry")));
    assert_eq!(entries[0]["detail"]["reason"], "the printer is out of paper");
    assert_eq!(letters.json(&["audit", "--subscriber", "stock", "--json"]), json!([]));
    assert!(letters.run(&["audit"]).contains("dead retry  subscriber mails  event "));

    // What is gone cannot be sent twice; what is there is sent all the same, and said so.
    let (status, error) = letters.refused(&["dead", "retry", "1", "3"]);
    assert!(status == 1 && error.contains("1 dead letter redriven") && error.contains("found for 1:"), "{error}");
    assert_eq!(letters.listed(&[]), [6, 5, 4]);
}

#[tokio::test]
async fn bulk_needs_words_and_a_yes() {
    let letters = Letters::six().await;
    let before = letters.dump();
    for action in ["retry", "discard"] {
        let (status, error) = letters.refused(&["dead", action]);
        assert!(status == 2 && error.contains("no dead letters selected"), "{error}");
        let (status, error) = letters.refused(&["dead", action, "--yes"]);
        assert!(status == 2 && error.contains("no dead letters selected"), "{error}");
        let (status, error) = letters.refused(&["dead", action, "--all"]);
        assert!(status == 2 && error.contains("6 dead letters") && error.contains("--all --yes"), "{error}");
        let (status, error) = letters.refused(&["dead", action, "--subscriber", "mails", "--error", "on fire"]);
        let command = format!("`aftercommit dead {action} --subscriber mails --error 'on fire' --yes`");
        assert!(status == 2 && error.contains("2 dead letters") && error.contains(&command), "{error}");
        let text = letters.run(&["dead", action, "--subscriber", "mails", "--error", "on fire", "--dry-run"]);
        assert!(text.starts_with("2 dead letters would be ") && text.contains("order.paid"), "{text}");
        assert!(letters.run(&["dead", action, "1", "--dry-run"]).starts_with("1 dead letter would be "));
    }
    let config = &letters.database.config;
    assert_eq!(dead::retry(config, "jane", &Filter::default()).await.unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(dead::discard(config, "jane", &Filter::default()).await.unwrap_err().kind(), ErrorKind::Config);
    assert!(before == letters.dump(), "none of these has changed anything");

    let arguments = ["dead", "retry", "--subscriber", "mails", "--error", "on fire", "--yes"];
    assert_eq!(letters.run(&arguments), "2 dead letters redriven\n");
    assert_eq!(letters.listed(&[]), [6, 5, 4, 2]);
    assert_eq!(letters.run(&["dead", "discard", "--all", "--yes"]), "4 dead letters discarded\n");
    assert_eq!(letters.run(&["dead", "retry", "--all", "--yes"]), "0 dead letters redriven\n");
}

#[tokio::test]
async fn a_discarded_letter_is_done_and_kept_in_the_audit_trail() {
    let letters = Letters::six().await;
    let before = dead::show(&letters.database.config, 6).await.unwrap().letter;
    assert_eq!(letters.run(&["dead", "discard", "--event", &before.event_id.to_string()]), "1 dead letter discarded\n");
    assert_eq!(letters.outcomes().await[0], (10, "discarded".into()));
    assert_eq!(letters.listed(&[]), [5, 4, 3, 2, 1]);
    assert_eq!(letters.numbers("select count(*) from aftercommit.redrive").await, [0]);
    let (who, detail): (String, Value) =
        sqlx::query_as("select who, detail from aftercommit.audit").fetch_one(&letters.pool).await.unwrap();
    assert_eq!(who, "jane");
    for (name, value) in [
        ("letter", json!(6)),
        ("type", json!("order.paid")),
        ("key", json!("b")),
        ("reason", json!("unknown currency")),
        ("attempts", json!(3)),
        ("source", json!("/shop")),
        ("headers", json!({"X-Tenant": "acme", "X-Old": "1"})),
        ("payload_base64", json!("eyJzZWNyZXQiOiA0NzExfQ==")),
        ("content_type", json!("application/json")),
        ("stream_seq", json!(10)),
    ] {
        assert_eq!(detail[name], value, "{name}");
    }
    let filter = AuditFilter { event: Some(before.event_id), ..AuditFilter::default() };
    let entry = &audit::list(&letters.database.config, &filter, 10).await.unwrap()[0];
    assert_eq!((&entry.detail["payload_base64"], &entry.detail["headers"]), (&Value::Null, &Value::Null));
    assert!(entry.detail["payload_sha256"].as_str().is_some_and(|digest| digest.len() == 64));
}

#[tokio::test]
async fn an_edit_keeps_what_was() {
    let letters = Letters::six().await;
    let arguments = [
        "dead",
        "edit",
        "1",
        "--payload",
        "-",
        "--header",
        "X-Tenant=emca",
        "--header",
        "X-New=2",
        "--remove-header",
        "X-Old",
    ];
    let text = succeeded(letters.fed(&arguments, b"{\"secret\": 4712}"));
    for part in ["SHA-256", "header set  X-New\nheader set  X-Tenant\nheader gone X-Old\n", "aftercommit dead retry 1"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("471") && !text.contains("emca"), "{text}");
    let opened = dead::show(&letters.database.config, 1).await.unwrap();
    assert_eq!(opened.payload, b"{\"secret\": 4712}");
    assert_eq!(json!(opened.headers), json!({"X-Tenant": "emca", "X-New": "2"}));
    assert_eq!(opened.audit[0].action, "dead edit");
    let detail: Value =
        sqlx::query_scalar("select detail from aftercommit.audit").fetch_one(&letters.pool).await.unwrap();
    assert_eq!(detail["payload_base64"], "eyJzZWNyZXQiOiA0NzExfQ==");
    assert_eq!(detail["headers"], json!({"X-Tenant": "acme", "X-Old": "1"}));

    let before = letters.dump();
    let refused = |arguments: &[&str], input: &[u8]| {
        let output = letters.fed(&[&["dead", "edit"], arguments].concat(), input);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    for (arguments, input, status, words) in [
        (&["1", "--payload", "-"][..], &b"{\"secret\":"[..], 2, "not JSON"),
        (&["1"], b"", 2, "nothing to change"),
        (&["1", "--header", "ce-partitionkey=b"], b"", 2, "reserved"),
        (&["1", "--key", "b"], b"", 2, "--key"),
        (&["99", "--header", "a=b"], b"", 1, "no dead letter 99"),
    ] {
        let (found, error) = refused(arguments, input);
        assert!(
            found == status && error.contains(words) && !error.contains("secret"),
            "{arguments:?}: {found} {error}"
        );
    }
    // What changes nothing is no act.
    assert!(
        succeeded(letters.fed(&["dead", "edit", "1", "--payload", "-"], b"{\"secret\": 4712}")).contains("unchanged")
    );
    assert!(before == letters.dump());

    let text = succeeded(letters.fed(&["dead", "edit", "1", "--payload", "-", "--retry"], b"[]"));
    assert!(text.ends_with("redriven to its subscriber\n"), "{text}");
    let payload: Vec<u8> =
        sqlx::query_scalar("select payload from aftercommit.redrive").fetch_one(&letters.pool).await.unwrap();
    assert_eq!(payload, b"[]");
    assert_eq!(letters.numbers("select count(*) from aftercommit.audit").await, [3]);
}

#[tokio::test]
async fn an_edit_of_a_letter_that_is_just_sent_back_is_refused() {
    let letters = Letters::six().await;
    let config = &letters.database.config;
    // The operator who retries is slow to commit.
    let mut other = letters.pool.begin().await.unwrap();
    sqlx::query("delete from aftercommit.dead_letter where id = 1").execute(&mut *other).await.unwrap();
    let edit = Edit { payload: Some(b"[]".to_vec()), ..Edit::default() };
    let editing = dead::edit(config, "jane", 1, &edit);
    let committing = async {
        let waits = "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
                      and datname = current_database())";
        aftercommit::testing::eventually(crate::support::SOON, "the edit waits", async || {
            sqlx::query_scalar(waits).fetch_one(&letters.pool).await.unwrap()
        })
        .await
        .unwrap();
        other.commit().await.unwrap();
    };
    let (edited, ()) = tokio::join!(editing, committing);
    assert_eq!(edited.unwrap_err().kind(), ErrorKind::NotReady);
    assert_eq!(letters.numbers("select count(*) from aftercommit.audit where action = 'dead edit'").await, [0]);
}

/// More than two batches, of 50 keys in turns, the letters numbered against the order of the stream.
#[tokio::test(flavor = "multi_thread")]
async fn two_who_retry_everything_send_each_letter_once_and_in_order() {
    let letters = Letters::none().await;
    sqlx::query(
        "insert into aftercommit.dead_letter
                (subscriber, event_id, type, version, key, source, time, headers, payload, content_type, stream, stream_seq,
                 attempts, reason, first_failed_at)
         select 'mails', gen_random_uuid(), 'a', 1, 'k' || (3500 - n) % 50, '/shop', now(), '{}', '', 'text/plain', 'EVENTS',
                3500 - n, 1, 'no', now()
           from generate_series(0, 3499) as n",
    )
    .execute(&letters.pool)
    .await
    .unwrap();
    let all = Filter { all: true, ..Filter::default() };
    let config = &letters.database.config;
    let retry = |who: &'static str| {
        let (config, all) = (config.clone(), all.clone());
        tokio::spawn(async move { dead::retry(&config, who, &all).await.unwrap() })
    };
    let (jane, joe) = (retry("jane"), retry("joe"));
    let (jane, joe) = (jane.await.unwrap(), joe.await.unwrap());
    assert_eq!(jane.len() + joe.len(), 3500);
    let sent: Vec<i64> = letters.numbers("select stream_seq from aftercommit.redrive order by id").await;
    assert_eq!(sent.len(), 3500);
    let mut last = std::collections::HashMap::new();
    for sequence in sent {
        let before = last.insert(sequence % 50, sequence);
        assert!(before.is_none_or(|before| before < sequence), "{before:?} before {sequence}");
    }
    assert_eq!(letters.numbers("select count(*) from aftercommit.audit where action = 'dead retry'").await, [3500]);
    let each = "select count(distinct event_id) from aftercommit.audit";
    assert_eq!(letters.numbers(each).await, [3500], "nobody is on record for what another one did");
}

/// A letter that comes back while the retry still runs is not sent again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_again_meanwhile_is_left_alone() {
    let letters = Letters::six().await;
    // A worker that fails at once: whatever enters the queue is a dead letter again.
    letters
        .database
        .execute(
            "create function fail() returns trigger language plpgsql as $$ begin
                insert into aftercommit.dead_letter
                    (subscriber, event_id, type, version, key, source, time, headers, payload, content_type, stream,
                     stream_seq, attempts, reason, first_failed_at)
                values (new.subscriber, gen_random_uuid(), new.type, 1, new.key, new.source, new.time, new.headers, new.payload,
                        new.content_type, new.stream, new.stream_seq, 1, 'again', now());
                return new;
             end $$;
             create trigger fail after insert on aftercommit.redrive for each row execute function fail()",
        )
        .await;
    let all = Filter { all: true, ..Filter::default() };
    let retried = tokio::time::timeout(Duration::from_secs(20), dead::retry(&letters.database.config, "jane", &all));
    assert_eq!(retried.await.unwrap().unwrap(), [6, 5, 4, 3, 2, 1]);
    assert_eq!(letters.listed(&["--error", "again"]).len(), 6);
}

/// An event that waits in the queue can become a dead letter a second time, when the stream delivers it once more.
#[tokio::test]
async fn a_letter_whose_event_waits_already_takes_its_place() {
    let letters = Letters::six().await;
    let event: EventId = dead::show(&letters.database.config, 1).await.unwrap().letter.event_id;
    letters.run(&["dead", "retry", "1"]);
    sqlx::query(
        "insert into aftercommit.dead_letter
                (subscriber, event_id, type, version, key, source, time, headers, payload, content_type, stream,
                 stream_seq, attempts, reason, first_failed_at)
         values ('mails', $1, 'order.placed', 1, 'a', '/shop', now(), '{}', '[1]', 'application/json', 'EVENTS', 60, 1, 'no', now())",
    )
    .bind(event.as_uuid())
    .execute(&letters.pool)
    .await
    .unwrap();
    letters.run(&["dead", "retry", "--event", &event.to_string()]);
    let payloads: Vec<Vec<u8>> =
        sqlx::query_scalar("select payload from aftercommit.redrive").fetch_all(&letters.pool).await.unwrap();
    assert_eq!(payloads, [b"[1]"]);
}
