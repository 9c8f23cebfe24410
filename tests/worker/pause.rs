//! Pausing a subscriber, and all of them: it takes hold soon, loses nothing, costs no attempt, survives restarts, and
//! resumes in order.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Act, Number, Record, RunningWorker, SOON, Work};
use aftercommit::operator::Pausing;
use aftercommit::operator::worker::{Which, pause, resume};
use aftercommit::testing::eventually;
use aftercommit::worker::{Subscriber, Worker};

const KEYS: [&str; 4] = ["a", "b", "c", "d"];
const RECEIPTS: Which<'_> = Which::Subscriber("receipts");

fn receipts() -> Subscriber {
    Subscriber::new("receipts").on::<Number>(Record::good()).max_batch(3)
}

/// Nothing more takes effect, and JetStream has everything back.
async fn wait_until_still(work: &Work) -> i64 {
    let (mut last, mut since) = (work.count().await, Instant::now());
    eventually(SOON, "the subscriber is still", async || {
        let now = work.count().await;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(3)
    })
    .await
    .unwrap();
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_under_load_and_a_resume_lose_nothing_and_keep_the_order() {
    let work = Work::shared().await;
    // Three seconds of work.
    let slow = Record::new(|_| Act::Sleep(Duration::from_millis(30)));
    let worker = work.run(Subscriber::new("receipts").on::<Number>(slow).max_batch(3)).await;
    let ((), paused) = tokio::join!(work.send_many(&KEYS, 100), async {
        work.wait_for(20).await;
        pause(&work.outbox.postgres, RECEIPTS, "me", Some("load")).await.unwrap()
    });
    assert_eq!(paused, Pausing::Paused);
    let before = wait_until_still(&work).await;
    assert!(before < 400, "it was paused under load: {before}");
    work.send_many(&["e"], 10).await;
    assert_eq!(work.count().await, before);
    assert_eq!(pause(&work.outbox.postgres, RECEIPTS, "me", None).await.unwrap(), Pausing::Unchanged);

    assert!(resume(&work.outbox.postgres, RECEIPTS, "me").await.unwrap().changed);
    work.wait_for(410).await;
    work.assert_in_order(&KEYS, 100).await;
    work.assert_in_order(&["e"], 10).await;
    work.assert_nothing_failed().await;
    work.wait_until_acked("receipts").await;
    worker.stop().await;
}

/// What runs may finish, what waits for its next attempt goes back, and its attempts are not counted anew.
#[tokio::test(flavor = "multi_thread")]
async fn what_runs_finishes_and_nothing_costs_an_attempt() {
    let work = Work::shared().await;
    let record = Record::new(|delivery| match (delivery.event.n, delivery.attempt) {
        (1, _) => Act::Sleep(Duration::from_secs(4)),
        (2, 1) => Act::Fail(aftercommit::worker::HandlerError::retry_after(Duration::from_millis(100), "once")),
        _ => Act::Succeed,
    });
    let worker = work.run(Subscriber::new("receipts").on::<Number>(record).max_attempts(2)).await;
    work.send("slow", 1).await;
    eventually(SOON, "the slow handler runs", async || {
        let running = "select count(*) from pg_stat_activity where datname = current_database() and state = 'idle in transaction'";
        sqlx::query_scalar::<_, i64>(running).fetch_one(&work.outbox.pool).await.unwrap() == 1
    })
    .await
    .unwrap();
    pause(&work.outbox.postgres, RECEIPTS, "me", None).await.unwrap();
    work.wait_for(1).await;
    work.send("failing", 2).await;
    assert_eq!(wait_until_still(&work).await, 1);
    for _ in 0..3 {
        resume(&work.outbox.postgres, RECEIPTS, "me").await.unwrap();
        pause(&work.outbox.postgres, RECEIPTS, "me", None).await.unwrap();
    }
    resume(&work.outbox.postgres, RECEIPTS, "me").await.unwrap();
    work.wait_for(2).await;
    assert_eq!(work.effects().await, [(Some("slow".into()), 1, 1), (Some("failing".into()), 2, 2)]);
    assert_eq!(work.dead_letters().await, []);
    worker.stop().await;
}

/// Nothing is held hostage: while it is paused, no message is in flight in a way that keeps it from others for long, and
/// JetStream's redelivery after `ack_wait` makes nothing run.
#[tokio::test(flavor = "multi_thread")]
async fn a_redelivery_during_a_pause_waits_and_runs_in_order() {
    let work = Work::shared().await;
    let subscriber = || receipts().ack_wait(Duration::from_secs(1));
    let worker = work.worker_with(subscriber());
    worker.provision().await.unwrap();
    work.send_many(&KEYS, 5).await;
    // A predecessor took some and died.
    let mut taken = work.consumer("receipts").await.fetch().max_messages(7).messages().await.unwrap();
    let mut numbers = 0;
    while let Some(message) = futures_util::StreamExt::next(&mut taken).await {
        message.unwrap();
        numbers += 1;
    }
    assert_eq!(numbers, 7);
    // No worker of this database has served it yet.
    assert!(pause(&work.outbox.postgres, RECEIPTS, "me", None).await.is_err());
    pause(&work.outbox.postgres, Which::Ahead("receipts"), "me", None).await.unwrap();
    let worker = RunningWorker::start(worker);
    assert_eq!(wait_until_still(&work).await, 0);
    let info = work.consumer("receipts").await;
    assert_eq!(info.cached_info().num_waiting, 0, "a paused worker asks for nothing");
    resume(&work.outbox.postgres, RECEIPTS, "me").await.unwrap();
    work.wait_for(20).await;
    work.assert_in_order(&KEYS, 5).await;
    work.wait_until_acked("receipts").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_survives_a_restart_and_a_change_of_hands() {
    let work = Work::shared().await;
    let first = work.run(receipts()).await;
    work.send_many(&KEYS, 5).await;
    work.wait_for(20).await;
    pause(&work.outbox.postgres, RECEIPTS, "me", Some("maintenance")).await.unwrap();
    wait_until_still(&work).await;
    drop(first);
    let worker = work.worker_with(receipts());
    let monitor = worker.monitor();
    let second = RunningWorker::start(worker);
    let text = "paused by me: maintenance, 4 events waiting";
    for key in KEYS {
        work.send(key, 6).await;
    }
    let mut report = None;
    eventually(SOON, "the second one is paused and says so", async || {
        report = monitor.report().subscribers.pop();
        report.as_ref().is_some_and(|report| report.healthy && report.active && report.health == text)
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {report:?}"));
    assert_eq!(work.count().await, 20);
    resume(&work.outbox.postgres, RECEIPTS, "me").await.unwrap();
    work.wait_for(24).await;
    work.assert_in_order(&KEYS, 6).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kill_switch_holds_all_subscribers_whatever_is_resumed() {
    let work = Work::shared().await;
    let other = Subscriber::new("reports").on::<Number>(Record::good());
    let worker = work.worker_with(receipts()).subscriber(other);
    worker.provision().await.unwrap();
    let monitor = worker.monitor();
    let worker = RunningWorker::start(worker);
    work.send("a", 1).await;
    work.wait_for(2).await;

    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command
            .arg("worker")
            .args(arguments)
            .env("DATABASE_URL", &work.outbox.postgres.url)
            .env("AFTERCOMMIT_OPERATOR", "jane");
        let output = command.output().unwrap();
        let said = if output.status.success() { output.stdout } else { output.stderr };
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    let done = |text: &str| (Some(0), text.to_string());
    let all = "paused; `aftercommit worker resume --all` goes on\n";
    assert_eq!(run(&["pause", "--all", "--reason", "fire"]), done(all));
    let pause = ["pause", "--subscriber", "receipts"];
    assert_eq!(run(&pause), done("paused; `aftercommit worker resume --subscriber receipts` goes on\n"));
    assert_eq!(run(&pause), done("it was paused already\n"));
    assert_eq!(
        run(&[&pause[..], &["--reason", "smoke"]].concat()),
        done("it was paused already; the reason was changed\n")
    );
    let reason = "select paused_by || ': ' || reason from aftercommit.pause where name = 'subscriber:receipts'";
    let reason: String = sqlx::query_scalar(reason).fetch_one(&work.outbox.pool).await.unwrap();
    assert_eq!(reason, "jane: smoke");
    let (status, unknown) = run(&["pause", "--subscriber", "receipt"]);
    assert!(status == Some(1) && unknown.contains("no worker has ever served subscriber receipt"), "{unknown}");
    let ahead = ["pause", "--subscriber", "later", "--ahead"];
    assert_eq!(run(&ahead), done("paused; `aftercommit worker resume --subscriber later` goes on\n"));
    let audited: Vec<String> = sqlx::query_scalar(
        "select concat_ws(' ', who, action, subscriber, detail ->> 'reason') from aftercommit.audit order by id",
    )
    .fetch_all(&work.outbox.pool)
    .await
    .unwrap();
    let acts = [
        "jane worker pause fire",
        "jane worker pause receipts",
        "jane worker pause receipts smoke",
        "jane worker pause later",
    ];
    assert_eq!(audited, acts, "what changed nothing is no act");
    assert_eq!(run(&["pause"]).0, Some(2));
    assert_eq!(run(&["pause", "--all", "--subscriber", "receipts"]).0, Some(2));
    assert_eq!(run(&["pause", "--subscriber", "*"]).0, Some(2));

    eventually(SOON, "both are paused", async || {
        monitor.report().subscribers.iter().all(|report| report.health.starts_with("paused"))
    })
    .await
    .unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("status")
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .env("NATS_URL", &work.outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
        .output()
        .unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    for line in ["\npaused       subscriber:* since ", " by jane: fire\n", "\npaused       subscriber:receipts since "]
    {
        assert!(status.contains(line), "{status}");
    }
    work.send("a", 2).await;
    let resume = ["resume", "--subscriber", "receipts"];
    let held = "resumed\nall subscribers are paused, this one too: `aftercommit worker resume --all`\n";
    assert_eq!(run(&resume), done(held));
    assert_eq!(wait_until_still(&work).await, 2, "the kill switch holds");
    run(&pause);
    assert_eq!(run(&["resume", "--all"]), done("resumed\nstill paused by themselves: later, receipts\n"));
    work.wait_for(3).await;
    assert_eq!(wait_until_still(&work).await, 3, "receipts is paused by itself");
    assert_eq!(run(&resume), done("resumed\n"));
    assert_eq!(run(&resume), done("it was not paused\n"));
    work.wait_for(4).await;
    worker.stop().await;
}

/// A pause that cannot be read is no permission to work.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_may_not_look_for_a_pause_does_not_work() {
    let work = Work::shared().await;
    let worker: Worker = work.worker_with(receipts());
    worker.provision().await.unwrap();
    sqlx::raw_sql("alter table aftercommit.pause rename to hidden").execute(&work.outbox.pool).await.unwrap();
    work.send("a", 1).await;
    let monitor = worker.monitor();
    let worker = RunningWorker::start(worker.unhealthy_after(Duration::from_secs(1)));
    eventually(SOON, "it says what is missing", async || {
        monitor.report().subscribers.first().is_some_and(|report| report.health.contains("aftercommit.pause"))
    })
    .await
    .unwrap();
    assert_eq!(work.count().await, 0);
    sqlx::raw_sql("alter table aftercommit.hidden rename to pause").execute(&work.outbox.pool).await.unwrap();
    work.wait_for(1).await;
    worker.stop().await;
}
