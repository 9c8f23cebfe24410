//! What accounts.conf does not let a user do: for each a list of subjects that nats-server refuses, or that lead nowhere.

use std::collections::BTreeSet;
use std::time::Duration;

use aftercommit::testing::eventually;
use async_nats::{Event, RequestErrorKind};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::stage::{OWN_ACCOUNTS, Stage, password, started};
use crate::support::SOON;

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

/// Within the account of the stream the permissions of its users say it, and the server what they lack.
const PUBLISH: [(&str, &[&str]); 3] = [
    (
        "provisioner",
        &[
            "events.test.number",
            "events.erasure.requested",
            "events.erasure.outcome",
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
            "_INBOX_prov.somebody",
        ],
    ),
    (
        "outbox_reconciler",
        &[
            "$JS.API.CONSUMER.CREATE.EVENTS.receipts",
            "$JS.API.CONSUMER.DELETE.EVENTS.receipts",
            "events.test.number",
            "events.erasure.requested",
            "events.erasure.outcome",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "aftercommit.outbox.EVENTS",
        ],
    ),
];

const SUBSCRIBE: [(&str, &[&str]); 3] = [
    ("provisioner", &["_INBOX.>", "_INBOX_relay.>", "_R_.>", "aftercommit.outbox.EVENTS"]),
    ("relay", &["_INBOX_prov.>", "_R_.>", "aftercommit.worker.EVENTS.status"]),
    ("outbox_reconciler", &["_INBOX_relay.>", "_R_.>", "aftercommit.outbox.EVENTS", "$SRV.PING"]),
];

/// Whoever has an account of its own can ask only what that imports: everything else finds nobody who answers.
const ASK: [(&str, &[&str]); 5] = [
    (
        "receipts",
        &[
            "$JS.API.CONSUMER.INFO.EVENTS.branch-balance",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.branch-balance",
            "$JS.API.CONSUMER.LIST.EVENTS",
            "$JS.API.CONSUMER.NAMES.EVENTS",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.NAMES",
            "$JS.API.INFO",
            "$JS.API.STREAM.INFO.EVENTS_ADVISORIES",
            "$JS.ACK.EVENTS.branch-balance.1.1.1.1.1",
            "aftercommit.relay.EVENTS.status",
            "events.erasure.requested",
            "events.erasure.outcome",
            "_INBOX_branch-balance.1",
        ],
    ),
    (
        "branch-balance",
        &[
            "$JS.API.CONSUMER.INFO.EVENTS.receipts",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.API.STREAM.LIST",
            "$JS.API.CONSUMER.NAMES.EVENTS",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "_INBOX_receipts.1",
        ],
    ),
    (
        "receipts_reconciler",
        &[
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "$JS.API.CONSUMER.INFO.EVENTS.branch-balance",
            "$JS.API.STREAM.LIST",
            "$JS.API.CONSUMER.NAMES.EVENTS",
            "aftercommit.worker.EVENTS.status",
        ],
    ),
    (
        "eraser",
        &[
            "$JS.API.CONSUMER.INFO.EVENTS.receipts",
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.MSG.DELETE.OTHER",
            "$JS.API.STREAM.MSG.DELETE.EVENTS_ADVISORIES",
            "aftercommit.outbox.EVENTS",
        ],
    ),
    (
        "operator",
        &[
            "$JS.API.CONSUMER.MSG.NEXT.EVENTS.receipts",
            "$JS.API.STREAM.INFO.OTHER",
            "events.erasure.requested",
            "events.erasure.outcome",
            "$JS.API.CONSUMER.LIST.EVENTS_ADVISORIES",
            "$JS.API.CONSUMER.CREATE.EVENTS_ADVISORIES.mine",
            "$JS.API.STREAM.UPDATE.EVENTS_ADVISORIES",
            "$JS.API.STREAM.PURGE.EVENTS_ADVISORIES",
            "$JS.API.STREAM.DELETE.EVENTS_ADVISORIES",
            "$JS.API.STREAM.MSG.DELETE.EVENTS_ADVISORIES",
            "$JS.ACK.EVENTS.receipts.1.1.1.1.1",
            "_INBOX_receipts.1",
        ],
    ),
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
        let subscribe: Vec<&str> = subscribe.iter().chain(&NOBODY_LISTENS).copied().collect();
        let all = publish.iter().map(|subject| format!("publish {subject}"));
        let all: BTreeSet<String> = all.chain(subscribe.iter().map(|subject| format!("subscribe {subject}"))).collect();
        let refused = refused(&stage, user, &publish, &subscribe).await;
        let allowed: Vec<&String> = all.difference(&refused).collect();
        assert!(allowed.is_empty(), "{user} may: {allowed:?}");
        // Not everything is refused.
        assert!(answered(&stage, user, "$JS.API.STREAM.INFO.EVENTS").await, "{user}");
    }
    for (user, ask) in ASK {
        let mut ask: Vec<&str> = ask.iter().chain(&ADMINISTRATION).chain(&NOBODY).copied().collect();
        ask.push("events.test.number");
        ask.retain(|subject| user != "eraser" || *subject != "$JS.API.STREAM.MSG.DELETE.EVENTS");
        for subject in ask {
            assert!(!answered(&stage, user, subject).await, "{user} may ask {subject}");
            // Of its own account, which has no JetStream, and as the account would import it.
            if let Some(api) = subject.strip_prefix("$JS.API.") {
                assert!(!answered(&stage, user, &format!("JS.API.{api}")).await, "{user} may ask JS.API.{api}");
            }
        }
        assert!(answered(&stage, user, "JS.API.STREAM.INFO.EVENTS").await, "{user}");
    }
    let untouched = stage.outbox().await;
    assert_eq!(untouched.stored().await, 0);
}

/// Whether what this user asks is answered, by something else than a JetStream that the account does not have.
async fn answered(stage: &Stage, user: &str, subject: &str) -> bool {
    let client = stage.options(user).connect(stage.nats.url()).await.unwrap();
    match client.request(subject.to_string(), "".into()).await {
        Ok(answer) => !String::from_utf8_lossy(&answer.payload).contains("\"err_code\":10039"),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => false,
        Err(error) => panic!("{user} asks {subject}: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_hears_what_goes_on_in_another_account() {
    let stage = Stage::provisioned().await;
    let outbox = stage.outbox().await;
    outbox.publish("test.number", "{}", None).await;
    let relay = started(stage.command("aftercommit-relay", "relay", "relay"), &stage.log("relay"));
    let mut ears = Vec::new();
    for user in OWN_ACCOUNTS {
        let client = stage.options(user).connect(stage.nats.url()).await.unwrap();
        let ear = client.subscribe(">").await.unwrap();
        client.flush().await.unwrap();
        ears.push((user, client, ear));
    }
    eventually(SOON, "the event is stored", async || outbox.stored().await == 1).await.unwrap();
    // Everybody asks something, so that there are answers to hear.
    for user in OWN_ACCOUNTS {
        assert!(answered(&stage, user, "JS.API.STREAM.INFO.EVENTS").await);
        // Whoever erases may ask nothing of the relay.
        if user != "eraser" {
            assert!(answered(&stage, user, "aftercommit.outbox.EVENTS").await);
        }
    }
    relay.kill();
    for (user, client, mut ear) in ears {
        client.publish("heard", "".into()).await.unwrap();
        loop {
            let message = tokio::time::timeout(SOON, ear.next()).await.unwrap().unwrap();
            let subject = message.subject.as_str();
            if subject == "heard" {
                break;
            }
            // `answered` is the same user, on another connection.
            let own = subject == "JS.API.STREAM.INFO.EVENTS"
                || subject == "aftercommit.outbox.EVENTS"
                || subject.starts_with(&format!("_INBOX_{user}."));
            assert!(own, "{user} hears {subject}");
        }
    }
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
