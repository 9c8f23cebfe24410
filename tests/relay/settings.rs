//! G1: settings of the stream that would lose events are noticed at any time, and nothing is published with them.

use aftercommit::operator;
use aftercommit::operator::doctor::{DoctorConfig, doctor};
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::Client;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::refusals::{state_contains, stored, types};
use crate::support::{Outbox, SOON};

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

/// Sets fields of the stream's configuration as an operator with another tool may.
async fn set(outbox: &Outbox, fields: Value) {
    let client = async_nats::connect(&outbox.nats.url).await.unwrap();
    let stream = &outbox.naming.stream;
    let ask = async |call: &str, body: String| -> Value {
        let answer = client.request(format!("$JS.API.STREAM.{call}.{stream}"), body.into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    };
    let mut config = ask("INFO", String::new()).await["config"].clone();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let answer = ask("UPDATE", config.to_string()).await;
    assert!(answer["error"].is_null(), "{fields}: {answer}");
}

/// The relay runs, the setting changes, the relay stops publishing and says why, provision mends it, and everything goes out.
#[tokio::test(flavor = "multi_thread")]
async fn settings_that_would_lose_events_stop_publishing() {
    let outbox = shared().await;
    let prefix = outbox.naming.prefix.to_string();
    let relay = outbox.relay();
    outbox.publish("first", "{}", None).await;
    stored(&outbox, 1).await;
    let mut expected = vec!["first".to_string()];
    for (name, fields) in [
        ("max_msgs_per_subject", json!({ "max_msgs_per_subject": 2 })),
        ("subject_transform", json!({ "subject_transform": { "src": format!("{prefix}.>"), "dest": "elsewhere.>" } })),
        ("consumer_limits", json!({ "consumer_limits": { "inactive_threshold": 1_000_000_000 } })),
        ("discard", json!({ "discard": "old", "max_msgs": 1_000_000 })),
        ("subject_delete_marker_ttl", json!({ "subject_delete_marker_ttl": 1_000_000_000 })),
    ] {
        set(&outbox, fields).await;
        state_contains(&outbox, &format!("{name}: ")).await;
        for n in 0..3 {
            let event_type = format!("{}.{n}", name.replace('_', "-"));
            outbox.publish(&event_type, "{}", Some("key")).await;
            expected.push(event_type);
        }
        // It is looked at again, and nothing has gone out.
        state_contains(&outbox, &format!("{name}: ")).await;
        assert_eq!(outbox.stored().await, expected.len() as u64 - 3, "{name}");
        if name == "subject_delete_marker_ttl" {
            // That one has switched on another setting, which cannot be switched off.
            let refusal = operator::provision(&outbox.nats, &outbox.naming).await.unwrap_err();
            assert!(refusal.to_string().contains("allow_msg_ttl: "), "{refusal}");
            state_contains(&outbox, "allow_msg_ttl: ").await;
            break;
        }
        let changes = operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
        assert!(changes.iter().any(|change| change.contains(name)), "{name}: {changes:?}");
        stored(&outbox, expected.len() as u64).await;
    }
    assert_eq!(types(&outbox).await, expected[..expected.len() - 3]);
    relay.stop().await.unwrap();
}

/// One window after the other: the relay looks between them and within them.
#[tokio::test(flavor = "multi_thread")]
async fn settings_are_looked_at_under_load_too() {
    let outbox = shared().await;
    let relay = outbox.relay();
    // It is not broken off in the middle of a statement, which may still commit then.
    let enough = CancellationToken::new();
    let load = tokio::spawn({
        let (pool, enough) = (outbox.pool.clone(), enough.clone());
        async move {
            while !enough.is_cancelled() {
                let many = "select aftercommit.publish('load.' || n % 5, '{}', n::text) from generate_series(1, 20) n";
                sqlx::query(many).execute(&pool).await.unwrap();
            }
        }
    });
    eventually(SOON, "events flow", async || outbox.stored().await > 100).await.unwrap();
    set(&outbox, json!({ "max_msgs_per_subject": 1_000_000 })).await;
    state_contains(&outbox, "max_msgs_per_subject: ").await;
    let stopped_at = outbox.stored().await;
    state_contains(&outbox, "max_msgs_per_subject: ").await;
    assert_eq!(outbox.stored().await, stopped_at);
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    eventually(SOON, "events flow again", async || outbox.stored().await > stopped_at).await.unwrap();
    enough.cancel();
    load.await.unwrap();
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// Passes JetStream's API on under another name, and says that the stream has a setting that nobody knows.
async fn newer_server(client: Client) {
    let mut requests = client.subscribe("NEWER.API.>").await.unwrap();
    client.flush().await.unwrap();
    while let Some(request) = requests.next().await {
        let subject = request.subject.replacen("NEWER", "$JS", 1);
        let mut answer = client.request(subject, request.payload).await.unwrap().payload;
        if let Ok(mut said) = serde_json::from_slice::<Value>(&answer)
            && said.get("config").is_some_and(|config| config.get("subjects").is_some())
        {
            said["config"]["evict_on_tuesdays"] = json!(true);
            said["config"]["evict_on_mondays"] = json!(false);
            answer = said.to_string().into();
        }
        client.publish(request.reply.unwrap(), answer).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_is_not_known_is_reported_by_name() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let server = tokio::spawn(newer_server(async_nats::connect(nats.url()).await.unwrap()));
    outbox.publish("some.event", "{}", None).await;
    let relay = outbox.relay_command().arg("--once").env("NATS_API_PREFIX", "NEWER.API").output().unwrap();
    let said = String::from_utf8_lossy(&[relay.stdout, relay.stderr].concat()).into_owned();
    assert!(relay.status.success() && said.contains("evict_on_tuesdays"), "{said}");
    assert!(!said.contains("evict_on_mondays"), "it is off: {said}");
    assert_eq!(outbox.stored().await, 1, "it goes on all the same");
    let doctor = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("doctor")
        .env("DATABASE_URL", &outbox.postgres.url)
        .env("NATS_URL", nats.url())
        .env("NATS_API_PREFIX", "NEWER.API")
        .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let told = said.lines().find(|line| line.contains("evict_on_tuesdays"));
    assert!(told.is_some_and(|line| line.starts_with("WARN") && line.contains("stream")), "{said}");
    server.abort();
}

/// A server whose configuration maps subjects: it answers every publish as if nothing were.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_the_server_puts_under_another_subject_are_named() {
    let name = format!("mapped{}", std::process::id());
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let config = format!("mappings {{ \"{name}.placed\": \"{name}.hidden\" }}");
    let nats = Nats::start(NatsOptions { config, ..NatsOptions::default() }).await.unwrap();
    let mut outbox = Outbox::new(database, nats.url()).await;
    outbox.naming.prefix = SubjectPrefix::new(&name).unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    let relay = outbox.relay();
    let verdict = async || {
        let config = DoctorConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone());
        let report = doctor(&config).await.unwrap();
        report.checks.into_iter().find(|check| check.name == "subjects").map(|check| check.finding)
    };
    outbox.publish("paid", "{}", None).await;
    eventually(SOON, "it is stored", async || outbox.stored().await == 1).await.unwrap();
    assert_eq!(verdict().await, None);
    outbox.publish("placed", "{}", None).await;
    eventually(SOON, "it is stored", async || outbox.stored().await == 2).await.unwrap();
    let finding = verdict().await.unwrap();
    assert!(finding.contains(&format!("published on {name}.placed and lies under {name}.hidden")), "{finding}");
    relay.stop().await.unwrap();
}
