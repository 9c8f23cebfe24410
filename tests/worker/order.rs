//! G3: events with one key reach each subscriber in order, through retries, crashes and several workers.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Act, Number, Random, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};
use futures_util::StreamExt;

const KEYS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

#[tokio::test(flavor = "multi_thread")]
async fn random_failures_in_sixteen_lanes_change_no_order() {
    let work = Work::shared().await;
    let random = Mutex::new(Random(20));
    let act = move |_: &Delivery<Number>| match random.lock().unwrap().below(8) {
        0 => Act::Fail(HandlerError::retry("told to")),
        1 => Act::Fail(HandlerError::snooze(Duration::from_millis(3))),
        2 => Act::Panic,
        _ => Act::Succeed,
    };
    let subscriber = Subscriber::new("order").on::<Number>(Record::new(act));
    work.send_many(&KEYS, 20).await;
    let worker = work.run(subscriber.concurrency(16).max_attempts(100).backoff(QUICK)).await;
    work.send_many(&["i", "j"], 40).await;
    for n in 0..40 {
        work.put(&work.envelope(None, n)).await;
    }
    work.wait_for(8 * 20 + 2 * 40 + 40).await;
    work.wait_until_acked("order").await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 20).await;
    work.assert_in_order(&["i", "j"], 40).await;
    assert_eq!(work.count().await, 8 * 20 + 2 * 40 + 40);
}

/// A handler that hangs on the third event of key `a` and reports that.
fn hanging(reached: &Arc<AtomicUsize>) -> Record {
    let reached = Arc::clone(reached);
    Record::new(move |delivery| {
        if (delivery.key.as_deref(), delivery.event.n) != (Some("a"), 3) {
            return Act::Succeed;
        }
        reached.fetch_add(1, Ordering::SeqCst);
        Act::Sleep(Duration::from_secs(3600))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_runs_what_was_left_unacked_first() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 10).await;
    let reached = Arc::new(AtomicUsize::new(0));
    let victim = work.run(Subscriber::new("order").on::<Number>(hanging(&reached)).max_batch(1)).await;
    eventually(SOON, "the crash site", async || reached.load(Ordering::SeqCst) > 0).await.unwrap();
    // All others are handled; those of `a` from the third on are delivered, unacked, and wait for 30 seconds.
    work.wait_for(7 * 10 + 2).await;
    drop(victim);
    for n in 11..=15 {
        work.send("a", n).await;
    }
    let crashed = Instant::now();
    let successor = work.run(Subscriber::new("order").on::<Number>(Record::good())).await;
    work.wait_for(7 * 10 + 15).await;
    assert!(crashed.elapsed() < Duration::from_secs(15), "took {:?}", crashed.elapsed());
    work.assert_in_order(&["a"], 15).await;
    work.assert_in_order(&KEYS[1..], 10).await;
    successor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_were_lost_on_the_way_are_read_from_the_stream() {
    lose_messages(&[]).await;
}

/// What comes again has a newer delivery number than what was lost.
#[tokio::test(flavor = "multi_thread")]
async fn messages_lost_between_redeliveries_are_read_too() {
    lose_messages(&["p", "q", "r", "s", "t", "u"]).await;
}

/// Loses messages of the keys `a` and `b`, while the events of other keys come again and again.
async fn lose_messages(again: &'static [&'static str]) {
    let work = Work::shared().await;
    let act = |delivery: &Delivery<Number>| match again.contains(&delivery.key.as_deref().unwrap_or_default()) {
        true => Act::Fail(HandlerError::snooze(Duration::from_millis(5))),
        false => Act::Succeed,
    };
    work.send_many(again, 1).await;
    let worker = work.run(Subscriber::new("order").on::<Number>(Record::new(act))).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    // Another client of the consumer gets some messages and never answers.
    let consumer = work.consumer("order").await;
    let stolen = Arc::new(AtomicUsize::new(0));
    let thief = {
        let stolen = Arc::clone(&stolen);
        let mut messages = consumer.stream().max_messages_per_batch(5).messages().await.unwrap();
        tokio::spawn(async move {
            while messages.next().await.is_some() {
                stolen.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    let started = Instant::now();
    for n in 2..=60 {
        work.send("a", n).await;
        work.send("b", n - 1).await;
        if stolen.load(Ordering::SeqCst) >= 10 {
            thief.abort();
        }
    }
    thief.abort();
    assert!(stolen.load(Ordering::SeqCst) > 0, "nothing was lost, so nothing was tested");
    // The last ones may be among the stolen; what comes after them brings them up.
    eventually(SOON, "all effects", async || {
        work.put(&work.envelope(None, 0)).await;
        work.numbers("a").await.len() + work.numbers("b").await.len() >= 60 + 59
    })
    .await
    .unwrap();
    assert!(started.elapsed() < Duration::from_secs(20), "took {:?}", started.elapsed());
    work.assert_in_order(&["a"], 60).await;
    work.assert_in_order(&["b"], 59).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_that_both_believe_to_be_active_do_no_harm() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 60).await;
    let subscriber = || {
        let slowly =
            |delivery: &Delivery<Number>| Act::Sleep(Duration::from_millis(20 * (delivery.event.n as u64 % 4)));
        Subscriber::new("order").on::<Number>(Record::new(slowly)).max_attempts(3)
    };
    work.run_two_at_once(subscriber, async || work.count().await >= 8 * 60).await;
    work.assert_in_order(&KEYS, 60).await;
    work.assert_nothing_failed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_instance_that_wakes_up_late_does_no_harm() {
    let work = Work::shared().await;
    work.create_apply("perform pg_sleep(0.002);").await;
    let file = "[[subscriber]]\nname = \"frozen\"\ntypes = [\"*\"]\nsql = { function = \"apply\" }\ntime_limit = \"2s\"\nack_wait = \"3s\"\n";
    work.send_many(&KEYS, 100).await;
    let first = work.process(file);
    work.wait_for(50).await;
    let signal = |signal: &str| {
        Command::new("kill").args([signal, &first.0.id().to_string()]).status().unwrap();
    };
    signal("-STOP");
    let frozen_at = work.count().await;
    let second = work.process(file);
    work.wait_for(frozen_at + 100).await;
    signal("-CONT");
    work.wait_for(800).await;
    work.wait_until_acked("frozen").await;
    assert_eq!((first.stop(), second.stop()), (Some(0), Some(0)));
    work.assert_in_order(&KEYS, 100).await;
    work.assert_nothing_failed().await;
}

/// The process dies in the middle of each step; another one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    let work = Work::shared().await;
    work.create_apply("if event -> 'data' ->> 'n' = '7' then raise exception 'seven is refused'; end if;").await;
    let file = "[[subscriber]]\nname = \"steps\"\ntypes = [\"*\"]\nsql = { function = \"apply\" }\n\
                max_attempts = 3\nmax_batch = 4\nbackoff = { first = \"20ms\" }\n";
    work.send_many(&KEYS, 30).await;
    let steps = [
        ("worker-fetched", 1),
        ("worker-fetched", 100),
        ("worker-inserted", 5),
        ("worker-handled", 5),
        ("worker-committed", 1),
        ("worker-committed", 8),
        ("worker-answered", 1),
        ("worker-answered", 6),
        ("worker-failure-counted", 3),
        ("worker-given-up", 2),
    ];
    work.dies_at_each(&steps, file).await;
    let last = work.process(file);
    work.wait_for(8 * 29).await;
    eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 8).await.unwrap();
    for key in KEYS {
        assert_eq!(work.numbers(key).await, (1..=30).filter(|n| *n != 7).collect::<Vec<_>>(), "key {key}");
    }
    assert!(work.dead_letters().await.iter().all(|(n, attempts, _)| *n == 7 && *attempts == 3));
    assert_eq!(last.stop(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_workers_lose_and_repeat_nothing() {
    let work = Work::shared().await;
    let mut random = Random(7);
    let subscriber = || {
        let slowly = |delivery: &Delivery<Number>| Act::Sleep(Duration::from_millis(delivery.event.n as u64 % 3));
        Subscriber::new("order").on::<Number>(Record::new(slowly)).max_batch(10)
    };
    work.send_many(&KEYS, 50).await;
    for round in 0..4 {
        let before = work.count().await;
        let worker = work.run(subscriber()).await;
        eventually(SOON, "some progress", async || work.count().await > before).await.unwrap();
        tokio::time::sleep(Duration::from_millis(random.below(40))).await;
        drop(worker);
        work.send_many(&[["w", "x", "y", "z"][round]], 30).await;
    }
    let worker = work.run(subscriber()).await;
    work.wait_for(8 * 50 + 4 * 30).await;
    work.assert_in_order(&KEYS, 50).await;
    work.assert_in_order(&["w", "x", "y", "z"], 30).await;
    assert_eq!(work.count().await, 8 * 50 + 4 * 30);
    worker.stop().await;
}

/// How long a successor needs until it handles new events, when one event near the beginning is not done and 100,000
/// behind it are.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn measure_take_over() {
    let work = Work::shared().await;
    let mut acks = Vec::new();
    let subject = work.outbox.naming.prefix.subject("test.number");
    for n in 1..=100_000 {
        let event = work.envelope(Some(&format!("k{}", n % 1000)), n);
        let mut headers = async_nats::HeaderMap::new();
        for (name, value) in event.to_headers().iter() {
            headers.append(name.as_ref(), value.as_ref());
        }
        acks.push(work.context.publish_with_headers(subject.clone(), headers, event.payload).await.unwrap());
        if n % 1000 == 0 {
            for ack in acks.drain(..) {
                ack.await.unwrap();
            }
        }
    }
    let hang = |delivery: &Delivery<Number>| match delivery.event.n {
        1 => Act::Fail(HandlerError::snooze(Duration::from_secs(600))),
        _ => Act::Succeed,
    };
    let victim = work.run(Subscriber::new("order").on::<Number>(Record::new(hang))).await;
    let started = Instant::now();
    eventually(Duration::from_secs(300), "the effects", async || work.count().await >= 100_000 - 100).await.unwrap();
    println!("handled {} in {:?}", work.count().await, started.elapsed());
    victim.stop().await;
    for round in 0..3 {
        let before = work.numbers("new").await.len();
        work.send("new", 10 + round).await;
        let started = Instant::now();
        let successor = work.run(Subscriber::new("order").on::<Number>(Record::new(hang))).await;
        eventually(Duration::from_secs(100), "new", async || work.numbers("new").await.len() > before).await.unwrap();
        println!("take-over {:?}", started.elapsed());
        successor.stop().await;
    }
}
