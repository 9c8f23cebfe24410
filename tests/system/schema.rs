//! X-01: the tables and functions in a schema of another name, alone and beside another system in one database.

use std::process::{Child, Command, Output, Stdio};

use aftercommit::config::{PostgresConfig, Schema};
use aftercommit::operator::doctor::{Check, DoctorConfig, Role, Severity, doctor};
use aftercommit::relay::{Mode, RelayConfig};
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::{ErrorKind, operator};
use serde_json::Value;
use sqlx::AssertSqlSafe;

use crate::support::{Database, Outbox, RunningRelay, SOON, succeeded};

/// Handlers write here, and one fails on purpose.
const APPLY: &str = "create table public.done (system text, n bigint);
     create function public.apply(event jsonb) returns void language plpgsql as $$ begin
         if event->'data'->>'n' = '13' then raise exception 'thirteen'; end if;
         insert into public.done values (event->>'source', (event->'data'->>'n')::bigint);
     end $$;";

/// An outbox in this schema of a database that has nothing else of aftercommit.
async fn system(url: &str, schema: &str) -> Outbox {
    let postgres = PostgresConfig { schema: schema.parse().unwrap(), ..PostgresConfig::new(url) };
    let outbox = Outbox::of(postgres, Nats::shared().await.unwrap().url()).await;
    Outbox { naming: aftercommit::config::Naming { source: format!("/{schema}"), ..outbox.naming }, ..outbox }
}

/// Runs `aftercommit`, which must succeed.
fn run(outbox: &Outbox, arguments: &[&str]) -> String {
    let output = outbox.operator(arguments);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {told}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

/// A worker's program with a subscriber for everything.
struct Worker(Child);

impl Worker {
    fn start(outbox: &Outbox) -> Self {
        let file = std::env::temp_dir().join(format!("{}.toml", unique_name("worker")));
        let toml = "[[subscriber]]\nname = \"all\"\ntypes = [\"*\"]\nmax_attempts = 1\nsql = { function = \"public.apply\" }\n";
        std::fs::write(&file, toml).unwrap();
        run(outbox, &["provision", "--config", file.to_str().unwrap()]);
        let child = Command::new(env!("CARGO_BIN_EXE_aftercommit-worker"))
            .arg("--config")
            .arg(&file)
            .env("DATABASE_URL", &outbox.postgres.url)
            .env("AFTERCOMMIT_SCHEMA", outbox.postgres.schema.name())
            .env("NATS_URL", &outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Publishes a number in SQL and returns its event's id.
async fn publish(outbox: &Outbox, n: i64) -> String {
    let schema = &outbox.postgres.schema;
    let sql = format!("select {schema}.publish('test.number', jsonb_build_object('n', $1::bigint), 'k' || $1)::text");
    sqlx::query_scalar(AssertSqlSafe(sql)).bind(n).fetch_one(&outbox.pool).await.unwrap()
}

/// The numbers that this system's events have left.
async fn done(outbox: &Outbox) -> Vec<i64> {
    sqlx::query_scalar("select n from public.done where system = $1 order by n")
        .bind(&outbox.naming.source)
        .fetch_all(&outbox.pool)
        .await
        .unwrap()
}

async fn wait_for(outbox: &Outbox, numbers: &[i64]) {
    let waited = eventually(SOON, "the effects", async || done(outbox).await == numbers).await;
    assert!(waited.is_ok(), "{:?} instead of {numbers:?}", done(outbox).await);
}

async fn letters(outbox: &Outbox) -> Vec<i64> {
    let list: Value = serde_json::from_str(&run(outbox, &["dead", "list", "--json"])).unwrap();
    let list = list.as_array().or_else(|| list["dead_letters"].as_array()).unwrap();
    list.iter().map(|letter| letter["id"].as_i64().unwrap()).collect()
}

/// Any statement that is meant for the schema `aftercommit` fails here.
#[tokio::test(flavor = "multi_thread")]
async fn everything_works_in_a_database_that_only_has_another_schema() {
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = system(&url, "shop_events").await;
    sqlx::raw_sql(APPLY).execute(&outbox.pool).await.unwrap();
    let (_relay, _worker) = (outbox.relay_process(), Worker::start(&outbox));
    let id = publish(&outbox, 1).await;
    run(&outbox, &["publish", "test.number", "--payload", r#"{"n": 2}"#]);
    publish(&outbox, 13).await;
    publish(&outbox, 3).await;
    wait_for(&outbox, &[1, 2, 3]).await;
    eventually(SOON, "a dead letter", async || !letters(&outbox).await.is_empty()).await.unwrap();
    // What the one is repaired with, and the other one given up.
    let letter = letters(&outbox).await[0].to_string();
    run(&outbox, &["dead", "show", &letter, "--show-payload"]);
    run(&outbox, &["dead", "edit", &letter, "--payload", r#"{"n": 4}"#, "--retry"]);
    wait_for(&outbox, &[1, 2, 3, 4]).await;
    publish(&outbox, 13).await;
    eventually(SOON, "a dead letter", async || !letters(&outbox).await.is_empty()).await.unwrap();
    run(&outbox, &["dead", "discard", &letters(&outbox).await[0].to_string()]);
    run(&outbox, &["relay", "pause", "--reason", "aftercommit.outbox moves"]);
    let look = async || {
        doctor(&DoctorConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone())).await.unwrap()
    };
    let report = look().await.to_string();
    assert!(report.contains("aftercommit.outbox moves"), "words of people stay: {report}");
    run(&outbox, &["relay", "resume"]);
    run(&outbox, &["worker", "pause", "--subscriber", "all"]);
    run(&outbox, &["worker", "resume", "--subscriber", "all"]);
    run(&outbox, &["replay", "--subscriber", "all", &id]);
    eventually(SOON, "it ran once more", async || done(&outbox).await.iter().filter(|n| **n == 1).count() == 1)
        .await
        .unwrap();
    for comparison in ["outbox", "consumer", "inbox"] {
        let subscriber: &[&str] = if comparison == "outbox" { &[] } else { &["--subscriber", "all"] };
        run(&outbox, &[&["reconcile", "--full", "--repair", "--comparison", comparison], subscriber].concat());
    }
    let explained = run(&outbox, &["explain", &id]);
    assert!(explained.contains("handled"), "{explained}");
    for look in [
        "status",
        "backlog",
        "audit",
        "findings",
        "runs",
        "parked list",
        "coverage",
        "prune run --once",
        "prune status",
    ] {
        run(&outbox, &look.split(' ').collect::<Vec<_>>());
    }
    run(&outbox, &["peek", "--subscriber", "all"]);
    assert!(run(&outbox, &["audit"]).contains("resume"), "acts are on record");
    let report = look().await;
    assert!(report.checks.iter().all(|check| check.status != Severity::Fail || check.name == "fsync"), "{report}");
    assert!(operator::migrate(&outbox.postgres).await.unwrap().is_empty(), "it is up to date");
    let strays: Vec<String> = sqlx::query_scalar(
        "select proname::text from pg_proc where pronamespace = 'shop_events'::regnamespace and prosrc like '%aftercommit.%'
          union all
         select nspname::text from pg_namespace where nspname = 'aftercommit'",
    )
    .fetch_all(&outbox.pool)
    .await
    .unwrap();
    assert_eq!(strays, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_systems_in_one_database_do_not_meet() {
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let (first, second) = (system(&url, "aftercommit").await, system(&url, "shop").await);
    sqlx::raw_sql(APPLY).execute(&first.pool).await.unwrap();
    let _relays = (first.relay_process(), second.relay_process());
    // They have the same name, and each its own lease, inbox and dead letters.
    let _workers = (Worker::start(&first), Worker::start(&second));
    for n in 1..=20 {
        publish(&first, n).await;
        publish(&second, 100 + n).await;
    }
    let numbers: Vec<i64> = (1..=20).filter(|n| *n != 13).collect();
    wait_for(&first, &numbers).await;
    wait_for(&second, &(101..=120).collect::<Vec<_>>()).await;
    eventually(SOON, "a dead letter", async || letters(&first).await.len() == 1).await.unwrap();
    assert_eq!(letters(&second).await, [0; 0]);
    for system in [&first, &second] {
        let status: Value = serde_json::from_str(&run(system, &["status", "--json"])).unwrap();
        assert_eq!(status["subscribers"]["all"]["has_consumer"], true, "{status:#}");
    }
    // A consumer belongs to an inbox, and there are two of them.
    let foreign = Outbox { naming: first.naming.clone(), ..second };
    let refused = foreign.operator(&["replay", "--subscriber", "all", "--again", "--yes"]);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && told.contains("feeds the inbox of"), "{told}");
    let refused: Output = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["provision", "--config"])
        .arg({
            let file = std::env::temp_dir().join(format!("{}.toml", unique_name("worker")));
            std::fs::write(
                &file,
                "[[subscriber]]\nname = \"all\"\ntypes = [\"*\"]\nsql = { function = \"public.apply\" }\n",
            )
            .unwrap();
            file
        })
        .env("DATABASE_URL", &foreign.postgres.url)
        .env("AFTERCOMMIT_SCHEMA", foreign.postgres.schema.name())
        .env("NATS_URL", &foreign.nats.url)
        .env("AFTERCOMMIT_STREAM", &foreign.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", foreign.naming.prefix.to_string())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && told.contains("--adopt"), "{told}");
}

/// Without a stamp nothing tells whose the stream is.
#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_stream_is_published_to_by_its_own_outbox_alone() {
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let (first, second) = (system(&url, "aftercommit").await, system(&url, "shop").await);
    let foreign = Outbox { naming: first.naming.clone(), ..second };
    let claim = ["provision", "--outbox-database", &url];
    assert!(run(&first, &claim).contains("whose it is: not known -> database "));
    assert_eq!(run(&first, &claim), "everything is as it should be\n");
    let relay = first.relay();
    publish(&first, 1).await;
    eventually(SOON, "its own relay publishes", async || first.stored().await == 1).await.unwrap();
    relay.stop().await.unwrap();

    publish(&foreign, 2).await;
    let refused = foreign.operator(&claim);
    let told = String::from_utf8_lossy(&refused.stderr);
    let says = format!("stream {} belongs to the outbox in database ", first.naming.stream);
    assert!(!refused.status.success() && told.contains(&says) && told.contains("schema shop"), "{told}");
    let refused = foreign.relay().ended().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotReady);
    let told = refused.to_string();
    assert!(told.starts_with(&says) && told.contains("`aftercommit provision --adopt`"), "{told}");
    let config = DoctorConfig::new(foreign.postgres.clone(), foreign.nats.clone(), foreign.naming.clone());
    let failed = |checks: &[Check]| checks.iter().any(|check| check.name == "owner" && check.status == Severity::Fail);
    assert!(failed(&doctor(&config).await.unwrap().checks));
    assert_eq!(foreign.stored().await, 1);

    // A stream that several outboxes share is nobody's.
    let shared = RunningRelay::start(RelayConfig { mode: Mode::Shared, ..foreign.relay_config() });
    eventually(SOON, "it is published in shared mode", async || foreign.stored().await == 2).await.unwrap();
    shared.stop().await.unwrap();

    // As after a restore.
    let adopted = run(&foreign, &["provision", "--outbox-database", &url, "--adopt"]);
    assert!(adopted.contains("schema shop"), "{adopted}");
    let relay = foreign.relay();
    publish(&foreign, 3).await;
    eventually(SOON, "the other relay publishes", async || foreign.stored().await == 3).await.unwrap();
    assert!(!failed(&doctor(&config).await.unwrap().checks));
    relay.stop().await.unwrap();

    let of_what = foreign.operator(&["provision", "--adopt"]);
    assert_eq!(of_what.status.code(), Some(2), "{}", String::from_utf8_lossy(&of_what.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_script_follows_the_schema() {
    let database = Database::empty().await;
    let postgres = PostgresConfig { schema: "shop".parse().unwrap(), ..database.config.clone() };
    operator::migrate(&postgres).await.unwrap();
    let prefix = unique_name("ac") + "_";
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/postgres/roles.sql");
    let mut psql = Command::new(Postgres::program("psql").unwrap());
    psql.args(["--no-psqlrc", "--file", script, "--dbname", &database.config.url]);
    let output = psql.args(["--set", &format!("prefix={prefix}"), "--set", "schema=shop"]).output().unwrap();
    succeeded(output);
    let outbox = Outbox::of(postgres, Nats::shared().await.unwrap().url()).await;
    for role in Role::ALL {
        let name = role.name();
        let login = format!("{prefix}{name}_login");
        database.execute(&format!("create role {login} login in role {prefix}{name}")).await;
        let limited = PostgresConfig { url: database.url_of(&login), ..outbox.postgres.clone() };
        let mut config = DoctorConfig::new(limited, outbox.nats.clone(), outbox.naming.clone());
        config.roles = vec![role];
        let report = doctor(&config).await.unwrap();
        let rights: Vec<_> = report.checks.iter().filter(|check| check.name == "grants").collect();
        assert!(!rights.is_empty() && rights.iter().all(|check| check.status == Severity::Ok), "{name}: {report}");
    }
    // They may do nothing in a schema that is not theirs.
    operator::migrate(&database.config).await.unwrap();
    let error = sqlx::PgPool::connect(&database.url_of(&format!("{prefix}relay_login"))).await.unwrap();
    let refused = sqlx::query("select from aftercommit.outbox").execute(&error).await.unwrap_err();
    assert!(refused.to_string().contains("permission denied"), "{refused}");
}

#[tokio::test]
async fn words_that_the_server_does_not_take_for_a_schema_are_refused() {
    let pool = Database::empty().await.pool().await;
    let words: Vec<String> = sqlx::query_scalar("select word from pg_get_keywords() where catcode in ('R', 'T')")
        .fetch_all(&pool)
        .await
        .unwrap();
    let taken: Vec<&String> = words.iter().filter(|word| word.parse::<Schema>().is_ok()).collect();
    assert!(words.len() > 90 && taken.is_empty(), "{taken:?} of {}", words.len());
}

#[test]
fn a_name_that_would_need_quotes_is_refused_before_anything_happens() {
    for (name, told) in
        [("Shop", "lower-case"), ("a;drop table x", "lower-case"), ("user", "reserved"), ("pg_x", "pg_")]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
            .args(["migrate", "--schema", name])
            .env("DATABASE_URL", "postgres://127.0.0.1:1/none")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(told) && text.contains("--schema"), "{text}");
    }
}
