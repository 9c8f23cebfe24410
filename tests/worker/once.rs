//! G4: each event takes effect once per subscriber.

use std::process::Command;
use std::time::Duration;

use crate::support::{Act, Number, Record, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::Subscriber;

#[tokio::test(flavor = "multi_thread")]
async fn events_take_effect_and_are_acked() {
    let work = Work::shared().await;
    let worker = work.run(Subscriber::new("once").on::<Number>(Record::good())).await;
    work.send_many(&["a", "b", "c"], 20).await;
    work.put(&work.envelope(None, 7)).await;
    work.wait_for(61).await;
    work.wait_until_acked("once").await;
    work.assert_in_order(&["a", "b", "c"], 20).await;
    worker.stop().await;
    assert_eq!(work.count().await, 61);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_gets_the_cloud_event_in_the_worker_process() {
    let work = Work::shared().await;
    work.create_apply("").await;
    let file = "[[subscriber]]\nname = \"sql\"\ntypes = [\"*\"]\nsql = { function = \"public.apply\" }\n";
    let process = work.process(file);
    work.send_many(&["a", "b"], 50).await;
    work.wait_for(100).await;
    work.wait_until_acked("sql").await;
    process.kill();
    work.send_many(&["c"], 5).await;
    let process = work.process(file);
    work.wait_for(105).await;
    assert_eq!(process.stop(), Some(0));
    work.assert_in_order(&["a", "b"], 50).await;
    work.assert_in_order(&["c"], 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_twice_in_the_stream_takes_effect_once() {
    let work = Work::shared().await;
    let event = work.envelope(None, 1);
    for _ in 0..5 {
        work.put(&event).await;
    }
    let worker = work.run(Subscriber::new("once").on::<Number>(Record::good())).await;
    work.wait_until_acked("once").await;
    work.put(&event).await;
    work.wait_until_acked("once").await;
    worker.stop().await;
    assert_eq!(work.count().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_event_leaves_no_trace_of_its_attempts() {
    let work = Work::shared().await;
    let act = |delivery: &aftercommit::worker::Delivery<Number>| match (delivery.event.n, delivery.attempt) {
        (3, 1) => Act::Fail(aftercommit::worker::HandlerError::retry("not yet")),
        (5, 1) => Act::Panic,
        (7, 1) => Act::Swallow,
        _ => Act::Succeed,
    };
    work.send_many(&["a", "b"], 10).await;
    let subscriber =
        Subscriber::new("once").on::<Number>(Record::new(act)).backoff(aftercommit::backoff::Backoff::RECONNECT);
    let worker = work.run(subscriber).await;
    work.wait_for(20).await;
    work.assert_in_order(&["a", "b"], 10).await;
    let attempts: Vec<i32> = work.effects().await.into_iter().map(|(_, _, attempt)| attempt).collect();
    assert_eq!(attempts.iter().filter(|attempt| **attempt == 2).count(), 6, "{attempts:?}");
    eventually(SOON, "no attempts on record", async || work.attempts().await.is_empty()).await.unwrap();
    worker.stop().await;
}

/// The worker is frozen for longer than `ack_wait`, again and again, while its handlers are slow: each time everything
/// that was delivered comes again, and signs of life come too late.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_redeliveries_changes_nothing_and_fits_into_memory() {
    const EVENTS: i64 = 800;
    let work = Work::shared().await;
    work.create_apply("perform pg_sleep(0.03);").await;
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    for n in 1..=EVENTS / 8 {
        for key in keys {
            let mut event = work.envelope(Some(key), n);
            event.payload = format!(r#"{{"n": {n}, "padding": "{}"}}"#, "x".repeat(150_000)).into();
            work.put(&event).await;
        }
    }
    let file = "[[subscriber]]\nname = \"storm\"\ntypes = [\"*\"]\nsql = { function = \"apply\" }\nack_wait = \"1s\"\n";
    let process = work.process(file);
    let signal = |signal: &str| {
        Command::new("kill").args([signal, &process.0.id().to_string()]).status().unwrap();
    };
    for _ in 0..3 {
        let before = work.count().await;
        work.wait_for(before + 40).await;
        signal("-STOP");
        tokio::time::sleep(Duration::from_secs(2)).await;
        signal("-CONT");
    }
    work.wait_for(EVENTS).await;
    work.wait_until_acked("storm").await;
    let deliveries = work.consumer("storm").await.cached_info().delivered.consumer_sequence;
    assert!(deliveries > EVENTS.unsigned_abs() + 200, "there was no storm: {deliveries} deliveries");
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    // 64 MiB of payloads and what is on its way; all of them are 120 MB, and each of their redeliveries as much again.
    assert!(peak.unwrap_or(0) < 250_000, "{peak:?} kB at most");
    assert_eq!(process.stop(), Some(0));
    work.assert_in_order(&keys, EVENTS / 8).await;
    assert_eq!(work.count().await, EVENTS);
}
