//! The relay answers what subscribers' reconcilers ask about its outbox, with a permission of its own, and only into
//! inboxes. What goes over the wire is in docs/reconciliation.md.

use std::time::Duration;

use crate::support::{Outbox, RunningRelay, SOON};
use aftercommit::reconciler::{Mode, OutboxComparison, Runner, Scope};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::{Client, Message};
use futures_util::StreamExt;
use serde_json::{Value, json};

async fn shared() -> (Outbox, Client) {
    let url = Nats::shared().await.unwrap().url();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    (Outbox::new(database, url.clone()).await, async_nats::connect(url).await.unwrap())
}

/// The events of an answer, and its last message.
async fn ask(client: &Client, outbox: &Outbox, question: Value) -> (Vec<Message>, Value) {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.unwrap();
    let subject = format!("aftercommit.outbox.{}", outbox.naming.stream);
    client.publish_with_reply(subject, inbox, question.to_string().into()).await.unwrap();
    let mut events = Vec::new();
    loop {
        let answer = tokio::time::timeout(Duration::from_secs(10), answers.next()).await.unwrap().unwrap();
        match answer.headers.as_ref().is_some_and(|headers| headers.get("ce-id").is_some()) {
            true => events.push(answer),
            false => return (events, serde_json::from_slice(&answer.payload).unwrap()),
        }
    }
}

/// Every listed event, and the token to go on with.
async fn pages(client: &Client, outbox: &Outbox, up_to: u64, mut after: Value, types: &[&str]) -> (Vec<i64>, Value) {
    let mut ids = Vec::new();
    loop {
        let question = json!({ "page": { "up_to": up_to, "after": after, "types": types } });
        let (_, page) = ask(client, outbox, question).await;
        ids.extend(page["events"].as_array().unwrap().iter().map(|event| event["id"].as_i64().unwrap()));
        after = page["next"].clone();
        if page["more"] == false {
            return (ids, after);
        }
    }
}

async fn publish(outbox: &Outbox, event_type: &str, numbers: std::ops::Range<i32>) {
    sqlx::query(
        "select aftercommit.publish($1, jsonb_build_object('n', n), 'key-' || n % 5)
           from generate_series($2::int, $3::int) n",
    )
    .bind(event_type)
    .bind(numbers.start)
    .bind(numbers.end - 1)
    .execute(&outbox.pool)
    .await
    .unwrap();
}

async fn published(outbox: &Outbox) -> u64 {
    outbox.assert_complete().await;
    outbox.settled().await;
    outbox.stored().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_outbox_has_is_told_in_pages_and_digests() {
    let (outbox, client) = shared().await;
    let relay = outbox.relay();
    publish(&outbox, "a", 0..700).await;
    let first = published(&outbox).await;
    publish(&outbox, "b", 0..700).await;
    let second = published(&outbox).await;
    let (ids, token) = pages(&client, &outbox, first, Value::Null, &[]).await;
    assert_eq!(ids, (1..=700).collect::<Vec<_>>(), "only what lies before the asker's place");
    let (ids, token) = pages(&client, &outbox, second, token, &[]).await;
    assert_eq!(ids, (701..=1400).collect::<Vec<_>>(), "only what is new");
    assert_eq!(pages(&client, &outbox, second, token, &[]).await.0, [0; 0]);
    assert_eq!(pages(&client, &outbox, second, Value::Null, &["b"]).await.0.len(), 700);

    let (mut after, mut count, mut digest) = (Value::Null, 0, 0_u128);
    loop {
        let (_, page) = ask(&client, &outbox, json!({ "digest": { "up_to": second, "after": after } })).await;
        count += page["count"].as_u64().unwrap();
        digest += page["digest"].as_str().map_or(0, |sum| sum.parse().unwrap());
        after = page["next"].clone();
        if page["more"] == false {
            break;
        }
    }
    let sum: String = sqlx::query_scalar(
        "select sum(('x' || left(md5(uuid_send(event_id)), 15))::bit(60)::bigint)::text from aftercommit.outbox",
    )
    .fetch_one(&outbox.pool)
    .await
    .unwrap();
    assert_eq!((count, digest.to_string()), (1400, sum));
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_events_come_as_they_are_in_the_stream() {
    let (outbox, client) = shared().await;
    let relay = outbox.relay();
    publish(&outbox, "a", 0..700).await;
    let end = published(&outbox).await;
    let messages = outbox.messages().await;
    let ids: Vec<&str> = [4, 2].map(|at: usize| messages[at].headers["ce-id"].as_str()).to_vec();
    let (events, last) = ask(&client, &outbox, json!({ "events": { "ids": ids } })).await;
    assert_eq!(last, json!({ "next": null, "left_out": [] }));
    for (event, message) in events.iter().zip([&messages[2], &messages[4]]) {
        assert_eq!(event.payload, message.payload);
        for (name, value) in message.headers.iter().filter(|(name, _)| name.starts_with("ce-")) {
            assert_eq!(event.headers.as_ref().unwrap().get(name.as_str()).unwrap().as_str(), value);
        }
    }
    let (mut from, mut of_keys) = (1, Vec::new());
    loop {
        let question = json!({ "keys": { "keys": ["key-1", "key-3"], "from": from, "behind": 0 } });
        let (events, last) = ask(&client, &outbox, question).await;
        of_keys.extend(events.into_iter().map(|event| {
            let headers = event.headers.unwrap();
            let id: i64 = headers.get("ce-sequence").unwrap().as_str().parse().unwrap();
            (id, headers.get("ce-partitionkey").unwrap().to_string())
        }));
        match last["next"].as_i64() {
            Some(next) => from = next,
            None => break,
        }
    }
    let expected: Vec<(i64, String)> =
        sqlx::query_as("select id, key from aftercommit.outbox where key in ('key-1', 'key-3') order by id")
            .fetch_all(&outbox.pool)
            .await
            .unwrap();
    assert_eq!(of_keys, expected);
    // What lies in the stream at or before a sequence may be left out, and nothing else.
    let question = json!({ "keys": { "keys": ["key-1", "key-3"], "from": 1, "behind": end } });
    assert_eq!(ask(&client, &outbox, question).await.0.len(), 0);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_were_missing_are_told() {
    let (outbox, client) = shared().await;
    let relay = outbox.relay();
    publish(&outbox, "a", 0..10).await;
    published(&outbox).await;
    let displaced = async |after: Value| ask(&client, &outbox, json!({ "displaced": { "after": after } })).await.1;
    let token = displaced(Value::Null).await["next"].clone();
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.delete_message(4).await.unwrap();
    let runner = Runner::new(outbox.postgres.clone())
        .comparison(OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone()));
    runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
    let mut answer = Value::Null;
    eventually(SOON, "it is told", async || {
        answer = displaced(token.clone()).await;
        assert_eq!(answer["more"], true, "what is too new to be told is announced");
        answer["events"] != json!([])
    })
    .await
    .unwrap();
    let event = &answer["events"][0];
    assert_eq!((&event["id"], &event["state"], &event["sequence"]), (&json!(4), &json!("published"), &json!(11)));
    assert_eq!(displaced(answer["next"].clone()).await["events"], json!([]));
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_and_nothing_is_answered_into_the_stream() {
    let (outbox, client) = shared().await;
    let relay = outbox.relay();
    publish(&outbox, "a", 0..3).await;
    let end = published(&outbox).await;
    for question in [json!("?"), json!({ "page": {} }), json!({ "page": { "up_to": 1, "after": { "from": "x" } } })] {
        let (_, answer) = ask(&client, &outbox, question.clone()).await;
        assert!(answer["error"].is_string(), "{question}: {answer}");
    }
    let subject = format!("aftercommit.outbox.{}", outbox.naming.stream);
    let question = json!({ "displaced": {} }).to_string();
    let into = format!("{}.forged", outbox.naming.prefix);
    client.publish_with_reply(subject, into, question.into()).await.unwrap();
    // The questions are answered one after the other.
    ask(&client, &outbox, json!({ "displaced": {} })).await;
    assert_eq!(outbox.stored().await, end);
    relay.stop().await.unwrap();
}

/// G8: who may not ask gets no answer, and the relay needs no more than what the documentation names.
#[tokio::test(flavor = "multi_thread")]
async fn asking_takes_a_permission_of_its_own() {
    let config = "accounts { A { jetstream: enabled, users: [
        { user: admin, password: a },
        { user: relay, password: r, permissions: {
            publish: [\"$JS.API.STREAM.INFO.*\", \"$JS.API.STREAM.MSG.GET.*\", \"*.a\", \"_INBOX_worker.>\",
                \"$JS.API.CONSUMER.CREATE.*.aftercommit-reconciler\", \"$JS.API.CONSUMER.DELETE.*.aftercommit-reconciler\",
                \"$JS.API.CONSUMER.MSG.NEXT.*.aftercommit-reconciler\"],
            subscribe: [\"_INBOX_relay.>\", \"aftercommit.outbox.*\"] } },
        { user: worker, password: w, permissions: { publish: [\"aftercommit.outbox.*\"], subscribe: [\"_INBOX_worker.>\"] } },
        { user: stranger, password: s, permissions: { publish: [\"other\"], subscribe: [\"_INBOX_worker.>\"] } } ] } }";
    let nats = Nats::start(NatsOptions { config: config.into(), ..NatsOptions::default() }).await.unwrap();
    let as_user = |user: &str| nats.url().replace("nats://", &format!("nats://{user}@"));
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, as_user("admin:a")).await;
    let mut config = outbox.relay_config();
    config.nats.url = as_user("relay:r");
    let relay = RunningRelay::start(config.clone());
    publish(&outbox, "a", 0..3).await;
    let end = published(&outbox).await;
    let client = |user: &str, password: &str| {
        let options = async_nats::ConnectOptions::with_user_and_password(user.into(), password.into());
        options.custom_inbox_prefix("_INBOX_worker").connect(nats.url())
    };
    let worker = client("worker", "w").await.unwrap();
    assert_eq!(pages(&worker, &outbox, end, Value::Null, &[]).await.0, [1, 2, 3]);
    let stranger = client("stranger", "s").await.unwrap();
    let subject = format!("aftercommit.outbox.{}", outbox.naming.stream);
    let request = async_nats::Request::new().payload("{\"displaced\":{}}".into()).timeout(Some(Duration::from_secs(1)));
    assert!(stranger.send_request(subject, request).await.is_err());
    // The same rights suffice to compare and repair.
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.delete_message(2).await.unwrap();
    let runner = Runner::new(outbox.postgres.clone()).comparison(OutboxComparison::new(config.nats, config.naming));
    let summary = runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!((summary.found, summary.repaired), (1, 1), "{summary}");
    relay.stop().await.unwrap();
}

/// A page is as long as a message may be, wherever that is less than its events need.
#[tokio::test(flavor = "multi_thread")]
async fn pages_fit_into_the_messages_of_a_server_with_a_small_limit() {
    let nats =
        Nats::start(NatsOptions { config: "max_payload: 16384".into(), ..NatsOptions::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let (outbox, client) = (Outbox::new(database, nats.url()).await, async_nats::connect(nats.url()).await.unwrap());
    let relay = outbox.relay();
    publish(&outbox, "a", 0..700).await;
    let all = published(&outbox).await;
    let (ids, _) = pages(&client, &outbox, all, Value::Null, &[]).await;
    assert_eq!(ids, (1..=700).collect::<Vec<_>>());
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    for sequence in 1..=300 {
        stream.delete_message(sequence).await.unwrap();
    }
    let leg = OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone());
    let runner = Runner::new(outbox.postgres.clone()).comparison(leg);
    runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
    let (mut moved, mut after) = (0, Value::Null);
    eventually(SOON, "all that was repaired is told", async || {
        let (_, told) = ask(&client, &outbox, json!({ "displaced": { "after": after } })).await;
        moved += told["events"].as_array().unwrap().len();
        after = told["next"].clone();
        moved >= 300
    })
    .await
    .unwrap();
    assert_eq!(moved, 300);
    relay.stop().await.unwrap();
}
