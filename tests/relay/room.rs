//! G9: an event that is too large only for a setting that was changed waits, and is not parked.

use std::time::Duration;

use aftercommit::operator;
use aftercommit::relay::{PublishMethod, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};

use crate::refusals::{state_contains, stored, types};
use crate::support::{Outbox, RunningRelay, SOON};

async fn outbox(config: &str) -> (Outbox, Nats) {
    let nats = Nats::start(NatsOptions { config: config.into(), ..NatsOptions::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    (Outbox::new(database, nats.url()).await, nats)
}

fn large() -> String {
    format!("\"{}\"", "x".repeat(100_000))
}

async fn parked(outbox: &Outbox) -> usize {
    operator::relay::parked(&outbox.postgres, 100).await.unwrap().len()
}

/// However the relay publishes: the server closes the connection on the first large message, the client then knows the new
/// limit, and would never learn of the next one.
#[tokio::test(flavor = "multi_thread")]
async fn max_payload_that_is_lowered_and_raised_again_parks_nothing() {
    for publish in [PublishMethod::Chained, PublishMethod::Batched] {
        let (outbox, mut nats) = outbox("").await;
        let config = RelayConfig { park_after: Duration::from_hours(1), publish, ..outbox.relay_config() };
        let relay = RunningRelay::start(config);
        outbox.publish("first", "{}", Some("a")).await;
        stored(&outbox, 1).await;
        nats.reload("max_payload: 4096").await.unwrap();
        outbox.publish("large", &large(), Some("a")).await;
        outbox.publish("behind", "{}", Some("a")).await;
        state_contains(&outbox, "raise max_payload of nats-server").await;
        assert_eq!((parked(&outbox).await, outbox.stored().await), (0, 1));
        nats.reload("").await.unwrap();
        stored(&outbox, 3).await;
        outbox.publish("after", "{}", Some("a")).await;
        stored(&outbox, 4).await;
        assert_eq!(types(&outbox).await, ["first", "large", "behind", "after"]);
        assert_eq!(parked(&outbox).await, 0);
        relay.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn max_msg_size_that_is_lowered_and_raised_again_parks_nothing() {
    let (outbox, _nats) = outbox("").await;
    let relay = RunningRelay::start(RelayConfig { park_after: Duration::from_hours(1), ..outbox.relay_config() });
    outbox.publish("first", "{}", None).await;
    stored(&outbox, 1).await;
    crate::refusals::change_stream(&outbox, |config| config.max_message_size = 4096).await;
    outbox.publish("large", &large(), Some("a")).await;
    outbox.publish("behind", "{}", Some("a")).await;
    state_contains(&outbox, "raise max_msg_size of the stream").await;
    assert_eq!(parked(&outbox).await, 0);
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    stored(&outbox, 3).await;
    assert_eq!(types(&outbox).await, ["first", "large", "behind"]);
    relay.stop().await.unwrap();
}

/// What stays too large is parked in the end, so that it holds up its own key only; and once the limit is raised it can
/// be released, without a restart of the relay.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_parked_until_the_limit_is_raised() {
    let (outbox, mut nats) = outbox("max_payload: 4096").await;
    let config = RelayConfig { park_after: Duration::from_secs(1), ..outbox.relay_config() };
    let relay = RunningRelay::start(config);
    outbox.publish("large", &large(), Some("a")).await;
    outbox.publish("behind", "{}", Some("a")).await;
    outbox.publish("other", "{}", Some("b")).await;
    stored(&outbox, 1).await;
    eventually(SOON, "the large one and the one behind it are parked", async || parked(&outbox).await == 2)
        .await
        .unwrap();
    nats.reload("").await.unwrap();
    // The relay believes for a second what it learnt of the limit.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let first = operator::relay::parked(&outbox.postgres, 1).await.unwrap().remove(0);
    assert_eq!(operator::relay::release(&outbox.postgres, "test", first.event_id).await.unwrap(), 2);
    stored(&outbox, 3).await;
    assert_eq!(types(&outbox).await, ["other", "large", "behind"]);
    relay.stop().await.unwrap();
}

/// Many at once go by the rules of `aftercommit dead retry`.
#[tokio::test(flavor = "multi_thread")]
async fn parked_events_are_released_and_discarded_by_filter() {
    let (outbox, mut nats) = outbox("max_payload: 4096").await;
    let relay = outbox.relay();
    for (event_type, key) in [("large.a", "a"), ("large.a", "b"), ("large.b", "c"), ("large.b", "d")] {
        outbox.publish(event_type, &large(), Some(key)).await;
    }
    outbox.publish("behind", "{}", Some("a")).await;
    eventually(SOON, "all are parked", async || parked(&outbox).await == 5).await.unwrap();
    nats.reload("").await.unwrap();
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command.arg("parked").args(arguments).env("DATABASE_URL", &outbox.postgres.url);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.code(), said)
    };
    for (arguments, status, expected) in [
        (&["release"][..], 2, "no parked events selected"),
        (&["release", "--all", "--type", "large.a"], 2, "cannot be used with"),
        (&["release", "--type", "large.a"], 2, "nothing was done: 2 parked events would be released"),
        (&["release", "--all", "--dry-run"], 0, "4 parked events would be released"),
        (&["discard", "--key", "nobody", "--yes"], 0, "0 parked events discarded"),
        (&["release", "--error", "max_payload of 4096", "--older-than", "1h", "--yes"], 0, "0 parked events released"),
    ] {
        let (code, said) = run(arguments);
        assert!(code == Some(status) && said.contains(expected), "{arguments:?}: {code:?} {said}");
    }
    assert_eq!((parked(&outbox).await, outbox.stored().await), (5, 0));

    let (code, said) = run(&["discard", "--key", "d", "--yes"]);
    assert!(code == Some(0) && said.contains("1 parked event discarded; 0 events are going out now"), "{said}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (code, said) = run(&["release", "--type", "large.a", "--error", "max_payload", "--yes"]);
    assert!(code == Some(0) && said.contains("2 parked events released; 3 events are going out now"), "{said}");
    stored(&outbox, 3).await;
    let (code, said) = run(&["release", "--all", "--yes"]);
    assert!(code == Some(0) && said.contains("1 parked event released; 1 event is going out now"), "{said}");
    stored(&outbox, 4).await;
    assert_eq!(parked(&outbox).await, 0);
    let entries = operator::audit::list(&outbox.postgres, &Default::default(), 100).await.unwrap();
    let actions: Vec<&str> = entries.iter().map(|entry| entry.action.as_str()).collect();
    let count = |action| actions.iter().filter(|found| **found == action).count();
    assert_eq!((count("parked release"), count("parked discard")), (3, 1), "{actions:?}");
    relay.stop().await.unwrap();
}
