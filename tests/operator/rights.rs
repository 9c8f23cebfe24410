//! G8: operators need no more rights than docs/operations.md ("Rights of operators") gives them, which is read from there.

use std::process::{Command, Output};

use crate::support::{Act, Database, Number, Record, Work, succeeded};
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::testing::unique_name;
use aftercommit::worker::{HandlerError, Subscriber};

/// The block of the page's section in this language.
fn block(language: &str) -> String {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md")).unwrap();
    let section = page.split("## Rights of operators").nth(1).unwrap();
    let block = section.split(&format!("```{language}\n")).nth(1).unwrap();
    block.split("```").next().unwrap().to_string()
}

/// The subjects of a line of the permissions, for this stream.
fn permissions(line: &str, stream: &str) -> String {
    let block = block("text");
    let subjects = block.lines().find_map(|text| text.strip_prefix(line)).unwrap().split_whitespace();
    let subjects = subjects.map(|subject| {
        let tokens = subject.split('.').map(|token| if token == "S" { stream } else { token });
        format!("\"{}\"", tokens.collect::<Vec<_>>().join("."))
    });
    subjects.collect::<Vec<_>>().join(", ")
}

struct Stage {
    work: Work,
    database: Database,
    read: String,
    write: String,
}

impl Stage {
    /// The program as one of the two roles.
    fn run(&self, role: &str, arguments: &[&str]) -> Output {
        let nats = self.work.outbox.nats.url.replace("admin:a@", "ops:o@");
        Command::new(env!("CARGO_BIN_EXE_aftercommit"))
            .args(arguments)
            .env("DATABASE_URL", self.database.url_of(role))
            .env("NATS_URL", nats)
            .env("AFTERCOMMIT_STREAM", &self.work.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.work.outbox.naming.prefix.to_string())
            .output()
            .unwrap()
    }

    fn refused(&self, arguments: &[&str]) {
        let output = self.run(&self.read, arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains("lacks a grant"), "{arguments:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_do_their_work_with_the_documented_rights_only() {
    let config = |permissions: &str| {
        format!(
            "accounts {{ A {{ jetstream: enabled, users: [ {{ user: admin, password: a }}, \
             {{ user: ops, password: o{permissions} }} ] }} }}"
        )
    };
    let mut nats = Nats::start(NatsOptions { config: config(""), ..NatsOptions::default() }).await.unwrap();
    let url = nats.url().replace("nats://", "nats://admin:a@");
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = crate::support::Outbox::new(database, url).await;
    sqlx::raw_sql(
        "create table effect (id bigint generated always as identity, event_id uuid, key text, n bigint, attempt int)",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let context = outbox.js().await;
    let work = Work { outbox, context };
    let stream = work.outbox.naming.stream.clone();
    let (publish, subscribe) = (permissions("publish", &stream), permissions("subscribe", &stream));
    let granted =
        format!(", permissions: {{ publish: {{ allow: [{publish}] }}, subscribe: {{ allow: [{subscribe}] }} }}");
    nats.reconfigure(config(&granted)).await.unwrap();

    let database = Database { config: work.outbox.postgres.clone() };
    let (read, write) = (unique_name("read"), unique_name("write"));
    database.execute(&format!("create role {read} login; create role {write} login")).await;
    database.execute(&block("sql").replace("ops_read", &read).replace("ops_write", &write)).await;
    let reject = Record::new(|_| Act::Fail(HandlerError::reject("no such printer")));
    work.worker_with(Subscriber::new("idle").on::<Number>(Record::good())).provision().await.unwrap();
    let sent: Vec<_> = (1..=4).map(|n| work.envelope(Some("a"), n)).collect();
    for event in &sent {
        work.put(event).await;
    }
    let worker = work.run(Subscriber::new("mails").on::<Number>(reject)).await;
    work.wait_until_acked("mails").await;
    worker.stop().await;
    work.outbox.publish("a", "{}", None).await;
    let stage = Stage { work, database, read, write };
    let event = sent[0].id.to_string();

    for arguments in [
        &["status"][..],
        &["explain", &event],
        &["explain", &event, "--payload"],
        &["peek", "--subscriber", "idle"],
        &["peek", "--subscriber", "mails"],
        &["audit"],
        &["parked", "list"],
        &["dead", "list"],
        &["dead", "list", "--group"],
        &["dead", "show", "1", "--payload"],
        &["dead", "retry", "--all", "--dry-run"],
    ] {
        let text = succeeded(stage.run(&stage.read, arguments));
        let unknown = ["not known", "unknown:"].iter().any(|words| text.contains(words));
        assert!(!unknown || text.contains("no database that was asked knows it"), "{arguments:?}: {text}");
    }
    sqlx::query(
        "insert into aftercommit.parked (outbox_id, event_id, type, code, reason)
         select id, event_id, type, 1, 'no' from aftercommit.outbox",
    )
    .execute(&stage.work.outbox.pool)
    .await
    .unwrap();
    let parked: String = sqlx::query_scalar("select event_id::text from aftercommit.parked")
        .fetch_one(&stage.work.outbox.pool)
        .await
        .unwrap();
    for arguments in [
        &["dead", "retry", "1"][..],
        &["dead", "edit", "2", "--header", "a=b"],
        &["dead", "edit", "2", "--header", "a=c", "--retry"],
        &["dead", "discard", "3"],
        &["relay", "pause"],
        &["relay", "resume"],
        &["parked", "release", &parked],
    ] {
        stage.refused(arguments);
        succeeded(stage.run(&stage.write, arguments));
    }
    let entries = succeeded(stage.run(&stage.read, &["audit"]));
    assert_eq!(entries.lines().count(), 7 + 1, "one for each, an edit with a retry has two: {entries}");
    let acting = sqlx::PgPool::connect(&stage.database.url_of(&stage.write)).await.unwrap();
    for forging in ["delete from aftercommit.audit", "update aftercommit.audit set who = 'joe'"] {
        assert!(sqlx::query(forging).execute(&acting).await.is_err(), "{forging}");
    }
}
