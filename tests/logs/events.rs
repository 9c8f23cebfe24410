//! The log lines of one event, from its publisher to its subscriber, are found by its id.

use std::time::Duration;

use crate::log::Log;
use crate::support::{Act, Number, Record, Work};
use aftercommit::outbox;
use aftercommit::worker::{HandlerError, Subscriber};

/// One that is tried twice, one that is given up, and that no line of one names the other.
#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_an_event_is_found_by_its_id() {
    let log = Log::start();
    let work = Work::shared().await;
    let act = |number: &aftercommit::worker::Delivery<Number>| match (number.event.n, number.attempt) {
        (1, 1) => Act::Fail(HandlerError::retry_after(Duration::ZERO, "not at first")),
        (2, _) => Act::Fail(HandlerError::reject("never")),
        _ => Act::Succeed,
    };
    let worker = work.run(Subscriber::new("logged").on::<Number>(Record::new(act))).await;
    let relay = work.outbox.relay();
    let mut tx = work.outbox.pool.begin().await.unwrap();
    let numbers = [1, 2, 3].map(|n| Number { key: Some("key-secret".into()), n });
    let ids = outbox::publish_all(&mut tx, &numbers).await.unwrap();
    tx.commit().await.unwrap();
    work.wait_for(2).await;
    work.wait_until_acked("logged").await;
    worker.stop().await;
    relay.stop().await.unwrap();

    let find = |n: usize, parts: &[&str]| {
        let lines = log.lines(&ids[n - 1].to_string());
        let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "no line of {n} with {parts:?}: {lines:#?}");
    };
    let stream = format!("stream=\"{}\"", work.outbox.naming.stream);
    for n in 1..=3 {
        find(n, &["DEBUG", "event written to the outbox", "event_type=\"test.number\""]);
        find(n, &["DEBUG", "event published", &stream, &format!("sequence={n}"), "outbox_id="]);
    }
    for (n, attempt, outcome) in [(1, 1, "retry"), (1, 2, "ok"), (2, 1, "reject"), (3, 1, "ok")] {
        let run = ["subscriber=\"logged\"".to_string(), format!("attempt={attempt}"), "delivery_count=".into()];
        let run = Vec::from_iter(run.iter().map(String::as_str));
        find(n, &[&run[..], &["DEBUG", "handler starts"]].concat());
        find(n, &[&run[..], &["DEBUG", "handler ended", &format!("outcome=\"{outcome}\""), "latency_ms="]].concat());
    }
    find(1, &["WARN", "event failed", "subscriber=\"logged\"", "attempt=1", "error=\"not at first\""]);
    find(2, &["ERROR", "event became a dead letter", "subscriber=\"logged\"", "error=\"never\""]);
    for (n, id) in ids.iter().enumerate() {
        for line in log.lines(&id.to_string()) {
            assert!(!line.contains("key-secret"), "{line}");
            let other = ids.iter().enumerate().find(|(other, id)| *other != n && line.contains(&id.to_string()));
            assert_eq!(other, None, "{line}");
        }
    }
}
