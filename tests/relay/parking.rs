//! G1, G3, G6 for events that were parked: none is forgotten, none goes out twice, and releasing many holds up nobody.

use std::time::{Duration, Instant};

use crate::support::{Outbox, Proxy, RunningRelay, SOON, Way, cut_off, has_caught_up, standby_of};
use aftercommit::operator;
use aftercommit::operator::relay::ParkedEvent;
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use async_nats::jetstream::stream::Config;
use sqlx::PgPool;

/// A server that takes messages of 4 KiB.
async fn small_messages() -> Nats {
    Nats::start(NatsOptions { config: "max_payload: 4096".into(), ..NatsOptions::default() }).await.unwrap()
}

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

/// One transaction with an event that is too large and one that is not.
async fn publish_large_and_small(outbox: &Outbox) {
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    let mut tx = outbox.pool.begin().await.unwrap();
    for (event_type, payload) in [("large", large.as_str()), ("small", "{}")] {
        sqlx::query("select aftercommit.publish($1, $2::text::jsonb)")
            .bind(event_type)
            .bind(payload)
            .execute(&mut *tx)
            .await
            .unwrap();
    }
    tx.commit().await.unwrap();
}

async fn parked(outbox: &Outbox) -> Vec<ParkedEvent> {
    operator::relay::parked(&outbox.postgres, 10).await.unwrap()
}

async fn is_parked(outbox: &Outbox) {
    eventually(SOON, "the large event is parked", async || {
        parked(outbox).await.iter().any(|event| event.event_type == "large")
    })
    .await
    .unwrap();
}

async fn types(outbox: &Outbox) -> Vec<String> {
    outbox.messages().await.into_iter().map(|message| message.headers["ce-type"].clone()).collect()
}

async fn limit_messages(outbox: &Outbox, bytes: i32) {
    let js = outbox.js().await;
    let config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    js.update_stream(Config { max_message_size: bytes, ..config }).await.unwrap();
}

/// The database does not wait for its disk, and crashes when the event behind the parked one is in the stream.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_parked_for_good_before_a_later_one_is_published() {
    let settings = [("synchronous_commit", "off"), ("wal_writer_delay", "10s")];
    let settings = settings.map(|(name, value)| (name.to_string(), value.to_string())).to_vec();
    let mut postgres = Postgres::start(PostgresOptions { settings, ..PostgresOptions::default() }).await.unwrap();
    let nats = small_messages().await;
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), nats.url()).await;
    publish_large_and_small(&outbox).await;
    outbox.dies_at("relay-window-done:1").await;
    postgres.kill().await.unwrap();
    postgres.restart().await.unwrap();
    assert_eq!(types(&outbox).await, ["small"]);
    let relay = outbox.relay();
    is_parked(&outbox).await;
    relay.stop().await.unwrap();
}

/// An asynchronous standby is promoted that has the open window, and not that an event of it was parked.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_that_lacks_the_parking_parks_again() {
    let mut primary = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let nats = small_messages().await;
    let outbox = Outbox::new(primary.create_database().await.unwrap(), nats.url()).await;
    let standby = standby_of(&primary).await;
    let other = PgPool::connect(&standby.url("postgres")).await.unwrap();
    outbox.publish("first", "{}", None).await;
    publish_large_and_small(&outbox).await;
    outbox.dies_at("relay-parking:1").await;
    has_caught_up(&outbox.pool, &other).await;
    cut_off(&other).await;
    let relay = outbox.relay();
    is_parked(&outbox).await;
    eventually(SOON, "the others are in the stream", async || outbox.stored().await == 2).await.unwrap();
    drop(relay);
    primary.kill().await.unwrap();
    sqlx::raw_sql("select pg_promote()").execute(&other).await.unwrap();

    let name = outbox.postgres.url.rsplit('/').next().unwrap().to_string();
    let outbox = outbox.moved_to(standby.url(&name)).await;
    assert_eq!(parked(&outbox).await, [], "the promoted standby does not know of it");
    outbox.expire_leases().await;
    let relay = outbox.relay();
    is_parked(&outbox).await;
    outbox.publish("last", "{}", None).await;
    eventually(SOON, "it goes on", async || outbox.stored().await == 3).await.unwrap();
    assert_eq!(types(&outbox).await, ["first", "small", "last"], "each once");
    relay.stop().await.unwrap();
}

/// A relay whose lease has passed to another one writes nothing any more that lets the cursor pass an event.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_leads_no_more_parks_nothing() {
    let outbox = shared().await;
    let proxy = Proxy::to(&outbox.nats.url).await;
    let mut config = RelayConfig { lease: Duration::from_secs(30), ..outbox.relay_config() };
    config.nats.url = format!("nats://{}", proxy.address);
    let relay = RunningRelay::start(config);
    leads(&outbox).await;
    limit_messages(&outbox, 2_000).await;
    proxy.set(Way::Slow(Duration::from_secs(1)));
    publish_large_and_small(&outbox).await;
    eventually(SOON, "the window is open", async || {
        sqlx::query_scalar("select target_id >= 3 from aftercommit.relay_log order by seq desc limit 1")
            .fetch_one(&outbox.pool)
            .await
            .unwrap()
    })
    .await
    .unwrap();
    // Somebody else leads from now on; the first one learns of it in ten seconds.
    sqlx::query(
        "update aftercommit.lease set epoch = epoch + 1, holder = 'another', expires_at = now() + interval '3 s'",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    eventually(SOON, "the first one steps down", async || {
        relay.monitor.report().state.contains("another relay has taken over")
    })
    .await
    .unwrap();
    assert_eq!(parked(&outbox).await, []);
    drop(relay);
    limit_messages(&outbox, -1).await;
    outbox.expire_leases().await;
    let relay = outbox.relay();
    eventually(SOON, "nothing was passed", async || outbox.stored().await == 3).await.unwrap();
    relay.stop().await.unwrap();
}

/// A relay has published a first event.
async fn leads(outbox: &Outbox) {
    outbox.publish("first", "{}", None).await;
    eventually(SOON, "the first event is there", async || outbox.stored().await == 1).await.unwrap();
}

/// Large events that are parked, each with its key.
async fn park(outbox: &Outbox, keys: &[Option<&str>]) -> Vec<ParkedEvent> {
    limit_messages(outbox, 2_000).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    for key in keys {
        outbox.publish("large", &large, *key).await;
    }
    eventually(SOON, "they are parked", async || parked(outbox).await.len() == keys.len()).await.unwrap();
    limit_messages(outbox, -1).await;
    parked(outbox).await
}

async fn release(outbox: &Outbox, event: &ParkedEvent) {
    operator::relay::release(&outbox.postgres, "test", event.event_id).await.unwrap();
}

/// Somebody empties the outbox and has its ids begin anew, while what is known of an old event stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_id_of_an_event_that_was_parked_hides_no_other_event() {
    for discarded in [true, false] {
        let outbox = shared().await;
        let relay = outbox.relay();
        leads(&outbox).await;
        let parked = park(&outbox, &[None]).await;
        if discarded {
            operator::relay::discard(&outbox.postgres, "test", parked[0].event_id).await.unwrap();
        }
        relay.stop().await.unwrap();
        sqlx::raw_sql("truncate aftercommit.outbox restart identity").execute(&outbox.pool).await.unwrap();
        for _ in 0..5 {
            outbox.publish("later", "{}", None).await;
        }
        let relay = outbox.relay();
        eventually(SOON, "all of them are in the stream", async || outbox.stored().await == 6).await.unwrap();
        assert_eq!(types(&outbox).await, ["first", "later", "later", "later", "later", "later"]);
        if !discarded {
            // It is gone, and the operator is told so. Another event has its place.
            release(&outbox, &parked[0]).await;
            eventually(SOON, "the old one is refused", async || {
                self::parked(&outbox).await.iter().any(|event| event.reason.contains("was removed from the outbox"))
            })
            .await
            .unwrap();
            assert_eq!(outbox.stored().await, 6, "none went out twice");
        }
        relay.stop().await.unwrap();
    }
}

/// The relay dies behind the publish of a released event, and the message is purged: the server still knows its id.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_event_that_was_purged_is_published_again() {
    let outbox = shared().await;
    let relay = outbox.relay();
    leads(&outbox).await;
    let parked = park(&outbox, &[None]).await;
    relay.stop().await.unwrap();
    outbox.expire_leases().await;
    release(&outbox, &parked[0]).await;
    outbox.dies_at("relay-repair-published:1").await;
    assert_eq!(types(&outbox).await, ["first", "large"]);
    outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap().purge().await.unwrap();
    let relay = outbox.relay();
    eventually(SOON, "nothing is parked any more", async || self::parked(&outbox).await.is_empty()).await.unwrap();
    assert_eq!(types(&outbox).await.last().unwrap(), "large");
    relay.stop().await.unwrap();
}

/// The relay is paused while a released event is on its way: it is in the stream once, also when the server has
/// forgotten its id.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_in_which_the_relay_was_paused_goes_out_once() {
    let outbox = shared().await;
    outbox.forget_message_ids().await;
    let proxy = Proxy::to(&outbox.nats.url).await;
    let mut config = RelayConfig { lease: Duration::from_millis(600), ..outbox.relay_config() };
    config.nats.url = format!("nats://{}", proxy.address);
    let relay = RunningRelay::start(config);
    leads(&outbox).await;
    let parked = park(&outbox, &[None]).await;
    proxy.set(Way::Slow(Duration::from_secs(3)));
    release(&outbox, &parked[0]).await;
    eventually(SOON, "it is there", async || outbox.stored().await == 2).await.unwrap();
    operator::relay::pause(&outbox.postgres, "test", None).await.unwrap();
    eventually(SOON, "the relay is paused", async || relay.monitor.report().state == "paused").await.unwrap();
    proxy.set(Way::Open);
    operator::relay::resume(&outbox.postgres, "test").await.unwrap();
    eventually(SOON, "it is settled", async || self::parked(&outbox).await.is_empty()).await.unwrap();
    outbox.publish("last", "{}", None).await;
    eventually(SOON, "it goes on", async || types(&outbox).await.contains(&"last".to_string())).await.unwrap();
    assert_eq!(types(&outbox).await, ["first", "large", "last"]);
    relay.stop().await.unwrap();
}

/// Thousands of events of one key are released; another key's events come as fast as ever, and the key keeps its order
/// with what comes meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_released_events_hold_up_no_other_key() {
    const WAITING: i64 = 3_000;
    let outbox = shared().await;
    let relay = outbox.relay();
    leads(&outbox).await;
    let parked = park(&outbox, &[Some("a")]).await;
    let many =
        "select aftercommit.publish('many', jsonb_build_object('version', n), 'a') from generate_series(1, $1) n";
    sqlx::query(many).bind(WAITING).execute(&outbox.pool).await.unwrap();
    let open = async || {
        let count = "select count(*) from aftercommit.parked where state in ('parked', 'released')";
        sqlx::query_scalar::<_, i64>(count).fetch_one(&outbox.pool).await.unwrap()
    };
    eventually(SOON, "they wait", async || open().await == WAITING + 1).await.unwrap();
    operator::relay::discard(&outbox.postgres, "test", parked[0].event_id).await.unwrap();
    let (mut live, mut latest, mut during) = (0, Duration::ZERO, 0);
    while open().await > 0 {
        let began = Instant::now();
        let before = outbox.stored().await;
        outbox.publish("live", &format!("{{\"version\": {}}}", live + 1), Some("b")).await;
        live += 1;
        outbox.publish("many", &format!("{{\"version\": {}}}", WAITING + live), Some("a")).await;
        let live_is_there = async || {
            let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
            let subject = format!("{}.live", outbox.naming.prefix);
            let last = stream.get_last_raw_message_by_subject(&subject).await;
            last.is_ok_and(|last| {
                let payload: serde_json::Value = serde_json::from_slice(&last.payload).unwrap();
                payload["version"] == live
            })
        };
        eventually(SOON, "the live event is there", live_is_there).await.unwrap();
        during += i64::from(open().await > 0 && before < WAITING as u64);
        latest = latest.max(began.elapsed());
    }
    println!("{live} live events, {during} of them during the release, the slowest in {latest:?}");
    assert!(latest < Duration::from_secs(5), "{latest:?}");
    eventually(SOON, "all are there", async || outbox.stored().await == (1 + WAITING + 2 * live) as u64).await.unwrap();
    let messages = outbox.messages().await;
    for (key, last) in [("a", WAITING + live), ("b", live)] {
        let versions =
            messages.iter().filter(|message| message.headers.get("ce-partitionkey").is_some_and(|of| of == key));
        let versions = versions.map(|message| serde_json::from_slice::<serde_json::Value>(&message.payload).unwrap());
        let versions: Vec<i64> = versions.map(|payload| payload["version"].as_i64().unwrap()).collect();
        assert_eq!(versions, (1..=last).collect::<Vec<_>>(), "{key}");
    }
    relay.stop().await.unwrap();
}

/// A released event that still does not fit keeps back its own key and nothing else, whatever else is released.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_event_that_still_does_not_fit_blocks_only_its_key() {
    let outbox = shared().await;
    let relay = outbox.relay();
    leads(&outbox).await;
    let parked = park(&outbox, &[Some("a"), Some("b")]).await;
    for (event_type, key) in [("behind.a", "a"), ("behind.b", "b")] {
        outbox.publish(event_type, "{}", Some(key)).await;
    }
    eventually(SOON, "they wait", async || self::parked(&outbox).await.len() == 4).await.unwrap();
    limit_messages(&outbox, 2_000).await;
    release(&outbox, &parked[0]).await;
    eventually(SOON, "it is parked again", async || {
        let parked = self::parked(&outbox).await;
        parked.len() == 4 && parked[0].state == "parked" && parked[0].reason.contains("message size exceeds")
    })
    .await
    .unwrap();
    operator::relay::discard(&outbox.postgres, "test", parked[1].event_id).await.unwrap();
    eventually(SOON, "the other key goes on", async || outbox.stored().await == 2).await.unwrap();
    assert_eq!(types(&outbox).await, ["first", "behind.b"]);
    limit_messages(&outbox, -1).await;
    release(&outbox, &parked[0]).await;
    eventually(SOON, "so does this one", async || outbox.stored().await == 4).await.unwrap();
    assert_eq!(types(&outbox).await, ["first", "behind.b", "large", "behind.a"]);
    relay.stop().await.unwrap();
}
