//! `aftercommit migrate`: once, twice, many at once, printed, and beside the application's own migrations.

use std::process::{Command, Output};

use crate::support::{Database, succeeded};
use aftercommit::{ErrorKind, admin};
use futures_util::future::join_all;
use sqlx::{Connection, PgConnection};

const ALL: [&str; 6] =
    ["0001 outbox", "0002 relay", "0003 inbox", "0004 worker", "0005 reconciler", "0006 reserved headers"];

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
    assert_eq!(admin::migrate(&database.config).await.unwrap(), ALL);
    let schema = database.pg_dump(&["-s"]);
    assert_eq!(admin::migrate(&database.config).await.unwrap(), Vec::<String>::new());
    assert_eq!(database.pg_dump(&["-s"]), schema);
}

#[tokio::test]
async fn eight_at_once_are_safe() {
    let database = Database::empty().await;
    let runs = join_all((0..8).map(|_| admin::migrate(&database.config))).await;
    let mut applied: Vec<Vec<String>> = runs.into_iter().map(Result::unwrap).collect();
    applied.sort();
    assert_eq!(applied.pop().unwrap(), ALL);
    assert_eq!(applied.concat(), Vec::<String>::new());
    assert_eq!(records(&database).await, i64::try_from(ALL.len()).unwrap());
}

#[tokio::test]
async fn the_applications_own_migrations_are_not_touched() {
    let database = Database::empty().await;
    database
        .execute("create table _sqlx_migrations (version bigint); insert into _sqlx_migrations values (20260101)")
        .await;
    let before = database.pg_dump(&["-t", "public._sqlx_migrations"]);
    admin::migrate(&database.config).await.unwrap();
    assert_eq!(database.pg_dump(&["-t", "public._sqlx_migrations"]), before);

    // And where the application has none, none appears.
    let other = Database::migrated().await;
    assert!(!other.pg_dump(&["-s"]).contains("_sqlx_migrations"));
}

#[tokio::test]
async fn the_printed_script_makes_the_same_schema_and_migrate_goes_on_from_it() {
    let applied = Database::migrated().await;
    let printed = Database::empty().await;
    let script = succeeded(aftercommit(&printed, &["migrate", "--print"]));
    succeeded(printed.psql(&script));
    assert_eq!(printed.pg_dump(&["-s"]), applied.pg_dump(&["-s"]));
    assert_eq!(admin::migrate(&printed.config).await.unwrap(), Vec::<String>::new());

    // The script of an older version ends earlier; the rest is applied.
    let older = Database::empty().await;
    let end = script.find("\n-- 0002").unwrap();
    succeeded(older.psql(&script[..end]));
    assert_eq!(admin::migrate(&older.config).await.unwrap(), ALL[1..]);
    assert_eq!(older.pg_dump(&["-s"]), applied.pg_dump(&["-s"]));
}

#[tokio::test]
async fn the_printed_script_is_all_or_nothing_when_run_again() {
    let database = Database::empty().await;
    succeeded(database.psql(&admin::migrations_sql()));
    let before = database.pg_dump(&[]);
    assert!(!database.psql(&admin::migrations_sql()).status.success());
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn a_schema_without_a_record_is_left_alone() {
    let database = Database::empty().await;
    database.execute(include_str!("../../migrations/0001_outbox.sql")).await;
    let before = database.pg_dump(&[]);
    let error = admin::migrate(&database.config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotReady);
    assert!(error.to_string().contains("aftercommit.migrations"), "{error}");
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn a_newer_schema_is_left_alone_and_another_or_changed_one_is_refused() {
    let database = Database::migrated().await;
    database.execute("insert into aftercommit.migrations values (9999, 'x', now(), true, '', 0)").await;
    let before = database.pg_dump(&[]);
    assert_eq!(admin::migrate(&database.config).await.unwrap(), Vec::<String>::new());
    assert_eq!(database.pg_dump(&[]), before);

    // What is newer than something that is missing cannot have been made for it.
    database.execute("delete from aftercommit.migrations where version = 6").await;
    let error = admin::migrate(&database.config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotReady);
    assert!(error.to_string().contains("use a newer version"), "{error}");

    let database = Database::migrated().await;
    database.execute("update aftercommit.migrations set checksum = '' where version = 2").await;
    assert_eq!(admin::migrate(&database.config).await.unwrap_err().kind(), ErrorKind::Integrity);
}

#[tokio::test]
async fn a_failed_migration_leaves_nothing_behind() {
    let database = Database::empty().await;
    // A table of this name stands in the way of the third migration.
    database.execute("create schema aftercommit; create table aftercommit.inbox ()").await;
    let before = database.pg_dump(&[]);
    let error = admin::migrate(&database.config).await.unwrap_err();
    assert!(error.to_string().contains("nothing was changed"), "{error}");
    assert_eq!(database.pg_dump(&[]), before);
}

#[tokio::test]
async fn other_encodings_are_refused() {
    let server = Database::empty().await;
    server.execute("create database latin encoding 'LATIN1' locale 'C' template template0").await;
    let mut config = server.config.clone();
    config.url = config.url.rsplit_once('/').unwrap().0.to_string() + "/latin";
    let error = admin::migrate(&config).await.unwrap_err();
    assert!(error.to_string().contains("encoding UTF8"), "{error}");
}

#[tokio::test]
async fn the_command_reports_and_its_exit_status_tells_faults_apart() {
    let database = Database::empty().await;
    assert_eq!(
        succeeded(aftercommit(&database, &["migrate"])),
        "applied 0001 outbox\napplied 0002 relay\napplied 0003 inbox\napplied 0004 worker\napplied 0005 reconciler\n\
         applied 0006 reserved headers\n"
    );
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
