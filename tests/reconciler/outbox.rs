//! The outbox comparison: what the outbox has and its stream has not, or the other way round, is found, named and
//! repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::support::{Message, Outbox, Random, RelayProcess, RunningRelay, SOON};
use aftercommit::config::Naming;
use aftercommit::operator;
use aftercommit::reconciler::{Mode, OutboxComparison, Outcome, Runner, Scope, Summary};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::jetstream::stream::Config;

pub async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

pub async fn private() -> (Nats, Outbox) {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    (nats, outbox)
}

pub fn leg(outbox: &Outbox) -> OutboxComparison {
    OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone())
}

pub async fn run(outbox: &Outbox, scope: Scope, mode: Mode) -> Summary {
    Runner::new(outbox.postgres.clone()).comparison(leg(outbox)).run_now("outbox", scope, mode).await.unwrap()
}

/// A run that must come to its end.
pub async fn ran(outbox: &Outbox, scope: Scope, mode: Mode) -> Summary {
    let summary = run(outbox, scope, mode).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    summary
}

/// Kind, state and outbox id of the findings.
pub async fn findings(outbox: &Outbox) -> Vec<(String, String, Option<i64>)> {
    sqlx::query_as("select kind, state, outbox_id from aftercommit.finding order by kind, outbox_id, stream_seq")
        .fetch_all(&outbox.pool)
        .await
        .unwrap()
}

pub fn finding(kind: &str, state: &str, id: impl Into<Option<i64>>) -> (String, String, Option<i64>) {
    (kind.into(), state.into(), id.into())
}

/// Numbers of some keys, one transaction each.
pub async fn publish(outbox: &Outbox, numbers: std::ops::Range<i32>) {
    sqlx::query(
        "select aftercommit.publish('test.number', jsonb_build_object('n', n), 'key-' || n % 5)
           from generate_series($1::int, $2::int) n",
    )
    .bind(numbers.start)
    .bind(numbers.end - 1)
    .execute(&outbox.pool)
    .await
    .unwrap();
}

pub async fn published(outbox: &Outbox) -> Vec<Message> {
    let messages = outbox.assert_complete().await;
    outbox.settled().await;
    messages
}

pub async fn delete(outbox: &Outbox, sequences: impl IntoIterator<Item = u64>) {
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    for sequence in sequences {
        stream.delete_message(sequence).await.unwrap();
    }
}

/// How often each event is in the stream.
pub fn times(messages: &[Message]) -> BTreeMap<String, usize> {
    let mut times = BTreeMap::new();
    for id in messages.iter().filter_map(|message| message.headers.get("ce-id")) {
        *times.entry(id.clone()).or_default() += 1;
    }
    times
}

pub fn reconcile_command(outbox: &Outbox, arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    command
        .args(["reconcile", "--repair"])
        .args(arguments)
        .env("DATABASE_URL", &outbox.postgres.url)
        .env("NATS_URL", &outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
        .env("AFTERCOMMIT_SOURCE", &outbox.naming.source);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn single_missed_messages_are_published_again() {
    let outbox = shared().await;
    let relay = outbox.relay();
    publish(&outbox, 0..50).await;
    let messages = published(&outbox).await;
    let nothing = ran(&outbox, Scope::New, Mode::Report).await;
    assert_eq!((nothing.found, nothing.scanned), (0, 100), "messages and rows");
    delete(&outbox, [3, 17, 18, 50]).await;
    // A run over what is new does not look back; a sweep does.
    assert_eq!(ran(&outbox, Scope::New, Mode::Report).await.found, 0);
    assert_eq!(ran(&outbox, Scope::Full, Mode::Report).await.found, 4);
    let missing = |state: &str| [3, 17, 18, 50].map(|id| finding("missing_from_stream", state, id)).to_vec();
    assert_eq!(findings(&outbox).await, missing("open"));
    // What an earlier run only reported is repaired by one that may.
    let summary = ran(&outbox, Scope::New, Mode::Repair).await;
    assert_eq!(summary.repaired, 4);
    let repaired = outbox.assert_complete().await;
    assert_eq!(findings(&outbox).await, missing("repaired"));
    let by_id = |messages: &[Message], id: &str| {
        let mut found = messages.iter().find(|message| message.headers["ce-id"] == id).unwrap().clone();
        found.headers.retain(|name, _| name.starts_with("ce-"));
        (found.subject, found.headers, found.payload)
    };
    for lost in [2, 16, 17, 49].map(|at: usize| &messages[at].headers["ce-id"]) {
        assert_eq!(by_id(&repaired, lost), by_id(&messages, lost));
    }
    let again: Vec<&Message> = repaired.iter().filter(|m| m.headers.contains_key("Aftercommit-Repair")).collect();
    let ids: Vec<&str> = again.iter().map(|message| message.headers["ce-sequence"].as_str()).collect();
    assert_eq!(ids, ["3", "17", "18", "50"], "in the order of the outbox");
    for message in again {
        assert_eq!(message.headers["Nats-Msg-Id"], format!("{}:r1", message.headers["ce-id"]));
    }
    // A repair that is lost is missing again, and gets another message id.
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.delete_message(52).await.unwrap();
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 1);
    let repaired = outbox.assert_complete().await;
    assert!(repaired.last().unwrap().headers["Nats-Msg-Id"].ends_with(":r2"));
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purged_stream_is_filled_again_in_the_order_of_the_outbox() {
    let outbox = shared().await;
    let relay = outbox.relay();
    publish(&outbox, 0..3000).await;
    published(&outbox).await;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.purge().sequence(1500).await.unwrap();
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 1499);
    assert_eq!(outbox.stored().await, 3000);
    stream.purge().await.unwrap();
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 3000);
    let messages = outbox.messages().await;
    assert!(messages.iter().map(|m| m.headers["ce-sequence"].parse::<i64>().unwrap()).eq(1..=3000));
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    let open: i64 = sqlx::query_scalar("select count(*) from aftercommit.finding where state <> 'repaired'")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    assert_eq!(open, 0);
    publish(&outbox, 3000..3010).await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_ghosts_and_foreign_messages_are_named() {
    let outbox = shared().await;
    let relay = outbox.relay();
    publish(&outbox, 0..5).await;
    let messages = published(&outbox).await;
    relay.stop().await.unwrap();
    let js = outbox.js().await;
    let put = async |change: &dyn Fn(&mut Message)| {
        let mut message = messages[1].clone();
        change(&mut message);
        let mut headers = async_nats::HeaderMap::new();
        for (name, value) in message.headers.iter().filter(|(name, _)| name.starts_with("ce-")) {
            headers.insert(name.as_str(), value.as_str());
        }
        js.publish_with_headers(message.subject, headers, message.payload.into()).await.unwrap().await.unwrap();
    };
    let set = |message: &mut Message, name: &str, value: &str| _ = message.headers.insert(name.into(), value.into());
    put(&|message| message.payload = b"{\"n\": 7}".to_vec()).await;
    put(&|message| set(message, "ce-partitionkey", "other")).await;
    put(&|message| set(message, "ce-id", "019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11")).await;
    put(&|message| set(message, "ce-sequence", "4711")).await;
    put(&|message| set(message, "ce-source", "/elsewhere")).await;
    js.publish(messages[0].subject.clone(), "no event".into()).await.unwrap().await.unwrap();
    delete(&outbox, [2]).await;
    let relay = outbox.relay();
    publish(&outbox, 5..6).await;
    outbox.settled().await;
    eventually(SOON, "the last one is in the stream", async || outbox.stored().await == 11).await.unwrap();
    outbox.settled().await;
    ran(&outbox, Scope::Full, Mode::Repair).await;
    assert_eq!(
        findings(&outbox).await,
        [
            finding("differs", "open", 2),
            finding("differs", "open", 2),
            finding("foreign", "open", None),
            finding("foreign", "open", None),
            finding("ghost", "open", 2),
            finding("ghost", "open", 4711),
            // Messages that only claim to be the event do not hide that it is missing.
            finding("missing_from_stream", "repaired", 2),
        ]
    );
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_pruned_or_parked_is_not_missed() {
    let outbox = shared().await;
    let relay = outbox.relay();
    publish(&outbox, 0..10).await;
    published(&outbox).await;
    let js = outbox.js().await;
    let config = async || js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    // Removed from the outbox: its messages are no ghosts.
    sqlx::query("delete from aftercommit.outbox where id <= 4").execute(&outbox.pool).await.unwrap();
    assert_eq!(ran(&outbox, Scope::Full, Mode::Report).await.found, 0);
    // Parked, then given up; and one that was released.
    js.update_stream(Config { max_message_size: 2_000, ..config().await }).await.unwrap();
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    for key in ["a", "b", "c"] {
        outbox.publish("large", &large, Some(key)).await;
    }
    eventually(SOON, "they are parked", async || {
        operator::relay::parked(&outbox.postgres, 10).await.unwrap().len() == 3
    })
    .await
    .unwrap();
    let parked = operator::relay::parked(&outbox.postgres, 10).await.unwrap();
    operator::relay::discard(&outbox.postgres, "test", parked[0].event_id).await.unwrap();
    outbox.settled().await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    js.update_stream(Config { max_message_size: -1, ..config().await }).await.unwrap();
    operator::relay::release(&outbox.postgres, "test", parked[1].event_id).await.unwrap();
    eventually(SOON, "it is released", async || outbox.stored().await == 11).await.unwrap();
    outbox.settled().await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    // What was released is missed when it is gone.
    let last = outbox.messages().await.last().unwrap().sequence;
    delete(&outbox, [last]).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 1);
    assert_eq!(outbox.stored().await, 11);
    // Parked for long is a finding.
    let long = OutboxComparison { parked_limit: Duration::ZERO, ..leg(&outbox) };
    let runner = Runner::new(outbox.postgres.clone()).comparison(long);
    assert_eq!(runner.run_now("outbox", Scope::New, Mode::Report).await.unwrap().found, 1);
    // Older than the stream keeps its messages.
    sqlx::query("delete from aftercommit.finding").execute(&outbox.pool).await.unwrap();
    let short = Duration::from_secs(2);
    let config = Config { max_age: short, duplicate_window: short, ..config().await };
    js.update_stream(config).await.unwrap();
    eventually(SOON, "the stream is empty", async || outbox.stored().await == 0).await.unwrap();
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    relay.stop().await.unwrap();
}

/// Two outboxes and a stranger in one stream, each outbox with two relays of which the first is killed.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_shared_stream_each_outbox_looks_for_its_own() {
    let one = shared().await;
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut other = Outbox::new(database, one.nats.url.clone()).await;
    other.naming = Naming { source: "/other".into(), ..one.naming.clone() };
    let relays = |outbox: &Outbox| {
        let config = RelayConfig { mode: aftercommit::relay::Mode::Shared, ..outbox.relay_config() };
        [RunningRelay::start(config.clone()), RunningRelay::start(config)]
    };
    let ([killed, _one], _others) = (relays(&one), relays(&other));
    let js = one.js().await;
    let stranger = async || {
        js.publish(format!("{}.foreign", one.naming.prefix), "of a stranger".into()).await.unwrap().await.unwrap();
    };
    let mut killed = Some(killed);
    for round in 0..4 {
        tokio::join!(
            publish(&one, round * 20..round * 20 + 20),
            stranger(),
            publish(&other, round * 20..round * 20 + 20)
        );
        if round == 2 {
            drop(killed.take());
        }
    }
    eventually(SOON, "everything is there", async || one.stored().await == 164).await.unwrap();
    tokio::join!(one.settled(), other.settled());
    let source = |message: &Message| message.headers.get("ce-source").cloned();
    let victims =
        one.messages().await.into_iter().enumerate().filter(|(at, _)| at % 20 == 7).map(|(_, message)| message);
    let victims: Vec<Message> = victims.collect();
    delete(&one, victims.iter().map(|message| message.sequence)).await;
    let reconcile = async |outbox: &Outbox| {
        let leg = OutboxComparison { shared: true, ..leg(outbox) };
        let runner = Runner::new(outbox.postgres.clone()).comparison(leg);
        let summary = runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
        assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
        (summary.found, summary.repaired)
    };
    // At the same time: they have nothing to do with each other.
    let found = tokio::join!(reconcile(&one), reconcile(&other));
    let lost = |outbox: &Outbox| {
        let own =
            victims.iter().filter(|message| source(message).as_ref() == Some(&outbox.naming.source)).count() as u64;
        (own, own)
    };
    assert_eq!(found, (lost(&one), lost(&other)));
    let times = times(&one.messages().await);
    let committed = [one.committed().await, other.committed().await].concat();
    assert!(committed.iter().all(|id| times.get(id) == Some(&1)), "{times:?}");
    assert_eq!(tokio::join!(reconcile(&one), reconcile(&other)), ((0, 0), (0, 0)));
}

/// More bytes than a batch may have, gaps at the end of the stream and of batches.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_and_gaps_at_every_edge() {
    let (_nats, outbox) = private().await;
    let relay = outbox.relay();
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, payload)
         select aftercommit.new_event_id(), 'large', convert_to(format('\"%s\"', repeat('x', length)), 'UTF8')
           from unnest(array[10, 900000, 900000, 900000, 900000, 900000, 900000, 900000, 900000, 900000, 10, 10]) length",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    publish(&outbox, 12..2100).await;
    published(&outbox).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Report).await.found, 0);
    for victims in [vec![1, 2, 2099, 2100], vec![9], (990..=1015).collect(), vec![2000, 2098]] {
        let lost = victims.len() as u64;
        delete(&outbox, victims).await;
        assert_eq!(ran(&outbox, Scope::Full, Mode::Report).await.found, lost);
        assert_eq!(ran(&outbox, Scope::New, Mode::Repair).await.repaired, lost);
        outbox.assert_complete().await;
    }
    relay.stop().await.unwrap();
}

/// An event that the stream takes no more is refused with the reason, and its key waits behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_can_never_be_stored_is_refused() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    for (event_type, payload) in [("large", large.as_str()), ("behind", "{}"), ("other", "{}")] {
        outbox.publish(event_type, payload, Some(if event_type == "other" { "b" } else { "a" })).await;
    }
    published(&outbox).await;
    let js = outbox.js().await;
    let stream = js.get_stream(&outbox.naming.stream).await.unwrap();
    js.update_stream(Config { max_message_size: 2_000, ..stream.cached_info().config.clone() }).await.unwrap();
    stream.purge().await.unwrap();
    let runner = Runner::new(outbox.postgres.clone()).comparison(leg(&outbox));
    let summary = runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(summary.found, 3, "{summary}");
    let states: Vec<(i64, String, bool)> =
        sqlx::query_as("select outbox_id, state, reason is not null from aftercommit.repair order by outbox_id")
            .fetch_all(&outbox.pool)
            .await
            .unwrap();
    assert_eq!(states, [(1, "refused".into(), true), (2, "queued".into(), false), (3, "published".into(), false)]);
    assert_eq!(findings(&outbox).await[0], finding("missing_from_stream", "repairing", 1));
    relay.stop().await.unwrap();
}

/// `aftercommit reconcile --every`: an outbox, without a word of which leg, as a process of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_its_own_repairs_until_it_is_stopped() {
    let outbox = shared().await;
    let _relay = outbox.relay_process();
    publish(&outbox, 1..21).await;
    published(&outbox).await;
    let mut process = RelayProcess(reconcile_command(&outbox, &["--every", "1s"]).spawn().unwrap());
    for sequence in [3, 11] {
        delete(&outbox, [sequence]).await;
        let repaired = eventually(SOON, "it is repaired", async || {
            // The first run is a sweep over everything, the later ones look at what is new.
            let due = sqlx::raw_sql("update aftercommit.reconciler set full_sweep_at = now() - interval '9 days'");
            due.execute(&outbox.pool).await.unwrap();
            outbox.stored().await == 20
        });
        repaired.await.unwrap();
    }
    process.signal("-TERM");
    assert_eq!(process.ends(SOON).await.code(), Some(0));
    let repaired: i64 = sqlx::query_scalar("select count(*) from aftercommit.finding where state <> 'open'")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    assert_eq!(repaired, 2);
}

/// Prints what a sweep takes. `AFTERCOMMIT_EVENTS=10000000 cargo test --release --all-features --test reconciler
/// a_million -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn a_million_events_of_which_a_hundred_are_missing() {
    let events: u64 = std::env::var("AFTERCOMMIT_EVENTS").map_or(1_000_000, |text| text.parse().unwrap());
    let (_nats, outbox) = private().await;
    let began = std::time::Instant::now();
    // The relay publishes while the rest is still written.
    let _relay = outbox.relay_process();
    for first in (1..=events).step_by(200_000) {
        sqlx::query(
            "insert into aftercommit.outbox (event_id, type, key, payload)
             select aftercommit.new_event_id(), 'test.number', 'key-' || n % 1000,
                    convert_to(format('{\"n\": %s, \"text\": \"%s\"}', n, repeat('x', 200)), 'UTF8')
               from generate_series($1::bigint, $2::bigint) n",
        )
        .bind(first.cast_signed())
        .bind(events.min(first + 199_999).cast_signed())
        .execute(&outbox.pool)
        .await
        .unwrap();
    }
    let long = Duration::from_secs(1800);
    eventually(long, "everything is in the stream", async || outbox.stored().await == events).await.unwrap();
    outbox.settled().await;
    println!("published {events} events in {:.1} s", began.elapsed().as_secs_f64());
    let sweep = async |what: &str| {
        let child = reconcile_command(&outbox, &["--comparison", "outbox", "--full", "--json"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let status = format!("/proc/{}/status", child.id());
        let ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
        let mut peak = String::new();
        while !ended.is_finished() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            peak = text.lines().find(|line| line.starts_with("VmHWM")).map_or(peak, String::from);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let output = ended.await.unwrap();
        let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let summary = summary[0].clone();
        println!("{what}: {summary} {peak}");
        summary
    };
    assert_eq!(sweep("nothing missing").await["found"], 0);
    let mut random = Random(5);
    let victims: BTreeSet<u64> = (0..100).map(|_| random.below(events) + 1).collect();
    let removed = victims.len() as u64;
    delete(&outbox, victims).await;
    let summary = sweep("a hundred missing").await;
    assert_eq!((&summary["found"], &summary["repaired"]), (&removed.into(), &removed.into()));
    assert_eq!(outbox.stored().await, events);
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    stream.purge().sequence(100_001).await.unwrap();
    sweep("the first 100,000 messages purged").await;
    assert_eq!(outbox.stored().await, events);
}
