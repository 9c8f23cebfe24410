//! Connections that die without a word, as a firewall lets those die that were idle for long: neither side hears of it. A
//! minute later everything goes on.

use std::time::Duration;

use crate::support::{Act, Number, Outbox, Proxy, Record, RunningRelay, SOON, Work};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::Subscriber;

/// A minute of silence, and some time around it.
const A_WHILE: Duration = Duration::from_secs(120);

/// The URL with a way in between that can be disturbed.
async fn proxied(url: &str) -> (Proxy, String) {
    let server = url.split("//").nth(1).unwrap().split('/').next().unwrap().rsplit('@').next().unwrap();
    let proxy = Proxy::to(server).await;
    let url = url.replace(server, &proxy.address);
    (proxy, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gives_connections_up_that_died_while_they_were_idle() {
    let mut work = Work::shared().await;
    let (proxy, url) = proxied(&work.outbox.postgres.url).await;
    work.outbox.postgres.url = url;
    let subscriber = || {
        let record = Record::new(|_| Act::Sleep(Duration::from_millis(20)));
        Subscriber::new("idle").on::<Number>(record).concurrency(8).max_batch(1)
    };
    let worker = work.run(subscriber()).await;
    work.send_many(&["a", "b", "c", "d", "e", "f", "g", "h"], 5).await;
    work.wait_for(40).await;
    work.wait_until_acked("idle").await;
    assert!(proxy.forget() >= 3, "there are idle connections");
    // It has to look anew at what a predecessor left, on one of them.
    let stream = work.outbox.js().await.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.delete_consumer("idle").await.unwrap();
    work.worker_with(subscriber()).provision().await.unwrap();
    work.send_many(&["i", "j"], 5).await;
    eventually(A_WHILE, "the worker goes on", async || work.count().await == 50).await.unwrap();
    work.assert_in_order(&["i", "j"], 5).await;
    worker.stop().await;
}

async fn outbox() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

/// A relay, with at least so many connections through the proxy, publishes again some time after they died.
async fn goes_on_after_silence(outbox: &Outbox, config: RelayConfig, proxy: &Proxy, connections: u64) {
    let relay = RunningRelay::start(config);
    outbox.publish("before", "{}", None).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    assert!(proxy.forget() >= connections, "there are connections");
    outbox.publish("after", "{}", None).await;
    eventually(A_WHILE, "the relay goes on", async || outbox.stored().await == 2).await.unwrap();
    outbox.assert_complete().await;
    tokio::time::timeout(SOON, relay.stop()).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_gives_connections_up_that_died_while_they_were_idle() {
    let outbox = outbox().await;
    let mut config = outbox.relay_config();
    let (proxy, url) = proxied(&config.postgres.url).await;
    config.postgres.url = url;
    goes_on_after_silence(&outbox, config, &proxy, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_notices_that_nats_has_fallen_silent() {
    let mut work = Work::shared().await;
    let direct = work.outbox.nats.url.clone();
    let (proxy, url) = proxied(&direct).await;
    work.outbox.nats.url = url;
    let worker = work.run(Subscriber::new("silent").on::<Number>(Record::good())).await;
    work.send_many(&["a"], 2).await;
    work.wait_for(2).await;
    assert!(proxy.forget() >= 1, "it is connected");
    work.send_many(&["b"], 4).await;
    eventually(A_WHILE, "it goes on", async || work.count().await == 6).await.unwrap();
    work.assert_in_order(&["b"], 4).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_notices_that_nats_has_fallen_silent() {
    let outbox = outbox().await;
    let mut config = outbox.relay_config();
    let (proxy, url) = proxied(&config.nats.url).await;
    config.nats.url = url;
    goes_on_after_silence(&outbox, config, &proxy, 1).await;
}
