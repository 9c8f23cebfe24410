//! G1, G3 with other writers in the stream: nothing is lost, and every key keeps its order.

use std::time::Duration;

use crate::support::{Outbox, Proxy, RunningRelay, SOON, Way, Writers};
use aftercommit::relay::{Mode, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

/// Another writer in the stream, a relay that is killed, acknowledgements that are lost and late.
#[tokio::test(flavor = "multi_thread")]
async fn others_write_too_and_everything_fails() {
    let outbox = shared().await;
    let proxy = Proxy::to(&outbox.nats.url).await;
    let config = || {
        let mut config =
            RelayConfig { mode: Mode::Shared, ack_timeout: Duration::from_millis(300), ..outbox.relay_config() };
        config.nats.url = format!("nats://{}", proxy.address);
        config
    };
    let mut relay = RunningRelay::start(config());
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let js = outbox.js().await;
    let subject = format!("{}.foreign", outbox.naming.prefix);
    let mut foreign = 0;
    for round in 0..2 {
        for way in [Way::Deaf, Way::Slow(Duration::from_millis(450)), Way::Cut] {
            for _ in 0..5 {
                writers.more(15).await;
                js.publish(subject.clone(), "of somebody else".into()).await.unwrap().await.unwrap();
                foreign += 1;
            }
            proxy.set(way);
            writers.more(60).await;
            proxy.cut().await;
            outbox.goes_on().await;
        }
        if round == 0 {
            // Without a stop: the next leader goes through the open window again.
            drop(relay);
            relay = RunningRelay::start(config());
        }
    }
    writers.stop().await;
    eventually(SOON, "everything is in the stream", async || {
        outbox.stored().await >= outbox.committed().await.len() as u64 + foreign
    })
    .await
    .unwrap();
    let messages = outbox.assert_complete().await;
    assert_eq!(messages.len() as u64, outbox.committed().await.len() as u64 + foreign);
    relay.stop().await.unwrap();
}

/// A duplicate window shorter than the time for which a relay may send again is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_duplicate_window_is_refused() {
    let outbox = shared().await;
    let js = outbox.js().await;
    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    config.duplicate_window = Duration::from_secs(10);
    js.update_stream(config).await.unwrap();
    let relay = RunningRelay::start(RelayConfig { mode: Mode::Shared, ..outbox.relay_config() });
    let error = relay.ended().await.unwrap_err().to_string();
    assert!(error.contains("duplicate_window"), "{error}");
}
