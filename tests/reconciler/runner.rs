//! Reconcilers: when they run, what becomes of items and runs that fail, and what is written down of it.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use crate::support::{Database, Roles, SOON, succeeded};
use aftercommit::ErrorKind;
use aftercommit::config::PostgresConfig;
use aftercommit::health::Check;
use aftercommit::reconciler::{Drift, ItemError, Mode, Outcome, Reconciler, Runner, Scope, Summary};
use aftercommit::testing::eventually;
use futures_util::future::join_all;
use metrics_exporter_prometheus::PrometheusBuilder;
use sqlx::{PgPool, PgTransaction};
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
            "ends" => {
                _ = sqlx::query("select pg_terminate_backend(pg_backend_pid())").execute(&mut **tx).await?;
            }
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

#[tokio::test(flavor = "multi_thread")]
async fn of_many_runners_one_runs_per_interval() {
    let stage = Stage::new(&["a", "b", "c", "d"]).await;
    let doubles = Doubles::every(Duration::from_secs(3));
    let runners: Vec<Running> = (0..8).map(|_| stage.start(&doubles)).collect();
    stage
        .until("the second run", "select count(*) >= 2 from aftercommit.reconcile_run where ended_at is not null")
        .await;
    stage
        .until("the third run", "select count(*) >= 3 from aftercommit.reconcile_run where ended_at is not null")
        .await;
    for runner in runners {
        runner.stop().await;
    }
    let early = "select count(*) from (
        select started_at - lag(ended_at) over (order by id) as pause from aftercommit.reconcile_run) as r
         where pause < interval '3 seconds'";
    assert_eq!(stage.count(early).await, 0, "a run before the interval was over");
    assert!(stage.results().await.iter().all(|result| result == "ok"));
    let [runs, visits] = [
        stage.count("select count(*) from aftercommit.reconcile_run").await,
        stage.count("select count(*) from visit").await,
    ];
    assert_eq!(visits, runs * 4, "each run looks at each item once");
}

/// All at the same moment, without the rhythm of a runner.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_at_the_same_moment_one_runs_and_the_others_say_why_not() {
    let stage = Stage::new(&["a", "b", "c", "d"]).await;
    let doubles = Doubles::every(HOUR);
    let tries = (0..12).map(|_| {
        let runner = stage.runner(&doubles);
        tokio::spawn(async move { runner.run_if_due("doubles").await.unwrap() })
    });
    let mut ran = 0;
    for summary in tries.collect::<Vec<_>>() {
        match summary.await.unwrap().outcome {
            Outcome::Ran => ran += 1,
            Outcome::Skipped(reason) => {
                assert!(reason.contains("runs it since") || reason.contains("last success"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((ran, stage.results().await.len()), (1, 1));
    let skipped = stage.if_due(&doubles).await;
    assert!(skipped.to_string().starts_with("reconciler=doubles result=skipped: last success"), "{skipped}");
    assert!(skipped.to_string().contains(" s ago, due in 3"), "{skipped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_does_not_use_up_the_interval() {
    let stage = Stage::new(&["a", "b"]).await;
    let doubles = Doubles::every(HOUR);
    doubles.broken.store(true, Ordering::SeqCst);
    let failed = stage.if_due(&doubles).await;
    assert!(failed.to_string().starts_with("reconciler=doubles result=failed "), "{failed}");
    assert!(failed.to_string().contains("the list of items is on fire"), "{failed}");
    assert_eq!(
        stage
            .count(
                "select count(*) from aftercommit.reconciler where last_success_at is null and failures = 1
        and last_attempt_at is not null and retry_at <= clock_timestamp() + interval '2 seconds'"
            )
            .await,
        1
    );
    // At once is too soon, and it says so.
    let skipped = stage.if_due(&doubles).await;
    assert!(skipped.to_string().contains("failed 1 times in a row, next try in"), "{skipped}");

    // A new process knows of it, tries again long before the hour is over, and then keeps to the hour.
    let running = stage.start(&doubles);
    stage.until("more failures", "select failures >= 2 from aftercommit.reconciler").await;
    doubles.broken.store(false, Ordering::SeqCst);
    stage.until("a success", "select last_success_at is not null from aftercommit.reconciler").await;
    running.stop().await;
    assert_eq!(stage.wrong().await, [""; 0]);
    let results = stage.results().await;
    let (last, before) = results.split_last().unwrap();
    assert!(last == "ok" && before.len() >= 2 && before.iter().all(|result| result == "failed"), "{results:?}");
    let settled =
        "select failures = 0 and retry_at is null and last_success_at > last_attempt_at from aftercommit.reconciler";
    stage.until("no failure is left", settled).await;
    let error = "select error from aftercommit.reconcile_run order by id limit 1";
    assert_eq!(stage.texts(error).await, ["the next page of items cannot be read: the list of items is on fire"]);

    // Failing again: what was known of the last success stays.
    doubles.broken.store(true, Ordering::SeqCst);
    assert!(matches!(stage.now(&doubles, Scope::Full).await.outcome, Outcome::Failed(_)));
    stage.until("both times", "select last_success_at < last_attempt_at from aftercommit.reconciler").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_item_neither_stops_nor_undoes_the_others() {
    let bad = ["error-1", "hang-1", "panic-1", "slow-1", "sql-1"];
    let stage = Stage::new(&["a", "b", "f", "i", "q", "sz", "z"]).await;
    stage.disturb(&bad).await;
    let doubles = Doubles { page_size: 2, ..Doubles::every(HOUR) };
    let summary = stage.if_due(&doubles).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    assert_eq!(numbers(&summary), [12, 7, 7, 5]);
    assert_eq!(stage.wrong().await, bad, "only the bad ones are still wrong");
    let reasons: Vec<(&str, &str)> =
        summary.failures.iter().map(|failure| (failure.item.as_str(), failure.reason.as_str())).collect();
    assert_eq!(reasons[0], ("error-1", "the item says no"));
    assert_eq!(reasons[1], ("hang-1", "it ran longer than its time limit of 800ms"));
    assert_eq!(reasons[2], ("panic-1", "it panicked: the item panics"));
    assert!(reasons[3].0 == "slow-1" && (reasons[3].1.contains("timeout") || reasons[3].1.contains("time limit")));
    assert!(reasons[4].0 == "sql-1" && reasons[4].1.contains("current transaction is aborted"), "{reasons:?}");
    let findings = "select item || ' ' || state from aftercommit.finding where kind = 'item_failed' order by item";
    assert_eq!(stage.texts(findings).await, bad.map(|item| format!("{item} open")));

    // One of them is well again, one is gone: the next sweep settles what was found, and nothing is found twice.
    stage.database.execute("delete from item where key in ('slow-1', 'hang-1', 'panic-1')").await;
    stage.database.execute("update item set key = 'ok' where key = 'sql-1'").await;
    stage.now(&doubles, Scope::Full).await;
    let expected = ["error-1 open", "hang-1 gone", "panic-1 gone", "slow-1 gone", "sql-1 gone"];
    assert_eq!(stage.texts(findings).await, expected);
    let again = "select count(*) from aftercommit.finding where item = 'error-1' and last_run > first_run";
    assert_eq!(stage.count(again).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_in_which_every_item_fails_has_failed() {
    let stage = Stage::new(&["error-1", "error-2"]).await;
    let summary = stage.if_due(&Doubles::every(HOUR)).await;
    assert!(summary.to_string().contains("result=failed"), "{summary}");
    assert!(summary.to_string().ends_with(": every item failed, error-1: the item says no"), "{summary}");
    stage
        .until(
            "it is tried again",
            "select last_success_at is null and retry_at is not null from aftercommit.reconciler",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_on_demand_bypasses_the_interval() {
    let stage = Stage::new(&["a", "b", "c", "d"]).await;
    let doubles = Doubles::every(HOUR);
    stage.if_due(&doubles).await;
    stage.disturb(&["a", "b", "c", "d"]).await;
    assert!(matches!(stage.if_due(&doubles).await.outcome, Outcome::Skipped(_)));

    let summary = stage.now(&doubles, keys(&["b", "nobody", "d"])).await;
    assert_eq!((&summary.outcome, numbers(&summary)), (&Outcome::Ran, [3, 2, 2, 0]));
    assert_eq!(stage.wrong().await, ["a", "c"], "only what was asked for");
    let summary = stage.now(&doubles, Scope::Full).await;
    assert_eq!((&summary.outcome, numbers(&summary)), (&Outcome::Ran, [4, 2, 2, 0]));
    assert_eq!(stage.wrong().await, [""; 0]);
    let runs = "select cause || ' ' || scope from aftercommit.reconcile_run order by id";
    assert_eq!(stage.texts(runs).await, ["scheduled new", "demand keys", "demand full"]);
}

/// Neither a run for single keys nor one that only looks puts off the next scheduled run.
#[tokio::test(flavor = "multi_thread")]
async fn keys_and_reports_do_not_count_as_the_run_of_the_interval() {
    let stage = Stage::new(&["a", "b", "error-1"]).await;
    let doubles = Doubles::every(HOUR);
    stage.now(&doubles, keys(&["a"])).await;
    assert!(matches!(stage.now(&doubles, keys(&["error-1"])).await.outcome, Outcome::Failed(_)));
    stage.runner(&doubles).run_now("doubles", Scope::Full, Mode::Report).await.unwrap();
    assert_eq!(
        stage.count("select count(*) from aftercommit.reconciler where last_success_at is null and failures = 0").await,
        1
    );
    assert_eq!(stage.if_due(&doubles).await.outcome, Outcome::Ran);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_changes_nothing_and_says_what_it_would() {
    let stage = Stage::new(&["a", "b", "c"]).await;
    let doubles = Doubles::every(HOUR);
    let summary = stage.runner(&doubles).run_now("doubles", Scope::Full, Mode::Report).await.unwrap();
    assert_eq!(numbers(&summary), [3, 3, 0, 0]);
    assert_eq!((stage.wrong().await.len(), stage.count("select count(*) from visit").await), (3, 0));
    let findings = "select kind || ' ' || item || ' ' || state from aftercommit.finding order by item";
    assert_eq!(stage.texts(findings).await, ["drift a open", "drift b open", "drift c open"]);
    stage.if_due(&doubles).await;
    assert_eq!(stage.texts(findings).await, ["drift a repaired", "drift b repaired", "drift c repaired"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_on_demand_waits_for_the_one_under_way() {
    let stage = Stage::new(&["a", "b"]).await;
    let doubles = Doubles::every(HOUR);
    // It gets no further than item a.
    let mut blocker = stage.pool.begin().await.unwrap();
    sqlx::query("lock table visit").execute(&mut *blocker).await.unwrap();
    let slow = tokio::spawn({
        let runner = stage.runner(&doubles);
        async move { runner.run_if_due("doubles").await.unwrap() }
    });
    stage.until("it runs", "select count(*) = 1 from aftercommit.reconcile_run where ended_at is null").await;
    let demanded = tokio::spawn({
        let runner = stage.runner(&doubles);
        async move { runner.run_now("doubles", Scope::Full, Mode::Repair).await.unwrap() }
    });
    blocker.rollback().await.unwrap();
    let (slow, demanded) = (slow.await.unwrap(), demanded.await.unwrap());
    assert!(slow.run.unwrap() < demanded.run.unwrap());
    let overlap = "select count(*) from (
        select started_at < lag(ended_at) over (order by id) as beside from aftercommit.reconcile_run) r where beside";
    assert_eq!(stage.count(overlap).await, 0);
}

/// The position is in the database: the process may end in the middle of a sweep.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_sweep_goes_on_where_it_was() {
    let stage = Stage::new(&["a", "b", "c", "d", "hang-1", "x", "y"]).await;
    let doubles = Doubles { page_size: 2, ..Doubles::every(HOUR) };
    let running = stage.start(&doubles);
    stage.until("two pages are done", "select position ->> 'after' = 'd' from aftercommit.reconciler").await;
    running.stop().await;
    assert_eq!(stage.results().await, ["stopped"]);
    stage.until("no failure", "select failures = 0 and retry_at is null from aftercommit.reconciler").await;
    stage.database.execute("delete from item where key = 'hang-1'; update item set value = -1").await;
    let summary = stage.if_due(&doubles).await;
    assert_eq!((&summary.outcome, numbers(&summary)), (&Outcome::Ran, [2, 2, 2, 0]));
    assert_eq!(stage.wrong().await, ["a", "b", "c", "d"], "they had had their turn");
    // The sweep has ended, so the next one begins at the beginning.
    assert_eq!(numbers(&stage.now(&doubles, Scope::New).await)[0], 6);
}

/// Not a test: the process that dies in the tests below.
#[tokio::test]
#[ignore = "run by another test"]
async fn sweeps_and_dies() {
    let runner = Runner::new(PostgresConfig::new(std::env::var("DATABASE_URL").unwrap()));
    let doubles = Doubles { page_size: 2, ..Doubles::every(HOUR) };
    runner.reconciler(doubles).run(CancellationToken::new()).await.unwrap();
}

/// A sweep in a process of its own that dies at this step.
async fn dies_at(stage: &Stage, fault: &str) {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--ignored", "--exact", "runner::sweeps_and_dies"]).env("DATABASE_URL", &stage.database.config.url);
    process.env("AFTERCOMMIT_FAULT", fault);
    let died = tokio::task::spawn_blocking(move || process.output().unwrap()).await.unwrap();
    assert!(!died.status.success(), "{fault} was not passed");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    let steps = ["begun:1", "item:3", "committed:4", "page:1", "saved:2", "page:4", "saved:4", "done:1", "recorded:1"];
    let kills = steps.map(async |step| {
        let stage = Stage::new(&["a", "b", "c", "d", "e", "f", "g"]).await;
        dies_at(&stage, &format!("reconciler-{step}")).await;
        let running = stage.start(&Doubles { page_size: 2, ..Doubles::every(HOUR) });
        stage.until("a success", "select last_success_at is not null from aftercommit.reconciler").await;
        running.stop().await;
        assert_eq!(stage.wrong().await, [""; 0], "{step}");
        let expected: &[&str] = if step == "recorded:1" { &["ok"] } else { &["failed", "ok"] };
        assert_eq!(stage.results().await, expected, "{step}");
        // The open page comes again at most.
        let visits = stage.count("select count(*) from visit").await;
        assert!((7..=9).contains(&visits), "{step}: {visits} visits");
    });
    join_all(kills).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_is_closed_as_failed_and_its_sweep_goes_on() {
    let stage = Stage::new(&["a", "b", "c", "d", "e", "f", "g"]).await;
    // The items of the second page are done, its position is not saved.
    dies_at(&stage, "reconciler-page:2").await;
    assert_eq!(
        (stage.results().await, stage.wrong().await),
        (vec!["open".into()], ["e", "f", "g"].map(Into::into).into())
    );
    let other = stage.if_due(&Doubles::every(HOUR)).await;
    assert!(other.to_string().contains("runs it since"), "it may be alive: {other}");

    let running = stage.start(&Doubles { page_size: 2, ..Doubles::every(HOUR) });
    stage.until("a success", "select last_success_at is not null from aftercommit.reconciler").await;
    running.stop().await;
    assert_eq!(stage.wrong().await, [""; 0]);
    assert_eq!(stage.results().await, ["failed", "ok"]);
    let error = "select error from aftercommit.reconcile_run where result = 'failed'";
    assert!(stage.texts(error).await[0].starts_with("its process died, or lost the database: "));
    let visits = "select key || count(*) from visit group by key order by key";
    assert_eq!(stage.texts(visits).await, ["a1", "b1", "c2", "d2", "e1", "f1", "g1"], "only the open page comes again");
}

/// A process that was frozen wakes up when another one has taken over.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_taken_over_stops_and_leaves_the_position_alone() {
    let stage = Stage::new(&["a", "b", "c", "d"]).await;
    let doubles = Doubles { page_size: 2, ..Doubles::every(HOUR) };
    let mut blocker = stage.pool.begin().await.unwrap();
    sqlx::query("lock table visit").execute(&mut *blocker).await.unwrap();
    let late = tokio::spawn({
        let runner = stage.runner(&Doubles { page_size: 4, ..doubles.clone() });
        async move { runner.run_if_due("doubles").await.unwrap() }
    });
    stage.until("it runs", "select count(*) = 1 from aftercommit.reconcile_run where ended_at is null").await;
    // What another process does when the signs of life have stopped.
    let closed = "update aftercommit.reconcile_run set ended_at = clock_timestamp(), result = 'failed'";
    stage.database.execute(closed).await;
    stage.database.execute("update aftercommit.reconciler set position = '{\"since\": 7, \"after\": \"b\"}'").await;
    blocker.rollback().await.unwrap();
    let late = late.await.unwrap();
    assert!(late.to_string().ends_with(": another process has taken over"), "{late}");
    assert_eq!(stage.texts("select position ->> 'after' from aftercommit.reconciler").await, ["b"]);
    assert_eq!(stage.count("select count(*) from aftercommit.reconciler where last_success_at is null").await, 1);
}

/// No item is to blame for it, and nothing is lost by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_fails_neither_the_run_nor_the_item() {
    let stage = Stage::new(&["a", "b", "c"]).await;
    let doubles = Doubles::every(HOUR);
    let mut blocker = stage.pool.begin().await.unwrap();
    sqlx::query("lock table visit").execute(&mut *blocker).await.unwrap();
    let run = tokio::spawn({
        let runner = stage.runner(&doubles);
        async move { runner.run_if_due("doubles").await.unwrap() }
    });
    let cut = "select count(pg_terminate_backend(pid)) > 0 from pg_stat_activity
                where datname = current_database() and query like 'insert into visit%' and wait_event_type = 'Lock'";
    stage.until("its connection is cut", cut).await;
    blocker.rollback().await.unwrap();
    let summary = run.await.unwrap();
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    assert_eq!((summary.failed, stage.count("select count(*) from aftercommit.finding").await), (0, 0));
    assert_eq!(stage.wrong().await, [""; 0]);
}

/// While the database answers it is the item's doing: the others are reconciled.
#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_ends_its_session_fails_alone() {
    let stage = Stage::new(&["a", "ends-1", "z"]).await;
    let summary = stage.if_due(&Doubles::every(HOUR)).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    assert_eq!(stage.wrong().await, ["ends-1"]);
    let [failure] = &summary.failures[..] else { panic!("{summary}") };
    assert!(failure.reason.starts_with("its database session was lost twice: "), "{}", failure.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_names_the_reconciler_and_its_error() {
    let stage = Stage::new(&["a"]).await;
    let doubles = Doubles::every(Duration::from_secs(1));
    let runner = stage.runner(&doubles);
    let monitor = runner.monitor();
    assert!(!monitor.readiness().ok);
    let stop = CancellationToken::new();
    let _task = AbortOnDropHandle::new(tokio::spawn(runner.run(stop.clone())));
    eventually(SOON, "it is well", async || monitor.readiness().ok && monitor.health().ok).await.unwrap();
    doubles.broken.store(true, Ordering::SeqCst);
    eventually(SOON, "it is unwell", async || !monitor.health().ok).await.unwrap();
    let text = monitor.health().text;
    assert!(text.contains("reconciler doubles failed") && text.contains("the list of items is on fire"), "{text}");
    doubles.broken.store(false, Ordering::SeqCst);
    eventually(SOON, "it is well again", async || monitor.health().ok).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_run_is_refused() {
    let stage = Stage::new(&[]).await;
    let doubles = Doubles::every(HOUR);
    let unknown = stage.runner(&doubles).run_if_due("other").await.unwrap_err();
    assert_eq!(unknown.to_string(), "there is no reconciler other, only doubles");
    let twice = stage.runner(&doubles).reconciler(doubles.clone());
    assert_eq!(twice.run_if_due("doubles").await.unwrap_err().kind(), ErrorKind::Config);
    let never = stage.runner(&Doubles::every(Duration::ZERO)).run(CancellationToken::new()).await;
    assert_eq!(never.unwrap_err().kind(), ErrorKind::Config);
}

/// A page that does not move would be read for ever.
#[tokio::test]
async fn a_page_that_gets_nowhere_fails_the_run() {
    struct Stuck;
    impl Reconciler for Stuck {
        fn name(&self) -> &str {
            "stuck"
        }
        fn interval(&self) -> Duration {
            HOUR
        }
        async fn page(&self, _: &mut PgTransaction<'_>, _: Option<&str>, _: i64) -> Result<Vec<String>, ItemError> {
            Ok(vec!["a".into(), "b".into()])
        }
        async fn reconcile(&self, _: &mut PgTransaction<'_>, _: &str) -> Result<Drift, ItemError> {
            Ok(Drift::None)
        }
    }
    let database = Database::migrated().await;
    let summary = Runner::new(database.config.clone()).reconciler(Stuck).run_if_due("stuck").await.unwrap();
    assert!(summary.to_string().ends_with("the page behind item b ends with that item again"), "{summary}");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_runs_and_settled_findings_are_pruned() {
    let stage = Stage::new(&["a", "error-1"]).await;
    let doubles = Doubles::every(HOUR);
    for _ in 0..3 {
        stage.now(&doubles, Scope::Full).await;
    }
    stage
        .database
        .execute(
            "update aftercommit.reconcile_run set ended_at = ended_at - interval '31 days' where id < 3;
             insert into aftercommit.finding (name, kind, item, first_run, last_run, state, settled_at)
             values ('doubles', 'drift', 'old', 1, 1, 'gone', now() - interval '31 days'),
                    ('doubles', 'drift', 'young', 1, 1, 'gone', now() - interval '29 days')",
        )
        .await;
    stage.now(&doubles, Scope::Full).await;
    assert_eq!(stage.texts("select id::text from aftercommit.reconcile_run order by id").await, ["3", "4"]);
    assert_eq!(stage.texts("select item from aftercommit.finding order by item").await, ["error-1", "young"]);
}

#[test]
fn drift_repairs_and_failures_are_counted_in_metrics() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let stage = Stage::new(&["a", "b", "error-1"]).await;
            let doubles = Doubles::every(HOUR);
            stage.runner(&doubles).run_now("doubles", Scope::Full, Mode::Report).await.unwrap();
            stage.now(&doubles, Scope::Full).await;
            doubles.broken.store(true, Ordering::SeqCst);
            stage.now(&doubles, Scope::Full).await;
            let running = stage.start(&doubles);
            let gauges = async || metrics.render().contains("aftercommit_reconciler_findings{");
            eventually(SOON, "the tables are read", gauges).await.unwrap();
            running.stop().await;
        });
    });
    let rendered = metrics.render();
    for line in [
        "aftercommit_reconciler_runs_total{reconciler=\"doubles\",result=\"ok\"} 2",
        "aftercommit_reconciler_runs_total{reconciler=\"doubles\",result=\"failed\"} 1",
        "aftercommit_reconciler_drift_total{reconciler=\"doubles\"} 4",
        "aftercommit_reconciler_repaired_total{reconciler=\"doubles\"} 2",
        "aftercommit_reconciler_failed_items_total{reconciler=\"doubles\"} 2",
        "aftercommit_reconciler_findings{reconciler=\"doubles\",kind=\"item_failed\"} 1",
        "aftercommit_reconciler_failures{reconciler=\"doubles\"} 1",
    ] {
        assert!(rendered.contains(line), "{line} is not in\n{rendered}");
    }
    assert!(rendered.contains("aftercommit_reconciler_last_success_seconds{reconciler=\"doubles\"}"), "{rendered}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_tool_lists_findings_and_runs() {
    let stage = Stage::new(&["a", "error-1"]).await;
    let tool = |arguments: &[&str]| {
        let mut tool = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        succeeded(tool.args(arguments).env("DATABASE_URL", &stage.database.config.url).output().unwrap())
    };
    assert_eq!(tool(&["findings"]), "nothing is open\n");
    assert_eq!(tool(&["runs"]), "no reconciler has run\n");
    stage.now(&Doubles::every(HOUR), Scope::Full).await;
    assert!(tool(&["findings"]).ends_with("Z  doubles  item_failed  error-1  open  the item says no\n"));
    assert_eq!(tool(&["findings", "--kind", "drift"]), "nothing is open\n");
    let runs = tool(&["runs", "--reconciler", "doubles"]);
    assert!(runs.contains("  run 1  doubles  demand full repair  ok in "), "{runs}");
    assert!(runs.ends_with("  scanned 2, found 1, repaired 1, failed 1\n"), "{runs}");
    stage.database.execute("delete from item where key = 'error-1'").await;
    stage.now(&Doubles::every(HOUR), Scope::Full).await;
    assert_eq!(tool(&["findings"]), "nothing is open\n");
    assert!(tool(&["findings", "--all", "--json"]).contains("\"state\": \"gone\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_its_role_suffice() {
    let stage = Stage::new(&["a", "error-1"]).await;
    let role = Roles::of(&stage.database).login(&stage.database, "app", &["own_reconciler"]).await;
    stage.database.execute(&format!("grant all on all tables in schema public to {role}")).await;
    let runner = || {
        let config = PostgresConfig::new(stage.database.url_of(&role));
        Runner::new(config).reconciler(Doubles::every(HOUR))
    };
    let due = runner().run_if_due("doubles").await.unwrap();
    assert_eq!((&due.outcome, numbers(&due)), (&Outcome::Ran, [2, 1, 1, 1]), "{due}");
    let stop = CancellationToken::new();
    let (runner, again) = (runner(), runner());
    let monitor = runner.monitor();
    let task = tokio::spawn(runner.run(stop.clone()));
    eventually(SOON, "it can read the tables", async || monitor.readiness().ok).await.unwrap();
    stop.cancel();
    task.await.unwrap().unwrap();
    // What is old is deleted, which needs a right of its own.
    let age = "update aftercommit.reconcile_run set ended_at = now() - interval '31 days';
        insert into aftercommit.finding (name, kind, item, first_run, last_run, state, settled_at)
        values ('doubles', 'drift', 'old', 1, 1, 'gone', now() - interval '31 days')";
    stage.database.execute(age).await;
    again.run_now("doubles", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(stage.count("select count(*) from aftercommit.finding where item = 'old'").await, 0);
    assert_eq!(stage.results().await, ["ok"]);
}
