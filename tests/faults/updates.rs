//! Rolling updates: processes are replaced one after the other while events flow, and the schema is migrated under those
//! that run, by this version and by a newer one.

use std::time::Duration;

use aftercommit::config::Schema;
use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, unique_name};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool};

use super::live::{Live, start};
use super::support::{Outbox, RelayProcess, SOON, Writers};

/// A process may take so long to end in an orderly way; Kubernetes waits for 30 seconds.
const GRACE: Duration = Duration::from_secs(10);

/// Processes that are replaced by others of the same kind.
struct Fleet<'a> {
    live: &'a Live,
    processes: Vec<(&'static str, RelayProcess)>,
}

impl<'a> Fleet<'a> {
    async fn start(live: &'a Live, names: &[&'static str]) -> Self {
        let mut fleet = Self { live, processes: Vec::new() };
        for name in names {
            fleet.processes.push((name, fleet.run(name).await));
        }
        fleet
    }

    /// Starts one, and waits until it is ready.
    async fn run(&self, name: &str) -> RelayProcess {
        let (command, ready) = match name.split('-').next().unwrap() {
            "relay" => (self.live.relay(name), ["leading", "relay started"]),
            "worker" => (self.live.worker(name), ["active", "standing by"]),
            _ => {
                let mut command = self.live.tool(name);
                command.args(["reconcile", "--leg", "outbox", "--repair", "--every", "1s"]);
                (command, ["running", "running"])
            }
        };
        let said = self.live.log(name).len();
        let process = start(command);
        let waited = eventually(SOON, "the process is ready", async || {
            let log = self.live.log(name).split_off(said);
            ready.iter().any(|word| log.contains(word))
        });
        assert!(waited.await.is_ok(), "{name} is not ready: {}", self.live.log(name));
        process
    }

    /// Replaces each of them when the one before is at work.
    async fn replace(&mut self, writers: &Writers) {
        for n in 0..self.processes.len() {
            let (name, old) = &mut self.processes[n];
            let name = *name;
            old.signal("-TERM");
            let status = old.ends(GRACE).await;
            let log = self.live.log(name);
            assert_eq!(status.code(), Some(0), "{name}: {log}");
            // It gave its lease up, so that nobody waits until that runs out.
            assert!(!log.contains("was not released") && !log.contains("run out by itself"), "{name}: {log}");
            let new = self.run(name).await;
            self.processes[n].1 = new;
            self.live.goes_on(writers, 5).await;
        }
    }
}

const ALL: [&str; 6] = ["relay-0", "relay-1", "worker-0", "worker-1", "worker-2", "reconciler"];

#[tokio::test(flavor = "multi_thread")]
async fn all_processes_are_replaced_twice_under_load() {
    let postgres = Postgres::shared().await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    let mut fleet = Fleet::start(&live, &ALL).await;
    let writers = live.write().await;
    live.goes_on(&writers, 50).await;
    fleet.replace(&writers).await;
    fleet.replace(&writers).await;
    writers.stop().await;
    live.assert_whole().await;
}

/// The schema as the version before the last migration made it.
async fn older_schema(url: &str, up_to: &str) -> PgPool {
    let script = operator::migrations_sql(&Schema::default());
    let end = script.find(up_to).unwrap();
    let pool = PgPoolOptions::new().max_connections(40).acquire_timeout(SOON).connect(url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(script[..end].to_string())).execute(&pool).await.unwrap();
    pool
}

/// The beginning of the last migration in the printed script.
fn last_migration() -> String {
    let script = operator::migrations_sql(&Schema::default());
    let headings = script.lines().filter_map(|line| line.strip_prefix("-- "));
    let number = |heading: &str| heading.split_once(' ')?.0.parse::<u32>().ok();
    let last = headings.filter_map(number).max().unwrap();
    format!("\n-- {last:04} ")
}

async fn outbox_of(url: String, pool: PgPool) -> Outbox {
    let name = unique_name("t");
    let nats = NatsConfig { url: Nats::shared().await.unwrap().url(), ..NatsConfig::default() };
    let naming =
        Naming { stream: name.to_uppercase(), prefix: SubjectPrefix::new(name).unwrap(), source: "/test".into() };
    operator::provision(&nats, &naming).await.unwrap();
    Outbox { postgres: PostgresConfig::new(url), nats, naming, pool }
}

/// What a newer version may do while an older one runs: it adds. Each statement is a transaction of its own, so that it
/// waits for nobody while somebody waits for it.
async fn expand(pool: &PgPool) {
    let tables: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class where relnamespace = 'aftercommit'::regnamespace and relkind = 'r'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(tables.len() > 15, "{tables:?}");
    for table in tables {
        let sql = format!("alter table aftercommit.{table} add column of_the_future text not null default 'x'");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await.unwrap();
    }
    sqlx::raw_sql(
        "create table aftercommit.of_the_future (id bigint);
         insert into aftercommit.migrations (version, description, success, checksum, execution_time)
         values (9999, 'of the future', true, '', 0)",
    )
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_is_migrated_under_load_to_this_and_a_newer_version() {
    let postgres = Postgres::shared().await.unwrap();
    let (first, second) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let pool = older_schema(&first, &last_migration()).await;
    older_schema(&second, &last_migration()).await;
    let live = Live::on(outbox_of(first, pool).await, PostgresConfig::new(second)).await;
    let mut fleet = Fleet::start(&live, &ALL).await;
    let writers = live.write().await;
    live.goes_on(&writers, 50).await;

    for config in [&live.outbox.postgres, &live.database] {
        assert_eq!(operator::migrate(config).await.unwrap().len(), 1, "the last one was missing");
    }
    live.goes_on(&writers, 50).await;

    for (pool, config) in [(&live.outbox.pool, &live.outbox.postgres), (&live.books, &live.database)] {
        expand(pool).await;
        assert_eq!(operator::migrate(config).await.unwrap(), Vec::<String>::new(), "there is nothing to do");
    }
    live.goes_on(&writers, 50).await;
    // Those of the older version can also be started again.
    fleet.replace(&writers).await;
    live.goes_on(&writers, 50).await;
    writers.stop().await;
    live.assert_whole().await;
}

/// Programs that are there before the schema is say what to do, and go on once it is done.
#[tokio::test(flavor = "multi_thread")]
async fn processes_wait_for_a_schema_that_is_too_old() {
    let postgres = Postgres::shared().await.unwrap();
    let (first, second) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let pool = older_schema(&first, "\n-- 0002 ").await;
    older_schema(&second, "\n-- 0002 ").await;
    let live = Live::on(outbox_of(first, pool).await, PostgresConfig::new(second)).await;
    let mut processes = [("relay", start(live.relay("relay"))), ("worker", start(live.worker("worker")))];
    let writers = live.write().await;
    for (name, _) in &processes {
        live.says(name, "run `aftercommit migrate`").await;
    }
    writers.more(20).await;
    for config in [&live.outbox.postgres, &live.database] {
        operator::migrate(config).await.unwrap();
    }
    for (name, process) in &mut processes {
        assert!(process.0.try_wait().unwrap().is_none(), "{name} still runs: {}", live.log(name));
    }
    live.goes_on(&writers, 20).await;
    writers.stop().await;
    live.assert_whole().await;
}

/// So do programs that need a column which is still to come.
#[tokio::test(flavor = "multi_thread")]
async fn processes_wait_for_a_column_that_is_missing() {
    let postgres = Postgres::shared().await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    let rename = async |sql: &'static str| {
        for pool in [&live.outbox.pool, &live.books] {
            sqlx::raw_sql(sql).execute(pool).await.unwrap();
        }
    };
    rename("alter table aftercommit.lease rename column epoch to of_the_past").await;
    let _processes = [start(live.relay("relay")), start(live.worker("worker"))];
    for name in ["relay", "worker"] {
        live.says(name, "run `aftercommit migrate`").await;
    }
    rename("alter table aftercommit.lease rename column of_the_past to epoch").await;
    let writers = live.write().await;
    live.goes_on(&writers, 20).await;
    writers.stop().await;
    live.assert_whole().await;
}
