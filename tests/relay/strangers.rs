//! G1 against others: a NATS client that writes into the stream under the ids of events, servers that take a batch for
//! single messages, and proxies that send reads elsewhere.

use crate::support::{Message, Number, Outbox, Record, RunningRelay, SOON, Split, Work, has_caught_up, standby_of};
use aftercommit::reconciler::{self, OutboxComparison, Runner, Scope};
use aftercommit::relay::{Mode, PublishMethod, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::Subscriber;
use async_nats::HeaderMap;
use async_nats::jetstream::stream::Config;
use sqlx::PgPool;

const FORGED: &str = r#"{"key": "a", "n": 666}"#;

/// An event that is committed: its id, its position, and when it was written.
async fn event(outbox: &Outbox, id: i64) -> (String, i64, String) {
    sqlx::query_as(
        "select event_id::text, id, to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')
           from aftercommit.outbox where id = $1",
    )
    .bind(id)
    .fetch_one(&outbox.pool)
    .await
    .unwrap()
}

/// Somebody else writes a message that has everything of the event but its payload.
async fn forge(outbox: &Outbox, id: i64, message_id: bool) -> u64 {
    let (event_id, position, time) = event(outbox, id).await;
    let mut headers = HeaderMap::new();
    let attributes = [
        ("ce-specversion", "1.0"),
        ("ce-id", event_id.as_str()),
        ("ce-type", "test.number"),
        ("ce-source", "/test"),
        ("ce-time", time.as_str()),
        ("ce-partitionkey", "a"),
        ("ce-datacontenttype", "application/json"),
        ("ce-dataversion", "1"),
    ];
    attributes.into_iter().for_each(|(name, value)| headers.insert(name, value));
    headers.insert("ce-sequence", position.to_string());
    if message_id {
        headers.insert("Nats-Msg-Id", event_id.as_str());
    }
    let subject = format!("{}.test.number", outbox.naming.prefix);
    outbox.js().await.publish_with_headers(subject, headers, FORGED.into()).await.unwrap().await.unwrap().sequence
}

async fn publish(outbox: &Outbox, n: i64) {
    outbox.publish("test.number", &format!(r#"{{"key": "a", "n": {n}}}"#), Some("a")).await;
}

/// The numbers in the stream, with what each message replaces.
async fn numbers(outbox: &Outbox) -> Vec<(i64, Option<String>)> {
    let number = |message: &Message| {
        let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
        (payload["n"].as_i64().unwrap(), message.headers.get("Aftercommit-Replaces").cloned())
    };
    outbox.messages().await.iter().map(number).collect()
}

/// The effect of the event takes place, also where the forged copy was handled before it.
async fn a_forged_copy_does_not_pass_for_the_event(mode: Mode, message_id: bool) {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    publish(outbox, 1).await;
    assert_eq!(forge(outbox, 1, message_id).await, 1);
    let worker = work.run(Subscriber::new("once").on::<Number>(Record::good())).await;
    work.wait_for(1).await;
    assert_eq!(work.numbers("a").await, [666]);
    let relay = RunningRelay::start(RelayConfig { mode, ..outbox.relay_config() });
    publish(outbox, 2).await;
    eventually(SOON, "the events are in the stream", async || outbox.stored().await == 3).await.unwrap();
    if mode == Mode::Shared && !message_id {
        // Nobody has noticed on the way. The reconciler does, once.
        outbox.settled().await;
        let leg =
            OutboxComparison { shared: true, ..OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone()) };
        let runner = Runner::new(outbox.postgres.clone()).comparison(leg);
        let runs = [(1, 1), (1, 0)];
        for (found, repaired) in runs {
            let summary = runner.run_now("outbox", Scope::Full, reconciler::Mode::Repair).await.unwrap();
            assert_eq!((summary.found, summary.repaired), (found, repaired), "{summary}");
        }
        assert_eq!(numbers(outbox).await, [(666, None), (1, None), (2, None), (1, Some("1".into()))]);
        work.wait_for(3).await;
        assert_eq!(work.numbers("a").await, [666, 2, 1]);
    } else {
        assert_eq!(numbers(outbox).await, [(666, None), (1, Some("1".into())), (2, None)]);
        work.wait_for(3).await;
        assert_eq!(work.numbers("a").await, [666, 1, 2]);
    }
    work.wait_until_acked("once").await;
    worker.stop().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_copy_of_a_committed_event_is_noticed_and_replaced() {
    a_forged_copy_does_not_pass_for_the_event(Mode::Exclusive, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgery_under_the_events_message_id_is_noticed_and_replaced() {
    a_forged_copy_does_not_pass_for_the_event(Mode::Exclusive, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reconciler_finds_and_replaces_a_forged_copy() {
    a_forged_copy_does_not_pass_for_the_event(Mode::Shared, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_shared_stream_the_servers_word_for_a_repeat_is_checked() {
    a_forged_copy_does_not_pass_for_the_event(Mode::Shared, true).await;
}

/// A batch that is asked for, where it would not be one.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_refused_where_the_server_would_not_take_it_for_one() {
    let outbox = {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        Outbox::new(database, Nats::shared().await.unwrap().url()).await
    };
    let js = outbox.js().await;
    let config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    let batched = RelayConfig { publish: PublishMethod::Batched, ..outbox.relay_config() };
    let shared = RunningRelay::start(RelayConfig { mode: Mode::Shared, ..batched.clone() });
    let error = shared.ended().await.unwrap_err().to_string();
    assert!(error.contains("--publish batched") && error.contains("--mode shared"), "{error}");
    js.update_stream(Config { allow_atomic_publish: false, ..config }).await.unwrap();
    let error = RunningRelay::start(batched).ended().await.unwrap_err().to_string();
    assert!(error.contains("--publish batched") && error.contains("aftercommit provision"), "{error}");
}

/// A server that knows no batches: refused by name, and nothing is lost when even that is taken away.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_batch_headers_is_refused_or_found_out() {
    let old = NatsOptions { version: Some("2.11.11".into()), ..NatsOptions::default() };
    let nats = match Nats::start(old).await {
        Ok(nats) => nats,
        Err(error) => return println!("skipped: {error}"),
    };
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let batched = RelayConfig { publish: PublishMethod::Batched, ..outbox.relay_config() };
    let error = RunningRelay::start(batched).ended().await.unwrap_err().to_string();
    assert!(error.contains("2.12.1") && error.contains("2.11.11"), "{error}");
    for n in 1..=50 {
        publish(&outbox, n).await;
    }
    let mut command = outbox.relay_command();
    command.args(["--publish", "batched", "--once"]).env("AFTERCOMMIT_BROKEN", "batch-check");
    assert!(command.status().unwrap().success());
    let all: Vec<(i64, Option<String>)> = (1..=50).map(|n| (n, None)).collect();
    assert_eq!(numbers(&outbox).await, all);
}

/// A proxy sends what begins with `select` to a standby that lags behind.
#[tokio::test(flavor = "multi_thread")]
async fn reads_that_a_proxy_sends_to_a_standby_are_refused() {
    let primary = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let outbox = Outbox::new(primary.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let standby = standby_of(&primary).await;
    let relay = outbox.relay();
    publish(&outbox, 1).await;
    eventually(SOON, "it is there", async || outbox.stored().await == 1).await.unwrap();
    outbox.settled().await;
    relay.stop().await.unwrap();
    let other = PgPool::connect(&standby.url("postgres")).await.unwrap();
    has_caught_up(&outbox.pool, &other).await;
    let split = Split::between(&primary.url("postgres"), &standby.url("postgres")).await;
    let mut config = outbox.relay_config();
    let database = outbox.postgres.url.rsplit('/').next().unwrap();
    config.postgres.url = format!("postgres://postgres@{}/{database}?sslmode=disable", split.address);
    let relay = RunningRelay::start(config);
    eventually(SOON, "it says why it does not lead", async || {
        relay.monitor.report().state.contains("sent to a standby")
    })
    .await
    .unwrap();
    sqlx::raw_sql("select pg_wal_replay_pause()").execute(&other).await.unwrap();
    publish(&outbox, 2).await;
    relay.stop().await.unwrap();
    outbox.expire_leases().await;
    let relay = outbox.relay();
    eventually(SOON, "nothing was passed", async || outbox.stored().await == 2).await.unwrap();
    relay.stop().await.unwrap();
}
