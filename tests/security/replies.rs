//! nats-server answers requests of JetStream as itself, on the subject that the request names, and asks nobody's
//! permission. Here every user outside of the stream's account asks everything with every answer's subject that would do
//! harm, and none is done.

use std::collections::BTreeMap;
use std::time::Duration;

use aftercommit::testing::eventually;
use aftercommit::testing::servers::Nats;
use async_nats::Client;
use async_nats::jetstream::{self, consumer};
use futures_util::TryStreamExt;

use crate::stage::{OWN_ACCOUNTS, Stage, server, started};
use crate::support::{Database, Outbox, SOON};

/// The release with which the oldest line of nats-server that is supported ends.
const OLDEST: &str = "2.11.11";

/// What is asked: beyond and within the rights of the users, in ways that end with an answer that has no payload, too.
const JETSTREAM: [(&str, &str); 29] = [
    ("STREAM.INFO.EVENTS", ""),
    ("STREAM.INFO.EVENTS", "nonsense"),
    ("STREAM.MSG.GET.EVENTS", r#"{"seq":1}"#),
    ("STREAM.MSG.GET.EVENTS", r#"{"seq":999999}"#),
    ("STREAM.MSG.GET.EVENTS", ""),
    ("DIRECT.GET.EVENTS", r#"{"seq":1}"#),
    ("DIRECT.GET.EVENTS", r#"{"seq":999999}"#),
    ("DIRECT.GET.EVENTS", "nonsense"),
    ("DIRECT.GET.EVENTS.events.test.number", ""),
    ("CONSUMER.INFO.EVENTS.receipts", ""),
    ("CONSUMER.INFO.EVENTS.branch-balance", ""),
    ("CONSUMER.LIST.EVENTS", ""),
    ("CONSUMER.NAMES.EVENTS", ""),
    ("CONSUMER.MSG.NEXT.EVENTS.receipts", r#"{"batch":1,"no_wait":true}"#),
    ("CONSUMER.MSG.NEXT.EVENTS.receipts", "{nonsense"),
    ("CONSUMER.MSG.NEXT.EVENTS.branch-balance", r#"{"batch":1,"no_wait":true}"#),
    ("CONSUMER.MSG.NEXT.EVENTS.branch-balance", "{nonsense"),
    ("STREAM.NAMES", ""),
    ("STREAM.LIST", ""),
    ("STREAM.LIST", "nonsense"),
    ("INFO", ""),
    ("STREAM.INFO.EVENTS_ADVISORIES", ""),
    ("STREAM.MSG.GET.EVENTS_ADVISORIES", r#"{"seq":1}"#),
    ("DIRECT.GET.EVENTS_ADVISORIES", r#"{"seq":1}"#),
    ("DIRECT.GET.EVENTS_ADVISORIES", r#"{"seq":999999}"#),
    ("STREAM.CREATE.FORGED", r#"{"name":"FORGED","subjects":["forged.>"],"storage":"file","retention":"limits"}"#),
    ("STREAM.PURGE.EVENTS", ""),
    ("STREAM.DELETE.EVENTS", ""),
    ("CONSUMER.DELETE.EVENTS.branch-balance", ""),
];

/// The same of others than JetStream.
const OTHERS: [(&str, &str); 9] = [
    ("$JS.ACK.EVENTS.receipts.1.1.1.1.0", ""),
    ("$JS.ACK.EVENTS.receipts.1.1.1.1.0", r#"+NXT {"no_wait":true}"#),
    ("$JS.ACK.EVENTS.branch-balance.1.1.1.1.0", ""),
    ("$JS.ACK.EVENTS.branch-balance.1.1.1.1.0", "+TERM"),
    ("aftercommit.outbox.EVENTS", r#"{"page":{"up_to":1}}"#),
    ("aftercommit.outbox.EVENTS", "nonsense"),
    ("aftercommit.relay.EVENTS.status", ""),
    ("$SRV.PING", ""),
    ("events.test.number", "{}"),
];

/// Where the answer goes.
const ADMINISTRATION: [&str; 10] = [
    "STREAM.DELETE.EVENTS",
    "STREAM.PURGE.EVENTS",
    "STREAM.CREATE.FORGED",
    "STREAM.UPDATE.EVENTS",
    "STREAM.MSG.DELETE.EVENTS",
    "STREAM.SNAPSHOT.EVENTS",
    "CONSUMER.DELETE.EVENTS.branch-balance",
    "CONSUMER.CREATE.EVENTS.forged",
    "CONSUMER.MSG.NEXT.EVENTS.branch-balance",
    "CONSUMER.PAUSE.EVENTS.branch-balance",
];
const ELSEWHERE: [&str; 6] = [
    "events.test.number",
    "$JS.ACK.EVENTS.branch-balance.1.1.1.1.0",
    "$JS.ACK.EVENTS.branch-balance.1.2.2.1.0",
    "_R_.forged.forged",
    "_INBOX_relay.forged",
    "aftercommit.outbox.EVENTS",
];

/// Within the account of the stream as it is, and as the users of other accounts call it.
const PREFIXES: [&str; 2] = ["$JS.API", "JS.API"];

fn requests() -> Vec<(String, &'static str)> {
    let within = PREFIXES.iter().flat_map(|prefix| JETSTREAM.map(|(call, body)| (format!("{prefix}.{call}"), body)));
    within.chain(OTHERS.map(|(subject, body)| (subject.to_string(), body))).collect()
}

fn replies() -> Vec<String> {
    let within = PREFIXES.iter().flat_map(|prefix| ADMINISTRATION.map(|call| format!("{prefix}.{call}")));
    within.chain(ELSEWHERE.map(str::to_string)).collect()
}

/// All that could be harmed: the streams, what is in them, and the consumers, without the one that is the user's own.
async fn state(outbox: &Outbox, own: &str) -> BTreeMap<String, String> {
    let js = outbox.js().await;
    let mut state = BTreeMap::new();
    let streams: Vec<jetstream::stream::Info> = js.streams().try_collect().await.unwrap();
    for stream in streams {
        let (name, held) = (stream.config.name.clone(), stream.state);
        let config = serde_json::to_string(&stream.config).unwrap();
        let held = format!("{}, {} to {}", held.messages, held.first_sequence, held.last_sequence);
        state.insert(format!("stream {name}"), format!("{} {held} {config}", stream.created));
        let consumers = js.get_stream(&name).await.unwrap();
        let consumers: Vec<consumer::Info> = consumers.consumers().try_collect().await.unwrap();
        for consumer in consumers.into_iter().filter(|consumer| consumer.name != own) {
            let at = format!("{:?} {:?}", consumer.delivered.stream_sequence, consumer.ack_floor.stream_sequence);
            let held = format!("{} {} {at} {}", consumer.created, consumer.num_ack_pending, consumer.paused);
            state.insert(format!("consumer {}", consumer.name), held);
        }
    }
    state
}

/// Asks in earnest, so that all that was asked before is answered, too. Says whether the user may ask this.
async fn answered(client: &Client, subject: &str, body: &str) -> bool {
    match tokio::time::timeout(SOON, client.request(subject.to_string(), body.to_string().into())).await.unwrap() {
        Ok(answer) => !String::from_utf8_lossy(&answer.payload).contains("\"err_code\":10039"),
        Err(error) if error.kind() == async_nats::RequestErrorKind::NoResponders => false,
        Err(error) => panic!("{subject}: {error}"),
    }
}

/// A server with a relay, some events, and deliveries that the subscriber branch-balance has not acked.
async fn stage(nats: Nats) -> (Stage, Outbox, crate::support::WorkerProcess) {
    let stage = Stage::on(Database::empty().await, nats).await.provision().await;
    let outbox = stage.outbox().await;
    for n in 1..=5 {
        outbox.publish("test.number", &format!("{{\"n\": {n}}}"), None).await;
    }
    let relay = started(stage.command("aftercommit-relay", "relay", "relay"), &stage.log("relay"));
    eventually(SOON, "the events are stored", async || outbox.stored().await == 5).await.unwrap();
    let js = outbox.js().await;
    // It gets nothing by itself here, because a worker may announce a dead letter of its own.
    let (name, subjects) = ("EVENTS_ADVISORIES".into(), vec!["announced".into()]);
    let config = jetstream::stream::Config { name, subjects, allow_direct: true, ..Default::default() };
    js.create_stream(config).await.unwrap();
    js.publish("announced", "{}".into()).await.unwrap().await.unwrap();
    let stream = js.get_stream("EVENTS").await.unwrap();
    let config = consumer::pull::Config {
        durable_name: Some("branch-balance".into()),
        ack_wait: Duration::from_hours(1),
        ..Default::default()
    };
    let consumer = stream.create_consumer(config).await.unwrap();
    let delivered = consumer.fetch().max_messages(3).messages().await.unwrap();
    assert_eq!(delivered.try_collect::<Vec<_>>().await.unwrap().len(), 3);
    (stage, outbox, relay)
}

async fn no_harm_is_done(nats: Nats) {
    let (stage, outbox, _relay) = stage(nats).await;
    let (requests, replies) = (requests(), replies());
    for user in OWN_ACCOUNTS {
        let client = stage.options(user).connect(stage.nats.url()).await.unwrap();
        let before = state(&outbox, user).await;
        let mut allowed = Vec::new();
        for (subject, body) in &requests {
            for reply in &replies {
                client.publish_with_reply(subject.clone(), reply.clone(), (*body).into()).await.unwrap();
            }
            if subject.starts_with("$JS.ACK") {
                client.flush().await.unwrap();
            } else if answered(&client, subject, body).await {
                allowed.push(subject.as_str());
            }
            assert_eq!(state(&outbox, user).await, before, "{user} asks {subject} {body:?}");
        }
        // The user may do its work, so it was not just refused everything.
        assert!(allowed.contains(&"JS.API.STREAM.INFO.EVENTS"), "{user}: {allowed:?}");
        assert_eq!(allowed.contains(&"aftercommit.outbox.EVENTS"), user != "eraser", "{user}: {allowed:?}");
        let own = allowed.iter().filter(|subject| subject.contains("MSG.NEXT"));
        assert!(own.clone().all(|subject| subject.ends_with(user)), "{user}: {allowed:?}");
        assert!(allowed.iter().all(|subject| !subject.starts_with("$JS.API")), "{user}: {allowed:?}");
    }
    the_stream_s_own_account_is_trusted(&stage, &outbox).await;
}

/// That the attack is one: whoever is in the account of the stream needs nothing but a look at it.
async fn the_stream_s_own_account_is_trusted(stage: &Stage, outbox: &Outbox) {
    let insider = stage.options("provisioner").connect(stage.nats.url()).await.unwrap();
    let question = r#"{"seq":999999}"#;
    let (subject, reply) = ("$JS.API.DIRECT.GET.EVENTS", "$JS.API.STREAM.DELETE.EVENTS");
    insider.publish_with_reply(subject, reply, question.into()).await.unwrap();
    eventually(SOON, "the stream is deleted", async || !state(outbox, "").await.contains_key("stream EVENTS"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_does_what_its_asker_may_not() {
    no_harm_is_done(server(None).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_does_what_its_asker_may_not_on_the_oldest_server() {
    match server(Some(OLDEST)).await {
        Ok(nats) => no_harm_is_done(nats).await,
        Err(error) => eprintln!("skipped: {}", error.report()),
    }
}
