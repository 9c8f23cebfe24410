//! What the integration tests share: an outbox with a stream, writers that behave badly, and the check of what came out.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::{BTreeMap, HashMap};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aftercommit::admin;
use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::relay::{Relay, RelayConfig};
use aftercommit::testing::{eventually, unique_name};
use async_nats::jetstream;
use futures_util::TryStreamExt;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, Row};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Long enough for a slow machine, short enough to tell that something hangs.
pub const SOON: Duration = Duration::from_secs(60);

/// An outbox of its own with a stream of its own.
pub struct Outbox {
    pub postgres: PostgresConfig,
    pub nats: NatsConfig,
    pub naming: Naming,
    pub pool: PgPool,
}

impl Outbox {
    /// In this database and on this server.
    pub async fn new(database_url: String, nats_url: String) -> Self {
        let postgres = PostgresConfig { url: database_url.clone() };
        let nats = NatsConfig { url: nats_url, ..NatsConfig::default() };
        let name = unique_name("t");
        let naming = Naming {
            stream: name.to_uppercase(),
            prefix: aftercommit::subject::SubjectPrefix::new(name).unwrap(),
            source: "/test".into(),
        };
        admin::migrate(&postgres).await.unwrap();
        admin::provision(&nats, &naming).await.unwrap();
        let pool = PgPoolOptions::new().max_connections(40).acquire_timeout(SOON).connect(&database_url).await.unwrap();
        Self { postgres, nats, naming, pool }
    }

    pub fn relay_config(&self) -> RelayConfig {
        RelayConfig::new(self.postgres.clone(), self.nats.clone(), self.naming.clone())
    }

    /// A relay in this process.
    pub fn relay(&self) -> RunningRelay {
        RunningRelay::start(self.relay_config())
    }

    /// The relay's program, as an operator runs it.
    pub fn relay_process(&self) -> RelayProcess {
        let child = Command::new(env!("CARGO_BIN_EXE_aftercommit-relay"))
            .env("DATABASE_URL", &self.postgres.url)
            .env("NATS_URL", &self.nats.url)
            .env("AFTERCOMMIT_STREAM", &self.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.naming.source)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        RelayProcess(child)
    }

    /// Writes one event in its own transaction.
    pub async fn publish(&self, event_type: &str, payload: &str, key: Option<&str>) {
        sqlx::query("select aftercommit.publish($1, $2::text::jsonb, $3)")
            .bind(event_type)
            .bind(payload)
            .bind(key)
            .execute(&self.pool)
            .await
            .unwrap();
    }

    /// All events that are committed, by outbox id.
    pub async fn committed(&self) -> Vec<String> {
        sqlx::query_scalar("select event_id::text from aftercommit.outbox order by id")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    pub async fn js(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(&self.nats.url).await.unwrap())
    }

    /// Messages in the stream.
    pub async fn stored(&self) -> u64 {
        match self.js().await.get_stream(&self.naming.stream).await {
            Ok(stream) => stream.cached_info().state.messages,
            Err(_) => 0,
        }
    }

    /// Everything in the stream, in order.
    pub async fn messages(&self) -> Vec<Message> {
        use async_nats::jetstream::consumer::{AckPolicy, pull};
        let stream = self.js().await.get_stream(&self.naming.stream).await.unwrap();
        let mut left = stream.cached_info().state.messages as usize;
        let config = pull::Config { ack_policy: AckPolicy::None, ..Default::default() };
        let consumer = stream.create_consumer(config).await.unwrap();
        let mut found = Vec::with_capacity(left);
        while left > 0 {
            let mut batch = consumer.fetch().max_messages(left.min(500)).messages().await.unwrap();
            while let Some(message) = batch.try_next().await.unwrap() {
                left -= 1;
                found.push(Message {
                    subject: message.subject.to_string(),
                    headers: message
                        .headers
                        .as_ref()
                        .map(|headers| {
                            headers.iter().map(|(n, v)| (n.to_string(), v[0].as_str().to_string())).collect()
                        })
                        .unwrap_or_default(),
                    payload: message.payload.to_vec(),
                    sequence: message.info().unwrap().stream_sequence,
                });
            }
        }
        found
    }

    /// Waits until as many messages as committed events are in the stream, then checks that it is them, each once, and
    /// every key in the order of its versions.
    pub async fn assert_complete(&self) -> Vec<Message> {
        let committed = self.committed().await;
        eventually(SOON, "every committed event is in the stream", async || {
            self.stored().await >= committed.len() as u64
        })
        .await
        .unwrap_or_else(|error| panic!("{error}"));
        let messages = self.messages().await;
        let mut times = HashMap::new();
        for message in messages.iter().filter(|message| message.headers.contains_key("ce-id")) {
            *times.entry(message.headers["ce-id"].clone()).or_insert(0) += 1;
        }
        let lost: Vec<_> = committed.iter().filter(|id| !times.contains_key(*id)).collect();
        let doubled: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
        let committed: std::collections::HashSet<_> = committed.iter().collect();
        let ghosts: Vec<_> = times.keys().filter(|id| !committed.contains(id)).collect();
        assert!(
            lost.is_empty() && doubled.is_empty() && ghosts.is_empty(),
            "lost {}, doubled {}, ghosts {} of {}: {lost:?} {doubled:?} {ghosts:?}",
            lost.len(),
            doubled.len(),
            ghosts.len(),
            committed.len()
        );
        let mut versions: BTreeMap<String, i64> = BTreeMap::new();
        for message in &messages {
            let Some(key) = message.headers.get("ce-partitionkey") else { continue };
            let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
            let Some(version) = payload["version"].as_i64() else { continue };
            let last = versions.entry(key.clone()).or_insert(0);
            assert_eq!(version, *last + 1, "key {key} out of order at sequence {}", message.sequence);
            *last = version;
        }
        messages
    }
}

/// A message as it is in the stream.
#[derive(Debug, Clone)]
pub struct Message {
    pub subject: String,
    pub headers: BTreeMap<String, String>,
    pub payload: Vec<u8>,
    pub sequence: u64,
}

/// A relay in this process, stopped softly when asked, aborted when dropped.
pub struct RunningRelay {
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), aftercommit::Error>>,
}

impl RunningRelay {
    pub fn start(config: RelayConfig) -> Self {
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(Relay::new(config).run(shutdown.clone()));
        Self { shutdown, task }
    }

    pub async fn stop(mut self) -> Result<(), aftercommit::Error> {
        self.shutdown.cancel();
        (&mut self.task).await.unwrap()
    }

    /// Waits for a relay that ends by itself.
    pub async fn ended(mut self) -> Result<(), aftercommit::Error> {
        (&mut self.task).await.unwrap()
    }
}

impl Drop for RunningRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The relay's program, killed when dropped.
pub struct RelayProcess(Child);

impl RelayProcess {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Writers that make life hard for a relay: transactions of random length, most of them on a few keys under row locks,
/// with savepoints released and rolled back, some rolled back as a whole, some adding events without a key.
pub struct Writers {
    stop: Arc<AtomicBool>,
    pub commits: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    pub async fn start(pool: &PgPool, writers: usize, keys: i32) -> Self {
        sqlx::raw_sql(
            "create table if not exists aggregate (key int primary key, version int not null);
             create table if not exists rolled_back (event_id uuid primary key)",
        )
        .execute(pool)
        .await
        .unwrap();
        sqlx::query("insert into aggregate select n, 0 from generate_series(1, $1) n on conflict do nothing")
            .bind(keys)
            .execute(pool)
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let commits = Arc::new(AtomicU64::new(0));
        let tasks = (0..writers)
            .map(|writer| {
                let (pool, stop, commits) = (pool.clone(), stop.clone(), commits.clone());
                let mut random = Random(writer as u64 + 1);
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        // A server that is down for a moment fails the transaction; then nothing of it may come out.
                        if write_once(&pool, &mut random, keys).await.is_ok() {
                            commits.fetch_add(1, Ordering::Relaxed);
                        } else {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    }
                })
            })
            .collect();
        Self { stop, commits, tasks }
    }

    /// Waits for so many commits more.
    pub async fn more(&self, commits: u64) {
        let enough = self.commits.load(Ordering::Relaxed) + commits;
        eventually(SOON, "the writers commit", async || self.commits.load(Ordering::Relaxed) >= enough)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

async fn write_once(pool: &PgPool, random: &mut Random, keys: i32) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    if random.one_in(4) {
        // The transaction gets its id long before it has the lock of its key.
        sqlx::query("select pg_current_xact_id()").execute(&mut *tx).await?;
    }
    let mut touched: Vec<i32> = (0..=random.below(2)).map(|_| random.below(keys as u64) as i32 + 1).collect();
    touched.sort_unstable();
    touched.dedup();
    for key in touched {
        let version: i32 = sqlx::query("update aggregate set version = version + 1 where key = $1 returning version")
            .bind(key)
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?;
        if random.one_in(3) {
            sqlx::query("savepoint inner_work").execute(&mut *tx).await?;
            write(&mut tx, "noise.undone", None, 0).await?;
            sqlx::query("rollback to savepoint inner_work").execute(&mut *tx).await?;
        }
        if random.one_in(3) {
            sqlx::query("savepoint inner_work").execute(&mut *tx).await?;
            write(&mut tx, "key.changed", Some(key), version).await?;
            sqlx::query("release savepoint inner_work").execute(&mut *tx).await?;
        } else {
            write(&mut tx, "key.changed", Some(key), version).await?;
        }
        if random.one_in(8) {
            tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        }
    }
    if random.one_in(3) {
        write(&mut tx, "noise.kept", None, 0).await?;
    }
    if random.one_in(6) { tx.rollback().await } else { tx.commit().await }
}

async fn write(
    tx: &mut sqlx::PgTransaction<'_>,
    event_type: &str,
    key: Option<i32>,
    version: i32,
) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.publish($1, jsonb_build_object('version', $2::int), $3)")
        .bind(event_type)
        .bind((version > 0).then_some(version))
        .bind(key.map(|key| format!("key-{key}")))
        .execute(&mut **tx)
        .await
        .map(drop)
}

/// A small generator with a seed, so that a writer does the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // The constants of Knuth's MMIX generator; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}
