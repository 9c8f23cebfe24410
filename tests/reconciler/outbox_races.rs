//! The outbox comparison beside relays, writers and other runs, some of which are killed: it accuses nobody of what is
//! still on its way, and repairs nothing twice.

use std::collections::BTreeSet;
use std::time::Duration;

use super::outbox::{
    delete, finding, findings, leg, private, publish, published, ran, reconcile_command, run, shared, times,
};
use crate::support::{Copy, Message, Outbox, Random, RelayProcess, SOON, Writers};
use aftercommit::reconciler::{Mode, OutboxComparison, Outcome, Runner, Scope};
use aftercommit::testing::eventually;

/// No false findings at the edges of windows, while eight writers write and a transaction that began long ago commits
/// between runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_relay_is_never_accused() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    for round in 0..15 {
        let mut late = outbox.pool.begin().await.unwrap();
        sqlx::query("select aftercommit.publish('late', '{}')").execute(&mut *late).await.unwrap();
        writers.more(20).await;
        let scope = if round % 4 == 0 { Scope::Full } else { Scope::New };
        assert_eq!(ran(&outbox, scope, Mode::Repair).await.found, 0, "round {round}");
        late.commit().await.unwrap();
    }
    writers.stop().await;
    published(&outbox).await;
    let summary = ran(&outbox, Scope::New, Mode::Repair).await;
    assert_eq!(summary.found, 0);
    let position: serde_json::Value =
        sqlx::query_scalar("select position from aftercommit.reconciler").fetch_one(&outbox.pool).await.unwrap();
    let last = outbox.messages().await.last().unwrap().sequence;
    assert_eq!(position["new"]["sequence"], last, "it has looked at everything");
    // The late ones have been looked at as well: when one of them is lost, a sweep finds exactly that.
    let messages = outbox.messages().await;
    let late = messages.iter().find(|message| message.headers["ce-type"] == "late").unwrap();
    delete(&outbox, [late.sequence]).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 1);
    relay.stop().await.unwrap();
}

/// Messages are removed, runs and relays are killed at every step, and a run races another one and busy writers: in the
/// end every event is there, and repaired no more often than it was removed.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_and_raced() {
    let outbox = shared().await;
    let relay = outbox.relay_process();
    let writers = Writers::start(&outbox.pool, 2, 10).await;
    writers.more(150).await;
    let mut random = Random(7);
    let mut removed = BTreeSet::new();
    let mut relay = Some(relay);
    for fault in [
        "reconciler-begun:1",
        "reconciler-outbox-read:1",
        "reconciler-outbox-compared:1",
        "reconciler-outbox-queued:1",
        "reconciler-outbox-found:1",
        "reconciler-outbox-chunk:1",
        "reconciler-outbox-waits:1",
        "reconciler-done:1",
        "reconciler-recorded:1",
        "relay-repair-published:1",
        "relay-repair-recorded:1",
        "relay-sent:4",
    ] {
        let messages = outbox.messages().await;
        let victims: BTreeSet<u64> =
            (0..5).map(|_| messages[random.below(messages.len() as u64 - 1) as usize].sequence).collect();
        let of = |message: &&Message| victims.contains(&message.sequence);
        removed.extend(messages.iter().filter(of).map(|message| message.headers["ce-id"].clone()));
        delete(&outbox, victims).await;
        if fault.starts_with("relay") {
            outbox.kill(relay.take().unwrap()).await;
            ran_without_relay(&outbox).await;
            outbox.dies_at(fault).await;
            relay = Some(outbox.relay_process());
        } else {
            let mut command = reconcile_command(&outbox, &["--comparison", "outbox", "--full"]);
            let status = command.env("AFTERCOMMIT_FAULT", fault).env("RUST_LOG", "off").status().unwrap();
            assert!(!status.success(), "it was to die at {fault}");
            outbox.expire_leases().await;
        }
        let (one, other) =
            tokio::join!(run(&outbox, Scope::Full, Mode::Repair), run(&outbox, Scope::Full, Mode::Repair));
        assert_eq!((one.outcome, other.outcome), (Outcome::Ran, Outcome::Ran), "after {fault}");
        writers.more(10).await;
    }
    writers.stop().await;
    everything_is_settled(&outbox).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
    let times = times(&outbox.messages().await);
    let committed = outbox.committed().await;
    let lost: Vec<&String> = committed.iter().filter(|id| !times.contains_key(*id)).collect();
    let twice: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert!(lost.is_empty() && twice.is_empty(), "lost {lost:?}, twice {twice:?}");
    let found: Vec<(String, String, String)> =
        sqlx::query_as("select kind, state, item from aftercommit.finding").fetch_all(&outbox.pool).await.unwrap();
    let expected = removed.into_iter().map(|id| ("missing_from_stream".to_string(), "repaired".to_string(), id));
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected.collect(), "each repair is on record");
    drop(relay);
}

/// Waits until everything that was committed is published.
async fn everything_is_settled(outbox: &Outbox) {
    eventually(SOON, "everything is published", async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from aftercommit.outbox where id > (select settled_id from aftercommit.relay_log order by seq desc limit 1)",
        )
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
        waiting == 0
    })
    .await
    .unwrap();
    outbox.settled().await;
}

/// Queues what is missing while no relay leads.
async fn ran_without_relay(outbox: &Outbox) {
    let job = Runner::new(outbox.postgres.clone()).comparison(OutboxComparison {
        interval: Duration::from_millis(1),
        full_every: Some(Duration::from_millis(1)),
        mode: Mode::Repair,
        ..leg(outbox)
    });
    eventually(SOON, "a scheduled run queues repairs", async || {
        _ = job.run_if_due("outbox").await.unwrap();
        let queued: i64 = sqlx::query_scalar("select count(*) from aftercommit.repair where state = 'queued'")
            .fetch_one(&outbox.pool)
            .await
            .unwrap();
        queued > 0
    })
    .await
    .unwrap();
}

/// A stream that has lost its end is the relay's work. A run beside it reports nothing that the relay publishes anyway.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_end_is_left_to_the_relay() {
    let (mut nats, outbox) = private().await;
    outbox.forget_message_ids().await;
    let relay = outbox.relay();
    for part in 0..3 {
        publish(&outbox, part * 100..part * 100 + 100).await;
        published(&outbox).await;
    }
    ran(&outbox, Scope::New, Mode::Repair).await;
    nats.stop().await.unwrap();
    let copy = Copy::of(&nats.store_directory());
    nats.restart().await.unwrap();
    publish(&outbox, 300..400).await;
    published(&outbox).await;
    ran(&outbox, Scope::New, Mode::Repair).await;
    relay.stop().await.unwrap();
    nats.stop().await.unwrap();
    copy.replace(&nats.store_directory());
    nats.restart().await.unwrap();
    let refused = run(&outbox, Scope::Full, Mode::Repair).await;
    assert!(matches!(&refused.outcome, Outcome::Failed(reason) if reason.contains("does not end where")), "{refused}");
    let relay = outbox.relay();
    eventually(SOON, "a run comes to its end", async || {
        run(&outbox, Scope::New, Mode::Repair).await.outcome == Outcome::Ran
    })
    .await
    .unwrap();
    published(&outbox).await;
    let summary = ran(&outbox, Scope::New, Mode::Repair).await;
    assert_eq!(summary.found, 0);
    // It went back with the relay: what came again is compared again.
    delete(&outbox, [350]).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.repaired, 1);
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// What a run has reported, and the relay has published again since because the stream lost its end, is not repaired as well.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_relay_has_published_again_is_not_repaired_as_well() {
    let (mut nats, outbox) = private().await;
    outbox.forget_message_ids().await;
    let relay = outbox.relay();
    publish(&outbox, 0..100).await;
    published(&outbox).await;
    delete(&outbox, [50]).await;
    nats.stop().await.unwrap();
    let copy = Copy::of(&nats.store_directory());
    nats.restart().await.unwrap();
    publish(&outbox, 100..200).await;
    eventually(SOON, "all but one are there", async || outbox.stored().await == 199).await.unwrap();
    outbox.settled().await;
    delete(&outbox, [150, 160]).await;
    assert_eq!(ran(&outbox, Scope::Full, Mode::Report).await.found, 3);
    relay.stop().await.unwrap();
    nats.stop().await.unwrap();
    copy.replace(&nats.store_directory());
    nats.restart().await.unwrap();
    let relay = outbox.relay();
    eventually(SOON, "the end is there again", async || outbox.stored().await == 199).await.unwrap();
    outbox.settled().await;
    assert_eq!(ran(&outbox, Scope::New, Mode::Repair).await.repaired, 1, "the one that was lost before");
    outbox.assert_complete().await;
    let missing = |state: &str, id| finding("missing_from_stream", state, id);
    assert_eq!(findings(&outbox).await, [missing("repaired", 50), missing("gone", 150), missing("gone", 160)]);
    relay.stop().await.unwrap();
}

/// Two processes at a time are killed at any moment, while messages go and a relay is busy: what is gone comes back once.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment() {
    let outbox = shared().await;
    let _relay = outbox.relay_process();
    let writers = Writers::start(&outbox.pool, 2, 10).await;
    writers.more(200).await;
    let mut random = Random(11);
    for _ in 0..12 {
        let messages = outbox.messages().await;
        let victims: BTreeSet<u64> =
            (0..5).map(|_| messages[random.below(messages.len() as u64 - 1) as usize].sequence).collect();
        delete(&outbox, victims).await;
        let start = || {
            let mut command = reconcile_command(&outbox, &["--comparison", "outbox", "--full"]);
            RelayProcess(command.env("RUST_LOG", "off").stdout(std::process::Stdio::null()).spawn().unwrap())
        };
        let mut processes = [start(), start()];
        for process in &mut processes {
            tokio::time::sleep(Duration::from_millis(random.below(400))).await;
            process.kill();
        }
        writers.more(5).await;
    }
    writers.stop().await;
    everything_is_settled(&outbox).await;
    ran(&outbox, Scope::Full, Mode::Repair).await;
    let times = times(&outbox.messages().await);
    let committed = outbox.committed().await;
    let wrong: Vec<&String> = committed.iter().filter(|id| times.get(*id) != Some(&1)).collect();
    assert!(wrong.is_empty(), "lost or twice: {wrong:?}");
    assert_eq!(ran(&outbox, Scope::Full, Mode::Repair).await.found, 0);
}
