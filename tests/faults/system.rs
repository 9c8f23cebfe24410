//! The system under test: private servers and the product's processes, connected through ways that can be disturbed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, NatsCluster, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::{Worker, read_file};
use async_nats::jetstream;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::Mutex;

use super::history::Journal;
use super::part::{Part, Ways};
use super::plan::{CONTROL, Plan};
use super::{publishers, subscribers};

/// Enough for everything that has to be there at the start.
const START: Duration = Duration::from_secs(90);
/// What lies between a relay and PostgreSQL forgets connections that rest for so long.
const RESTED: Duration = Duration::from_secs(4);

pub struct System {
    pub journal: Journal,
    /// Journals, logs and the file of the workers.
    pub directory: PathBuf,
    pub naming: Naming,
    pub publisher_postgres: Mutex<Postgres>,
    pub subscriber_postgres: Mutex<Postgres>,
    pub nats: Vec<Mutex<Nats>>,
    pub nats_config: NatsConfig,
    pub publisher: PgPool,
    pub subscriber: PgPool,
    pub publisher_config: PostgresConfig,
    pub subscriber_config: PostgresConfig,
    pub context: jetstream::Context,
    pub replicas: usize,
    broken: Option<&'static str>,
    pub publishers: Vec<Part>,
    pub relays: Vec<Part>,
    pub workers: Vec<Part>,
    pub reconcilers: Vec<Part>,
}

async fn pool(url: &str) -> PgPool {
    let options = PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(5));
    options.connect(url).await.unwrap()
}

/// The server of a URL, as a URL without a path and user.
fn server(url: &str) -> String {
    let (_, rest) = url.split_once('@').or_else(|| url.split_once("//")).unwrap();
    format!("//{}", rest.split('/').next().unwrap())
}

impl System {
    /// Servers with everything provisioned, and no process yet.
    pub async fn new(plan: &Plan, directory: PathBuf) -> Self {
        // What is not flushed for a commit stays unflushed, so that a crash takes all of it back.
        let settings = vec![("wal_writer_delay".to_string(), "10s".to_string())];
        let postgres = || Postgres::start(PostgresOptions { fsync: false, settings: settings.clone() });
        let options = NatsOptions { config: "max_payload: 65536".into(), ..NatsOptions::default() };
        let cluster = NatsCluster::start(plan.replicas, options);
        // A cluster of one would wait for others.
        let alone = Nats::start(NatsOptions { config: "max_payload: 65536".into(), ..NatsOptions::default() });
        let members = async {
            match plan.replicas {
                1 => vec![alone.await.unwrap()],
                _ => cluster.await.unwrap().members,
            }
        };
        let (publisher, subscriber, members) = tokio::join!(postgres(), postgres(), members);
        let (publisher_postgres, subscriber_postgres) = (publisher.unwrap(), subscriber.unwrap());
        let nats_config =
            NatsConfig { url: members.iter().map(Nats::url).collect::<Vec<_>>().join(","), ..NatsConfig::default() };
        let publisher_config = PostgresConfig::new(publisher_postgres.create_database().await.unwrap());
        let subscriber_config = PostgresConfig::new(subscriber_postgres.create_database().await.unwrap());
        let name = unique_name("t");
        let naming =
            Naming { stream: name.to_uppercase(), prefix: SubjectPrefix::new(name).unwrap(), source: "/faults".into() };
        for config in [&publisher_config, &subscriber_config] {
            operator::migrate(config).await.unwrap();
        }
        let (publisher, subscriber) = (pool(&publisher_config.url).await, pool(&subscriber_config.url).await);
        sqlx::raw_sql(publishers::TABLES).execute(&publisher).await.unwrap();
        sqlx::raw_sql(subscribers::TABLES).execute(&subscriber).await.unwrap();
        std::fs::write(directory.join("worker.toml"), subscribers::FILE).unwrap();
        let servers: Vec<async_nats::ServerAddr> = nats_config.url.split(',').map(|url| url.parse().unwrap()).collect();
        let options = async_nats::ConnectOptions::new().request_timeout(Some(Duration::from_secs(5)));
        let context = jetstream::new(options.retry_on_initial_connect().connect(servers).await.unwrap());
        let mut system = Self {
            journal: Journal::open(&directory.join("driver.jsonl")),
            directory,
            naming,
            publisher_postgres: Mutex::new(publisher_postgres),
            subscriber_postgres: Mutex::new(subscriber_postgres),
            nats: members.into_iter().map(Mutex::new).collect(),
            nats_config,
            publisher,
            subscriber,
            publisher_config,
            subscriber_config,
            context,
            replicas: plan.replicas,
            broken: plan.broken,
            publishers: Vec::new(),
            relays: Vec::new(),
            workers: Vec::new(),
            reconcilers: Vec::new(),
        };
        system.provision().await;
        system.make_parts(plan).await;
        system
    }

    /// The stream with its replicas, and all consumers.
    pub async fn provision(&self) {
        eventually(START, "stream and consumers are provisioned", async || self.try_provision().await.is_some())
            .await
            .unwrap();
    }

    async fn try_provision(&self) -> Option<()> {
        // With its replicas from the beginning; the rest is corrected.
        let config = jetstream::stream::Config {
            name: self.naming.stream.clone(),
            subjects: vec![format!("{}.>", self.naming.prefix)],
            discard: jetstream::stream::DiscardPolicy::New,
            num_replicas: self.replicas,
            ..Default::default()
        };
        self.context.get_or_create_stream(config).await.ok()?;
        operator::provision(&self.nats_config, &self.naming).await.ok()?;
        let worker = || Worker::new(self.subscriber_config.clone(), self.nats_config.clone(), self.naming.clone());
        worker().registry(subscribers::all()).provision().await.ok()?;
        worker().registry(read_file(&self.directory.join("worker.toml")).unwrap()).provision().await.ok()?;
        Some(())
    }

    async fn make_parts(&mut self, plan: &Plan) {
        for n in 0..3 {
            let mut command = child("publishing");
            command.env("FAULTS_ALL_ASYNCHRONOUS", matches!(plan.broken, Some("barrier" | CONTROL)).to_string());
            command.env("FAULTS_DATABASE", &self.publisher_config.url);
            command.env("FAULTS_JOURNAL", self.directory.join(format!("publisher-{n}.jsonl")));
            self.publishers.push(Part::new(format!("publisher-{n}"), &self.directory, command));
        }
        for n in 0..2 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit-relay"));
            // Some events are meant to be parked.
            command.env("AFTERCOMMIT_PARK_AFTER", "0s");
            let part = self.part(format!("relay-{n}"), command, &self.publisher_config).await;
            // As a firewall does, only sooner.
            part.postgres.iter().for_each(|ways| ways.forget_after(RESTED));
            self.relays.push(part.with_http());
        }
        for n in 0..3 {
            let mut command = child("working");
            command.env("FAULTS_RECONCILED", plan.reconciled.to_string());
            let part = self.part(format!("worker-{n}"), command, &self.subscriber_config).await;
            self.workers.push(part);
        }
        for n in 3..5 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit-worker"));
            command.arg("--config").arg(self.directory.join("worker.toml"));
            if plan.reconciled {
                command.args(["--reconcile-every", "2s", "--reconcile-repair"]);
            }
            let part = self.part(format!("worker-{n}"), command, &self.subscriber_config).await;
            self.workers.push(part.with_http());
        }
        if plan.reconciled {
            let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
            command.args(["reconcile", "--comparison", "outbox", "--repair", "--every", "2s"]);
            let part = self.part("reconciler-0".into(), command, &self.publisher_config).await;
            self.reconcilers.push(part);
        }
    }

    /// A process with ways of its own to NATS and to a database.
    async fn part(&self, name: String, mut command: Command, database: &PostgresConfig) -> Part {
        let urls: Vec<String> = self.nats_config.url.split(',').map(server).collect();
        let (nats, postgres) = (Ways::to(&urls).await, Ways::to(&[server(&database.url)]).await);
        let (_, name_of_database) = database.url.rsplit_once('/').unwrap();
        command
            .env("DATABASE_URL", format!("{}/{name_of_database}", postgres.urls("postgres://postgres@")))
            .env("NATS_URL", nats.urls("nats://"))
            .env("AFTERCOMMIT_STREAM", &self.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.naming.source)
            .env("AFTERCOMMIT_BROKEN", self.broken.unwrap_or_default())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()));
        Part::new(name, &self.directory, command).with_ways(nats, postgres)
    }

    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.publishers.iter().chain(&self.relays).chain(&self.workers).chain(&self.reconcilers)
    }

    pub async fn stream(&self) -> Option<jetstream::stream::Stream> {
        self.context.get_stream(&self.naming.stream).await.ok()
    }
}

/// This program again, as one of its ignored tests.
fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture"]);
    command
}

/// A directory for one run.
pub fn directory(seed: u64) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique_name(&format!("faults-{seed}")));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}
