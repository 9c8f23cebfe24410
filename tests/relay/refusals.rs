//! G5, G6: what the stream refuses ends as its class says, and what an operator switches off waits.

use std::time::Duration;

use crate::support::{Outbox, RunningRelay, SOON};
use aftercommit::operator;
use aftercommit::relay::{ParkPolicy, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::jetstream::stream::StorageType;

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

pub async fn change_stream(outbox: &Outbox, change: impl FnOnce(&mut async_nats::jetstream::stream::Config)) {
    let js = outbox.js().await;
    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    change(&mut config);
    js.update_stream(config).await.unwrap();
}

pub async fn state_contains(outbox: &Outbox, text: &str) {
    eventually(SOON, &format!("the relay's state says {text:?}"), async || {
        let state: Option<String> = sqlx::query_scalar("select state from aftercommit.relay_status")
            .fetch_optional(&outbox.pool)
            .await
            .unwrap();
        state.is_some_and(|state| state.contains(text))
    })
    .await
    .unwrap();
}

pub async fn types(outbox: &Outbox) -> Vec<String> {
    outbox.messages().await.into_iter().map(|message| message.headers["ce-type"].clone()).collect()
}

pub async fn stored(outbox: &Outbox, messages: u64) {
    eventually(SOON, &format!("{messages} messages are in the stream"), async || outbox.stored().await >= messages)
        .await
        .unwrap();
}

/// An event that the stream will never take is parked; with `block` its key waits, others go on; an operator
/// releases it after raising the limit, and the key's events follow in order.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_too_large_blocks_only_its_key() {
    let outbox = shared().await;
    let relay = outbox.relay();
    stored(&outbox, 0).await;
    outbox.publish("first", "{}", Some("a")).await;
    stored(&outbox, 1).await;
    change_stream(&outbox, |config| config.max_message_size = 2_000).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    outbox.publish("large", &large, Some("a")).await;
    outbox.publish("behind", "{}", Some("a")).await;
    outbox.publish("other", "{}", Some("b")).await;
    outbox.publish("no.key", "{}", None).await;
    stored(&outbox, 3).await;
    assert_eq!(types(&outbox).await, ["first", "other", "no.key"]);
    let parked = operator::relay::parked(&outbox.postgres, 10).await.unwrap();
    assert_eq!(parked.iter().map(|event| event.event_type.as_str()).collect::<Vec<_>>(), ["large", "behind"]);
    assert_eq!((parked[0].code, parked[1].code), (Some(10054), None));
    let behind = operator::relay::release(&outbox.postgres, "test", parked[1].event_id).await;
    assert!(behind.is_err(), "it waits behind another and cannot be released by itself");

    change_stream(&outbox, |config| config.max_message_size = -1).await;
    assert_eq!(operator::relay::release(&outbox.postgres, "test", parked[0].event_id).await.unwrap(), 2);
    stored(&outbox, 5).await;
    outbox.publish("later", "{}", Some("a")).await;
    stored(&outbox, 6).await;
    assert_eq!(types(&outbox).await, ["first", "other", "no.key", "large", "behind", "later"]);
    assert_eq!(operator::relay::parked(&outbox.postgres, 10).await.unwrap(), []);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discarded_event_lets_its_key_go() {
    let outbox = shared().await;
    let relay = outbox.relay();
    outbox.publish("first", "{}", None).await;
    stored(&outbox, 1).await;
    change_stream(&outbox, |config| config.max_message_size = 2_000).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    outbox.publish("large", &large, Some("a")).await;
    outbox.publish("behind", "{}", Some("a")).await;
    eventually(SOON, "both are parked", async || {
        operator::relay::parked(&outbox.postgres, 10).await.unwrap().len() == 2
    })
    .await
    .unwrap();
    // The next leader knows what is parked, too, and what is behind it waits although it would fit.
    relay.stop().await.unwrap();
    change_stream(&outbox, |config| config.max_message_size = -1).await;
    let relay = outbox.relay();
    outbox.publish("also.behind", "{}", Some("a")).await;
    outbox.publish("other", "{}", Some("b")).await;
    stored(&outbox, 2).await;
    let parked = operator::relay::parked(&outbox.postgres, 10).await.unwrap();
    assert_eq!(operator::relay::discard(&outbox.postgres, "test", parked[0].event_id).await.unwrap(), 2);
    stored(&outbox, 4).await;
    assert_eq!(types(&outbox).await, ["first", "other", "behind", "also.behind"]);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn with_policy_skip_the_key_goes_on_without_it() {
    let outbox = shared().await;
    let relay = RunningRelay::start(RelayConfig { park_policy: ParkPolicy::Skip, ..outbox.relay_config() });
    outbox.publish("first", "{}", None).await;
    stored(&outbox, 1).await;
    change_stream(&outbox, |config| config.max_message_size = 2_000).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(5_000));
    outbox.publish("large", &large, Some("a")).await;
    outbox.publish("after", "{}", Some("a")).await;
    stored(&outbox, 2).await;
    assert_eq!(types(&outbox).await, ["first", "after"]);
    relay.stop().await.unwrap();
}

/// A full stream is back-pressure: nothing is parked, and it drains by itself when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_is_waited_out() {
    let outbox = shared().await;
    change_stream(&outbox, |config| config.max_messages = 10).await;
    let relay = outbox.relay();
    for n in 0..30 {
        outbox.publish("many", &format!("{{\"n\": {n}}}"), Some("k")).await;
    }
    state_contains(&outbox, "raise its limits or free space").await;
    assert_eq!(outbox.stored().await, 10);
    change_stream(&outbox, |config| config.max_messages = -1).await;
    outbox.assert_complete().await;
    assert_eq!(operator::relay::parked(&outbox.postgres, 10).await.unwrap(), []);
    relay.stop().await.unwrap();
}

/// The stream is deleted while the relay runs: it says so, and goes on when the stream is there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_stream_is_waited_for() {
    let outbox = shared().await;
    let relay = outbox.relay();
    outbox.publish("before", "{}", None).await;
    stored(&outbox, 1).await;
    outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
    outbox.publish("after", "{}", None).await;
    state_contains(&outbox, "aftercommit provision").await;
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    eventually(SOON, "what was written after it is in the new stream", async || {
        types(&outbox).await.contains(&"after".to_string())
    })
    .await
    .unwrap();
    relay.stop().await.unwrap();
}

/// The right to publish is taken away: the relay says what the server says, and goes on when it is given back.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_named_and_waited_out() {
    let config = |publish: &str| {
        format!(
            "accounts {{ A {{ jetstream: enabled, users: [ {{ user: admin, password: a }}, \
             {{ user: relay, password: r, permissions: {{ publish: {{ allow: [{publish}] }}, subscribe: \"_INBOX_relay.>\" }} }} ] }} }}"
        )
    };
    let api = "\"$JS.API.STREAM.INFO.>\", \"$JS.API.STREAM.MSG.GET.>\"";
    let mut nats = Nats::start(NatsOptions { config: config(api), ..NatsOptions::default() }).await.unwrap();
    let url = nats.url();
    let as_user = |user: &str| url.replace("nats://", &format!("nats://{user}@"));
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, as_user("admin:a")).await;
    let mut relay_config = RelayConfig { ack_timeout: Duration::from_millis(500), ..outbox.relay_config() };
    relay_config.nats.url = as_user("relay:r");
    let relay = RunningRelay::start(relay_config);
    outbox.publish("refused", "{}", None).await;
    state_contains(&outbox, "ermission").await;
    assert_eq!(outbox.stored().await, 0);
    nats.reconfigure(config(&format!("{api}, \"{}\"", outbox.naming.prefix.wildcard()))).await.unwrap();
    outbox.assert_complete().await;
    assert_eq!(operator::relay::parked(&outbox.postgres, 10).await.unwrap(), []);
    relay.stop().await.unwrap();
}

/// Settings with which events would be lost are refused at the start, with the setting and the way out.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_would_lose_events_is_refused() {
    let outbox = shared().await;
    let js = outbox.js().await;
    let refusal = async |outbox: &Outbox| outbox.relay().ended().await.unwrap_err().to_string();
    change_stream(&outbox, |config| config.allow_rollup = true).await;
    let error = refusal(&outbox).await;
    assert!(error.contains("allow_rollup_hdrs") && error.contains("aftercommit provision"), "{error}");
    let changed = operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    assert!(changed.iter().any(|change| change.contains("allow_rollup_hdrs")), "{changed:?}");
    assert_eq!(operator::provision(&outbox.nats, &outbox.naming).await.unwrap(), [""; 0]);

    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    js.delete_stream(&outbox.naming.stream).await.unwrap();
    let error = refusal(&outbox).await;
    assert!(error.contains(&outbox.naming.stream) && error.contains("aftercommit provision"), "{error}");
    config.storage = StorageType::Memory;
    js.create_stream(config).await.unwrap();
    let error = refusal(&outbox).await;
    assert!(error.contains("storage") && error.contains("memory"), "{error}");
    assert!(operator::provision(&outbox.nats, &outbox.naming).await.is_err(), "it cannot be changed in place");
}

/// Paused: nothing goes out, also not after a restart; resumed: everything, in order.
#[tokio::test(flavor = "multi_thread")]
async fn pause_survives_a_restart_and_loses_nothing() {
    let outbox = shared().await;
    let relay = outbox.relay();
    outbox.publish("before", "{}", None).await;
    stored(&outbox, 1).await;
    let pause = async |reason| operator::relay::pause(&outbox.postgres, "test", reason).await.unwrap();
    assert_eq!(pause(Some("maintenance")).await, operator::Pausing::Paused);
    assert_eq!(pause(None).await, operator::Pausing::Unchanged);
    state_contains(&outbox, "paused").await;
    relay.stop().await.unwrap();
    for n in 1..=20 {
        outbox.publish("while.paused", &format!("{{\"version\": {n}}}"), Some("k")).await;
    }
    let relay = outbox.relay();
    state_contains(&outbox, "paused").await;
    assert_eq!(outbox.stored().await, 1);
    assert!(operator::relay::resume(&outbox.postgres, "test").await.unwrap());
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// `--once` publishes what is there and ends.
#[tokio::test(flavor = "multi_thread")]
async fn once_publishes_what_is_there_and_ends() {
    let outbox = shared().await;
    for n in 1..=50 {
        outbox.publish("there", &format!("{{\"version\": {n}}}"), Some("k")).await;
    }
    let status = outbox.relay_command().arg("--once").status().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(outbox.stored().await, 50);
    outbox.assert_complete().await;
}

/// What is parked stays, with its event; what is done with goes, with its event, though pruning has long gone past it.
#[tokio::test(flavor = "multi_thread")]
async fn parked_events_are_pruned_once_they_are_done_with() {
    let outbox = shared().await;
    for _ in 0..20 {
        outbox.publish("old", "{}", None).await;
    }
    let park = "insert into aftercommit.parked (outbox_id, event_id, type, code, reason)
                select id, event_id, type, 1, 'no' from aftercommit.outbox where id in (3, 5)";
    sqlx::raw_sql(park).execute(&outbox.pool).await.unwrap();
    let relay = RunningRelay::start(RelayConfig {
        retention: Duration::ZERO,
        prune_interval: Duration::from_millis(50),
        ..outbox.relay_config()
    });
    stored(&outbox, 18).await;
    let left = async || -> (i64, i64) {
        let counts = "select (select count(*) from aftercommit.outbox), (select count(*) from aftercommit.parked)";
        sqlx::query_as(counts).fetch_one(&outbox.pool).await.unwrap()
    };
    eventually(SOON, "the published events are pruned", async || left().await == (2, 2)).await.unwrap();
    for (id, state, expected) in [(3, "discarded", (1, 1)), (5, "published", (0, 0))] {
        sqlx::query("update aftercommit.parked set state = $2 where outbox_id = $1")
            .bind(id)
            .bind(state)
            .execute(&outbox.pool)
            .await
            .unwrap();
        eventually(SOON, "the event goes, and what is known of it", async || left().await == expected).await.unwrap();
    }
    relay.stop().await.unwrap();
}

/// Old events are removed when they are settled, and only then.
#[tokio::test(flavor = "multi_thread")]
async fn pruning_never_passes_the_settled_mark() {
    let outbox = shared().await;
    let mut held = outbox.pool.begin().await.unwrap();
    sqlx::query("select aftercommit.publish('held', '{}')").execute(&mut *held).await.unwrap();
    for _ in 0..20 {
        outbox.publish("old", "{}", None).await;
    }
    let relay = RunningRelay::start(RelayConfig {
        retention: Duration::ZERO,
        prune_interval: Duration::from_millis(50),
        ..outbox.relay_config()
    });
    stored(&outbox, 20).await;
    eventually(SOON, "the published events are pruned", async || outbox.committed().await.is_empty()).await.unwrap();
    held.commit().await.unwrap();
    stored(&outbox, 21).await;
    eventually(SOON, "the late one is pruned too", async || outbox.committed().await.is_empty()).await.unwrap();
    assert_eq!(types(&outbox).await.last().unwrap(), "held");
    relay.stop().await.unwrap();
}
