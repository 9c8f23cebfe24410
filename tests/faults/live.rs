//! A system of processes under load: what was committed, what became of it, and who leads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::testing::eventually;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinHandle;

use super::support::{Directory, Outbox, RelayProcess, SOON, Writers};

/// What is committed, also when it is no longer in the outbox.
const LEDGER: &str = "
    create table ledger (event_id uuid primary key);
    create function note() returns trigger language plpgsql as $$
        begin insert into public.ledger values (new.event_id); return new; end $$;
    create trigger note after insert on aftercommit.outbox for each row execute function note()";

/// What the subscriber does: it writes down what it sees.
const SEEN: &str = "
    create table seen (id bigint generated always as identity, event_id uuid not null, key text, version int);
    create function see(event jsonb) returns void language sql as $$
        insert into seen (event_id, key, version)
        values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'version')::int) $$";

const FILE: &str = "
    [[subscriber]]
    name = 'books'
    sql.function = 'see'
    types = ['*']
    concurrency = 3
    backoff = { first = '50ms', max = '200ms' }";

pub struct Live {
    pub outbox: Outbox,
    /// The subscriber's database.
    pub database: PostgresConfig,
    pub books: PgPool,
    pub files: Directory,
}

impl Live {
    /// Everything is provisioned, and no process runs yet.
    pub async fn new(publisher_url: String, subscriber_url: String, nats_url: String) -> Self {
        let outbox = Outbox::new(publisher_url, nats_url).await;
        let database = PostgresConfig::new(subscriber_url);
        operator::migrate(&database).await.unwrap();
        Self::on(outbox, database).await
    }

    /// The same where somebody else has made the schema.
    pub async fn on(outbox: Outbox, database: PostgresConfig) -> Self {
        sqlx::raw_sql(LEDGER).execute(&outbox.pool).await.unwrap();
        let options = PgPoolOptions::new().max_connections(5).acquire_timeout(SOON);
        let books = options.connect(&database.url).await.unwrap();
        sqlx::raw_sql(SEEN).execute(&books).await.unwrap();
        let live = Self { outbox, database, books, files: Directory::new() };
        live.files.write("worker.toml", FILE);
        let mut provision = live.command(env!("CARGO_BIN_EXE_aftercommit"), &live.database, "provision");
        let provisioned = provision.arg("provision").arg("--config").arg(live.files.path().join("worker.toml"));
        assert!(provisioned.status().unwrap().success(), "{}", live.log("provision"));
        live
    }

    /// A relay that is not started yet; what it says goes into a log of this name.
    pub fn relay(&self, name: &str) -> Command {
        self.command(env!("CARGO_BIN_EXE_aftercommit-relay"), &self.outbox.postgres, name)
    }

    /// A worker that is not started yet.
    pub fn worker(&self, name: &str) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_aftercommit-worker"), &self.database, name);
        command.arg("--config").arg(self.files.path().join("worker.toml"));
        command
    }

    /// The operator's tool at the outbox.
    pub fn tool(&self, name: &str) -> Command {
        self.command(env!("CARGO_BIN_EXE_aftercommit"), &self.outbox.postgres, name)
    }

    fn command(&self, program: &str, database: &PostgresConfig, name: &str) -> Command {
        let log = File::options().create(true).append(true).open(self.log_file(name)).unwrap();
        let mut command = Command::new(program);
        command
            .env("DATABASE_URL", &database.url)
            .env("NATS_URL", &self.outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &self.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.outbox.naming.prefix.to_string())
            .env("AFTERCOMMIT_SOURCE", &self.outbox.naming.source)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        command
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.files.path().join(format!("{name}.log"))
    }

    /// What the process of this name has said.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_file(name)).unwrap_or_default()
    }

    /// Waits until the process of this name has said that.
    pub async fn says(&self, name: &str, words: &str) {
        let said = eventually(SOON, "it says so", async || self.log(name).contains(words)).await;
        assert!(said.is_ok(), "{name} does not say {words:?}: {}", self.log(name));
    }

    pub async fn write(&self) -> Writers {
        Writers::start(&self.outbox.pool, 4, 6).await
    }

    /// So many commits more, and waits until all of them are handled.
    pub async fn goes_on(&self, writers: &Writers, commits: u64) {
        writers.more(commits).await;
        self.handled(SOON).await;
    }

    /// Waits until everything that is committed now is handled.
    pub async fn handled(&self, soon: Duration) {
        let committed = ids(&self.outbox.pool, "select event_id::text from ledger").await;
        let mut missing = committed.len();
        let waited = eventually(soon, "everything is handled", async || {
            let seen = ids(&self.books, "select event_id::text from seen").await;
            missing = committed.difference(&seen).count();
            missing == 0
        });
        let waited = waited.await;
        assert!(waited.is_ok(), "{missing} of {} events are not handled", committed.len());
    }

    /// Waits until everything is handled, and checks that it was committed, is in the stream once, and took effect once,
    /// in the order of its key, and that nothing counts as failed. Returns how many events there were.
    pub async fn assert_whole(&self) -> usize {
        self.handled(SOON).await;
        let committed = ids(&self.outbox.pool, "select event_id::text from ledger").await;
        let stored = self.outbox.messages().await.into_iter().map(|message| {
            let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
            let key = message.headers.get("ce-partitionkey").cloned();
            (message.headers["ce-id"].clone(), key, payload["version"].as_i64())
        });
        assert_once_in_order("in the stream", &committed, stored);
        let seen: Vec<(String, Option<String>, Option<i64>)> =
            sqlx::query_as("select event_id::text, key, version::bigint from seen order by id")
                .fetch_all(&self.books)
                .await
                .unwrap();
        assert_once_in_order("seen", &committed, seen);
        for (pool, what) in [
            (&self.books, "select count(*) from aftercommit.attempt"),
            (&self.books, "select count(*) from aftercommit.dead_letter"),
            (&self.outbox.pool, "select count(*) from aftercommit.parked"),
        ] {
            assert_eq!(sqlx::query_scalar::<_, i64>(what).fetch_one(pool).await.unwrap(), 0, "{what}");
        }
        let back = "select count(*) from (select epoch, lag(epoch) over (order by seq) as before from aftercommit.relay_log) log
                     where epoch < before";
        assert_eq!(
            sqlx::query_scalar::<_, i64>(back).fetch_one(&self.outbox.pool).await.unwrap(),
            0,
            "a relay wrote to the log after its successor had"
        );
        committed.len()
    }

    /// Holder and epoch of who leads: the relay, or the subscriber's worker.
    pub async fn leads(&self, relay: bool) -> Option<(String, i64)> {
        let pool = if relay { &self.outbox.pool } else { &self.books };
        leader(pool, if relay { "relay" } else { "subscriber:books" }).await
    }
}

/// Holder and epoch of a lease.
async fn leader(pool: &PgPool, lease: &str) -> Option<(String, i64)> {
    let sql = "select holder, epoch from aftercommit.lease where name = $1";
    sqlx::query_as(sql).bind(lease).fetch_optional(pool).await.unwrap_or_default()
}

async fn ids(pool: &PgPool, sql: &'static str) -> BTreeSet<String> {
    sqlx::query_scalar(sql).fetch_all(pool).await.unwrap().into_iter().collect()
}

/// That it is the committed events, each once, and those of a key with their versions in order.
fn assert_once_in_order(
    place: &str,
    committed: &BTreeSet<String>,
    events: impl IntoIterator<Item = (String, Option<String>, Option<i64>)>,
) {
    let (mut times, mut versions) = (BTreeMap::<String, usize>::new(), BTreeMap::<String, Vec<i64>>::new());
    for (id, key, version) in events {
        *times.entry(id).or_default() += 1;
        if let (Some(key), Some(version)) = (key, version) {
            versions.entry(key).or_default().push(version);
        }
    }
    let lost = committed.iter().filter(|id| !times.contains_key(*id)).count();
    let ghosts = times.keys().filter(|id| !committed.contains(*id)).count();
    let doubled = times.values().filter(|times| **times > 1).count();
    assert_eq!((lost, ghosts, doubled), (0, 0, 0), "{place}: lost, never committed, twice, of {}", committed.len());
    for (key, versions) in versions {
        let last = i64::try_from(versions.len()).unwrap();
        assert_eq!(versions, (1..=last).collect::<Vec<_>>(), "{place}: {key}");
    }
}

/// Looks all the time at who holds a lease, and fails when an epoch goes back or has two holders.
pub struct Watch(JoinHandle<()>);

impl Watch {
    pub fn over(pool: &PgPool, lease: &'static str) -> Self {
        let pool = pool.clone();
        Self(tokio::spawn(async move {
            let (mut last, mut holders) = (0, BTreeMap::new());
            loop {
                if let Some((holder, epoch)) = leader(&pool, lease).await {
                    assert!(epoch >= last, "{lease}: epoch {epoch} after {last}");
                    assert_eq!(
                        *holders.entry(epoch).or_insert_with(|| holder.clone()),
                        holder,
                        "{lease}: epoch {epoch}"
                    );
                    last = epoch;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }))
    }

    pub async fn stop(self) {
        self.0.abort();
        let ended = self.0.await;
        assert!(ended.is_err_and(|error| error.is_cancelled()), "what was watched went wrong");
    }
}

/// Runs it.
pub fn start(mut command: Command) -> RelayProcess {
    RelayProcess(command.spawn().unwrap())
}
