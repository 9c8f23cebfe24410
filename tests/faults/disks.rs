//! Disks that are full, and disks whose power is cut.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::admin;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::Subscriber;
use async_nats::jetstream::stream::Config;
use sqlx::{AssertSqlSafe, PgPool};

use super::scenarios::{complaint, publish, relay};
use super::support::{Outbox, Record, SOON, Work, get, metric};

/// A small disk, which is there until it is dropped.
struct Disk(PathBuf);

impl Disk {
    /// None where nothing may be mounted.
    fn mount(place: &Path, megabytes: u32) -> Option<Self> {
        let options = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(place).stderr(Stdio::null());
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Self(place.to_path_buf()));
        }
        println!("SKIPPED: only root may mount a small disk");
        None
    }

    /// Takes all the room that is left, until the file is removed.
    fn fill(&self) -> PathBuf {
        let ballast = self.0.join("ballast");
        let mut fill = Command::new("dd");
        fill.args(["if=/dev/zero", "bs=4k"]).arg(format!("of={}", ballast.display())).stderr(Stdio::null());
        fill.status().unwrap();
        ballast
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// How often publishing was interrupted, by class.
async fn interruptions(outbox: &Outbox, address: &str, class: &str) -> f64 {
    let metrics = get(address, "/metrics").await.unwrap().1;
    let stream = &outbox.naming.stream;
    let name = format!("aftercommit_relay_interruptions_total{{stream=\"{stream}\",class=\"{class}\"}}");
    metric(&metrics, &name).unwrap_or(0.0)
}

/// The relay named `words` as the cause, in health and in its log, and the class of the metric is that of a lack of room.
async fn assert_cause_named(outbox: &Outbox, address: &str, log: &Path, words: &[&str]) {
    complaint(address, words).await;
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} are not in: {log}");
    assert!(!log.contains("another writer"), "{log}");
    assert!(interruptions(outbox, address, "back_pressure").await > 0.0);
    assert_eq!(interruptions(outbox, address, "fenced").await, 0.0);
}

async fn nats_waits_for_room(version: Option<&str>) {
    let mut nats = Nats::start(NatsOptions { version: version.map(Into::into), ..Default::default() }).await.unwrap();
    nats.stop().await.unwrap();
    let Some(disk) = Disk::mount(&nats.store_directory(), 12) else { return };
    nats.restart().await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let (_relay, address, log) = relay(&outbox);
    publish(&outbox.pool, 100).await.unwrap();
    outbox.assert_complete().await;
    let ballast = disk.fill();
    publish(&outbox.pool, 2000).await.unwrap();
    // Later versions do not say why they answer no more, and write to that stream only when they are started again.
    let frozen = !nats.version().starts_with("2.12.");
    let words = if frozen { ["disk", "make room", "restart nats-server"] } else { ["10077", "no space left", "disk"] };
    assert_cause_named(&outbox, &address, &log, &words).await;
    std::fs::remove_file(ballast).unwrap();
    if frozen {
        nats.restart().await.unwrap();
    }
    outbox.assert_complete().await;
    assert_eq!(admin::relay::parked(&outbox.postgres, 10).await.unwrap().len(), 0, "nothing is to blame");
    drop(nats);
    drop(disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_nats_is_waited_out() {
    nats_waits_for_room(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_an_older_nats_is_waited_out() {
    nats_waits_for_room(Some("2.12.8")).await;
}

/// The server's own limit, `max_file_store`.
#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_used_up_is_waited_out() {
    let limited = NatsOptions { jetstream: "max_file_store: 2MB".into(), ..NatsOptions::default() };
    let nats = Nats::start(limited).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let (_relay, address, log) = relay(&outbox);
    let js = outbox.js().await;
    js.create_stream(Config { name: "OTHER".into(), subjects: vec!["other".into()], ..Config::default() })
        .await
        .unwrap();
    for _ in 0..15 {
        js.publish("other", vec![0; 100_000].into()).await.unwrap().await.unwrap();
    }
    publish(&outbox.pool, 400).await.unwrap();
    assert_cause_named(&outbox, &address, &log, &["10023", "storage", "max_file_store"]).await;
    js.delete_stream("OTHER").await.unwrap();
    outbox.assert_complete().await;
    assert_eq!(admin::relay::parked(&outbox.postgres, 10).await.unwrap().len(), 0, "nothing is to blame");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_postgresql_fails_writers_and_costs_no_attempt() {
    let postgres = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let place = postgres.data_directory().parent().unwrap().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(disk) = Disk::mount(&place, 64) else { return };
    let owner = std::fs::metadata(postgres.data_directory()).unwrap();
    chown(&place, Some(owner.uid()), Some(owner.gid())).unwrap();
    let url = postgres.create_database().await.unwrap();
    let pool = PgPool::connect(&postgres.url("postgres")).await.unwrap();
    let name = url.rsplit('/').next().unwrap();
    for sql in [
        format!("create tablespace small location '{}'", place.display()),
        format!("alter database {name} set tablespace small"),
    ] {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
    }
    let work = Work::on(url, Nats::shared().await.unwrap().url()).await;
    let worker = work.run(Subscriber::new("full").on(Record::good()).max_attempts(2)).await;
    work.send_many(&["a", "b"], 20).await;
    work.wait_for(40).await;
    let ballast = disk.fill();
    let refused = async || publish(&work.outbox.pool, 200).await.is_err();
    eventually(SOON, "a writer is refused", refused).await.unwrap();
    let written: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.outbox").fetch_one(&work.outbox.pool).await.unwrap();
    // Those that still had room in pages that were there already are whole transactions.
    assert_eq!(written % 200, 0, "nothing of a refused transaction is there");
    for n in 21..=400 {
        work.send("a", n).await;
    }
    // The worker, too, comes to where it cannot write.
    tokio::time::sleep(Duration::from_secs(2)).await;
    std::fs::remove_file(ballast).unwrap();
    work.wait_for(420).await;
    work.assert_in_order(&["a"], 400).await;
    assert_eq!(work.dead_letters().await, []);
    assert_eq!(work.attempts().await, [0; 0]);
    worker.stop().await;
    drop(work);
    drop(postgres);
    drop(disk);
}
