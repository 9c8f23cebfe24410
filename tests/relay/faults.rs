//! G1, G3, G5, G9 at the relay: killed at every step, cut off, fenced, refused: nothing is lost, doubled or reordered.

use std::time::{Duration, Instant};

use crate::support::{Outbox, Proxy, RunningRelay, SOON, Way, Writers};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};

async fn shared() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

async fn relay_state(outbox: &Outbox) -> String {
    sqlx::query_scalar("select state from aftercommit.relay_status")
        .fetch_optional(&outbox.pool)
        .await
        .unwrap()
        .unwrap_or_default()
}

/// The process dies in the middle of each step, several times, under load; another one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    let outbox = shared().await;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let steps = [
        ("relay-before-barrier", 3),
        ("relay-after-barrier", 3),
        ("relay-window-read", 5),
        ("relay-sent", 1),
        ("relay-sent", 40),
        ("relay-acknowledged", 1),
        ("relay-acknowledged", 25),
        ("relay-window-done", 4),
        ("relay-pruned", 1),
        ("relay-renew", 2),
    ];
    for (step, times) in steps {
        outbox.dies_at(&format!("{step}:{times}")).await;
    }
    writers.stop().await;
    // The last step is reached only when nothing is written any more.
    outbox.dies_at("relay-settled:1").await;
    let _relay = outbox.relay_process();
    outbox.assert_complete().await;
}

/// A standby leads within 5 seconds of a SIGKILL, and at once after an orderly stop.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over() {
    let outbox = shared().await;
    let mut first = outbox.relay_process();
    outbox.publish("a", "{}", None).await;
    outbox.assert_complete().await;
    let second = outbox.relay_process();
    let third = outbox.relay_process();
    first.kill();
    let killed = Instant::now();
    outbox.publish("b", "{}", None).await;
    outbox.assert_complete().await;
    let after_kill = killed.elapsed();
    assert!(after_kill < Duration::from_secs(5), "{after_kill:?}");

    // Whichever of the two leads is stopped.
    let holder: String =
        sqlx::query_scalar("select holder from aftercommit.lease").fetch_one(&outbox.pool).await.unwrap();
    let leader = [&second, &third].into_iter().find(|relay| holder.contains(&format!(":{}:", relay.id())));
    leader.unwrap().signal("-TERM");
    let stopped = Instant::now();
    outbox.publish("c", "{}", None).await;
    outbox.assert_complete().await;
    let after_stop = stopped.elapsed();
    assert!(after_stop < Duration::from_secs(2), "{after_stop:?}");
    println!("take-over {after_kill:?} after SIGKILL, {after_stop:?} after SIGTERM");
}

/// A leader that was asleep for longer than its lease wakes up beside the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_wakes_up_late_damages_nothing() {
    let outbox = shared().await;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let relays = [outbox.relay_process(), outbox.relay_process()];
    for _ in 0..4 {
        writers.more(150).await;
        let holder: String = sqlx::query_scalar("select holder from aftercommit.lease where expires_at > now()")
            .fetch_one(&outbox.pool)
            .await
            .unwrap();
        let Some(leader) = relays.iter().find(|relay| holder.contains(&format!(":{}:", relay.id()))) else { continue };
        leader.signal("-STOP");
        eventually(SOON, "the other one leads", async || {
            let now: String =
                sqlx::query_scalar("select holder from aftercommit.lease").fetch_one(&outbox.pool).await.unwrap();
            now != holder
        })
        .await
        .unwrap();
        writers.more(50).await;
        leader.signal("-CONT");
    }
    writers.stop().await;
    outbox.assert_complete().await;
}

/// The lease is taken away again and again, as a clock that jumps would, so that several lead at once.
#[tokio::test(flavor = "multi_thread")]
async fn relays_that_fight_for_the_lead_damage_nothing() {
    let outbox = shared().await;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let relays: Vec<_> = (0..3).map(|_| outbox.relay()).collect();
    for _ in 0..15 {
        writers.more(40).await;
        sqlx::query("update aftercommit.lease set expires_at = now() - interval '1 hour'")
            .execute(&outbox.pool)
            .await
            .unwrap();
    }
    writers.stop().await;
    outbox.assert_complete().await;
    for relay in relays {
        relay.stop().await.unwrap();
    }
}

/// Acknowledgements that are lost, late, or cut off with the connection, in the middle of the pipeline.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_way_to_nats() {
    let outbox = shared().await;
    let proxy = Proxy::to(&outbox.nats.url).await;
    let mut config = RelayConfig { ack_timeout: Duration::from_millis(300), ..outbox.relay_config() };
    config.nats.url = format!("nats://{}", proxy.address);
    let relay = RunningRelay::start(config);
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    for _ in 0..2 {
        for way in [Way::Deaf, Way::Slow(Duration::from_millis(450)), Way::Cut] {
            writers.more(60).await;
            proxy.set(way);
            writers.more(60).await;
            proxy.cut().await;
            outbox.goes_on().await;
        }
    }
    writers.stop().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// A long outage of NATS: 30,000 events wait, none is counted as failed, and the relay says why it waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_outage_parks_nothing() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let relay = outbox.relay();
    outbox.publish("before", "{}", None).await;
    outbox.assert_complete().await;
    nats.kill().await.unwrap();
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, key, payload)
         select aftercommit.new_event_id(), 'during', 'k' || n % 100, '{}' from generate_series(1, 30000) n",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    eventually(SOON, "the relay says what it waits for", async || {
        let state = relay_state(&outbox).await;
        state.contains("interrupted") || state.contains("waiting for the stream")
    })
    .await
    .unwrap();
    nats.restart().await.unwrap();
    outbox.assert_complete().await;
    let parked: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.parked").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!(parked, 0);
    relay.stop().await.unwrap();
}

/// A row that is visible and not yet on disk must not get into the stream: PostgreSQL crashes right after the relay
/// has read rows that were committed without waiting for the disk.
#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_in_the_stream_whose_row_is_gone() {
    let settings = vec![
        ("synchronous_commit".into(), "off".into()),
        // Only a commit that waits writes the log to disk.
        ("wal_writer_delay".into(), "10s".into()),
    ];
    let mut postgres = Postgres::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let relay = outbox.relay();
    let mut lost = 0;
    for round in 0..3 {
        let before = outbox.stored().await;
        for n in 0..20 {
            outbox.publish("async.commit", &format!("{{\"n\": {}}}", round * 100 + n), None).await;
        }
        eventually(SOON, "the relay publishes", async || outbox.stored().await > before).await.unwrap();
        let written = outbox.committed().await.len();
        postgres.kill().await.unwrap();
        postgres.restart().await.unwrap();
        eventually(SOON, "the database answers", async || sqlx::query("select 1").execute(&outbox.pool).await.is_ok())
            .await
            .unwrap();
        lost += written - outbox.committed().await.len();
        outbox.assert_complete().await;
    }
    println!("{lost} rows that were committed without waiting are gone; none of them is in the stream");
    relay.stop().await.unwrap();
}

/// Somebody else writes into an exclusive stream: his message stays, ours are all there, each once.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_message_is_survived() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    let js = outbox.js().await;
    let subject = format!("{}.foreign", outbox.naming.prefix);
    for _ in 0..20 {
        writers.more(20).await;
        js.publish(subject.clone(), "not an event".into()).await.unwrap().await.unwrap();
    }
    writers.stop().await;
    eventually(SOON, "everything is in the stream", async || {
        outbox.stored().await >= outbox.committed().await.len() as u64 + 20
    })
    .await
    .unwrap();
    let messages = outbox.assert_complete().await;
    assert_eq!(messages.iter().filter(|message| message.subject == subject).count(), 20);
    relay.stop().await.unwrap();
}

/// A stranger's long transaction holds nobody up, and its own events come when it commits.
#[tokio::test(flavor = "multi_thread")]
async fn a_writing_transaction_held_open_delays_nobody() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let mut held = outbox.pool.begin().await.unwrap();
    sqlx::query("select aftercommit.publish('held', '{}')").execute(&mut *held).await.unwrap();
    for n in 0..50 {
        let written = Instant::now();
        outbox.publish("free", &format!("{{\"n\": {n}}}"), None).await;
        eventually(SOON, "it is in the stream", async || outbox.stored().await > n).await.unwrap();
        assert!(written.elapsed() < Duration::from_secs(2), "{:?}", written.elapsed());
    }
    held.commit().await.unwrap();
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}
