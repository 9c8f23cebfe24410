//! An outbox with a stream, the relays on it, and the check of what came out.

use std::collections::{BTreeMap, HashMap};
use std::process::{Child, Command, Output, Stdio};

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::relay::{Monitor, Relay, RelayConfig};
use aftercommit::testing::{eventually, unique_name};
use async_nats::jetstream;
use futures_util::{StreamExt, TryStreamExt};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::SOON;

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
        Self::of(PostgresConfig::new(database_url), nats_url).await
    }

    /// The same, perhaps in another schema than `aftercommit`.
    pub async fn of(postgres: PostgresConfig, nats_url: String) -> Self {
        let nats = NatsConfig { url: nats_url, ..NatsConfig::default() };
        let name = unique_name("t");
        let naming = Naming {
            stream: name.to_uppercase(),
            prefix: aftercommit::subject::SubjectPrefix::new(name).unwrap(),
            source: "/test".into(),
        };
        operator::migrate(&postgres).await.unwrap();
        operator::provision(&nats, &naming).await.unwrap();
        let pool = PgPoolOptions::new().max_connections(40).acquire_timeout(SOON).connect(&postgres.url).await.unwrap();
        Self { postgres, nats, naming, pool }
    }

    /// The same outbox after a restore into another database.
    pub async fn moved_to(&self, database_url: String) -> Self {
        let pool = PgPoolOptions::new().max_connections(40).acquire_timeout(SOON).connect(&database_url).await.unwrap();
        Self { postgres: PostgresConfig::new(database_url), nats: self.nats.clone(), naming: self.naming.clone(), pool }
    }

    /// Lets the server forget after a tenth of a second which ids it has seen, so that it hides no repeat of ours.
    pub async fn forget_message_ids(&self) {
        let js = self.js().await;
        let mut config = js.get_stream(&self.naming.stream).await.unwrap().cached_info().config.clone();
        config.duplicate_window = std::time::Duration::from_millis(100);
        js.update_stream(config).await.unwrap();
    }

    pub fn relay_config(&self) -> RelayConfig {
        RelayConfig {
            // Most tests lower a limit to have something parked.
            park_after: std::time::Duration::ZERO,
            ..RelayConfig::new(self.postgres.clone(), self.nats.clone(), self.naming.clone())
        }
    }

    /// A relay in this process.
    pub fn relay(&self) -> RunningRelay {
        RunningRelay::start(self.relay_config())
    }

    /// The relay's program, as an operator runs it.
    pub fn relay_process(&self) -> RelayProcess {
        RelayProcess(self.relay_command().spawn().unwrap())
    }

    /// The same, to be changed before it is started.
    pub fn relay_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit-relay"));
        command
            .env("DATABASE_URL", &self.postgres.url)
            .env("AFTERCOMMIT_PGBOUNCER", self.postgres.pooled.to_string())
            .env("AFTERCOMMIT_SCHEMA", self.postgres.schema.name())
            .env("NATS_URL", &self.nats.url)
            .env("AFTERCOMMIT_STREAM", &self.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.naming.source)
            .env("AFTERCOMMIT_PARK_AFTER", "0s")
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            .stdin(Stdio::null());
        command
    }

    /// `aftercommit` with the environment of the outbox, as the operator jane runs it.
    pub fn operator_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command
            .args(arguments)
            .env("DATABASE_URL", &self.postgres.url)
            .env("AFTERCOMMIT_SCHEMA", self.postgres.schema.name())
            .env("NATS_URL", &self.nats.url)
            .env("AFTERCOMMIT_STREAM", &self.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.naming.source)
            .env("AFTERCOMMIT_OPERATOR", "jane");
        command
    }

    /// Runs that.
    pub fn operator(&self, arguments: &[&str]) -> Output {
        self.operator_command(arguments).output().unwrap()
    }

    /// Writes a number in the outbox and returns its event's id.
    pub async fn written(&self, key: &str, n: i64) -> String {
        sqlx::query_scalar(
            "select aftercommit.publish('test.number', jsonb_build_object('key', $1::text, 'n', $2::bigint), $1)::text",
        )
        .bind(key)
        .bind(n)
        .fetch_one(&self.pool)
        .await
        .unwrap()
    }

    /// Runs a relay until it dies at this step. Its lease goes with it.
    pub async fn dies_at(&self, fault: &str) {
        let mut command = self.relay_command();
        let mut relay = RelayProcess(command.env("AFTERCOMMIT_FAULT", fault).env("RUST_LOG", "off").spawn().unwrap());
        let status = relay.ends(SOON).await;
        assert!(!status.success(), "it was to die at {fault}, but ended with {status}");
        self.expire_leases().await;
    }

    /// SIGKILL. The relay's lease goes with it.
    pub async fn kill(&self, relay: RelayProcess) {
        drop(relay);
        self.expire_leases().await;
    }

    /// What waiting for the leases of relays, workers and reconcilers to run out would do.
    pub async fn expire_leases(&self) {
        sqlx::raw_sql(
            "update aftercommit.lease set expires_at = to_timestamp(0);
             update aftercommit.reconcile_run set alive_until = clock_timestamp() - interval '1 second' where ended_at is null",
        )
        .execute(&self.pool)
        .await
        .unwrap();
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
        // The client library takes no user from the URL.
        let (scheme, rest) = self.nats.url.split_once("//").unwrap();
        let (login, address) = rest.split_once('@').unwrap_or(("", rest));
        let options = match login.split_once(':') {
            Some((user, password)) => async_nats::ConnectOptions::with_user_and_password(user.into(), password.into()),
            None => async_nats::ConnectOptions::new(),
        };
        jetstream::new(options.connect(format!("{scheme}//{address}")).await.unwrap())
    }

    /// Messages in the stream.
    pub async fn stored(&self) -> u64 {
        match self.js().await.get_stream(&self.naming.stream).await {
            Ok(stream) => stream.cached_info().state.messages,
            Err(_) => 0,
        }
    }

    /// Waits until the relay publishes again.
    pub async fn goes_on(&self) {
        let before = self.stored().await;
        eventually(SOON, "the relay publishes again", async || self.stored().await > before).await.unwrap();
    }

    /// Waits until the relay has nothing left to do and has closed its window.
    pub async fn settled(&self) {
        eventually(SOON, "the window is closed", async || {
            sqlx::query_scalar("select target is null and seq > 0 from aftercommit.relay_log order by seq desc limit 1")
                .fetch_one(&self.pool)
                .await
                .unwrap()
        })
        .await
        .unwrap();
    }

    /// Everything in the stream, in order.
    pub async fn messages(&self) -> Vec<Message> {
        let mut found = Vec::new();
        // A cluster that has lost a server reads nothing until it has agreed on who decides.
        eventually(SOON, "the stream can be read", async || {
            found = self.read().await.unwrap_or_default();
            !found.is_empty() || self.stored().await == 0
        })
        .await
        .unwrap();
        found
    }

    async fn read(&self) -> Result<Vec<Message>, async_nats::Error> {
        use async_nats::jetstream::consumer::{AckPolicy, pull};
        let stream = self.js().await.get_stream(&self.naming.stream).await?;
        let mut left = stream.cached_info().state.messages as usize;
        let config =
            pull::Config { ack_policy: AckPolicy::None, memory_storage: true, num_replicas: 1, ..Default::default() };
        let consumer = stream.create_consumer(config).await?;
        let mut found = Vec::with_capacity(left);
        while left > 0 {
            let mut batch = consumer.fetch().max_messages(left.min(500)).messages().await?;
            while let Some(message) = batch.try_next().await? {
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
                    sequence: message.info()?.stream_sequence,
                });
            }
        }
        Ok(found)
    }

    /// When each message was written and when the server stored it, in the stream's order.
    pub async fn timed_messages(&self) -> Vec<(chrono::DateTime<chrono::Utc>, chrono::DateTime<chrono::Utc>)> {
        use async_nats::jetstream::consumer::{AckPolicy, pull};
        let stream = self.js().await.get_stream(&self.naming.stream).await.unwrap();
        let left = stream.cached_info().state.messages as usize;
        let config = pull::Config { ack_policy: AckPolicy::None, ..Default::default() };
        let messages = stream.create_consumer(config).await.unwrap().messages().await.unwrap();
        let time = |message: async_nats::jetstream::Message| {
            let written = message.headers.as_ref().unwrap().get("ce-time").unwrap().as_str().parse().unwrap();
            let nanos = message.info().unwrap().published.unix_timestamp_nanos();
            (written, chrono::DateTime::from_timestamp_nanos(i64::try_from(nanos).unwrap()))
        };
        messages.take(left).map_ok(time).try_collect().await.unwrap()
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
    pub monitor: Monitor,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), aftercommit::Error>>,
}

impl RunningRelay {
    pub fn start(config: RelayConfig) -> Self {
        let shutdown = CancellationToken::new();
        let relay = Relay::new(config);
        let monitor = relay.monitor();
        let task = tokio::spawn(relay.run(shutdown.clone()));
        Self { monitor, shutdown, task }
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
pub struct RelayProcess(pub Child);

impl RelayProcess {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits for a relay that ends by itself.
    pub async fn ends(&mut self, deadline: std::time::Duration) -> std::process::ExitStatus {
        let mut status = None;
        eventually(deadline, "the relay's process ends", async || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        })
        .await
        .unwrap_or_else(|error| panic!("{error}"));
        status.unwrap()
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
