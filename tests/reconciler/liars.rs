//! Whoever answers in place of the publisher's relay, broken or forged: the inbox comparison and `replay` refuse what does not answer their
//! question with an error that says so. Nothing is stored or run that was not asked for, and nothing goes on for ever.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::inbox::{Apart, findings, ran, rows_left, runner, subscriber};
use aftercommit::operator::replay::{Replay, replay};
use aftercommit::reconciler::{Mode, Outcome, Scope};
use aftercommit::testing::eventually;
use async_nats::{HeaderMap, Message};
use futures_util::StreamExt;
use serde_json::{Value, json};
use sqlx::types::Uuid;

use crate::support::SOON;

/// A message of an answer.
type Part = (HeaderMap, Vec<u8>);
/// What a liar makes of an honest answer.
type Lie = fn(Vec<Part>) -> Vec<Part>;

/// An event of the outbox: id, event id, type, key, time and payload.
type Row = (i64, Uuid, String, String, String, Vec<u8>);

/// Answers in place of the relay.
struct Liar {
    rows: Vec<Row>,
    /// The question that is lied about, and how.
    lie: Mutex<(&'static str, Lie)>,
}

/// One message of JSON.
fn one(value: Value) -> Vec<Part> {
    vec![(HeaderMap::new(), value.to_string().into())]
}

/// The whole answer, and once more.
fn twice(parts: Vec<Part>) -> Vec<Part> {
    [parts.clone(), parts].concat()
}

/// Changes the JSON of the last message.
fn json_of(parts: Vec<Part>, change: impl FnOnce(&mut Value)) -> Vec<Part> {
    let mut parts = parts;
    let last = &mut parts.last_mut().unwrap().1;
    let mut value = serde_json::from_slice(last).unwrap();
    change(&mut value);
    *last = value.to_string().into();
    parts
}

/// Changes a header of the first message.
fn header_of(parts: Vec<Part>, name: &'static str, value: &str) -> Vec<Part> {
    let mut parts = parts;
    parts[0].0.insert(name, value);
    parts
}

impl Liar {
    /// Everything of the outbox is one range, the token behind it is `end`, and nothing is displaced.
    fn honest(&self, question: &Value) -> (&'static str, Vec<Part>) {
        let behind = |kind: &str| question[kind]["after"] == json!("end");
        let listed = |(id, event_id, event_type, key, time, _): &Row| json!({ "id": id, "event_id": event_id, "type": event_type, "key": key, "time": time });
        let end = json!({ "behind": 40, "to": 40, "events": [], "count": 0, "next": "end", "more": false });
        let whole = |wanted: &dyn Fn(&Row) -> bool| {
            let mut parts: Vec<Part> = self.rows.iter().filter(|row| wanted(row)).map(message).collect();
            let mut last = HeaderMap::new();
            last.insert("Aftercommit-End", "1");
            parts.push((last, json!({ "next": null, "left_out": [] }).to_string().into()));
            parts
        };
        if let Some(asked) = question.get("events") {
            let asked = asked["ids"].as_array().unwrap();
            return ("events", whole(&|row| asked.contains(&json!(row.1))));
        }
        if let Some(asked) = question.get("keys") {
            let keys = asked["keys"].as_array().unwrap();
            return ("keys", whole(&|row| keys.contains(&json!(row.3))));
        }
        match question.as_object().unwrap().keys().next().unwrap().as_str() {
            "digest" if behind("digest") => ("end", one(end)),
            "page" if behind("page") => ("end", one(end)),
            "digest" => {
                let count = self.rows.len();
                let digest =
                    json!({ "behind": 0, "to": 40, "count": count, "digest": "1", "next": "end", "more": true });
                ("digest", one(digest))
            }
            "page" => {
                let events: Vec<Value> = self.rows.iter().map(listed).collect();
                ("page", one(json!({ "behind": 0, "to": 40, "events": events, "next": "end", "more": true })))
            }
            _ => ("displaced", one(json!({ "events": [], "next": [0, 0], "more": false }))),
        }
    }

    fn answer(&self, message: &Message) -> Vec<Part> {
        let (kind, parts) = self.honest(&serde_json::from_slice(&message.payload).unwrap());
        let (about, lie) = *self.lie.lock().unwrap();
        if kind == about { lie(parts) } else { parts }
    }
}

/// An event as the relay sends it.
fn message((id, event_id, event_type, key, time, payload): &Row) -> Part {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("ce-id", event_id.to_string()),
        ("ce-type", event_type.clone()),
        ("ce-source", "/test".into()),
        ("ce-time", time.clone()),
        ("ce-partitionkey", key.clone()),
        ("ce-sequence", id.to_string()),
    ] {
        headers.insert(name, value.as_str());
    }
    (headers, payload.clone())
}

/// A range that is told of, and has no page. A replay does not ask for the range.
const NO_PAGE: &str = "nothing of what is in it";

/// What is lied about, how, and how it is refused.
const LIES: &[(&str, Lie, &str)] = &[
    ("digest", |_| vec![(HeaderMap::new(), vec![0xff, 0, 7, b'{'])], "expected value"),
    ("digest", |_| vec![(HeaderMap::new(), Vec::new())], "EOF"),
    ("digest", |_| one(json!([])), "does not match the query"),
    ("digest", |_| one(json!({ "more": true })), "missing field"),
    ("digest", |_| one(json!({ "events": [], "next": [0, 0], "more": true })), "missing field"),
    ("digest", |parts| json_of(parts, |page| page["digest"] = Value::Null), "instead of a digest"),
    ("digest", |parts| json_of(parts, |page| page["count"] = json!(1e30)), "invalid type"),
    ("digest", |parts| json_of(parts, |page| page["to"] = json!(u64::MAX)), "a range from 0 to 18446744073709551615"),
    ("digest", |parts| json_of(parts, |page| page["behind"] = json!(41)), "a range from 41 to 40"),
    ("digest", |parts| json_of(parts, |page| page["next"] = Value::Null), "leads nowhere"),
    ("digest", |parts| json_of(parts, |page| page["next"] = json!("\0")), "a token with a NUL"),
    ("digest", |_| one(json!({ "error": "no\0\r\n".repeat(1000) })), "no   no   no"),
    ("page", |parts| vec![(HeaderMap::new(), parts[0].1[..parts[0].1.len() / 2].to_vec())], "EOF"),
    ("page", |parts| json_of(parts, |page| page["count"] = json!(3)), "instead of a digest"),
    ("page", |parts| json_of(parts, |page| page["next"] = Value::Null), "leads nowhere"),
    ("page", |parts| json_of(parts, |page| page["events"][1] = page["events"][0].clone()), "out of their order"),
    ("page", |parts| json_of(parts, |page| page["events"][0]["id"] = json!(u64::MAX)), "invalid value"),
    ("page", |parts| json_of(parts, |page| page["events"][0]["type"] = json!("other")), "of type"),
    ("page", |parts| json_of(parts, |page| page["events"][0]["key"] = json!("\0")), "a key with a NUL"),
    ("page", |parts| json_of(parts, |page| page["events"][0]["event_id"] = json!("x")), "UUID"),
    ("page", |_| one(json!({ "behind": 40, "to": 40, "next": "end", "more": false })), NO_PAGE),
    ("displaced", |_| one(json!(null)), "does not match the query"),
    ("displaced", |parts| json_of(parts, |told| told["next"] = json!("\0")), "a token with a NUL"),
    ("keys", |_| one(json!({ "left_out": 7 })), "does not match the query"),
    ("keys", |parts| header_of(parts, "ce-partitionkey", "other"), "of another key"),
    ("keys", |parts| [&parts[..1], &parts[..]].concat(), "or twice"),
    ("keys", |parts| json_of(parts, |rest| rest["next"] = json!(1)), "going on from"),
    ("events", |_| one(json!({ "left_out": 7 })), "does not match the query"),
    ("events", |parts| header_of(parts, "ce-id", "7"), "ce-id"),
    ("events", |parts| header_of(parts, "ce-id", "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), "or that one twice"),
    ("events", |parts| [&parts[..1], &parts[..]].concat(), "more than"),
    ("events", |parts| [&parts[..1], &parts[..1], &parts[2..]].concat(), "or that one twice"),
    ("events", |parts| vec![parts[0].clone(); 1_000], "more than"),
    ("events", |parts| header_of(parts, "ce-partitionkey", "other"), "came from the outbox"),
    ("events", |parts| header_of(parts, "ce-sequence", "7"), "came from the outbox"),
    ("events", |parts| json_of(parts, |rest| rest["left_out"] = json!([Uuid::nil()])), "left out"),
    ("events", |parts| vec![(parts[parts.len() - 1].0.clone(), parts[parts.len() - 1].1[..9].to_vec())], "EOF"),
];

/// Forty events, of which twenty are not handled and no longer in the stream; the relay is gone, and the liar is there.
async fn apart() -> (Apart, Arc<Liar>) {
    let apart = Apart::shared().await;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    apart.publish(6..=10).await;
    apart.stream().await.purge().await.unwrap();
    eventually(SOON, "the floor has passed what was purged", async || {
        apart.work.consumer("back").await.cached_info().ack_floor.stream_sequence >= 40
    })
    .await
    .unwrap();
    relay.stop().await.unwrap();
    let rows: Vec<Row> = sqlx::query_as(
        r#"select id, event_id, type, key, to_char(created_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), payload
             from aftercommit.outbox order by id"#,
    )
    .fetch_all(&apart.publisher.pool)
    .await
    .unwrap();
    let liar = Arc::new(Liar { rows, lie: Mutex::new(("", |parts| parts)) });
    let client = async_nats::connect(&apart.publisher.nats.url).await.unwrap();
    let mut questions =
        client.subscribe(format!("aftercommit.outbox.{}", apart.publisher.naming.stream)).await.unwrap();
    client.flush().await.unwrap();
    let answering = liar.clone();
    tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            for (headers, payload) in answering.answer(&question) {
                let reply = question.reply.clone().unwrap();
                client.publish_with_headers(reply, headers, payload.into()).await.unwrap();
            }
        }
    });
    (apart, liar)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_answer_is_refused_and_nothing_of_it_is_stored_or_run() {
    let (apart, liar) = apart().await;
    let work = &apart.work;
    // Who answers twice has answered once.
    for about in ["digest", "page"] {
        *liar.lie.lock().unwrap() = (about, twice);
        assert_eq!(ran(work, Scope::Full, Mode::Report).await.found, 20);
    }
    for (about, lie, refusal) in LIES {
        *liar.lie.lock().unwrap() = (about, *lie);
        let run = runner(&work.outbox, &work.outbox.nats);
        let run = tokio::time::timeout(SOON, run.run_now("inbox:back", Scope::Full, Mode::Repair)).await;
        let summary = run.unwrap_or_else(|_| panic!("about {about}, {refusal}: it goes on for ever")).unwrap();
        let Outcome::Failed(why) = &summary.outcome else { panic!("about {about}, {refusal}: {summary}") };
        assert!(why.contains(refusal) && why.len() < 600, "about {about}: {why}");
        assert!(!why.contains(char::is_control), "{why:?}");
        assert_eq!(rows_left(work).await, 0, "about {about}, {refusal}");
        let found: Vec<Uuid> =
            sqlx::query_scalar("select event_id from aftercommit.finding").fetch_all(&work.outbox.pool).await.unwrap();
        assert!(found.iter().all(|id| liar.rows.iter().any(|row| row.1 == *id)), "about {about}, {refusal}");
    }
    *liar.lie.lock().unwrap() = ("events", twice);
    let summary = ran(work, Scope::Full, Mode::Repair).await;
    assert_eq!((summary.repaired, rows_left(work).await), (20, 20), "{summary}");
    assert_eq!(findings(work).await, [("not_handled".into(), "repairing".into(), 20)]);
    apart.run_worker_until(40).await;
    work.assert_in_order(&["a", "b", "c", "d"], 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_refuses_it_too() {
    let (apart, liar) = apart().await;
    let work = &apart.work;
    let subscription = subscriber().subscription(&work.outbox.naming);
    let run = async || {
        let (postgres, nats, how) = (&work.outbox.postgres, &work.outbox.nats, Replay::default());
        let run = replay(postgres, nats, &subscription, "anna", &how);
        tokio::time::timeout(Duration::from_secs(30), run).await.expect("it goes on for ever")
    };
    for (about, lie, refusal) in LIES {
        if !matches!(*about, "page" | "events") || *refusal == NO_PAGE {
            continue;
        }
        *liar.lie.lock().unwrap() = (about, *lie);
        let why = run().await.expect_err(refusal).report();
        assert!(why.contains(refusal) && why.len() < 600, "about {about}: {why}");
        assert_eq!(rows_left(work).await, 0, "about {about}, {refusal}");
    }
    *liar.lie.lock().unwrap() = ("events", twice);
    assert_eq!(run().await.unwrap().events, 20);
    assert_eq!(rows_left(work).await, 20);
}
