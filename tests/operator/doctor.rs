//! G5: `aftercommit doctor` says what is wrong, and nothing is wrong with a fresh set-up.

use std::process::{Command, Output};
use std::time::Duration;

use crate::support::{Outbox, Proxy, RunningRelay, SOON, free_address, is_before};
use aftercommit::config::{NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::operator::doctor::{Check, DoctorConfig, Report, Severity, doctor};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::StorageType;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

fn config(outbox: &Outbox) -> DoctorConfig {
    DoctorConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone())
}

async fn look(config: DoctorConfig) -> Report {
    doctor(&config).await.unwrap()
}

/// The checks of this name and severity.
fn found<'a>(report: &'a Report, status: Severity, name: &str) -> Vec<&'a Check> {
    let found: Vec<&Check> =
        report.checks.iter().filter(|check| check.status == status && check.name == name).collect();
    assert!(!found.is_empty(), "no {status:?} {name} in\n{report}");
    found
}

fn with(report: &Report, status: Severity) -> Vec<&str> {
    report.checks.iter().filter(|check| check.status == status).map(|check| check.name).collect()
}

/// The program as an operator runs it.
fn program(outbox: &Outbox, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("doctor")
        .args(arguments)
        .env("DATABASE_URL", &outbox.postgres.url)
        .env("NATS_URL", &outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_set_up_passes_and_each_part_can_be_missing() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let options = NatsOptions { jetstream: "sync_interval: always".into(), ..NatsOptions::default() };
    let mut nats = Nats::start(options).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), nats.url()).await;
    let relay = outbox.relay();
    outbox.publish("a", "{}", None).await;
    outbox.assert_complete().await;
    let output = program(&outbox, &["--json", "--nats-monitor", &nats.monitor_url()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let wrong: Vec<_> =
        checks.iter().filter(|check| check["status"] != "OK").map(|check| check["name"].clone()).collect();
    // A superuser, no reconciler, nobody has to log in to NATS. The last of 2.11 that can be had as a package has known holes.
    let expected = match is_before(nats.version(), (2, 12)) {
        true => json!(["grants", "reconcilers", "nats", "subscribers", "nats user"]),
        false => json!(["grants", "reconcilers", "subscribers", "nats user"]),
    };
    assert_eq!((json!(wrong), &report["status"]), (expected, &json!("WARN")), "{report:#}");
    let relay_check = checks.iter().find(|check| check["name"] == "relay").unwrap();
    assert!(relay_check["finding"].as_str().unwrap().contains("leads"), "{relay_check}");
    assert!(relay_check["remedy"].is_null());

    // The default, and the servers' answer to it.
    let lines = String::from_utf8(program(&outbox, &[]).stdout).unwrap();
    assert!(lines.contains("?     disk") && lines.contains("two minutes"), "{lines}");
    let plain = Nats::shared().await.unwrap().monitor_url();
    let report = look(DoctorConfig { nats_monitor: Some(plain), ..config(&outbox) }).await;
    assert!(found(&report, Severity::Warn, "disk")[0].finding.contains("every 2 minutes"), "{report}");

    // Through something with another port.
    let (_, server) = outbox.postgres.url.split_once('@').unwrap();
    let (server, database) = server.split_once('/').unwrap();
    let proxy = Proxy::to(server).await;
    let through = PostgresConfig::new(format!("postgres://postgres@{}/{database}", proxy.address));
    let report = look(DoctorConfig { postgres: through, ..config(&outbox) }).await;
    assert!(found(&report, Severity::Warn, "pooler")[0].finding.contains("in between"), "{report}");

    // Without a schema; the rest is looked at.
    let bare = PostgresConfig::new(postgres.create_database().await.unwrap());
    let report = look(DoctorConfig { postgres: bare, ..config(&outbox) }).await;
    assert_eq!(with(&report, Severity::Fail), ["schema"], "{report}");
    let remedy = found(&report, Severity::Fail, "schema")[0].remedy.clone().unwrap();
    assert!(remedy.contains("aftercommit migrate"), "{remedy}");
    found(&report, Severity::Ok, "stream");

    // Without the stream.
    outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
    let report = look(config(&outbox)).await;
    assert!(found(&report, Severity::Fail, "stream")[0].finding.contains("aftercommit provision"), "{report}");

    // Without NATS.
    relay.stop().await.unwrap();
    nats.stop().await.unwrap();
    let output = program(&outbox, &[]);
    assert_eq!(output.status.code(), Some(1));
    let report = look(config(&outbox)).await;
    assert_eq!(with(&report, Severity::Fail), ["nats"], "{report}");
    assert!(found(&report, Severity::Fail, "nats")[0].finding.contains("refused"), "{report}");
    found(&report, Severity::Ok, "schema");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgresql_the_stream_is_looked_at() {
    let outbox = shared().await;
    let nowhere = PostgresConfig::new(format!("postgres://me:hunter2@{}/db", free_address()));
    let report = look(DoctorConfig { postgres: nowhere, ..config(&outbox) }).await;
    assert_eq!(with(&report, Severity::Fail), ["postgres"], "{report}");
    assert!(found(&report, Severity::Fail, "postgres")[0].finding.contains("refused"), "{report}");
    found(&report, Severity::Ok, "stream");
    assert!(!report.to_string().contains("hunter2"), "{report}");
}

/// Every missing right is named with the statement that grants it, and with these rights, and no more, a relay works.
#[tokio::test(flavor = "multi_thread")]
async fn the_grants_it_names_are_those_that_a_relay_needs() {
    let outbox = shared().await;
    let role = unique_name("relay");
    let execute = async |sql: String| sqlx::raw_sql(AssertSqlSafe(sql)).execute(&outbox.pool).await.map(drop).unwrap();
    execute(format!("create role {role} login; revoke execute on function pg_control_system() from public")).await;
    let limited = PostgresConfig::new(outbox.postgres.url.replace("//postgres@", &format!("//{role}@")));
    assert_ne!(limited.url, outbox.postgres.url);
    let config = DoctorConfig { postgres: limited.clone(), ..config(&outbox) };
    let report = look(config.clone()).await;
    let missing = found(&report, Severity::Fail, "grants");
    assert_eq!(missing.len(), 13, "schema, ten tables, sequence, function: {report}");
    for check in missing {
        let statement = check.remedy.clone().unwrap();
        assert!(statement.starts_with("grant "), "{statement}");
        execute(statement).await;
    }
    let report = look(config).await;
    found(&report, Severity::Ok, "grants");
    let unreadable = found(&report, Severity::Unknown, "dead letters");
    assert!(unreadable[0].finding.contains("permission denied"), "{report}");
    let remedy = found(&report, Severity::Unknown, "transactions")[0].remedy.clone().unwrap();
    execute(remedy).await;

    let relay = RunningRelay::start(RelayConfig {
        retention: Duration::ZERO,
        prune_interval: Duration::from_millis(50),
        ..RelayConfig::new(limited, outbox.nats.clone(), outbox.naming.clone())
    });
    outbox.publish("a", "{}", Some("k")).await;
    eventually(SOON, "it is published and pruned", async || {
        outbox.stored().await == 1 && outbox.committed().await.is_empty()
    })
    .await
    .unwrap();
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_lose_events_fails() {
    let outbox = shared().await;
    let report = look(config(&outbox)).await;
    assert_eq!(with(&report, Severity::Fail), ["fsync"], "the tests' server has fsync off: {report}");
    assert_eq!(program(&outbox, &[]).status.code(), Some(1));

    let js = outbox.js().await;
    let mut stream = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    js.delete_stream(&outbox.naming.stream).await.unwrap();
    (stream.storage, stream.max_age) = (StorageType::Memory, Duration::from_hours(24));
    let stream = js.create_stream(stream).await.unwrap();
    let consumer = pull::Config {
        durable_name: Some("limited".into()),
        ack_policy: AckPolicy::Explicit,
        max_deliver: 3,
        ..pull::Config::default()
    };
    stream.create_consumer(consumer).await.unwrap();
    let report = look(config(&outbox)).await;
    assert_eq!(with(&report, Severity::Fail), ["fsync", "stream"], "{report}");
    assert!(found(&report, Severity::Fail, "stream")[0].finding.contains("storage"), "{report}");
    assert!(found(&report, Severity::Warn, "retention")[0].finding.contains("7 days"), "{report}");
    let consumer = found(&report, Severity::Warn, "consumer")[0];
    for part in ["limited", "max_deliver: 3 -> -1", "max_ack_pending: 1000 -> 100000"] {
        assert!(consumer.finding.contains(part), "no {part} in {report}");
    }
}

/// Publishing what nobody subscribes to works, and is told.
#[tokio::test(flavor = "multi_thread")]
async fn events_without_a_subscriber_are_told() {
    let outbox = shared().await;
    let report = look(config(&outbox)).await;
    assert!(found(&report, Severity::Ok, "subscribers")[0].finding.contains("holds no events"), "{report}");
    let _relay = outbox.relay();
    for event_type in ["order.placed", "order.paid", "order.line.added", "order"] {
        outbox.publish(event_type, "{}", None).await;
    }
    outbox.assert_complete().await;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    let subscribe = async |name: &str, filters: &[&str]| {
        let consumer = pull::Config {
            durable_name: Some(name.into()),
            ack_policy: AckPolicy::Explicit,
            filter_subjects: filters.iter().map(|filter| outbox.naming.prefix.subject(filter)).collect(),
            ..pull::Config::default()
        };
        stream.create_consumer(consumer).await.unwrap();
    };
    subscribe("receipts", &["order.placed", "order.cancelled"]).await;
    let report = look(config(&outbox)).await;
    let check = found(&report, Severity::Warn, "subscribers")[0];
    assert!(
        check.finding.contains("3 of 4") && check.finding.ends_with("order, order.line.added, order.paid"),
        "{check:?}"
    );
    subscribe("lines", &["order.*.added"]).await;
    let report = look(config(&outbox)).await;
    let check = found(&report, Severity::Warn, "subscribers")[0];
    assert!(check.finding.contains("2 of 4") && check.finding.ends_with("order, order.paid"), "{check:?}");
    subscribe("audit", &[">"]).await;
    let report = look(config(&outbox)).await;
    assert!(found(&report, Severity::Ok, "subscribers")[0].finding.contains("each of the 4"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_told() {
    let outbox = shared().await;
    let execute = async |sql: &'static str| sqlx::raw_sql(sql).execute(&outbox.pool).await.map(drop).unwrap();
    operator::relay::pause(&outbox.postgres, "test", Some("maintenance")).await.unwrap();
    let mut held = outbox.pool.begin().await.unwrap();
    let (pid,): (i32,) = sqlx::query_as("select pg_backend_pid()").fetch_one(&mut *held).await.unwrap();
    outbox.publish("fresh", "{}", None).await;
    let report = look(config(&outbox)).await;
    let paused = &found(&report, Severity::Warn, "paused")[0];
    assert!(paused.finding.contains("maintenance") && paused.finding.contains("by test"), "{report}");
    assert!(found(&report, Severity::Warn, "relay")[0].finding.contains("no relay has ever led"), "{report}");
    assert!(found(&report, Severity::Ok, "backlog")[0].finding.starts_with("1 event to publish"), "{report}");
    assert!(found(&report, Severity::Ok, "transactions")[0].finding.contains(&format!("pid {pid},")), "{report}");
    held.rollback().await.unwrap();

    execute("update aftercommit.outbox set created_at = now() - interval '30 days'").await;
    execute(
        "insert into aftercommit.dead_letter (subscriber, event_id, type, version, source, time, headers, payload, content_type,
                                              stream, stream_seq, attempts, reason, first_failed_at)
         values ('billing', gen_random_uuid(), 't', 1, '/s', now(), '{}', '', 'a/b', 's', 1, 1, 'why', now())",
    )
    .await;
    let report = look(config(&outbox)).await;
    let backlog = &found(&report, Severity::Fail, "backlog")[0];
    assert!(backlog.finding.contains("30 days") && backlog.finding.contains("no relay leads"), "{report}");
    assert!(found(&report, Severity::Warn, "dead letters")[0].finding.contains("billing"), "{report}");
    found(&report, Severity::Ok, "pruning");

    // Published, an old event should be removed.
    operator::relay::resume(&outbox.postgres, "test").await.unwrap();
    let keep = RelayConfig {
        prune_interval: Duration::from_hours(1),
        retention: Duration::from_hours(24 * 365),
        ..outbox.relay_config()
    };
    let relay = RunningRelay::start(keep);
    outbox.assert_complete().await;
    eventually(SOON, "the relay is done with it", async || {
        with(&look(config(&outbox)).await, Severity::Warn).contains(&"pruning")
    })
    .await
    .unwrap();
    execute(
        "insert into aftercommit.parked (outbox_id, event_id, type, code, reason) values (99, gen_random_uuid(), 't', 1, 'r')",
    )
    .await;
    found(&look(config(&outbox)).await, Severity::Warn, "parked");
    relay.stop().await.unwrap();
}

#[tokio::test]
async fn a_wrong_setting_ends_it_with_status_2() {
    let outbox = shared().await;
    let output = program(&outbox, &["--nats-monitor", "https://nats:8222"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--nats-monitor"), "{output:?}");
    let output = program(&outbox, &["--database-url", "nonsense"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let nats = NatsConfig { url: "http://me:hunter2@one".into(), ..NatsConfig::default() };
    let error = doctor(&DoctorConfig { nats, ..config(&outbox) }).await.unwrap_err();
    assert!(error.report().contains("NATS_URL") && !error.report().contains("hunter2"), "{}", error.report());
}
