//! Reconcilers: when they run, what becomes of items and runs that fail, and what is written down of it.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use aftercommit::reconciler::{Drift, ItemError, Mode, Outcome, Reconciler, Runner, Scope, Summary};
use aftercommit::testing::eventually;
use sqlx::{PgPool, PgTransaction};
use support::{Database, SOON};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

const HOUR: Duration = Duration::from_secs(3600);

/// Items whose `value` should be twice their `source`, and a log of which were looked at.
const TABLES: &str = "
    create table item (key text primary key, source int not null, value int not null, check (value <> 13));
    create table visit (id bigint generated always as identity, key text not null);";

/// Doubles.
#[derive(Clone)]
struct Doubles {
    interval: Duration,
    page_size: i64,
    /// Whether pages can be read.
    broken: Arc<AtomicBool>,
    /// How often a page was read.
    pages: Arc<AtomicI64>,
}

impl Doubles {
    fn every(interval: Duration) -> Self {
        Self { interval, page_size: 3, broken: Arc::default(), pages: Arc::default() }
    }
}

impl Reconciler for Doubles {
    fn name(&self) -> &str {
        "doubles"
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn page_size(&self) -> i64 {
        self.page_size
    }

    fn time_limit(&self) -> Duration {
        Duration::from_millis(800)
    }

    async fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<String>, ItemError> {
        self.pages.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            return Err("the list of items is on fire".into());
        }
        let sql = "select key from item where $1 is null or key > $1 order by key limit $2";
        Ok(sqlx::query_scalar(sql).bind(after).bind(limit).fetch_all(&mut **tx).await?)
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, key: &str) -> Result<Drift, ItemError> {
        sqlx::query("insert into visit (key) values ($1)").bind(key).execute(&mut **tx).await?;
        let double = "update item set value = source * 2 where key = $1 and value <> source * 2";
        let changed = sqlx::query(double).bind(key).execute(&mut **tx).await?.rows_affected();
        match key.split('-').next().unwrap_or_default() {
            "error" => return Err("the item says no".into()),
            "sql" => {
                // The error of the statement is dropped, the transaction is aborted all the same.
                let _ = sqlx::query("update item set value = 13").execute(&mut **tx).await;
            }
            "panic" => panic!("the item panics"),
            "slow" => _ = sqlx::query("select pg_sleep(60)").execute(&mut **tx).await?,
            "hang" => std::future::pending().await,
            _ => {}
        }
        Ok(Drift::of(changed))
    }
}

struct Stage {
    database: Database,
    pool: PgPool,
}

impl Stage {
    /// With these items, all of them wrong.
    async fn new(keys: &[&str]) -> Self {
        let database = Database::migrated().await;
        database.execute(TABLES).await;
        let pool = database.pool().await;
        let stage = Self { database, pool };
        stage.disturb(keys).await;
        stage
    }

    async fn disturb(&self, keys: &[&str]) {
        let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
        let sql = "insert into item select key, n, -1 from unnest($1::text[]) with ordinality as t(key, n)
                   on conflict (key) do update set value = -1";
        sqlx::query(sql).bind(keys).execute(&self.pool).await.unwrap();
    }

    fn runner(&self, doubles: &Doubles) -> Runner {
        Runner::new(self.database.config.clone()).reconciler(doubles.clone())
    }

    fn start(&self, doubles: &Doubles) -> Running {
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(self.runner(doubles).run(stop.clone())));
        Running { stop, task }
    }

    async fn if_due(&self, doubles: &Doubles) -> Summary {
        self.runner(doubles).run_if_due("doubles").await.unwrap()
    }

    async fn now(&self, doubles: &Doubles, scope: Scope) -> Summary {
        self.runner(doubles).run_now("doubles", scope, Mode::Repair).await.unwrap()
    }

    async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    async fn texts(&self, sql: &'static str) -> Vec<String> {
        sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap()
    }

    /// The items that are still wrong.
    async fn wrong(&self) -> Vec<String> {
        self.texts("select key from item where value <> source * 2 order by key").await
    }

    /// The results of the runs, in their order.
    async fn results(&self) -> Vec<String> {
        self.texts("select coalesce(result, 'open') from aftercommit.reconcile_run order by id").await
    }

    async fn until(&self, what: &str, sql: &'static str) {
        let holds = async || sqlx::query_scalar(sql).fetch_one(&self.pool).await.is_ok_and(|holds: bool| holds);
        eventually(SOON, what, holds).await.unwrap();
    }
}

struct Running {
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), aftercommit::Error>>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn numbers(summary: &Summary) -> [u64; 4] {
    [summary.scanned, summary.found, summary.repaired, summary.failed]
}

fn keys(keys: &[&str]) -> Scope {
    Scope::Keys(keys.iter().map(ToString::to_string).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_repairs_what_is_wrong() {
    let stage = Stage::new(&["a", "b", "c", "d", "e", "f", "g"]).await;
    let summary = stage.if_due(&Doubles::every(HOUR)).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    assert_eq!(numbers(&summary), [7, 7, 7, 0]);
    assert_eq!(stage.wrong().await, [""; 0]);
    assert_eq!(summary.to_string(), "reconciler=doubles result=ran scanned=7 found=7 repaired=7 failed=0");
    let again = stage.now(&Doubles::every(HOUR), Scope::Full).await;
    assert_eq!(numbers(&again), [7, 0, 0, 0]);
    assert_eq!(stage.count("select repaired_total from aftercommit.reconciler").await, 7);
}
