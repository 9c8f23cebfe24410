//! Power cuts under nats-server: what it acknowledged and had not synced is gone. Each arm is a test of its own, so that
//! it can be run alone; `scripts/power-cut` runs them many times.

use std::io::{BufRead, BufReader};
use std::panic::AssertUnwindSafe;
use std::process::{Command, Stdio};

use aftercommit::relay::PublishMethod;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions};
use async_nats::jetstream::{self, stream::Config};
use chrono::Utc;
use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use super::disks::Disk;
use super::support::{SOON, Scenario, Writers};

/// What a server lost of what it had acknowledged when its power was cut twice, and what the reconcilers found of that.
struct Losses {
    messages: usize,
    findings: Vec<(String, String, i64)>,
}

/// Power is cut under a busy system, while the worker runs and while it is behind. In the end everything that was
/// committed is in the stream and took effect once, the keys in order. None where no disk can be mounted. A failure tells
/// what the system had come to.
async fn survives_power_cuts(sync_interval: &str, publish: PublishMethod) -> Option<Losses> {
    let arm = format!("{}, {publish:?}", if sync_interval.is_empty() { "default sync" } else { sync_interval });
    let options = NatsOptions { jetstream: sync_interval.into(), ..NatsOptions::default() };
    let mut nats = Nats::start(options).await.unwrap();
    nats.stop().await.unwrap();
    let disk = Disk::in_file(&nats.store_directory(), 64)?;
    nats.restart().await.unwrap();
    let arm = format!("{arm}, nats-server {}", nats.version());
    let mut system = Scenario::on(nats, publish).await;
    let losses = match AssertUnwindSafe(cut_twice(&mut system, &disk)).catch_unwind().await {
        Ok(losses) => losses,
        Err(panic) => {
            println!("FAILED: {arm}\n{}", system.story().await);
            std::panic::resume_unwind(panic);
        }
    };
    println!("{arm}: {} acknowledged messages lost; {:?}", losses.messages, losses.findings);
    Some(losses)
}

async fn cut_twice(system: &mut Scenario, disk: &Disk) -> Losses {
    let stop = CancellationToken::new();
    let reconcilers = system.reconcilers().map(|runner| tokio::spawn(runner.run(stop.clone())));
    let mut messages = 0;
    for behind in [false, true] {
        let writers = Writers::start(&system.outbox.pool, 4, 6).await;
        writers.more(100).await;
        disk.sync();
        if behind {
            system.stop_worker().await;
        }
        let synced = system.acknowledged();
        writers.more(200).await;
        let more = async || system.acknowledged() >= synced + 50;
        eventually(SOON, "the server acknowledges what is not on the disk", more).await.unwrap();
        disk.cut(&mut system.nats).await;
        let (cut, acknowledged) = (Utc::now(), system.acknowledged());
        writers.more(50).await;
        system.nats.restart().await.unwrap();
        // What the server had not synced may be the consumer's definition, too; the worker says so and waits for an operator.
        system.provision().await;
        writers.more(50).await;
        writers.stop().await;
        system.published().await;
        // What was lost was stored again.
        let stored = system.outbox.timed_messages().await;
        let before = stored.iter().take(usize::try_from(acknowledged).unwrap());
        messages += before.filter(|(_, stored)| *stored > cut).count();
        if behind {
            system.start_worker();
        }
    }
    system.outbox.assert_complete().await;
    system.handled_in_order().await;
    stop.cancel();
    for reconciler in reconcilers {
        reconciler.await.unwrap().unwrap();
    }
    let findings = [system.outbox_findings().await, system.books_findings().await].concat();
    system.nothing_is_left().await;
    Losses { messages, findings }
}

/// A power cut is of one moment only if nothing is written after the server was halted.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_waits_for_its_disk_is_halted() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    nats.stop().await.unwrap();
    let Some(_) = Disk::in_file(&nats.store_directory(), 64) else { return };
    nats.restart().await.unwrap();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    context
        .create_stream(Config { name: "LATE".into(), subjects: vec!["late".into()], ..Config::default() })
        .await
        .unwrap();
    let directory = nats.store_directory().with_file_name("");
    let shell = |script: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(&directory).current_dir(nats.store_directory()).stdout(Stdio::piped());
        shell.spawn().unwrap()
    };
    // The disk answers when the first thread has stopped, and some time in any case: a process that waits for a disk
    // cannot be killed.
    let mut frozen = shell(
        r#"fsfreeze --freeze . && echo frozen
           until grep -q '^State:.T' /proc/$(cat "$0/pid")/task/*/status || [ $((tries += 1)) -gt 300 ]; do sleep 0.1; done
           touch "$0/answers"; fsfreeze --unfreeze ."#,
    );
    let mut said = String::new();
    BufReader::new(frozen.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "frozen\n");
    let acknowledged = context.publish("late", "1".into()).await.unwrap();
    eventually(SOON, "a thread waits for the disk", async || {
        let states = shell(r#"cat /proc/$(cat "$0/pid")/task/*/stat"#).wait_with_output().unwrap().stdout;
        String::from_utf8_lossy(&states).contains(") D ")
    })
    .await
    .unwrap();
    nats.pause().unwrap();
    assert!(directory.join("answers").exists(), "it was halted before the disk answered");
    nats.resume().unwrap();
    acknowledged.await.unwrap();
    frozen.wait().unwrap();
}

/// By default nats-server syncs its files every two minutes.
async fn costs_what_was_not_synced(publish: PublishMethod) {
    let Some(lost) = survives_power_cuts("", publish).await else { return };
    assert!(lost.messages > 0, "a power cut that costs nothing proves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn power_is_cut_with_default_sync_chained() {
    costs_what_was_not_synced(PublishMethod::Chained).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_is_cut_with_default_sync_batched() {
    costs_what_was_not_synced(PublishMethod::Batched).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_is_cut_with_sync_every_two_seconds_chained() {
    survives_power_cuts("sync_interval: 2s", PublishMethod::Chained).await;
}

async fn costs_nothing_that_was_acknowledged(publish: PublishMethod) {
    if let Some(lost) = survives_power_cuts("sync_interval: always", publish).await {
        assert_eq!((lost.messages, lost.findings), (0, vec![]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn power_is_cut_with_sync_always_chained() {
    costs_nothing_that_was_acknowledged(PublishMethod::Chained).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_is_cut_with_sync_always_batched() {
    costs_nothing_that_was_acknowledged(PublishMethod::Batched).await;
}
