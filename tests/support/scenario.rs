//! A whole system with a NATS server of its own: writers, an outbox with its relay, a worker with another database, and
//! their reconcilers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::reconciler::{
    ConsumerComparison, InboxComparison, Mode, OutboxComparison, Outcome, Runner, Scope, Summary, with_comparisons,
};
use aftercommit::relay::{PublishMethod, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::worker::{Subscriber, Worker};
use async_nats::jetstream::stream::Stream;
use sqlx::{AssertSqlSafe, PgPool};

use super::{Outbox, RunningRelay, RunningWorker, SOON, Writers};

/// The subscriber.
pub const NAME: &str = "books";

/// What the subscriber does: it writes down what it sees.
const EFFECTS: &str =
    "create table effect (id bigint generated always as identity, event_id uuid, key text, version int);
     create function see(event jsonb) returns void language sql as $$
        insert into effect (event_id, key, version)
        values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'version')::int) $$";

pub struct Scenario {
    pub nats: Nats,
    pub outbox: Outbox,
    /// The subscriber's database.
    pub database: PostgresConfig,
    pub books: PgPool,
    publish: PublishMethod,
    relay: Option<RunningRelay>,
    worker: Option<RunningWorker>,
}

impl Scenario {
    /// Everything runs, and nothing is written yet.
    pub async fn start() -> Self {
        Self::on(Nats::start(NatsOptions::default()).await.unwrap(), PublishMethod::Auto).await
    }

    /// The same on this server.
    pub async fn on(nats: Nats, publish: PublishMethod) -> Self {
        let postgres = Postgres::shared().await.unwrap();
        let outbox = Outbox::new(postgres.create_database().await.unwrap(), nats.url()).await;
        let database = PostgresConfig::new(postgres.create_database().await.unwrap());
        operator::migrate(&database).await.unwrap();
        let books = PgPool::connect(&database.url).await.unwrap();
        sqlx::raw_sql(EFFECTS).execute(&books).await.unwrap();
        let mut scenario = Self { nats, outbox, database, books, publish, relay: None, worker: None };
        scenario.provision().await;
        scenario.start_relay();
        scenario.start_worker();
        scenario
    }

    pub fn start_relay(&mut self) {
        let config = RelayConfig { publish: self.publish, ..self.outbox.relay_config() };
        self.relay = Some(RunningRelay::start(config));
    }

    /// The sequence of the last message of which the relay knows that it is stored.
    pub fn acknowledged(&self) -> u64 {
        self.relay.as_ref().unwrap().monitor.report().last_sequence
    }

    pub async fn stop_relay(&mut self) {
        self.relay.take().unwrap().stop().await.unwrap();
    }

    pub fn start_worker(&mut self) {
        self.worker = Some(RunningWorker::start(self.worker()));
    }

    pub async fn stop_worker(&mut self) {
        self.worker.take().unwrap().stop().await;
    }

    /// As a crash does, and another one takes over.
    pub fn kill_relay(&mut self) {
        self.relay = None;
        self.start_relay();
    }

    /// The same for the worker.
    pub fn kill_worker(&mut self) {
        self.worker = None;
        self.start_worker();
    }

    /// The program that compares all of the outbox with the stream, and repairs that.
    pub fn reconcile_command(&self) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_aftercommit"), &self.outbox.postgres);
        command
            .args(["reconcile", "--comparison", "outbox", "--repair", "--full"])
            .env("RUST_LOG", "warn,aftercommit::reconciler=off")
            .stdout(Stdio::null());
        command
    }

    /// The program that runs the subscriber as a process of its own.
    pub fn worker_command(&self) -> Command {
        let file = std::env::temp_dir().join(format!("{}.toml", self.outbox.naming.stream));
        let subscriber =
            format!("[[subscriber]]\nname = '{NAME}'\nsql.function = 'see'\ntypes = ['*']\nconcurrency = 2\n");
        std::fs::write(&file, subscriber).unwrap();
        let mut command = self.command(env!("CARGO_BIN_EXE_aftercommit-worker"), &self.database);
        command.arg("--config").arg(file).env("RUST_LOG", "warn");
        command
    }

    fn command(&self, program: &str, database: &PostgresConfig) -> Command {
        let mut command = Command::new(program);
        command
            .env("DATABASE_URL", &database.url)
            .env("NATS_URL", &self.outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &self.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.outbox.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.outbox.naming.source)
            .stdin(Stdio::null());
        command
    }

    fn subscriber() -> Subscriber {
        Subscriber::sql(NAME, "see", ["*"]).unwrap().concurrency(2)
    }

    fn worker(&self) -> Worker {
        let Outbox { nats, naming, .. } = &self.outbox;
        Worker::new(self.database.clone(), nats.clone(), naming.clone()).subscriber(Self::subscriber())
    }

    /// The stream and the consumer, as `aftercommit provision` makes them.
    pub async fn provision(&self) {
        operator::provision(&self.outbox.nats, &self.outbox.naming).await.unwrap();
        self.worker().provision().await.unwrap();
    }

    /// The subscriber's database is this one now.
    pub async fn move_books(&mut self, url: String) {
        self.books = PgPool::connect(&url).await.unwrap();
        self.database = PostgresConfig::new(url);
        self.worker().adopt().provision().await.unwrap();
    }

    pub async fn stream(&self) -> Stream {
        self.outbox.js().await.get_stream(&self.outbox.naming.stream).await.unwrap()
    }

    pub async fn delete(&self, sequences: impl IntoIterator<Item = u64>) {
        let stream = self.stream().await;
        for sequence in sequences {
            stream.delete_message(sequence).await.unwrap();
        }
    }

    /// The files of the stream, for what is done to them while the server is stopped.
    pub fn stream_directory(&self) -> PathBuf {
        self.nats.store_directory().join("jetstream/$G/streams").join(&self.outbox.naming.stream)
    }

    /// Commits of several writers on a few keys.
    pub async fn write(&self, commits: u64) {
        let writers = Writers::start(&self.outbox.pool, 4, 6).await;
        writers.more(commits).await;
        writers.stop().await;
    }

    /// The relay has published all that is committed, and has written that down.
    pub async fn published(&self) {
        eventually(SOON, "everything is published", async || {
            sqlx::query_scalar(
                "select target is null
                        and not exists (select from aftercommit.outbox where id > log.settled_id)
                   from aftercommit.relay_log log order by seq desc limit 1",
            )
            .fetch_one(&self.outbox.pool)
            .await
            .unwrap()
        })
        .await
        .unwrap();
    }

    /// Everything is handled, and acked.
    pub async fn caught_up(&self) {
        self.published().await;
        self.handled().await;
        eventually(SOON, "everything is acked", async || {
            let info = self.stream().await.consumer_info(NAME).await.unwrap();
            info.num_pending == 0 && info.num_ack_pending == 0
        })
        .await
        .unwrap();
    }

    /// How often each event took effect, and the versions of each key in the order of their effects.
    async fn effects(&self) -> (BTreeMap<String, usize>, BTreeMap<String, Vec<i32>>) {
        let rows: Vec<(String, Option<String>, Option<i32>)> =
            sqlx::query_as("select event_id::text, key, version from effect order by id")
                .fetch_all(&self.books)
                .await
                .unwrap();
        let (mut times, mut versions) = (BTreeMap::new(), BTreeMap::<_, Vec<i32>>::new());
        for (id, key, version) in rows {
            *times.entry(id).or_default() += 1;
            if let (Some(key), Some(version)) = (key, version) {
                versions.entry(key).or_default().push(version);
            }
        }
        (times, versions)
    }

    /// Waits until every committed event took effect, and checks that each did so once.
    pub async fn handled(&self) -> BTreeMap<String, Vec<i32>> {
        let committed = self.outbox.committed().await;
        let mut last = (BTreeMap::new(), BTreeMap::new());
        let waited = eventually(SOON, "everything is handled", async || {
            last = self.effects().await;
            committed.iter().all(|id| last.0.contains_key(id))
        })
        .await;
        let (times, versions) = last;
        let missing = committed.iter().filter(|id| !times.contains_key(*id)).count();
        assert!(waited.is_ok(), "{missing} of {} events are not handled", committed.len());
        assert!(times.values().all(|times| *times == 1), "each once");
        assert_eq!(times.len(), committed.len(), "nothing else");
        versions
    }

    /// What the system has come to, for whoever looks into a failure; and whether it gets on when it is left alone for as
    /// long again.
    pub async fn story(&self) -> String {
        let (outbox, books) = (&self.outbox.pool, &self.books);
        let mut story = String::new();
        for (pool, of, sql) in [
            (books, "inbox", "select * from aftercommit.inbox order by handled_at, sequence"),
            (
                books,
                "redrive",
                "select id, event_id, key, sequence, stream_seq, requested_by from aftercommit.redrive order by id",
            ),
            (books, "attempt", "select * from aftercommit.attempt"),
            (books, "lease", "select * from aftercommit.lease"),
            (books, "effect", "select * from effect order by id"),
            (
                outbox,
                "outbox",
                "select id, xid::text, event_id, key, convert_from(payload, 'UTF8') as payload from aftercommit.outbox order by id",
            ),
            (outbox, "relay log", "select * from aftercommit.relay_log order by seq"),
            (outbox, "repair", "select * from aftercommit.repair order by outbox_id"),
            (outbox, "runs", "select * from aftercommit.reconcile_run order by id"),
            (outbox, "findings", "select * from aftercommit.finding order by id"),
            (books, "runs of the subscriber", "select * from aftercommit.reconcile_run order by id"),
            (books, "findings of the subscriber", "select * from aftercommit.finding order by id"),
            (books, "reconcilers of the subscriber", "select * from aftercommit.reconciler"),
        ] {
            let sql = format!("select row_to_json(row)::text from ({sql}) as row");
            let rows: Vec<String> = match sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(pool).await {
                Ok(rows) => rows,
                Err(error) => vec![error.to_string()],
            };
            story += &format!("--- {of}: {}\n{}\n", rows.len(), rows.join("\n"));
        }
        story += &format!("--- stream and consumer\n{}\n", self.positions().await);
        story += &format!("--- worker\n{:?}\n", self.worker.as_ref().map(|worker| worker.report()));
        let left = async || {
            let effects = self.effects().await.0;
            self.outbox.committed().await.iter().filter(|id| !effects.contains_key(*id)).count()
        };
        let before = left().await;
        let gone_on = eventually(SOON, "it gets on", async || left().await == 0).await.is_ok();
        story + &format!("--- not handled: {before}, then {}; ended by itself: {gone_on}\n", left().await)
    }

    async fn positions(&self) -> String {
        let look = async {
            let mut stream = self.outbox.js().await.get_stream(&self.outbox.naming.stream).await?;
            let state = stream.info().await?.state.clone();
            Ok::<_, Box<dyn std::error::Error>>(format!("{state:?}\n{:?}", stream.consumer_info(NAME).await?))
        };
        look.await.unwrap_or_else(|error| error.to_string())
    }

    /// The same, and each key in the order of its versions.
    pub async fn handled_in_order(&self) {
        for (key, versions) in self.handled().await {
            let last = i32::try_from(versions.len()).unwrap();
            assert_eq!(versions, (1..=last).collect::<Vec<_>>(), "{key}");
        }
    }

    pub fn outbox_runner(&self) -> Runner {
        let leg = OutboxComparison::new(self.outbox.nats.clone(), self.outbox.naming.clone());
        Runner::new(self.outbox.postgres.clone()).comparison(leg)
    }

    /// All reconcilers, which repair every second.
    pub fn reconcilers(&self) -> [Runner; 2] {
        let every = Duration::from_secs(1);
        let leg = OutboxComparison::new(self.outbox.nats.clone(), self.outbox.naming.clone());
        let leg = OutboxComparison { interval: every, mode: Mode::Repair, ..leg };
        let worker = self.worker();
        let (own, subscriptions) = (worker.own_reconcilers(), worker.subscriptions());
        let beside = with_comparisons(own, &self.outbox.nats, subscriptions, every, Mode::Repair);
        [Runner::new(self.outbox.postgres.clone()).comparison(leg), beside]
    }

    fn books_runner(&self) -> Runner {
        let nats = &self.outbox.nats;
        let subscription = Self::subscriber().subscription(&self.outbox.naming);
        let consumer =
            ConsumerComparison { provision: true, ..ConsumerComparison::new(nats.clone(), subscription.clone()) };
        Runner::new(self.database.clone())
            .comparison(consumer)
            .comparison(InboxComparison::new(nats.clone(), subscription))
    }

    /// Compares all of the outbox with the stream, and repairs that.
    pub async fn reconcile_outbox(&self) -> Summary {
        Self::run(&self.outbox_runner(), "outbox").await
    }

    /// Compares all of the stream and the outbox with the consumer and the inbox, and repairs that.
    pub async fn reconcile_books(&self) -> [Summary; 2] {
        let runner = self.books_runner();
        [Self::run(&runner, &format!("consumer:{NAME}")).await, Self::run(&runner, &format!("inbox:{NAME}")).await]
    }

    /// Runs until one run comes to its end: a stream that is put right meanwhile ends a run, and the next begins anew.
    async fn run(runner: &Runner, leg: &str) -> Summary {
        let mut last = None;
        eventually(SOON, "a run comes to its end", async || {
            let summary = runner.run_now(leg, Scope::Full, Mode::Repair).await.unwrap();
            let ran = summary.outcome == Outcome::Ran;
            last = Some(summary);
            ran
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {last:?}"));
        last.unwrap()
    }

    /// Compares the stream with the consumer and the inbox only.
    pub async fn reconcile_consumer(&self) -> Summary {
        let leg = format!("consumer:{NAME}");
        self.books_runner().run_now(&leg, Scope::Full, Mode::Repair).await.unwrap()
    }

    /// All three again find nothing, and nothing is open.
    pub async fn nothing_is_left(&self) {
        let [consumer, inbox] = self.reconcile_books().await;
        for summary in [self.reconcile_outbox().await, consumer, inbox] {
            assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
        }
        for pool in [&self.outbox.pool, &self.books] {
            let open = findings(pool).await.into_iter().filter(|found| ["open", "repairing"].contains(&&*found.1));
            assert_eq!(open.collect::<Vec<_>>(), []);
        }
        self.handled().await;
    }

    /// Kind, state and number of the findings of the outbox's reconciler.
    pub async fn outbox_findings(&self) -> Vec<(String, String, i64)> {
        findings(&self.outbox.pool).await
    }

    /// The same of the subscriber's reconcilers.
    pub async fn books_findings(&self) -> Vec<(String, String, i64)> {
        findings(&self.books).await
    }
}

async fn findings(pool: &PgPool) -> Vec<(String, String, i64)> {
    let sql = "select kind, state, count(*) from aftercommit.finding group by kind, state order by kind, state";
    sqlx::query_as(AssertSqlSafe(sql)).fetch_all(pool).await.unwrap()
}
