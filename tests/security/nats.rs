//! What accounts.conf does not let a user do: for each a list of subjects that nats-server refuses.

use std::collections::BTreeSet;
use std::time::Duration;

use aftercommit::testing::eventually;
use async_nats::Event;
use tokio::sync::mpsc;

use crate::stage::{Stage, password};

/// Who else's business these are: only the provisioner changes streams and consumers.
const ADMINISTRATION: [&str; 9] = [
    "$JS.API.STREAM.CREATE.EVENTS",
    "$JS.API.STREAM.UPDATE.EVENTS",
    "$JS.API.STREAM.CREATE.MINE",
    "$JS.API.CONSUMER.CREATE.EVENTS",
    "$JS.API.CONSUMER.CREATE.EVENTS.mine",
    "$JS.API.CONSUMER.CREATE.EVENTS.receipts.events.>",
    "$JS.API.CONSUMER.DURABLE.CREATE.EVENTS.receipts",
    "$JS.API.CONSUMER.DELETE.EVENTS.receipts",
    "$JS.API.CONSUMER.PAUSE.EVENTS.receipts",
];

/// Nobody's.
const NOBODY: [&str; 9] = [
    "$JS.API.STREAM.DELETE.EVENTS",
    "$JS.API.STREAM.PURGE.EVENTS",
    "$JS.API.STREAM.MSG.DELETE.EVENTS",
    "$JS.API.STREAM.RESTORE.EVENTS",
    "$JS.API.STREAM.SNAPSHOT.EVENTS",
    "$JS.API.STREAM.MSG.GET.OTHER",
    "$SYS.REQ.SERVER.PING",
    "other.subject",
    "_INBOX.somebody",
];

const PUBLISH: [(&str, &[&str]); 7] = [
    (
        "provisioner",
        &[
            "events.test.number",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "aftercommit.outbox.EVENTS",
        ],
    ),
    (
        "relay",
        &[
            "$JS.API.CONSUMER.CREATE.EVENTS.receipts",
            "$JS.API.CONSUMER.DELETE.EVENTS.receipts",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.API.CONSUMER.INFO.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "aftercommit.outbox.EVENTS",
            "_INBOX_relay.somebody",
        ],
    ),
    (
        "outbox_reconciler",
        &[
            "$JS.API.CONSUMER.CREATE.EVENTS.receipts",
            "$JS.API.CONSUMER.DELETE.EVENTS.receipts",
            "events.test.number",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "aftercommit.outbox.EVENTS",
        ],
    ),
    (
        "receipts",
        &[
            "events.test.number",
            "$JS.API.CONSUMER.INFO.EVENTS.branch-balance",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.branch-balance",
            "$JS.ACK.EVENTS.branch-balance.1.1.1.1.1",
            "$JS.API.CONSUMER.LIST.EVENTS",
            "_INBOX_worker.branch-balance.1",
        ],
    ),
    (
        "branch-balance",
        &[
            "events.test.number",
            "$JS.API.CONSUMER.INFO.EVENTS.receipts",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "_INBOX_worker.receipts.1",
        ],
    ),
    (
        "receipts_reconciler",
        &[
            "events.test.number",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "$JS.API.CONSUMER.INFO.EVENTS.branch-balance",
        ],
    ),
    (
        "operator",
        &[
            "events.test.number",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "_INBOX_worker.receipts.1",
        ],
    ),
];

const SUBSCRIBE: [(&str, &[&str]); 7] = [
    ("provisioner", &["_INBOX.>", "_INBOX_worker.>", "_INBOX_relay.>", "aftercommit.outbox.EVENTS"]),
    ("relay", &["_INBOX_worker.>", "_INBOX_operator.>", "aftercommit.worker.EVENTS.status"]),
    ("outbox_reconciler", &["_INBOX_relay.>", "aftercommit.outbox.EVENTS", "$SRV.PING"]),
    (
        "receipts",
        &[
            "_INBOX_worker.>",
            "_INBOX_worker.branch-balance.>",
            "_INBOX_relay.>",
            "aftercommit.outbox.EVENTS",
            "aftercommit.relay.EVENTS.status",
        ],
    ),
    ("branch-balance", &["_INBOX_worker.receipts.>", "aftercommit.outbox.EVENTS"]),
    ("receipts_reconciler", &["_INBOX_worker.receipts.>", "aftercommit.outbox.EVENTS"]),
    ("operator", &["_INBOX_worker.>", "_INBOX_relay.>", "aftercommit.outbox.EVENTS", "$SRV.PING"]),
];

/// Nobody listens to events past the stream, or to what others ask of it.
const NOBODY_LISTENS: [&str; 5] = [">", "events.>", "$JS.>", "$JS.API.>", "$SYS.>"];

/// The subjects that the server refuses.
async fn refused(stage: &Stage, user: &str, publish: &[&str], subscribe: &[&str]) -> BTreeSet<String> {
    let (said, mut hear) = mpsc::unbounded_channel();
    let options = stage.options(user).event_callback(move |event| {
        if let Event::ServerError(error) = event {
            let _ = said.send(error.to_string());
        }
        std::future::ready(())
    });
    let client = options.connect(stage.nats.url()).await.unwrap();
    let mut subscriptions = Vec::new();
    for subject in subscribe {
        subscriptions.push(client.subscribe(subject.to_string()).await.unwrap());
    }
    for subject in publish {
        client.publish(subject.to_string(), "{}".into()).await.unwrap();
    }
    client.flush().await.unwrap();
    let mut refused = BTreeSet::new();
    let expected = publish.len() + subscribe.len();
    let _ = eventually(Duration::from_secs(10), "all are refused", async || {
        while let Ok(error) = hear.try_recv() {
            let lower = error.to_lowercase();
            assert!(lower.contains("permissions violation"), "{user}: {error}");
            let kind = if lower.contains("for publish") { "publish" } else { "subscribe" };
            refused.insert(format!("{kind} {}", error.split('"').nth(1).unwrap()));
        }
        refused.len() == expected
    })
    .await;
    refused
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_beyond_is_refused_by_nats() {
    let stage = Stage::provisioned().await;
    for ((user, publish), (_, subscribe)) in PUBLISH.iter().zip(SUBSCRIBE) {
        let mut publish: Vec<&str> = publish.iter().chain(&NOBODY).copied().collect();
        if *user != "provisioner" {
            publish.extend(ADMINISTRATION);
        }
        if *user == "relay" {
            publish.retain(|subject| !subject.starts_with("events."));
        }
        let subscribe: Vec<&str> = subscribe.iter().chain(&NOBODY_LISTENS).copied().collect();
        let all = publish.iter().map(|subject| format!("publish {subject}"));
        let all: BTreeSet<String> = all.chain(subscribe.iter().map(|subject| format!("subscribe {subject}"))).collect();
        let refused = refused(&stage, user, &publish, &subscribe).await;
        let allowed: Vec<&String> = all.difference(&refused).collect();
        assert!(allowed.is_empty(), "{user} may: {allowed:?}");
        // Not everything is refused.
        let client = stage.options(user).connect(stage.nats.url()).await.unwrap();
        let subject = if user.starts_with("receipts") {
            "$JS.API.CONSUMER.INFO.EVENTS.receipts"
        } else {
            "$JS.API.STREAM.INFO.EVENTS"
        };
        let answer = client.request(subject, "".into()).await.unwrap();
        assert!(!String::from_utf8_lossy(&answer.payload).contains("\"error\""), "{user}: {answer:?}");
    }
    let untouched = stage.outbox().await;
    assert_eq!(untouched.stored().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_connects_without_the_right_password() {
    let stage = Stage::new().await;
    assert!(async_nats::connect(stage.nats.url()).await.is_err());
    for user in ["provisioner", "relay", "receipts", "operator", "system"] {
        let wrong = async_nats::ConnectOptions::with_user_and_password(user.into(), "wrong".into());
        assert!(wrong.connect(stage.nats.url()).await.is_err(), "{user}");
        let right = async_nats::ConnectOptions::with_user_and_password(user.into(), password(user));
        assert!(right.connect(stage.nats.url()).await.is_ok(), "{user}");
    }
}
