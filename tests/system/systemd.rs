//! What systemd hears of relay and worker: ready, alive, what they do, stopping (sd_notify(3)).

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Outbox, RelayProcess, SOON, Scenario, answers, complains, free_address};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};

/// The socket at which systemd listens, and all that was said there.
struct Systemd {
    socket: PathBuf,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Systemd {
    fn listen() -> Self {
        let socket = std::env::temp_dir().join(format!("notify-{}", uuid::Uuid::now_v7()));
        let receiver = UnixDatagram::bind(&socket).unwrap();
        let heard = Arc::<Mutex<Vec<String>>>::default();
        let said = Arc::clone(&heard);
        std::thread::spawn(move || {
            let mut message = [0; 4096];
            while let Ok(length) = receiver.recv(&mut message) {
                let text = String::from_utf8_lossy(&message[..length]).into_owned();
                said.lock().unwrap().extend(text.lines().map(Into::into));
            }
        });
        Self { socket, heard }
    }

    /// As a unit with `Type=notify` starts it; it loses patience soon, so that a test need not wait for long.
    fn start(&self, command: &mut Command, http: &str, watchdog: Duration) -> RelayProcess {
        let command = command
            .env("NOTIFY_SOCKET", &self.socket)
            .env("WATCHDOG_USEC", watchdog.as_micros().to_string())
            .env("AFTERCOMMIT_HTTP", http)
            .env("AFTERCOMMIT_UNHEALTHY_AFTER", "1s");
        RelayProcess(command.spawn().unwrap())
    }

    fn count(&self, line: &str) -> usize {
        self.heard.lock().unwrap().iter().filter(|heard| heard.starts_with(line)).count()
    }

    async fn hears(&self, line: &str) {
        self.hears_more(line, 0).await;
    }

    /// More often than so many times.
    async fn hears_more(&self, line: &str, times: usize) {
        let heard = eventually(SOON, line, async || self.count(line) > times).await;
        assert!(heard.is_ok(), "{heard:?}: {:?}", self.heard.lock().unwrap());
    }

    /// The watchdog hears nothing for several times as long as it waits.
    async fn silent_for(&self, watchdog: Duration) -> bool {
        let before = self.count("WATCHDOG=1");
        tokio::time::sleep(watchdog * 3).await;
        self.count("WATCHDOG=1") == before
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.socket);
    }
}

const WATCHDOG: Duration = Duration::from_millis(600);

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_says_when_it_is_ready_and_stays_alive_in_an_outage() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    let (systemd, http) = (Systemd::listen(), free_address());
    nats.kill().await.unwrap();
    let mut relay = systemd.start(&mut outbox.relay_command(), &http, WATCHDOG);
    systemd.hears("STATUS=connecting").await;
    assert_eq!(systemd.count("READY=1"), 0);
    nats.restart().await.unwrap();
    systemd.hears("READY=1").await;
    answers(&http, "/readyz", 200, "leading").await;
    systemd.hears("STATUS=leading: idle").await;
    nats.kill().await.unwrap();
    outbox.publish("a", "{}", None).await;
    complains(&http, &["not connected to NATS"]).await;
    // A new start would not help: the watchdog hears of it all the same, and the operator why.
    systemd.hears("STATUS=no progress for").await;
    systemd.hears_more("WATCHDOG=1", systemd.count("WATCHDOG=1") + 3).await;
    nats.restart().await.unwrap();
    outbox.assert_complete().await;
    assert_eq!((systemd.count("READY=1"), systemd.count("STOPPING=1")), (1, 0));
    relay.signal("-TERM");
    assert!(relay.ends(SOON).await.success());
    assert_eq!(systemd.count("STOPPING=1"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_hears_nothing_of_a_relay_that_hangs() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let (systemd, http) = (Systemd::listen(), free_address());
    let held = std::env::temp_dir().join(format!("held-{}", outbox.naming.stream));
    let hold = format!("relay-window-read:{}", held.display());
    let mut relay = systemd.start(outbox.relay_command().env("AFTERCOMMIT_HOLD", hold), &http, WATCHDOG);
    systemd.hears("READY=1").await;
    outbox.publish("a", "{}", None).await;
    assert!(eventually(SOON, "the relay is held", async || held.exists()).await.is_ok());
    let silent = eventually(SOON, "the watchdog hears nothing", async || systemd.silent_for(WATCHDOG).await).await;
    assert!(silent.is_ok(), "{silent:?}");
    complains(&http, &["no progress for", "1 event waiting"]).await;
    let before = systemd.count("WATCHDOG=1");
    std::fs::remove_file(&held).unwrap();
    systemd.hears_more("WATCHDOG=1", before).await;
    outbox.assert_complete().await;
    relay.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_it_too_and_a_frozen_one_nothing() {
    let scenario = Scenario::start().await;
    scenario.provision().await;
    let (systemd, http) = (Systemd::listen(), free_address());
    let mut worker = systemd.start(&mut scenario.worker_command(), &http, WATCHDOG);
    systemd.hears("READY=1").await;
    systemd.hears("STATUS=books: ").await;
    systemd.hears("WATCHDOG=1").await;
    worker.signal("-STOP");
    let silent = eventually(SOON, "the watchdog hears nothing", async || systemd.silent_for(WATCHDOG).await).await;
    let before = systemd.count("WATCHDOG=1");
    worker.signal("-CONT");
    assert!(silent.is_ok(), "{silent:?}");
    systemd.hears_more("WATCHDOG=1", before).await;
    worker.signal("-TERM");
    assert!(worker.ends(SOON).await.success());
    assert_eq!(systemd.count("STOPPING=1"), 1);
}
