//! A service's own reconcilers in the program that `worker::main` makes: beside the subscribers, and on demand.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::support::{Number, Record, SOON, Work, WorkerProcess, free_address, get, metric};
use aftercommit::reconciler::{Drift, ItemError, Reconciler};
use aftercommit::testing::eventually;
use aftercommit::worker::{Registry, Subscriber};
use sqlx::PgTransaction;

/// Keeps `account.balance` equal to the sum of the bookings; the account `slow` takes its time.
struct Balances(&'static str);

impl Reconciler for Balances {
    fn name(&self) -> &str {
        self.0
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(100)
    }

    async fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<String>, ItemError> {
        let sql = "select name from account where $1 is null or name > $1 order by name limit $2";
        Ok(sqlx::query_scalar(sql).bind(after).bind(limit).fetch_all(&mut **tx).await?)
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, name: &str) -> Result<Drift, ItemError> {
        if name == "slow" {
            sqlx::query("select pg_sleep(50)").execute(&mut **tx).await?;
        }
        let changed =
            sqlx::query("update account set balance = booked where name = $1 and balance is distinct from booked");
        Ok(Drift::of(changed.bind(name).execute(&mut **tx).await?.rows_affected()))
    }
}

fn registry(second: Option<&'static str>) -> Registry {
    let registry = Registry::new().subscriber(Subscriber::new("numbers").on::<Number>(Record::good()));
    let registry = registry.reconciler(Balances("balances"));
    second.into_iter().fold(registry, |registry, name| registry.reconciler(Balances(name)))
}

/// The process that [`Service::command`] starts.
#[test]
#[ignore = "a child of the other tests"]
fn child() {
    let Ok(line) = std::env::var("SERVICE_LINE") else { return };
    let line = ["service"].into_iter().chain(line.split(' ').filter(|word| !word.is_empty()));
    let registry = registry(std::env::var("SERVICE_TWICE").is_ok().then_some("balances"));
    let status = aftercommit::worker::main_of(registry, line.map(Into::into).collect());
    // Its number is not to be had in any other way.
    let number = (0..=2).find(|n| format!("{:?}", std::process::ExitCode::from(*n)) == format!("{status:?}"));
    std::process::exit(number.unwrap_or(99).into());
}

struct Service(Work);

impl Service {
    async fn new() -> Self {
        let work = Work::shared().await;
        sqlx::raw_sql(
            "create table account (name text primary key, booked bigint not null, balance bigint not null default 0);
             insert into account values ('alice', 3), ('bob', 4)",
        )
        .execute(&work.outbox.pool)
        .await
        .unwrap();
        Self(work)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let naming = &self.0.outbox.naming;
        command
            .args(["reconcilers::child", "--exact", "--ignored", "--nocapture"])
            .env("SERVICE_LINE", line)
            .env("DATABASE_URL", &self.0.outbox.postgres.url)
            .env("NATS_URL", &self.0.outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", naming.prefix.to_string())
            .stdin(Stdio::null());
        command
    }

    fn output(&self, line: &str) -> (Output, String) {
        let output = self.command(line).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output, text)
    }

    async fn balance(&self, name: &str) -> i64 {
        let balance = sqlx::query_scalar("select balance from account where name = $1").bind(name);
        balance.fetch_one(&self.0.outbox.pool).await.unwrap()
    }

    async fn runs(&self) -> Vec<(String, String)> {
        sqlx::query_as(
            "select distinct result, coalesce(error, '') from aftercommit.reconcile_run where result is not null",
        )
        .fetch_all(&self.0.outbox.pool)
        .await
        .unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn they_run_beside_the_subscribers_and_stop_with_them() {
    let service = Service::new().await;
    let work = &service.0;
    assert_eq!(service.command("--provision").output().unwrap().status.code(), Some(0));
    let address = free_address();
    let start = || {
        let mut command = service.command(&format!("--http {address}"));
        WorkerProcess(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let process = start();
    work.send_many(&["a"], 5).await;
    work.wait_for(5).await;
    eventually(SOON, "the balances are right", async || {
        (service.balance("alice").await, service.balance("bob").await) == (3, 4)
    })
    .await
    .unwrap();
    eventually(SOON, "the metrics tell of it", async || {
        let Some((200, metrics)) = get(&address, "/metrics").await else { return false };
        metric(&metrics, "aftercommit_reconciler_repaired_total{reconciler=\"balances\"}") == Some(2.0)
    })
    .await
    .unwrap();
    sqlx::raw_sql("insert into account values ('slow', 1)").execute(&work.outbox.pool).await.unwrap();
    eventually(SOON, "the slow one is under way", async || {
        sqlx::query_scalar(
            "select exists (select from pg_stat_activity where query like '%pg_sleep(50)%'
                              and state = 'active' and pid <> pg_backend_pid() and datname = current_database())",
        )
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap()
    })
    .await
    .unwrap();
    assert_eq!(process.stop(), Some(0));
    let runs = service.runs().await;
    assert!(runs.contains(&("stopped".into(), String::new())), "{runs:?}");
    assert!(!runs.iter().any(|(result, _)| result == "failed"), "{runs:?}");
    // What was stopped goes on in the next process.
    sqlx::raw_sql("update account set name = 'swift' where name = 'slow'").execute(&work.outbox.pool).await.unwrap();
    let process = start();
    eventually(SOON, "the sweep goes on", async || service.balance("swift").await == 1).await.unwrap();
    assert_eq!(process.stop(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn they_run_on_demand_for_all_items_or_for_some() {
    let service = Service::new().await;
    let (output, text) = service.output("--reconcile balances --key alice --report");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("reconciler=balances result=ran scanned=1 found=1 repaired=0 failed=0"), "{text}");
    assert_eq!(service.balance("alice").await, 0);
    let (output, text) = service.output("--reconcile balances --key alice");
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("scanned=1 found=1 repaired=1 failed=0"), "{text}");
    assert_eq!((service.balance("alice").await, service.balance("bob").await), (3, 0));
    let (output, text) = service.output("--reconcile balances --full");
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("scanned=2 found=1 repaired=1 failed=0"), "{text}");
    assert_eq!(service.balance("bob").await, 4);
    let (output, text) = service.output("--reconcile balance");
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("there is no reconciler balance, only balances, consumer:numbers, inbox:numbers"), "{text}");
    assert_eq!(service.output("--key alice").0.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_their_definition_ends_the_program_at_its_start() {
    let service = Service::new().await;
    let output = service.command("").env("SERVICE_TWICE", "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("two reconcilers are called balances"), "{text}");
}
