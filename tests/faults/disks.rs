//! Disks: full ones, and the small ones whose power can be cut.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::health::Check;
use aftercommit::operator;
use aftercommit::relay::{Mode, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::Subscriber;
use async_nats::jetstream::stream::Config;
use sqlx::{AssertSqlSafe, PgPool};

use super::scenarios::{publish, relay};
use super::support::{Outbox, Record, RunningRelay, SOON, Work, complains, get, is_before, metric};

/// A small disk in a server's directory. It goes with the server.
pub struct Disk {
    place: PathBuf,
    /// What is on it; in memory without one.
    file: Option<PathBuf>,
}

impl Disk {
    /// One in memory. None where nothing may be mounted.
    fn in_memory(place: &Path, megabytes: u32) -> Option<Self> {
        let options = format!("size={megabytes}m");
        let mounted = mounts(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(place));
        mounted.then(|| Self { place: place.into(), file: None })
    }

    /// One whose power can be cut: a file system in a file. What was written to it and not synced is in the memory of the
    /// kernel, and not in that file. None where nothing may be mounted.
    pub fn in_file(place: &Path, megabytes: u64) -> Option<Self> {
        let file = place.with_extension("disk");
        std::fs::File::create_new(&file).unwrap().set_len(megabytes << 20).unwrap();
        let disk = Self { place: place.into(), file: Some(file.clone()) };
        let made = mounts(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file)) && mounts(&mut disk.plug_in());
        made.then_some(disk)
    }

    /// By itself the file system writes nothing down for five minutes.
    fn plug_in(&self) -> Command {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,commit=300"]).args(self.file.as_ref()).arg(&self.place);
        mount
    }

    /// Takes all the room that is left, until the file is removed.
    fn fill(&self) -> PathBuf {
        let ballast = self.place.join("ballast");
        let mut fill = Command::new("dd");
        fill.args(["if=/dev/zero", "bs=4k"]).arg(format!("of={}", ballast.display())).stderr(Stdio::null());
        fill.status().unwrap();
        ballast
    }

    /// Everything that was written so far survives.
    pub fn sync(&self) {
        succeed(Command::new("sync").arg("--file-system").arg(&self.place));
    }

    /// Cuts the power under the server and under its disk.
    pub async fn cut(&self, nats: &mut Nats) {
        let file = self.file.as_ref().unwrap();
        let left = file.with_extension("left");
        // Nothing moves while the file is copied, so that it is of one moment.
        nats.pause().unwrap();
        std::fs::copy(file, &left).unwrap();
        nats.kill().await.unwrap();
        succeed(Command::new("umount").arg(&self.place));
        std::fs::rename(left, file).unwrap();
        succeed(&mut self.plug_in());
    }
}

/// Whether nothing is missing that mounting takes.
fn mounts(command: &mut Command) -> bool {
    let done = command.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    if !done {
        println!("SKIPPED: only root may mount a small disk, and not everywhere");
    }
    done
}

fn succeed(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
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
    complains(address, words).await;
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} are not in: {log}");
    assert!(!log.contains("another writer"), "{log}");
    assert!(interruptions(outbox, address, "back_pressure").await > 0.0);
    assert_eq!(interruptions(outbox, address, "fenced").await, 0.0);
}

async fn nats_waits_for_room(version: Option<&str>) {
    let mut nats = Nats::start(NatsOptions { version: version.map(Into::into), ..Default::default() }).await.unwrap();
    nats.stop().await.unwrap();
    let Some(disk) = Disk::in_memory(&nats.store_directory(), 12) else { return };
    nats.restart().await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let (_relay, address, log) = relay(&outbox);
    publish(&outbox.pool, 100).await.unwrap();
    outbox.assert_complete().await;
    let ballast = disk.fill();
    publish(&outbox.pool, 2000).await.unwrap();
    // Later versions do not say why they answer no more, and write to that stream only when they are started again.
    let frozen = !is_before(nats.version(), (2, 14));
    let words = if frozen { ["disk", "make room", "restart nats-server"] } else { ["10077", "no space left", "disk"] };
    assert_cause_named(&outbox, &address, &log, &words).await;
    std::fs::remove_file(ballast).unwrap();
    if frozen {
        nats.restart().await.unwrap();
    }
    outbox.assert_complete().await;
    assert_eq!(operator::relay::parked(&outbox.postgres, 10).await.unwrap().len(), 0, "nothing is to blame");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_nats_is_waited_out() {
    nats_waits_for_room(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_an_older_nats_is_waited_out() {
    nats_waits_for_room(Some("2.12.8")).await;
}

/// With a single event in flight nothing is refused: nothing comes back at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_silent_over_a_full_disk_is_told_from_a_slow_one() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    nats.stop().await.unwrap();
    let Some(disk) = Disk::in_memory(&nats.store_directory(), 12) else { return };
    nats.restart().await.unwrap();
    let mut systems = Vec::new();
    for mode in [Mode::Exclusive, Mode::Shared] {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        let outbox = Outbox::new(database, nats.url()).await;
        let ack_timeout = Duration::from_millis(500);
        let relay = RunningRelay::start(RelayConfig { mode, ack_timeout, ..outbox.relay_config() });
        publish(&outbox.pool, 1).await.unwrap();
        outbox.assert_complete().await;
        systems.push((outbox, relay));
    }
    let ballast = disk.fill();
    for (outbox, relay) in &systems {
        let large = "select aftercommit.publish('large', to_jsonb(repeat('x', 20000)))";
        sqlx::query(large).execute(&outbox.pool).await.unwrap();
        let words = if is_before(nats.version(), (2, 14)) { "no space left" } else { "restart nats-server" };
        let named = async || relay.monitor.health().text.contains(words);
        eventually(SOON, "the cause is named", named).await.unwrap();
    }
    std::fs::remove_file(ballast).unwrap();
    nats.restart().await.unwrap();
    for (outbox, relay) in systems {
        outbox.assert_complete().await;
        relay.stop().await.unwrap();
    }
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
    assert_eq!(operator::relay::parked(&outbox.postgres, 10).await.unwrap().len(), 0, "nothing is to blame");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_postgresql_fails_writers_and_costs_no_attempt() {
    let postgres = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let place = postgres.data_directory().parent().unwrap().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(disk) = Disk::in_memory(&place, 64) else { return };
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
    let refusals = || std::fs::read_to_string(postgres.log()).unwrap().matches("No space left").count();
    let before = refusals();
    for n in 21..=400 {
        work.send("a", n).await;
    }
    // Nobody else writes any more.
    eventually(SOON, "the worker, too, comes to where it cannot write", async || refusals() > before).await.unwrap();
    std::fs::remove_file(ballast).unwrap();
    work.wait_for(420).await;
    work.assert_in_order(&["a"], 400).await;
    assert_eq!(work.dead_letters().await, []);
    assert_eq!(work.attempts().await, [0; 0]);
    worker.stop().await;
}
