//! What the `nats` program shows of streams and consumers: the JetStream API's answers that it prints, field by field,
//! as docs/nats-tooling.md explains them. tests/security/nats_tooling.rs runs the program itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};
use async_nats::Client;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use serde_json::{Value, json};

/// The subjects that the program asks, and the answer as the server wrote it.
async fn api(client: &Client, subject: String, request: Value) -> Value {
    let answer = client.request(format!("$JS.API.{subject}"), request.to_string().into()).await.unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

/// `nats stream get`: subject, headers and payload of one message.
async fn stream_get(work: &Work, sequence: u64) -> (String, BTreeMap<String, String>, String) {
    let subject = format!("STREAM.MSG.GET.{}", work.outbox.naming.stream);
    let answer = api(&work.context.client(), subject, json!({ "seq": sequence })).await;
    let text = |name: &str| {
        let encoded = answer["message"][name].as_str().unwrap_or_else(|| panic!("no {name} in {answer}"));
        String::from_utf8(STANDARD.decode(encoded).unwrap()).unwrap()
    };
    let headers = text("hdrs");
    let lines = headers.lines().skip(1).filter_map(|line| line.split_once(": "));
    let headers = lines.map(|(name, value)| (name.to_string(), value.to_string())).collect();
    (answer["message"]["subject"].as_str().unwrap().to_string(), headers, text("data"))
}

/// `nats consumer info`.
async fn consumer_info(work: &Work, consumer: &str) -> Value {
    api(&work.context.client(), format!("CONSUMER.INFO.{}.{consumer}", work.outbox.naming.stream), json!({})).await
}

/// The numbers of `nats consumer info` in the order in which it prints them.
fn state(info: &Value) -> [(&'static str, u64); 5] {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{info}"));
    [
        ("Last Delivered Message, stream sequence", number(&info["delivered"]["stream_seq"])),
        ("Acknowledgment Floor, stream sequence", number(&info["ack_floor"]["stream_seq"])),
        ("Outstanding Acks", number(&info["num_ack_pending"])),
        ("Redelivered Messages", number(&info["num_redelivered"])),
        ("Unprocessed Messages", number(&info["num_pending"])),
    ]
}

async fn wait_for_state(work: &Work, consumer: &str, expected: [u64; 5]) {
    let mut last = Value::Null;
    let reached = eventually(SOON, "the consumer's numbers", async || {
        last = consumer_info(work, consumer).await;
        state(&last).map(|(_, number)| number) == expected
    })
    .await;
    assert!(reached.is_ok(), "{:?} instead of {expected:?}", state(&last));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_says_everything_in_its_headers() {
    let work = Work::shared().await;
    let mut tx = work.outbox.pool.begin().await.unwrap();
    let written: (String, String) = sqlx::query_as(
        "insert into aftercommit.outbox (event_id, type, version, key, headers, payload)
         values (aftercommit.new_event_id(), 'order.placed', 2, 'order 7',
                 '{\"X-Tenant\": \"acme\", \"traceparent\": \"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"}',
                 '{\"order\": 7}')
         returning event_id::text, to_char(created_at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
    )
    .fetch_one(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    let relay = work.outbox.relay();
    work.outbox.assert_complete().await;
    relay.stop().await.unwrap();

    let (subject, mut headers, payload) = stream_get(&work, 1).await;
    assert_eq!(subject, format!("{}.order.placed", work.outbox.naming.prefix));
    assert_eq!(payload, r#"{"order": 7}"#, "readable as it is");
    // The chain to the message before; see docs/decisions/0001-identity-chain.md.
    assert_eq!(headers.remove("Nats-Expected-Last-Sequence").as_deref(), Some("0"));
    let (id, time) = written;
    let expected = [
        ("Nats-Msg-Id", id.as_str()),
        ("ce-id", id.as_str()),
        ("ce-specversion", "1.0"),
        ("ce-type", "order.placed"),
        ("ce-source", "/test"),
        ("ce-time", time.as_str()),
        ("ce-datacontenttype", "application/json"),
        ("ce-partitionkey", "order%207"),
        ("ce-sequence", "1"),
        ("ce-dataversion", "2"),
        ("X-Tenant", "acme"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ];
    assert_eq!(headers, expected.map(|(name, value)| (name.to_string(), value.to_string())).into());
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_and_consumer_say_what_they_are_for() {
    let work = Work::shared().await;
    let stream = &work.outbox.naming.stream;
    work.worker_with(Subscriber::new("cli").on::<Number>(Record::good())).provision().await.unwrap();
    work.send_many(&["a"], 3).await;
    let info = api(&work.context.client(), format!("STREAM.INFO.{stream}"), json!({})).await;
    assert_eq!(info["config"]["description"], "Events of the outbox /test, published by aftercommit-relay only");
    assert_eq!(info["config"]["subjects"], json!([work.outbox.naming.prefix.wildcard()]));
    let state = &info["state"];
    let numbers = ["messages", "first_seq", "last_seq", "consumer_count"].map(|name| state[name].as_u64().unwrap());
    assert_eq!(numbers, [3, 1, 3, 1]);

    // `nats consumer report` prints one line for each of these. No worker runs, so everything waits to be delivered.
    let list = api(&work.context.client(), format!("CONSUMER.LIST.{stream}"), json!({})).await;
    let [consumer] = list["consumers"].as_array().unwrap().as_slice() else { panic!("{list}") };
    assert_eq!(consumer["name"], "cli");
    let config = &consumer["config"];
    assert_eq!(config["description"], "aftercommit subscriber cli");
    assert_eq!(config["filter_subject"], work.outbox.naming.prefix.subject("test.number"));
    assert_eq!(config["ack_policy"], "explicit");
    assert_eq!(config["max_deliver"], -1, "attempts are counted in the database");
    assert_eq!(config["ack_wait"], 30_000_000_000_u64);
    assert_eq!(consumer["num_pending"], 3);
    assert_eq!(consumer["num_waiting"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_handler_shows_as_outstanding_and_redelivered() {
    let work = Work::shared().await;
    let failing = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&failing);
    let act = move |delivery: &Delivery<Number>| match (delivery.key.as_deref(), switch.load(Ordering::SeqCst)) {
        (Some("bad"), true) => Act::Fail(HandlerError::retry("the printer is on fire")),
        _ => Act::Succeed,
    };
    let backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_millis(100) };
    let subscriber = Subscriber::new("cli").on::<Number>(Record::new(act));
    let worker = work.run(subscriber.backoff(backoff).max_attempts(u32::MAX)).await;
    // Sequences 1 to 5: the first of the bad key, its follower, and three of another key.
    work.send_many(&["bad"], 2).await;
    work.send_many(&["good"], 3).await;
    work.wait_for(3).await;
    // 1 is tried again and again, 2 waits behind it, the others are done, and nothing is waiting to be delivered.
    wait_for_state(&work, "cli", [5, 0, 2, 1, 0]).await;
    let info = consumer_info(&work, "cli").await;
    assert!(info["num_waiting"].as_u64().unwrap() > 0, "the active worker asks for more: {info}");
    let deliveries = info["delivered"]["consumer_seq"].as_u64().unwrap();
    assert!(deliveries > 5, "each redelivery counts as a delivery: {deliveries}");
    // Why it fails is in the database, not in NATS.
    let tried = async || work.attempts().await.first().is_some_and(|attempts| *attempts > 1);
    eventually(SOON, "a second attempt is on record", tried).await.unwrap();
    let last_error: String =
        sqlx::query_scalar("select last_error from aftercommit.attempt").fetch_one(&work.outbox.pool).await.unwrap();
    assert_eq!(last_error, "the printer is on fire");

    failing.store(false, Ordering::SeqCst);
    work.wait_for(5).await;
    wait_for_state(&work, "cli", [5, 5, 0, 0, 0]).await;
    worker.stop().await;
}

/// The first delivery is still out then. What can be seen of it is the announcement that it was given back.
#[tokio::test(flavor = "multi_thread")]
async fn in_the_first_backoff_nothing_shows_as_redelivered() {
    let work = Work::shared().await;
    let stream = &work.outbox.naming.stream;
    let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.{stream}.cli");
    let mut advisories = work.context.client().subscribe(subject).await.unwrap();
    work.context.client().flush().await.unwrap();
    let backoff = Backoff { first: Duration::from_hours(1), max: Duration::from_hours(1) };
    let failing = Record::new(|_| Act::Fail(HandlerError::retry("the printer is on fire")));
    let worker = work.run(Subscriber::new("cli").on::<Number>(failing).backoff(backoff)).await;
    work.send("bad", 1).await;
    let advisory = tokio::time::timeout(SOON, advisories.next()).await.unwrap().unwrap();
    let advisory: Value = serde_json::from_slice(&advisory.payload).unwrap();
    assert_eq!((&advisory["stream_seq"], &advisory["deliveries"]), (&json!(1), &json!(1)));
    // Outstanding, not redelivered, and nothing waits to be delivered.
    wait_for_state(&work, "cli", [1, 0, 1, 0, 0]).await;
    let peek = work.outbox.operator(&["peek", "--subscriber", "cli"]);
    let peek = String::from_utf8(peek.stdout).unwrap();
    assert!(peek.contains("failing") && peek.contains("the printer is on fire"), "{peek}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_announced_with_its_reason() {
    let work = Work::shared().await;
    let stream = &work.outbox.naming.stream;
    let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{stream}.cli");
    let mut advisories = work.context.client().subscribe(subject).await.unwrap();
    work.context.client().flush().await.unwrap();
    work.send("bad", 1).await;
    let reject = Record::new(|_| Act::Fail(HandlerError::reject("no such printer")));
    let worker = work.run(Subscriber::new("cli").on::<Number>(reject)).await;
    let advisory = tokio::time::timeout(SOON, advisories.next()).await.unwrap().unwrap();
    let advisory: Value = serde_json::from_slice(&advisory.payload).unwrap();
    assert_eq!(advisory["stream_seq"], 1);
    assert_eq!((&advisory["stream"], &advisory["consumer"]), (&json!(stream), &json!("cli")));
    assert_eq!(advisory["type"], "io.nats.jetstream.advisory.v1.terminated");
    assert_eq!(advisory["deliveries"], 1);
    assert_eq!(advisory["reason"], "no such printer");
    // The message is still there to be looked at.
    assert_eq!(stream_get(&work, 1).await.2, r#"{"key":"bad","n":1}"#);
    wait_for_state(&work, "cli", [1, 1, 0, 0, 0]).await;
    worker.stop().await;
}

/// The announcements are kept where somebody has asked for that.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_announced_into_a_stream() {
    let work = Work::shared().await;
    let provision = || {
        let output = work.outbox.operator(&["provision", "--advisories"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let stream = format!("{}_ADVISORIES", work.outbox.naming.stream);
    assert!(provision().contains(&format!("stream {stream}: created")));
    assert_eq!(provision(), "everything is as it should be\n");
    let worker = work
        .run(Subscriber::new("cli").on::<Number>(Record::new(|_| Act::Fail(HandlerError::reject("no such printer")))))
        .await;
    work.send("bad", 1).await;
    let kept = work.context.get_stream(&stream).await.unwrap();
    eventually(SOON, "the announcement is kept", async || kept.get_raw_message(1).await.is_ok()).await.unwrap();
    let kept = kept.get_raw_message(1).await.unwrap();
    let advisory: Value = serde_json::from_slice(&kept.payload).unwrap();
    assert_eq!((&advisory["reason"], &advisory["stream_seq"]), (&json!("no such printer"), &json!(1)));
    worker.stop().await;
}

/// The trap: `nats consumer next` acks, and then the server believes that the subscriber is done with the event.
#[tokio::test(flavor = "multi_thread")]
async fn consumer_next_takes_an_event_away() {
    let work = Work::shared().await;
    work.worker_with(Subscriber::new("cli").on::<Number>(Record::good())).provision().await.unwrap();
    work.send("a", 1).await;
    let consumer = work.consumer("cli").await;
    let message = consumer.fetch().max_messages(1).messages().await.unwrap().next().await.unwrap().unwrap();
    message.double_ack().await.unwrap();
    wait_for_state(&work, "cli", [1, 1, 0, 0, 0]).await;
}
