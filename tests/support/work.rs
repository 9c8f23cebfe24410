//! A stream with numbers in it, the workers on it, and what their handlers did.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::envelope::Envelope;
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::{Delivery, Handler, HandlerError, Monitor, Subscriber, Worker, WorkerReport};
use aftercommit::{Error, Event, EventId};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer};
use sqlx::{AssertSqlSafe, PgTransaction};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Outbox, SOON};

/// The event of these tests: the n-th of its key.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Number {
    pub key: Option<String>,
    pub n: i64,
}

impl Event for Number {
    const TYPE: &'static str = "test.number";

    fn key(&self) -> Option<String> {
        self.key.clone()
    }
}

/// What a handler does after it has written its effect.
pub enum Act {
    Succeed,
    Fail(HandlerError),
    Panic,
    Sleep(Duration),
    /// Break the transaction and hide it.
    Swallow,
    /// End the worker's transaction.
    RollBack,
}

/// Writes a row per event, then does as it is told.
pub struct Record(Arc<Decide>);

/// What to do with an event.
type Decide = dyn Fn(&Delivery<Number>) -> Act + Send + Sync;

impl Record {
    pub fn new(act: impl Fn(&Delivery<Number>) -> Act + Send + Sync + 'static) -> Self {
        Self(Arc::new(act))
    }

    /// Never fails.
    pub fn good() -> Self {
        Self::new(|_| Act::Succeed)
    }
}

impl Handler<Number> for Record {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        sqlx::query("insert into effect (event_id, key, n, attempt) values ($1, $2, $3, $4)")
            .bind(delivery.id.as_uuid())
            .bind(&delivery.key)
            .bind(delivery.event.n)
            .bind(i32::try_from(delivery.attempt)?)
            .execute(&mut **tx)
            .await?;
        match (self.0)(delivery) {
            Act::Succeed => Ok(()),
            Act::Fail(error) => Err(error),
            Act::Panic => panic!("as told"),
            Act::Sleep(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
            Act::RollBack => {
                sqlx::raw_sql("rollback").execute(&mut **tx).await?;
                Ok(())
            }
            Act::Swallow => {
                let _ = sqlx::query("select 1 / 0").execute(&mut **tx).await;
                Ok(())
            }
        }
    }
}

/// An effect: its key, number and the attempt that made it.
pub type Effect = (Option<String>, i64, i32);

/// A stream and a database with a table of effects.
pub struct Work {
    pub outbox: Outbox,
    pub context: jetstream::Context,
}

impl Work {
    /// On the servers that all tests share.
    pub async fn shared() -> Self {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        Self::on(database, Nats::shared().await.unwrap().url()).await
    }

    pub async fn on(database_url: String, nats_url: String) -> Self {
        let outbox = Outbox::new(database_url, nats_url).await;
        let context = outbox.js().await;
        Self { outbox, context }.with_effects().await
    }

    /// A new database of a subscriber at the outbox's stream.
    pub async fn beside(outbox: &Outbox) -> Self {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        let work = Self::moved(outbox, database).await;
        aftercommit::operator::migrate(&work.outbox.postgres).await.unwrap();
        work.with_effects().await
    }

    /// A database of a subscriber, as it is, at the outbox's stream.
    pub async fn moved(outbox: &Outbox, database: String) -> Self {
        Self { context: outbox.js().await, outbox: outbox.moved_to(database).await }
    }

    async fn with_effects(self) -> Self {
        let table = "create table effect (id bigint generated always as identity, event_id uuid, key text, n bigint, attempt int)";
        sqlx::raw_sql(table).execute(&self.outbox.pool).await.unwrap();
        self
    }

    /// The envelope of a number.
    pub fn envelope(&self, key: Option<&str>, n: i64) -> Envelope {
        let event = Number { key: key.map(str::to_string), n };
        Envelope {
            id: EventId::new(),
            event_type: Number::TYPE.into(),
            version: Number::VERSION,
            key: event.key(),
            source: "/test".into(),
            time: chrono::Utc::now(),
            sequence: 0,
            headers: BTreeMap::new(),
            content_type: "application/json".into(),
            payload: serde_json::to_vec(&event).unwrap().into(),
            replaces: Vec::new(),
        }
    }

    /// Puts an event into the stream, past any relay and any dropping of repeats.
    pub async fn put(&self, event: &Envelope) -> u64 {
        let mut headers = HeaderMap::new();
        for (name, value) in event.to_headers().iter().filter(|(name, _)| name != "Nats-Msg-Id") {
            headers.append(name.as_ref(), value.as_ref());
        }
        let subject = self.outbox.naming.prefix.subject(&event.event_type);
        let ack = self.context.publish_with_headers(subject, headers, event.payload.clone()).await.unwrap();
        ack.await.unwrap().sequence
    }

    pub async fn send(&self, key: &str, n: i64) {
        self.put(&self.envelope(Some(key), n)).await;
    }

    /// `count` numbers of each key, in turns.
    pub async fn send_many(&self, keys: &[&str], count: i64) {
        let events = (1..=count).flat_map(|n| keys.iter().map(move |key| (n, *key)));
        for (n, key) in events {
            self.send(key, n).await;
        }
    }

    pub fn worker_with(&self, subscriber: Subscriber) -> Worker {
        let Outbox { postgres, nats, naming, .. } = &self.outbox;
        Worker::new(postgres.clone(), nats.clone(), naming.clone()).subscriber(subscriber)
    }

    /// Provisions the subscriber's consumer and runs it.
    pub async fn run(&self, subscriber: Subscriber) -> RunningWorker {
        let worker = self.worker_with(subscriber);
        worker.provision().await.unwrap();
        RunningWorker::start(worker)
    }

    /// Lets the stream keep its messages until they are removed, so that an inbox may forget at any time.
    pub async fn without_max_age(&self) {
        let mut config =
            self.context.get_stream(&self.outbox.naming.stream).await.unwrap().get_info().await.unwrap().config;
        config.max_age = Duration::ZERO;
        self.context.update_stream(config).await.unwrap();
    }

    /// Runs the subscriber in two workers that both believe to be active, until all is done.
    pub async fn run_two_at_once(&self, subscriber: impl Fn() -> Subscriber, mut done: impl AsyncFnMut() -> bool) {
        let first = self.run(subscriber()).await;
        let second = RunningWorker::start(self.worker_with(subscriber()));
        // Whoever stands by takes over at once, while the other notices that only a second later.
        let query = "update aftercommit.lease set expires_at = clock_timestamp() - interval '1 second'";
        let mut handled = -1;
        eventually(SOON, "all effects", async || {
            let now = self.count().await;
            // On a busy machine nobody would come to anything if it were taken away from him before.
            if now > handled {
                handled = now;
                sqlx::query(query).execute(&self.outbox.pool).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(700)).await;
            done().await
        })
        .await
        .unwrap();
        let epoch: i64 =
            sqlx::query_scalar("select epoch from aftercommit.lease").fetch_one(&self.outbox.pool).await.unwrap();
        assert!(epoch > 1, "there was no change of hands");
        first.stop().await;
        second.stop().await;
    }

    pub async fn effects(&self) -> Vec<Effect> {
        sqlx::query_as("select key, n, attempt from effect order by id").fetch_all(&self.outbox.pool).await.unwrap()
    }

    /// The numbers of one key, in the order in which they took effect.
    pub async fn numbers(&self, key: &str) -> Vec<i64> {
        let all = self.effects().await;
        all.into_iter().filter(|(of, ..)| of.as_deref() == Some(key)).map(|(_, n, _)| n).collect()
    }

    pub async fn count(&self) -> i64 {
        sqlx::query_scalar("select count(*) from effect").fetch_one(&self.outbox.pool).await.unwrap()
    }

    /// Waits for that many effects.
    pub async fn wait_for(&self, effects: i64) {
        let mut last = 0;
        let waited = eventually(SOON, "the effects", async || {
            last = self.count().await;
            last >= effects
        })
        .await;
        assert!(waited.is_ok(), "only {last} of {effects} effects");
    }

    /// That exactly the numbers 1 to `count` of each key took effect, each once and in order.
    pub async fn assert_in_order(&self, keys: &[&str], count: i64) {
        for key in keys {
            assert_eq!(self.numbers(key).await, (1..=count).collect::<Vec<_>>(), "key {key}");
        }
    }

    /// Failed attempts that are on record.
    pub async fn attempts(&self) -> Vec<i32> {
        sqlx::query_scalar("select attempts from aftercommit.attempt where attempts > 0")
            .fetch_all(&self.outbox.pool)
            .await
            .unwrap()
    }

    /// That no event was given up, and nothing is on record about one.
    pub async fn assert_nothing_failed(&self) {
        let text =
            "select format('%s attempts, %s crashes: %s', attempts, crashes, last_error) from aftercommit.attempt";
        let attempts: Vec<String> = sqlx::query_scalar(text).fetch_all(&self.outbox.pool).await.unwrap();
        assert_eq!((self.dead_letters().await, attempts), (vec![], vec![]));
    }

    /// Dead letters: number, attempts, reason.
    pub async fn dead_letters(&self) -> Vec<(i64, i32, String)> {
        sqlx::query_as(
            "select coalesce(substring(aftercommit.payload_json(payload) ->> 'n' from '^[0-9]+$')::bigint, 0), attempts, reason
               from aftercommit.dead_letter order by id",
        )
        .fetch_all(&self.outbox.pool)
        .await
        .unwrap()
    }

    pub async fn consumer(&self, subscriber: &str) -> consumer::PullConsumer {
        self.context.get_consumer_from_stream(subscriber, &self.outbox.naming.stream).await.unwrap()
    }

    /// Waits until the consumer has nothing left, not even acks.
    pub async fn wait_until_acked(&self, subscriber: &str) {
        let waited = eventually(SOON, "everything is acked", async || {
            let consumer = self.consumer(subscriber).await;
            let info = consumer.cached_info();
            info.num_pending == 0 && info.num_ack_pending == 0
        })
        .await;
        assert!(waited.is_ok(), "{:?}", self.consumer(subscriber).await.cached_info());
    }

    /// A process with the worker that the ignored test `test` of this test program runs: see [`child_worker`].
    pub fn child(&self, test: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([test, "--exact", "--ignored", "--nocapture"])
            .env("CHILD_STREAM", &self.outbox.naming.stream)
            .env("CHILD_PREFIX", self.outbox.naming.prefix.to_string())
            .env("CHILD_DATABASE", &self.outbox.postgres.url)
            .env("CHILD_NATS", &self.outbox.nats.url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// A handler in SQL, the function `apply`: the effect, and then these statements.
    pub async fn create_apply(&self, then: &str) {
        let function = format!(
            "create function apply(event jsonb) returns void language plpgsql as $$
             begin
                insert into effect (event_id, key, n, attempt)
                values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'n')::bigint, 1);
                {then}
             end $$"
        );
        sqlx::raw_sql(AssertSqlSafe(function)).execute(&self.outbox.pool).await.unwrap();
    }

    /// Runs the worker's program with this file until it dies at each of these steps, one after the other.
    pub async fn dies_at_each(&self, steps: &[(&str, u32)], toml: &str) {
        for (step, times) in steps {
            let mut worker =
                WorkerProcess(self.command(toml).env("AFTERCOMMIT_FAULT", format!("{step}:{times}")).spawn().unwrap());
            let mut status = None;
            let died = eventually(SOON, "the process dies", async || {
                status = worker.0.try_wait().unwrap();
                status.is_some()
            });
            let died = died.await.is_ok();
            assert!(died && !status.unwrap().success(), "it was to die at {step}: {status:?}");
            self.outbox.expire_leases().await;
        }
    }

    /// What waiting for the leases to run out would do: PostgreSQL notices that a process is dead, and then its leases end.
    pub async fn expire_leases(&self) {
        let open = "select count(*) from pg_stat_activity
                     where datname = current_database() and application_name = 'aftercommit-worker'
                       and xact_start is not null and query not like '%aftercommit.lease%'";
        // Another one may be at work meanwhile.
        let _ = eventually(Duration::from_secs(2), "open transactions end", async || {
            sqlx::query_scalar::<_, i64>(open).fetch_one(&self.outbox.pool).await.unwrap() == 0
        })
        .await;
        self.outbox.expire_leases().await;
    }

    /// The worker's program with a file of that content.
    pub fn process(&self, toml: &str) -> WorkerProcess {
        WorkerProcess(self.command(toml).spawn().unwrap())
    }

    /// The command that runs it, its consumers provisioned.
    pub fn command(&self, toml: &str) -> Command {
        // Each has a file of its own: another process may be reading the one before.
        let file = std::env::temp_dir().join(format!("{}.toml", unique_name("worker")));
        std::fs::write(&file, toml).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command
                .args(arguments)
                .arg("--config")
                .arg(&file)
                .env("DATABASE_URL", &self.outbox.postgres.url)
                .env("AFTERCOMMIT_PGBOUNCER", self.outbox.postgres.pooled.to_string())
                .env("NATS_URL", &self.outbox.nats.url)
                .env("AFTERCOMMIT_STREAM", &self.outbox.naming.stream)
                .env("AFTERCOMMIT_SUBJECT_PREFIX", self.outbox.naming.prefix.to_string())
                .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
                .stdin(Stdio::null());
            command
        };
        let provisioned = run(env!("CARGO_BIN_EXE_aftercommit"), &["provision"]).output().unwrap();
        assert!(provisioned.status.success(), "{}", String::from_utf8_lossy(&provisioned.stderr));
        run(env!("CARGO_BIN_EXE_aftercommit-worker"), &[])
    }
}

/// The worker of a process that [`Work::child`] started, still without subscribers. None when the test runner started it.
pub fn child_worker() -> Option<Worker> {
    let stream = std::env::var("CHILD_STREAM").ok()?;
    let setting = |name| std::env::var(name).unwrap();
    let postgres = PostgresConfig::new(setting("CHILD_DATABASE"));
    let nats = NatsConfig { url: setting("CHILD_NATS"), ..NatsConfig::default() };
    let prefix = SubjectPrefix::new(setting("CHILD_PREFIX")).unwrap();
    Some(Worker::new(postgres, nats, Naming { stream, prefix, ..Naming::default() }))
}

/// A worker in this process. Dropping it is like a crash: transactions are rolled back, nothing is given back.
pub struct RunningWorker {
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
    monitor: Monitor,
}

impl RunningWorker {
    pub fn start(worker: Worker) -> Self {
        let stop = CancellationToken::new();
        let monitor = worker.monitor();
        let task = tokio::spawn(worker.run(stop.clone()));
        Self { stop, task, monitor }
    }

    pub fn report(&self) -> WorkerReport {
        self.monitor.report()
    }

    /// Stops in an orderly way.
    pub async fn stop(mut self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, &mut self.task).await.unwrap().unwrap().unwrap();
    }
}

impl Drop for RunningWorker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A worker in a process of its own.
pub struct WorkerProcess(pub Child);

impl WorkerProcess {
    /// SIGKILL.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// SIGTERM, and the exit status.
    pub fn stop(mut self) -> Option<i32> {
        Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
