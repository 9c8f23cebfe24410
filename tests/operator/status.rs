//! G5: what `aftercommit status` says of the backlog, the relay, the stream and the subscribers.

use std::process::Command;

use crate::support::{Act, Number, Outbox, Record, SOON, Work};
use aftercommit::operator;
use aftercommit::operator::status::{Status, SubscriberStatus};
use aftercommit::testing::eventually;
use aftercommit::worker::{HandlerError, Subscriber};

async fn status(outbox: &Outbox) -> Status {
    operator::status::status(&outbox.postgres, &outbox.nats, &outbox.naming).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_is_counted_until_it_is_in_the_stream() {
    let outbox = Work::shared().await.outbox;
    let before = status(&outbox).await;
    assert_eq!((before.backlog.events, before.backlog.oldest_seconds), (0, None), "nothing waits, so nothing is old");
    assert_eq!(before.relay, None);
    for _ in 0..3 {
        outbox.publish("a", "{}", None).await;
    }
    let waiting = status(&outbox).await;
    assert_eq!(waiting.backlog.events, 3);
    assert!(waiting.backlog.oldest_seconds.is_some_and(|age| age > 0.0 && age < 60.0), "{:?}", waiting.backlog);
    let relay = outbox.relay();
    eventually(SOON, "the leader says how far it is", async || {
        let now = status(&outbox).await;
        now.backlog.events == 0 && now.relay.is_some_and(|relay| relay.last_outbox_id == Some(3))
    })
    .await
    .unwrap();
    let after = status(&outbox).await;
    assert_eq!(after.backlog.oldest_seconds, None);
    let (relay_status, stream) = (after.relay.unwrap(), after.stream.unwrap());
    assert_eq!((relay_status.alive, relay_status.epoch, relay_status.last_stream_sequence), (true, 1, Some(3)));
    assert_eq!((stream.messages, stream.first_stream_sequence, stream.last_stream_sequence), (3, 1, 3));
    relay.stop().await.unwrap();
    assert!(!status(&outbox).await.relay.unwrap().alive, "its lease is given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_show_what_waits_what_runs_and_what_was_given_up() {
    let work = Work::shared().await;
    let reject = Record::new(|delivery| match delivery.event.n {
        1 => Act::Fail(HandlerError::reject("no")),
        2 => Act::Fail(HandlerError::retry("not yet")),
        _ => Act::Succeed,
    });
    work.worker_with(Subscriber::new("idle").on::<Number>(Record::good())).provision().await.unwrap();
    work.send_many(&["a"], 3).await;
    let worker = work.run(Subscriber::new("busy").on::<Number>(reject)).await;
    let numbers =
        |one: &SubscriberStatus| (one.has_consumer, one.pending, one.in_flight, one.failing, one.dead_letters);
    // The first is a dead letter, the second waits for its next attempt, the third behind it. Of the other one this database
    // knows nothing.
    eventually(SOON, "the subscribers' numbers", async || {
        let subscribers = status(&work.outbox).await.subscribers;
        let (busy, idle) = (&subscribers["busy"], &subscribers["idle"]);
        let known = busy.active.is_some() && busy.active_since.is_some() && busy.ready == Some(true);
        known
            && numbers(busy) == (Some(true), Some(0), Some(2), Some(1), Some(1))
            && numbers(idle) == (Some(true), Some(3), Some(0), None, None)
    })
    .await
    .unwrap();
    let busy = &status(&work.outbox).await.subscribers["busy"];
    let (failure, letter) = (busy.last_failure.clone().unwrap(), busy.last_dead_letter.clone().unwrap());
    assert_eq!((failure.attempts, failure.max_attempts, failure.error.as_str()), (1, Some(10), "not yet"));
    assert!(failure.next_attempt_at.is_some_and(|next| next > failure.at), "{failure:?}");
    assert_eq!(letter.reason, "no");
    assert!(busy.oldest_seconds.is_some_and(|age| age > 0.0 && age < 60.0), "{busy:?}");
    worker.stop().await;
    assert_eq!(status(&work.outbox).await.subscribers["busy"].active, None, "it has given up its lease");
    // What an operator does to them.
    sqlx::query("insert into aftercommit.pause (name) values ('subscriber:busy')")
        .execute(&work.outbox.pool)
        .await
        .unwrap();
    let filter = aftercommit::operator::dead::Filter { all: true, ..Default::default() };
    operator::dead::retry(&work.outbox.postgres, "test", &filter).await.unwrap();
    let subscribers = status(&work.outbox).await.subscribers;
    let busy = &subscribers["busy"];
    assert_eq!((busy.paused, busy.failing, busy.redrive, busy.dead_letters), (true, Some(1), Some(1), Some(0)));
    assert!(!subscribers["idle"].paused);
    sqlx::query("insert into aftercommit.pause (name) values ('subscriber:*')")
        .execute(&work.outbox.pool)
        .await
        .unwrap();
    assert!(status(&work.outbox).await.subscribers["busy"].paused);

    let program = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
            .arg("status")
            .args(arguments)
            .env("DATABASE_URL", &work.outbox.postgres.url)
            .env("NATS_URL", &work.outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", work.outbox.naming.prefix.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = program(&[]);
    assert!(text.starts_with("NOT WELL: ") && text.contains("\nbacklog      0 events to publish\n"), "{text}");
    assert!(text.contains("active worker\nbusy ") && text.contains("none, paused\nidle"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&program(&["--json"])).unwrap();
    assert_eq!(json["subscribers"]["idle"]["pending"], 3, "{json}");
    assert_eq!(json["subscribers"]["busy"]["redrive"], 1, "{json}");
    assert_eq!(json["backlog"]["oldest_seconds"], serde_json::Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_nats_it_shows_what_the_database_knows() {
    let mut outbox = Work::shared().await.outbox;
    outbox.publish("a", "{}", None).await;
    outbox.nats.url = "nats://127.0.0.1:9".into();
    let status = status(&outbox).await;
    assert_eq!(status.backlog.events, 1);
    assert!(status.stream.is_none() && status.stream_error.is_some());
}
