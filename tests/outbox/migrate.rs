//! `aftercommit migrate`: once, twice, many at once, printed, and beside the application's own migrations.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Database, SOON, succeeded};
use aftercommit::config::{PostgresConfig, Schema};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::{ErrorKind, operator};
use futures_util::future::join_all;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

/// The names of all migrations, in order.
fn all() -> Vec<String> {
    let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap();
    let mut names: Vec<String> = files
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter_map(|file| Some(file.strip_suffix(".sql")?.replace('_', " ")))
        .collect();
    names.sort();
    names
}

fn aftercommit(database: &Database, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(arguments)
        .env("DATABASE_URL", &database.config.url)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn records(database: &Database) -> i64 {
    let mut connection = PgConnection::connect(&database.config.url).await.unwrap();
    sqlx::query_scalar("select count(*) from aftercommit.migrations where success")
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn twice_is_harmless() {
    let database = Database::empty().await;
    assert_eq!(operator::migrate(&database.config).await.unwrap(), all());
    let schema = database.pg_dump(&["-s"]);
    assert_eq!(operator::migrate(&database.config).await.unwrap(), Vec::<String>::new());
    assert_eq!(database.pg_dump(&["-s"]), schema);
}

#[tokio::test]
async fn eight_at_once_are_safe() {
    let database = Database::empty().await;
    let runs = join_all((0..8).map(|_| operator::migrate(&database.config))).await;
    let mut applied: Vec<Vec<String>> = runs.into_iter().map(Result::unwrap).collect();
    applied.sort();
    assert_eq!(applied.pop().unwrap(), all());
    assert_eq!(applied.concat(), Vec::<String>::new());
    assert_eq!(records(&database).await, i64::try_from(all().len()).unwrap());
}

#[tokio::test]
async fn the_applications_own_migrations_are_not_touched() {
    let database = Database::empty().await;
    database
        .execute("create table _sqlx_migrations (version bigint); insert into _sqlx_migrations values (20260101)")
        .await;
    let before = database.pg_dump(&["-t", "public._sqlx_migrations"]);
    operator::migrate(&database.config).await.unwrap();
    assert_eq!(database.pg_dump(&["-t", "public._sqlx_migrations"]), before);

    // And where the application has none, none appears.
    let other = Database::migrated().await;
    assert!(!other.pg_dump(&["-s"]).contains("_sqlx_migrations"));
}

#[tokio::test]
async fn the_printed_script_makes_the_schema_and_migrate_continues_it() {
    let applied = Database::migrated().await;
    let printed = Database::empty().await;
    let script = succeeded(aftercommit(&printed, &["migrate", "--print"]));
    succeeded(printed.psql(&script));
    assert_eq!(printed.pg_dump(&["-s"]), applied.pg_dump(&["-s"]));
    assert_eq!(operator::migrate(&printed.config).await.unwrap(), Vec::<String>::new());

    // The script of an older version ends earlier; the rest is applied.
    let older = Database::empty().await;
    let end = script.find("\n-- 0002").unwrap();
    succeeded(older.psql(&script[..end]));
    assert_eq!(operator::migrate(&older.config).await.unwrap(), all()[1..]);
    assert_eq!(older.pg_dump(&["-s"]), applied.pg_dump(&["-s"]));
}

#[tokio::test]
async fn the_printed_script_is_all_or_nothing_when_run_again() {
    let database = Database::empty().await;
    succeeded(database.psql(&operator::migrations_sql(&Schema::default())));
    let before = database.pg_dump(&[]);
    assert!(!database.psql(&operator::migrations_sql(&Schema::default())).status.success());
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn a_schema_without_a_record_is_left_alone() {
    let database = Database::empty().await;
    database.execute(include_str!("../../migrations/0001_outbox.sql")).await;
    let before = database.pg_dump(&[]);
    let error = operator::migrate(&database.config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotReady);
    assert!(error.to_string().contains("aftercommit.migrations"), "{error}");
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn a_table_of_migrations_that_is_not_ours_is_named_and_left_alone() {
    const SAME_COLUMNS: &str = "version bigint primary key, description text, installed_on timestamptz default now(),
                                success boolean, checksum bytea, execution_time bigint";
    for (schema, columns, values, shows) in [
        ("aftercommit", "id serial primary key, name text", "(1, 'init')", "does not have its columns"),
        ("shop", "version text primary key, checksum text", "('1', 'x')", "does not have its columns"),
        ("shop", SAME_COLUMNS, "(1, 'init', now(), true, '', 0)", "has entries although there is no table shop.outbox"),
    ] {
        let database = Database::empty().await;
        database
            .execute(&format!(
                "create schema {schema}; create table {schema}.migrations ({columns});
                 insert into {schema}.migrations values {values}"
            ))
            .await;
        let before = database.pg_dump(&[]);
        let config = PostgresConfig { schema: schema.parse().unwrap(), ..database.config.clone() };
        let error = operator::migrate(&config).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotReady);
        let text = error.to_string();
        let says =
            format!("schema {schema}: the table {schema}.migrations is not aftercommit's record of migrations: it ");
        assert!(text.starts_with(&says) && text.contains(shows) && text.contains("--schema"), "{text}");
        assert_eq!(database.pg_dump(&[]), before);

        let doctor = aftercommit(&database, &["doctor", "--schema", schema, "--nats-url", "nats://127.0.0.1:1"]);
        let report = String::from_utf8_lossy(&doctor.stdout);
        assert!(report.contains(&format!("there is no table {schema}.outbox")), "{report}{}", stderr(&doctor));

        // Beside it there is room.
        let other = PostgresConfig { schema: "events".parse().unwrap(), ..database.config.clone() };
        assert_eq!(operator::migrate(&other).await.unwrap(), all());
    }
}

#[tokio::test]
async fn a_newer_schema_is_left_alone_and_a_changed_one_is_refused() {
    let database = Database::migrated().await;
    database.execute("insert into aftercommit.migrations values (9999, 'x', now(), true, '', 0)").await;
    let before = database.pg_dump(&[]);
    assert_eq!(operator::migrate(&database.config).await.unwrap(), Vec::<String>::new());
    assert_eq!(database.pg_dump(&[]), before);

    // What is newer than something that is missing cannot have been made for it.
    database.execute("delete from aftercommit.migrations where version = 6").await;
    let error = operator::migrate(&database.config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotReady);
    assert!(error.to_string().contains("use a newer version"), "{error}");

    let database = Database::migrated().await;
    database.execute("update aftercommit.migrations set checksum = '' where version = 2").await;
    assert_eq!(operator::migrate(&database.config).await.unwrap_err().kind(), ErrorKind::Integrity);
}

#[tokio::test]
async fn a_failed_migration_leaves_nothing_behind() {
    let database = Database::empty().await;
    // A table of this name stands in the way of the third migration.
    database.execute("create schema aftercommit; create table aftercommit.inbox ()").await;
    let before = database.pg_dump(&[]);
    let error = operator::migrate(&database.config).await.unwrap_err();
    assert!(error.to_string().contains("nothing was changed"), "{error}");
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn other_encodings_are_refused() {
    let server = Database::empty().await;
    server.execute("create database latin encoding 'LATIN1' locale 'C' template template0").await;
    let mut config = server.config.clone();
    config.url = config.url.rsplit_once('/').unwrap().0.to_string() + "/latin";
    let error = operator::migrate(&config).await.unwrap_err();
    assert!(error.to_string().contains("encoding UTF8"), "{error}");
}

#[tokio::test]
async fn the_command_reports_and_its_exit_status_tells_faults_apart() {
    let database = Database::empty().await;
    let applied: String = all().iter().map(|name| format!("applied {name}\n")).collect();
    assert_eq!(succeeded(aftercommit(&database, &["migrate"])), applied);
    assert_eq!(succeeded(aftercommit(&database, &["migrate"])), "the schema aftercommit is up to date\n");

    let no_database = aftercommit(&database, &["migrate", "--database-url", ""]);
    assert_eq!(no_database.status.code(), Some(2), "{}", stderr(&no_database));
    let unknown = aftercommit(&database, &["migrate", "--no-such-flag"]);
    assert_eq!(unknown.status.code(), Some(2));
    let wrong = database.config.url.replace("/test_", "/missing_");
    let failed = aftercommit(&database, &["migrate", "--database-url", &wrong]);
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
}

#[test]
fn help_shows_no_credentials() {
    let help = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["migrate", "--help"])
        .env("DATABASE_URL", "postgres://user:secret@host/db")
        .output()
        .unwrap();
    assert!(!succeeded(help).contains("secret"));
}

/// A database as the version before had it: everything up to the sixth migration.
async fn of_an_older_version() -> Database {
    let database = Database::empty().await;
    let script = operator::migrations_sql(&Schema::default());
    let end = script.match_indices("\n-- 00").map(|(at, _)| at).nth(6).expect("there are newer ones");
    succeeded(database.psql(&script[..end]));
    database
}

/// Publishes until it is told to stop, and returns how many events there were and how long the slowest one took.
async fn publish_until(url: String, stop: CancellationToken) -> (u32, Duration) {
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let (mut events, mut slowest) = (0, Duration::ZERO);
    while !stop.is_cancelled() {
        let begun = Instant::now();
        sqlx::query("select aftercommit.publish('a', '{}')").execute(&mut connection).await.unwrap();
        slowest = slowest.max(begun.elapsed());
        events += 1;
    }
    (events, slowest)
}

/// Every migration, with what newer versions bring: beside a transaction that has published and stays open, others go on
/// publishing. A migration that scans or rewrites the outbox, or waits in front of everybody, fails here.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_publishes_waits_for_an_update() {
    let database = of_an_older_version().await;
    database
        .execute(
            "insert into aftercommit.outbox (event_id, type, payload)
             select gen_random_uuid(), 'a', convert_to(repeat('x', 500), 'UTF8') from generate_series(1, 200000)",
        )
        .await;
    let mut open = PgConnection::connect(&database.config.url).await.unwrap();
    sqlx::raw_sql("set application_name = 'a long one'; begin; select aftercommit.publish('a', '{}')")
        .execute(&mut open)
        .await
        .unwrap();
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("migrate")
        .env("DATABASE_URL", &database.config.url)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stop = CancellationToken::new();
    let publishers: Vec<_> =
        (0..3).map(|_| tokio::spawn(publish_until(database.config.url.clone(), stop.clone()))).collect();
    // It has waited, and been seen to, more than once.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(migrate.try_wait().unwrap(), None, "it waits for the open transaction");
    sqlx::raw_sql("commit").execute(&mut open).await.unwrap();
    eventually(SOON, "it is done", async || migrate.try_wait().unwrap().is_some()).await.unwrap();
    stop.cancel();
    for publisher in publishers {
        let (events, slowest) = publisher.await.unwrap();
        assert!(events > 50, "{events}");
        // Half a second for the lock, and what the machine adds.
        assert!(slowest < Duration::from_millis(1500), "{slowest:?}");
    }
    let output = migrate.wait_with_output().unwrap();
    let told = stderr(&output);
    assert!(output.status.success() && told.contains("a long one") && told.contains("waiting"), "{told}");
    assert_eq!(records(&database).await, i64::try_from(all().len()).unwrap());
}

/// Who holds the lock that migrators take is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_says_whom_it_waits_for() {
    let database = of_an_older_version().await;
    let login = unique_name("locker");
    database.execute(&format!("create role {login} login")).await;
    let mut other = PgConnection::connect(&database.url_of(&login)).await.unwrap();
    let key = i64::from_be_bytes(*b"aftercom");
    sqlx::query("select pg_advisory_lock($1)").bind(key).execute(&mut other).await.unwrap();
    let log = crate::support::Directory::new();
    let log = log.path().join("log");
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("migrate")
        .env("DATABASE_URL", &database.config.url)
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    eventually(SOON, "it names the login", async || std::fs::read_to_string(&log).unwrap().contains(&login))
        .await
        .unwrap();
    assert!(migrate.try_wait().unwrap().is_none());
    other.close().await.unwrap();
    eventually(SOON, "it goes on", async || migrate.try_wait().unwrap().is_some_and(|status| status.success()))
        .await
        .unwrap();
    assert_eq!(records(&database).await, i64::try_from(all().len()).unwrap());
}

/// An administrator makes the schema for an owner who may make none.
#[tokio::test]
async fn an_owner_without_create_on_the_database_migrates() {
    let database = Database::empty().await;
    let owner = unique_name("owner");
    database.execute(&format!("create role {owner} login; create schema aftercommit authorization {owner}")).await;
    let mut config = database.config.clone();
    config.url = database.url_of(&owner);
    assert_eq!(operator::migrate(&config).await.unwrap(), all());
    assert_eq!(operator::migrate(&config).await.unwrap(), Vec::<String>::new());
    let printed = Database::empty().await;
    printed.execute(&format!("create schema aftercommit authorization {owner}")).await;
    let script = format!("set role {owner};\n{}", operator::migrations_sql(&Schema::default()));
    succeeded(printed.psql(&script));
    config.url = printed.url_of(&owner);
    assert_eq!(operator::migrate(&config).await.unwrap(), Vec::<String>::new());
}

/// The script leaves the search path of the tool that runs it as it was.
#[tokio::test]
async fn the_printed_script_keeps_the_search_path() {
    let database = Database::empty().await;
    let script = format!(
        "set search_path = other, public;\n{}\ncreate table public.seen as select current_setting('search_path') as path;",
        operator::migrations_sql(&Schema::default())
    );
    succeeded(database.psql(&script));
    let mut connection = PgConnection::connect(&database.config.url).await.unwrap();
    let path: String = sqlx::query_scalar("select path from seen").fetch_one(&mut connection).await.unwrap();
    assert_eq!(path, "other, public");
}
