//! G1 and G5 at the operator: where one event is and what happened to it, and what waits for a subscriber, found out
//! without changing anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Act, Database, Number, Outbox, Record, SOON, Work, succeeded};
use aftercommit::backoff::Backoff;
use aftercommit::operator;
use aftercommit::operator::dead::{self, Filter};
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};
use serde_json::{Value, json};

fn explain(outbox: &Outbox, event: &str, more: &[&str]) -> Value {
    let text = succeeded(outbox.operator(&[&["explain", event, "--json"], more].concat()));
    serde_json::from_str(&text).unwrap()
}

/// What happened, without the times, which must not go back.
fn moments(explanation: &Value) -> Vec<String> {
    let moments = explanation["moments"].as_array().unwrap();
    let text = |moment: &Value, name: &str| moment[name].as_str().unwrap().to_string();
    let times: Vec<String> = moments.iter().map(|moment| text(moment, "at")).collect();
    assert!(times.is_sorted(), "{times:?}");
    moments.iter().map(|moment| format!("{}: {}", text(moment, "place"), text(moment, "text"))).collect()
}

fn state<'a>(explanation: &'a Value, subscriber: &str) -> &'a str {
    explanation["subscribers"][subscriber]["state"].as_str().unwrap_or_else(|| panic!("{explanation}"))
}

async fn published(outbox: &Outbox, messages: u64) {
    let relay = outbox.relay();
    eventually(SOON, "the events are in the stream", async || outbox.stored().await >= messages).await.unwrap();
    relay.stop().await.unwrap();
}

fn impatient(subscriber: Subscriber) -> Subscriber {
    subscriber.backoff(Backoff { first: Duration::from_millis(50), max: Duration::from_millis(50) })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_followed_from_the_outbox_to_its_effect() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let event = outbox.written("a", 1).await;

    let waiting = explain(outbox, &event, &[]);
    assert_eq!(waiting["outbox"]["state"], "waiting", "{waiting}");
    assert!(waiting["outbox"]["text"].as_str().unwrap().contains("no relay has ever led"), "{waiting}");
    assert_eq!(waiting["message"], Value::Null);
    assert_eq!(moments(&waiting).len(), 1);
    assert!(moments(&waiting)[0].starts_with("outbox: written as outbox id 1, in transaction "), "{waiting}");
    let about = &waiting["event"];
    assert_eq!(
        (&about["type"], &about["key"], &about["source"]),
        (&json!("test.number"), &json!("a"), &json!("/test"))
    );

    operator::relay::pause(&outbox.postgres, "test", None).await.unwrap();
    assert!(explain(outbox, &event, &[])["outbox"]["text"].as_str().unwrap().contains("the relay is paused"));
    operator::relay::resume(&outbox.postgres, "test").await.unwrap();

    work.worker_with(Subscriber::new("mails").on::<Number>(Record::good())).provision().await.unwrap();
    published(outbox, 1).await;
    let pending = explain(outbox, &event, &[]);
    assert_eq!(pending["outbox"]["state"], "published", "{pending}");
    let message = &pending["message"];
    assert_eq!(
        (&message["stream_sequence"], &message["present"], &message["repair"]),
        (&json!(1), &json!(true), &json!(false))
    );
    assert_eq!(message["message_id"], json!(event));
    assert_eq!(state(&pending, "mails"), "waiting");
    assert!(pending["unknown"][0].as_str().unwrap().contains("mails"), "its database is not known: {pending}");

    let worker = work.run(Subscriber::new("mails").on::<Number>(Record::good())).await;
    work.wait_for(1).await;
    work.wait_until_acked("mails").await;
    worker.stop().await;
    let handled = explain(outbox, &event, &[]);
    assert_eq!((state(&handled, "mails"), &handled["unknown"]), ("handled", &json!([])), "{handled}");
    let story = moments(&handled);
    assert_eq!(story.len(), 3);
    assert_eq!(story[1], format!("stream: published to {} as message 1", outbox.naming.stream));
    assert_eq!(story[2], "mails: handled");

    // On paper, and without the payload unless it is asked for.
    let text = succeeded(outbox.operator(&["explain", &event]));
    assert!(text.contains("what happened") && text.contains("mails   handled") && !text.contains("\"n\""), "{text}");
    let text = succeeded(outbox.operator(&["explain", &event, "--payload"]));
    assert!(text.ends_with("\npayload\n{\"n\": 1, \"key\": \"a\"}\n"), "{text}");
    assert_eq!(explain(outbox, &event, &["--payload"])["payload"], "{\"n\": 1, \"key\": \"a\"}");

    // What retention has removed from the outbox is told by the stream, and what the stream has lost by the inbox.
    sqlx::query("delete from aftercommit.outbox").execute(&outbox.pool).await.unwrap();
    let removed = explain(outbox, &event, &[]);
    assert_eq!((&removed["outbox"], &removed["event"]["outbox_id"]), (&Value::Null, &json!(1)), "{removed}");
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.purge().await.unwrap();
    let purged = explain(outbox, &event, &[]);
    assert_eq!(
        (&purged["message"]["present"], &purged["message"]["stream_sequence"]),
        (&json!(false), &json!(1)),
        "{purged}"
    );
    assert_eq!(moments(&purged), ["mails: handled"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_event_is_followed_to_its_dead_letter_and_back() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let (event, follower) = (outbox.written("a", 1).await, outbox.written("a", 2).await);
    published(outbox, 2).await;
    let rejecting = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&rejecting);
    let act = move |delivery: &Delivery<Number>| match (delivery.event.n, switch.load(Ordering::SeqCst)) {
        (1, true) => Act::Fail(HandlerError::reject("no such printer")),
        (1, false) => Act::Fail(HandlerError::retry("the printer is on fire")),
        _ => Act::Succeed,
    };
    let subscriber = impatient(Subscriber::new("mails").on::<Number>(Record::new(act))).max_attempts(u32::MAX);
    let worker = work.run(subscriber).await;
    eventually(SOON, "two attempts have failed", async || work.attempts().await.first().is_some_and(|n| *n > 1))
        .await
        .unwrap();
    let failing = explain(outbox, &event, &[]);
    assert!(["failing", "running"].contains(&state(&failing, "mails")), "{failing}");
    let story = moments(&failing);
    assert_eq!(
        story[2..4],
        ["mails: attempt 1 failed: the printer is on fire", "mails: attempt 2 failed: the printer is on fire"]
    );
    let behind = explain(outbox, &follower, &[]);
    let states = ["delivered", "running", "behind"];
    assert!(states.contains(&state(&behind, "mails")), "it waits behind the other one: {behind}");

    rejecting.store(true, Ordering::SeqCst);
    work.wait_for(1).await;
    work.wait_until_acked("mails").await;
    worker.stop().await;
    let dead = explain(outbox, &event, &[]);
    assert_eq!(state(&dead, "mails"), "dead");
    let text = dead["subscribers"]["mails"]["text"].as_str().unwrap();
    assert_eq!(text, "dead letter 1: no such printer; `aftercommit dead show 1`");
    assert!(moments(&dead).last().unwrap().ends_with("now a dead letter: no such printer"), "{dead}");

    dead::retry(&outbox.postgres, "jane", &Filter::id(1)).await.unwrap();
    let redriven = explain(outbox, &event, &[]);
    assert_eq!(state(&redriven, "mails"), "redrive", "{redriven}");
    let text = redriven["subscribers"]["mails"]["text"].as_str().unwrap();
    assert_eq!(text, "redriven by jane, waits to run again; no worker is active for it");
    let story = moments(&redriven);
    let [.., letter, retry] = story.as_slice() else { panic!("{story:?}") };
    assert!(letter.ends_with("now a dead letter: no such printer"), "the audit trail remembers: {story:?}");
    assert_eq!(retry, "operator: jane: dead retry at mails");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_event_says_so() {
    let outbox = Work::shared().await.outbox;
    let event = outbox.written("a", 1).await;
    sqlx::query(
        "insert into aftercommit.parked (outbox_id, event_id, type, code, reason)
         select id, event_id, type, 10054, 'message size exceeds maximum allowed' from aftercommit.outbox",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    let parked = explain(&outbox, &event, &[]);
    assert_eq!(parked["outbox"]["state"], "parked", "{parked}");
    assert_eq!(moments(&parked)[1], "outbox: parked: message size exceeds maximum allowed");
    operator::relay::discard(&outbox.postgres, "jane", event.parse::<sqlx::types::Uuid>().unwrap().into())
        .await
        .unwrap();
    let discarded = explain(&outbox, &event, &[]);
    assert_eq!(discarded["outbox"]["state"], "discarded", "{discarded}");
    let story = moments(&discarded)[2..].join(", ");
    assert!(story.contains("never to be published") && story.contains("operator: jane: parked discard"), "{story}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_asked_is_named_and_other_databases_can_be() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let event = outbox.written("a", 1).await;
    published(outbox, 1).await;
    // The subscriber works elsewhere.
    let elsewhere = Work::on(Database::empty().await.config.url, outbox.nats.url.clone()).await;
    let mut theirs = outbox.moved_to(elsewhere.outbox.postgres.url.clone()).await;
    theirs.nats = outbox.nats.clone();
    let there = Work { outbox: theirs, context: work.context.clone() };
    let worker = there.run(Subscriber::new("mails").on::<Number>(Record::good())).await;
    there.wait_for(1).await;
    there.wait_until_acked("mails").await;
    worker.stop().await;

    let alone = explain(outbox, &event, &[]);
    assert_eq!(state(&alone, "mails"), "acked", "{alone}");
    assert!(alone["unknown"][0].as_str().unwrap().contains("--subscriber-database"), "{alone}");
    let together = explain(outbox, &event, &["--subscriber-database", &there.outbox.postgres.url]);
    assert_eq!((state(&together, "mails"), &together["unknown"]), ("handled", &json!([])), "{together}");

    // NATS is away: the databases tell what they know.
    let mut deaf = outbox.moved_to(outbox.postgres.url.clone()).await;
    deaf.nats.url = "nats://127.0.0.1:9".into();
    let unheard = explain(&deaf, &event, &["--subscriber-database", &there.outbox.postgres.url]);
    assert_eq!(state(&unheard, "mails"), "handled", "{unheard}");
    assert!(unheard["unknown"][0].as_str().unwrap().contains("cannot connect to NATS"), "{unheard}");
    // So is the other database, which is named by its place, because its URL may hold a password.
    let nobody = "postgres://me:hunter2@127.0.0.1:9/x";
    let unheard = explain(outbox, &event, &["--subscriber-database", nobody]);
    let unknown = unheard["unknown"].to_string();
    assert!(unknown.contains("subscriber database 1") && !unknown.contains("hunter2"), "{unknown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_event_is_said_to_be_unknown() {
    let outbox = Work::shared().await.outbox;
    outbox.written("a", 1).await;
    published(&outbox, 1).await;
    for event in ["01a1fc42-0bc3-7cc0-af42-b56e125f1d94", "5f1e4e0e-8f7e-4b62-9a53-0a3f7d3e5b10"] {
        let output = outbox.operator(&["explain", event]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("nothing is known of event") && error.contains("sequences 1 to 1"), "{error}");
    }
    // A transaction that is still open tells nobody.
    let mut open = outbox.pool.begin().await.unwrap();
    let event: String =
        sqlx::query_scalar("select aftercommit.publish('a', '{}')::text").fetch_one(&mut *open).await.unwrap();
    let output = outbox.operator(&["explain", &event]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("has not committed"));
    open.commit().await.unwrap();
    assert_eq!(explain(&outbox, &event, &[])["outbox"]["state"], "waiting");
}

/// The stream is much longer than what is gone through message by message.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_found_in_a_long_stream() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    sqlx::query("select aftercommit.publish('bulk', '{}') from generate_series(1, 15000)")
        .execute(&outbox.pool)
        .await
        .unwrap();
    let early: String = sqlx::query_scalar("select event_id::text from aftercommit.outbox where id = 77")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    let late = outbox.written("a", 1).await;
    sqlx::query("select aftercommit.publish('bulk', '{}') from generate_series(1, 5000)")
        .execute(&outbox.pool)
        .await
        .unwrap();
    published(outbox, 20_001).await;
    for (event, sequence) in [(&early, 77), (&late, 15_001)] {
        assert_eq!(explain(outbox, event, &[])["message"]["stream_sequence"], sequence);
    }
    // A log that was thinned out says less.
    sqlx::query("delete from aftercommit.relay_log where seq < (select max(seq) from aftercommit.relay_log)")
        .execute(&outbox.pool)
        .await
        .unwrap();
    for (event, sequence) in [(&early, 77), (&late, 15_001)] {
        assert_eq!(explain(outbox, event, &[])["message"]["stream_sequence"], sequence);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peek_shows_what_waits_and_takes_nothing() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let bad = Record::new(|delivery: &Delivery<Number>| match delivery.key.as_deref() {
        Some("bad") => Act::Fail(HandlerError::retry("the printer is on fire")),
        _ => Act::Succeed,
    });
    // 1 fails, 2 waits behind it, 3 and 4 are done, 5 to 7 come when the worker is gone.
    work.send_many(&["bad"], 2).await;
    work.send_many(&["good"], 2).await;
    let slow = Backoff { first: Duration::from_secs(600), max: Duration::from_secs(600) };
    let worker = work.run(Subscriber::new("mails").on::<Number>(bad).backoff(slow)).await;
    work.wait_for(2).await;
    eventually(SOON, "an attempt has failed", async || work.attempts().await == [1]).await.unwrap();
    eventually(SOON, "all is delivered", async || work.consumer("mails").await.cached_info().num_pending == 0)
        .await
        .unwrap();
    drop(worker);
    outbox.expire_leases().await;
    let asks = async || work.consumer("mails").await.cached_info().num_waiting > 0;
    eventually(SOON, "nobody asks for messages any more", async || !asks().await).await.unwrap();
    work.send_many(&["late"], 3).await;

    // How the server sees the consumer, as it answers, but for the time of its answer.
    let consumer = async || {
        let subject = format!("$JS.API.CONSUMER.INFO.{}.mails", outbox.naming.stream);
        let answer = work.context.client().request(subject, "".into()).await.unwrap();
        let mut info: Value = serde_json::from_slice(&answer.payload).unwrap();
        info.as_object_mut().unwrap().remove("ts");
        info
    };
    let database = Database { config: outbox.postgres.clone() };
    let dump =
        || database.pg_dump(&["--data-only", "--schema=aftercommit", "--inserts", "--exclude-table=aftercommit.lease"]);
    let (before, rows) = (consumer().await, dump());
    let peek =
        |arguments: &[&str]| succeeded(outbox.operator(&[&["peek", "--subscriber", "mails"], arguments].concat()));
    let json =
        |arguments: &[&str]| -> Value { serde_json::from_str(&peek(&[&["--json"], arguments].concat())).unwrap() };
    let states = |peeked: &Value| -> Vec<(u64, String)> {
        let messages = peeked["messages"].as_array().unwrap().iter();
        messages.map(|m| (m["stream_sequence"].as_u64().unwrap(), m["state"].as_str().unwrap().to_string())).collect()
    };
    let expected = |states: &[(u64, &str)]| -> Vec<(u64, String)> {
        states.iter().map(|(sequence, state)| (*sequence, state.to_string())).collect()
    };
    let all = json(&[]);
    // Its worker is gone, so nobody says that the second one waits behind the first.
    let waiting = [(1, "failing"), (2, "outstanding"), (5, "waiting"), (6, "waiting"), (7, "waiting")];
    assert_eq!(states(&all), expected(&waiting), "{all}");
    assert_eq!((&all["pending"], &all["paused"], &all["redrive"]), (&json!(3), &json!(false), &json!(0)));
    let first = &all["messages"][0];
    assert_eq!((&first["last_error"], &first["attempts"]), (&json!("the printer is on fire"), &json!(1)));
    assert_eq!(
        (&first["type"], &first["key"], &first["payload"]),
        (&json!("test.number"), &json!("bad"), &Value::Null)
    );
    assert_eq!(states(&json(&["-n", "2"])), expected(&waiting[..2]));
    assert_eq!(json(&["--payload"])["messages"][0]["payload"], "{\"key\":\"bad\",\"n\":1}");
    let text = peek(&[]);
    assert!(
        text.contains("1 of 10 attempts failed: the printer is on fire; next try at 20") && !text.contains("\"n\""),
        "{text}"
    );
    assert!(peek(&["--payload"]).contains("\n7\n{\"key\":\"late\",\"n\":3}\n"));
    // Without its database nobody knows what is done of what was delivered.
    let blind = json(&["--database-url", ""]);
    assert_eq!(states(&blind)[2..4], expected(&[(3, "delivered"), (4, "delivered")])[..], "{blind}");
    assert!(blind["unknown"][0].as_str().unwrap().contains("DATABASE_URL"), "{blind}");
    assert_eq!(consumer().await, before, "nothing was taken");
    assert!(rows == dump(), "nothing was written");

    let output = outbox.operator(&["peek", "--subscriber", "nobody"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("no consumer nobody"));
}

/// What ran is not what was published when an operator has edited it.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_edited_is_told_beside_what_was_published() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let event = outbox.written("a", 1).await;
    published(outbox, 1).await;
    let refusing =
        work.run(Subscriber::new("mails").on::<Number>(Record::new(|_| Act::Fail(HandlerError::reject("no")))));
    let refusing = refusing.await;
    eventually(SOON, "the dead letter", async || work.dead_letters().await.len() == 1).await.unwrap();
    refusing.stop().await;
    succeeded(outbox.operator(&["dead", "edit", "1", "--payload", "{\"key\": \"a\", \"n\": 7}"]));
    let text = succeeded(outbox.operator(&["explain", &event, "--show-payload"]));
    let both = "\npayload\n{\"n\": 1, \"key\": \"a\"}\n\npayload at mails, as an operator edited it\n{\"key\": \"a\", \"n\": 7}\n";
    assert!(text.ends_with(both), "{text}");
    let edited = explain(outbox, &event, &["--show-payload"]);
    assert_eq!(edited["subscribers"]["mails"]["payload"], "{\"key\": \"a\", \"n\": 7}", "{edited}");

    succeeded(outbox.operator(&["dead", "retry", &event]));
    let good = work.run(Subscriber::new("mails").on::<Number>(Record::good())).await;
    work.wait_for(1).await;
    good.stop().await;
    assert_eq!(work.numbers("a").await, [7]);
    let handled = explain(outbox, &event, &["--show-payload"]);
    let standing = &handled["subscribers"]["mails"];
    assert_eq!(standing["text"], "handled, with the payload as jane edited it", "{handled}");
    assert!(
        handled["unknown"].to_string().contains("the payload that it runs, or ran, was edited by jane"),
        "{handled}"
    );
}

/// A message that a reconciler found missing was never parked.
#[tokio::test(flavor = "multi_thread")]
async fn a_repaired_event_says_that_it_was_missing() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let relay = outbox.relay();
    let events = [outbox.written("a", 1).await, outbox.written("a", 2).await, outbox.written("a", 3).await];
    outbox.assert_complete().await;
    outbox.settled().await;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.delete_message(2).await.unwrap();
    outbox.operator(&["reconcile", "--full", "--repair"]);
    let mut told = Value::Null;
    let waited = eventually(SOON, "it is published again", async || {
        told = explain(outbox, &events[1], &[]);
        told["message"]["repair"] == json!(true)
    })
    .await;
    assert!(waited.is_ok(), "{told}");
    let story = moments(&told).join("\n");
    for words in ["outbox: found missing in the stream, queued to be published again", "because it was missing there"] {
        assert!(story.contains(words), "{story}");
    }
    assert_eq!(told["outbox"]["state"], "published", "{told}");
    assert!(!told.to_string().contains("parked"), "{told}");
    let audit = succeeded(outbox.operator(&["audit"]));
    assert!(
        audit.contains("  jane (postgres)  reconcile --repair  {\"reconciler\":\"outbox\",\"repaired\":1}"),
        "{audit}"
    );
    relay.stop().await.unwrap();
}
