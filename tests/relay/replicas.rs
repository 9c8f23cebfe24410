//! G1, G3 in a stream that several servers keep: a message that names the wrong predecessor would stop it for good.

use crate::support::{Outbox, RunningRelay, SOON, Writers, is_before};
use aftercommit::operator;
use aftercommit::relay::{PublishMethod, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{NatsCluster, NatsOptions, Postgres};
use async_nats::jetstream::stream::PeerInfo;
use tokio::sync::{Mutex, MutexGuard};

/// What names a predecessor by its id.
const NAMED: &str = "Nats-Expected-Last-Msg-Id";

/// One cluster at a time: fifteen servers at once would be much for a small machine.
static TURN: Mutex<()> = Mutex::const_new(());

async fn cluster() -> (MutexGuard<'static, ()>, NatsCluster, Outbox) {
    let turn = TURN.lock().await;
    let cluster = NatsCluster::start(3, NatsOptions::default()).await.unwrap();
    let js = async_nats::jetstream::new(async_nats::connect(cluster.members[0].url()).await.unwrap());
    eventually(SOON, "the cluster has a leader", async || js.query_account().await.is_ok()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, cluster.members[0].url()).await;
    (turn, cluster, outbox)
}

/// Lets all servers keep the stream from now on.
async fn replicate(outbox: &Outbox, batches: bool) {
    let js = outbox.js().await;
    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    (config.num_replicas, config.allow_atomic_publish) = (3, batches);
    js.update_stream(config).await.unwrap();
    all_keep_up(outbox).await;
}

/// While much is written, a server that is back may be some messages behind whenever it is asked.
async fn all_keep_up(outbox: &Outbox) {
    let js = outbox.js().await;
    let keeps_up = |peer: &PeerInfo| peer.current || !peer.offline && peer.lag.is_some_and(|lag| lag < 100);
    eventually(SOON, "all servers keep the stream", async || {
        let stream = js.get_stream(&outbox.naming.stream).await.ok();
        let members = stream.and_then(|stream| stream.cached_info().cluster.clone());
        members.is_some_and(|members| {
            members.leader.is_some() && members.replicas.len() == 2 && members.replicas.iter().all(keeps_up)
        })
    })
    .await
    .unwrap();
}

/// Somebody else writes into the stream while events are on their way, again and again.
async fn disturbed(outbox: &Outbox, relay: &RunningRelay) {
    let before = outbox.stored().await - outbox.committed().await.len() as u64;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let js = outbox.js().await;
    let subject = format!("{}.foreign", outbox.naming.prefix);
    for _ in 0..15 {
        writers.more(20).await;
        js.publish(subject.clone(), "not an event".into()).await.unwrap().await.unwrap();
    }
    writers.stop().await;
    eventually(SOON, "everything is in the stream", async || {
        outbox.stored().await >= outbox.committed().await.len() as u64 + before + 15
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {:?}", relay.monitor.report()));
}

/// Everything is there, and came in single messages that name nothing.
async fn assert_single(outbox: &Outbox) {
    let messages = outbox.assert_complete().await;
    for header in [NAMED, "Nats-Batch-Id"] {
        assert!(messages.iter().all(|message| !message.headers.contains_key(header)), "{header}");
    }
}

/// Left to itself the relay takes batches, and a foreign message costs the stream nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_message_does_not_stop_a_replicated_stream() {
    let (_turn, _cluster, outbox) = cluster().await;
    replicate(&outbox, true).await;
    let relay = outbox.relay();
    disturbed(&outbox, &relay).await;
    let messages = outbox.assert_complete().await;
    let events = || messages.iter().filter(|message| message.headers.contains_key("ce-id"));
    assert!(events().all(|message| !message.headers.contains_key(NAMED)));
    let batched = events().filter(|message| message.headers.contains_key("Nats-Batch-Id")).count();
    assert!(batched * 2 > events().count(), "{batched} of {}", events().count());
    relay.stop().await.unwrap();
}

/// Without batches, and where they are not wanted, one message at a time is in flight.
#[tokio::test(flavor = "multi_thread")]
async fn without_batches_a_replicated_stream_gets_one_message_at_a_time() {
    let (_turn, cluster, outbox) = cluster().await;
    replicate(&outbox, false).await;
    let relay = outbox.relay();
    disturbed(&outbox, &relay).await;
    assert_single(&outbox).await;
    relay.stop().await.unwrap();
    if is_before(cluster.members[0].version(), (2, 12)) {
        println!("SKIPPED: this nats-server has no batches to allow");
        return;
    }
    // Provisioning allows them, and a relay that is told to chain goes on one by one.
    let changes = operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    assert!(changes.iter().any(|change| change.contains("allow_atomic") && change.contains("-> true")), "{changes:?}");
    let relay = RunningRelay::start(RelayConfig { publish: PublishMethod::Chained, ..outbox.relay_config() });
    disturbed(&outbox, &relay).await;
    assert_single(&outbox).await;
    relay.stop().await.unwrap();
}

/// A relay that leads while the stream gets its replicas names no predecessor any more.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_come_later_are_noticed() {
    let (_turn, _cluster, outbox) = cluster().await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 4, 4).await;
    writers.more(300).await;
    outbox.goes_on().await;
    replicate(&outbox, true).await;
    let js = outbox.js().await;
    let last = async || {
        let subject = format!("{}.>", outbox.naming.prefix);
        js.get_stream(&outbox.naming.stream).await.unwrap().get_last_raw_message_by_subject(&subject).await.unwrap()
    };
    // It is busy all the time.
    eventually(SOON, "it goes over to batches", async || last().await.headers.get("Nats-Batch-Id").is_some())
        .await
        .unwrap();
    writers.stop().await;
    let messages = outbox.assert_complete().await;
    let first = messages.iter().position(|message| message.headers.contains_key("Nats-Batch-Id")).unwrap();
    assert!(messages[..first].iter().any(|message| message.headers.contains_key(NAMED)), "at first it was one server");
    assert!(messages[first..].iter().all(|message| !message.headers.contains_key(NAMED)));
    relay.stop().await.unwrap();
}

/// The servers are killed one after the other while batches are on their way.
#[tokio::test(flavor = "multi_thread")]
async fn batches_keep_order_while_servers_of_a_cluster_are_killed() {
    let (_turn, mut cluster, outbox) = cluster().await;
    replicate(&outbox, true).await;
    let mut relay = outbox.relay_config();
    relay.nats.url = cluster.url();
    let relay = RunningRelay::start(relay);
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    // The first one is where the test looks.
    for victim in [1, 2, 1] {
        writers.more(100).await;
        outbox.goes_on().await;
        cluster.members[victim].kill().await.unwrap();
        outbox.goes_on().await;
        cluster.members[victim].restart().await.unwrap();
        all_keep_up(&outbox).await;
    }
    writers.stop().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// A stranger names a wrong predecessor, and the stream has stopped for good. The way out that the relay's operator is
/// told works: delete the stream and provision it; everything comes again from the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_a_stranger_has_stopped_for_good_is_made_anew() {
    let (_turn, cluster, outbox) = cluster().await;
    if is_before(cluster.members[0].version(), (2, 14)) {
        println!("SKIPPED: with this nats-server the stream goes on");
        return;
    }
    replicate(&outbox, true).await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 4, 4).await;
    writers.more(100).await;
    let js = outbox.js().await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert(NAMED, "of no message");
    let subject = format!("{}.foreign", outbox.naming.prefix);
    js.publish_with_headers(subject, headers, "".into()).await.unwrap().await.unwrap_err();
    writers.more(100).await;
    writers.stop().await;
    eventually(SOON, "the relay says what is wrong", async || {
        relay.monitor.report().state.contains("critical write error")
    })
    .await
    .unwrap();
    js.delete_stream(&outbox.naming.stream).await.unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}
