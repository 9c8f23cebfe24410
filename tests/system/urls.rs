//! Which servers are meant: URLs and the environment are understood or refused by name, several servers are tried in turn,
//! and nothing secret of a URL is shown. G8.

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::support::{Database, Directory, Outbox, RelayProcess, SOON, standby_from_files, succeeded};
use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

const TOOL: &str = env!("CARGO_BIN_EXE_aftercommit");
const RELAY: &str = env!("CARGO_BIN_EXE_aftercommit-relay");

fn run(program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG") || name.starts_with("NATS_")) {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied()).output().unwrap()
}

/// It ends with status 2, names this and shows no secret.
fn refuses(program: &str, arguments: &[&str], variables: &[(&str, &str)], named: &str) {
    let output = run(program, arguments, variables);
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{variables:?}: {said}");
    assert!(said.contains(named) && !said.contains("hunter2"), "{variables:?}: {said}");
}

#[tokio::test]
async fn what_is_not_understood_is_refused_by_name_with_status_2() {
    // What would be taken is taken in clear.
    let url = Postgres::shared().await.unwrap().url("postgres").replace("//postgres@", "//postgres:hunter2@");
    let nats = Nats::shared().await.unwrap().url().replace("nats://", "nats://me:hunter2@");
    for (program, arguments) in [(TOOL, &["migrate"][..]), (RELAY, &[])] {
        for parameter in ["sslmod=verify-full", "ssl_mode=verify-full", "SSLMODE=verify-full", "ssl=on"] {
            let (name, _) = parameter.split_once('=').unwrap();
            refuses(program, arguments, &[("DATABASE_URL", &format!("{url}?{parameter}"))], name);
        }
        let jdbc = format!("jdbc:{}", url.replace("postgres://", "postgresql://"));
        refuses(program, arguments, &[("DATABASE_URL", &jdbc)], "jdbc");
        refuses(program, arguments, &[("DATABASE_URL", &url), ("PGSSLMODE", "verify_full")], "PGSSLMODE");
        refuses(program, arguments, &[("DATABASE_URL", &url), ("PGCHANNELBINDING", "require")], "PGCHANNELBINDING");
    }
    for (url, named) in [(format!("{nats}?tls=true"), "tls"), (nats.replace("nats:", "natss:"), "natss")] {
        refuses(TOOL, &["provision"], &[("NATS_URL", &url)], named);
    }
    // Not even where none belongs.
    refuses(TOOL, &["status", &url], &[], "unexpected argument");
}

#[tokio::test]
async fn a_password_of_nats_is_read_from_the_environment_as_from_a_file() {
    let config = "authorization { user: me, password: s3cret }".to_string();
    let nats = Nats::start(NatsOptions { config, ..Default::default() }).await.unwrap();
    let url = nats.url();
    let provision = |password: &str| {
        run(TOOL, &["provision"], &[("NATS_URL", &url), ("NATS_USER", "me"), ("NATS_PASSWORD", password)])
    };
    succeeded(provision("s3cret\n"));
    assert_eq!(provision("s3cret\nx").status.code(), Some(1));
}

/// A server of `settings` and a database in it that has another name on every server.
async fn server(settings: &[(&str, &str)]) -> Postgres {
    let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap()
}

/// `host:port`.
fn place(server: &Postgres) -> String {
    server.url("").split(['@', '/']).nth(3).unwrap().to_string()
}

async fn is_migrated(server: &Postgres) -> bool {
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let there = "select to_regclass('aftercommit.outbox') is not null";
    sqlx::query_scalar(there).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn a_server_is_reached_over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("SKIPPED: this machine has no IPv6");
        return;
    }
    let server = server(&[("listen_addresses", "127.0.0.1, ::1")]).await;
    let url = server.url("postgres").replace("127.0.0.1", "[::1]");
    operator::migrate(&PostgresConfig::new(url)).await.unwrap();
    assert!(is_migrated(&server).await);
}

#[tokio::test]
async fn servers_are_tried_in_turn_until_one_is_wanted() {
    let (reader, writer) = (server(&[("default_transaction_read_only", "on")]).await, server(&[]).await);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("postgres://postgres@{nobody},{},{}/postgres", place(&reader), place(&writer));
    let status = |attribute: &str| {
        let url = PostgresConfig::new(format!("{url}?target_session_attrs={attribute}"));
        async move { operator::migrate(&url).await.map_err(|error| error.report()) }
    };
    // Nothing that is not wanted is written to.
    let no_standby = status("standby").await.unwrap_err();
    for (server, why) in
        [(nobody.to_string(), "refused"), (place(&reader), "no standby"), (place(&writer), "no standby")]
    {
        assert!(no_standby.contains(&server) && no_standby.contains(why), "{no_standby}");
    }
    assert!(status("read-only").await.unwrap_err().contains("read-only transaction"));
    assert!(status("any").await.unwrap_err().contains("read-only transaction"), "the first that answers");
    assert!(!is_migrated(&writer).await);
    // With several servers one that takes writes is looked for.
    operator::migrate(&PostgresConfig::new(url.clone())).await.unwrap();
    assert!(is_migrated(&writer).await);
    assert!(status("read-write").await.is_ok_and(|applied| applied.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_failover_a_relay_finds_the_new_primary() {
    let mut primary = server(&[]).await;
    let database = primary.create_database().await.unwrap();
    let standby = standby_from_files(&mut primary).await;
    let mut outbox = Outbox::new(database.clone(), Nats::shared().await.unwrap().url()).await;
    // The standby comes first, and takes no writes yet.
    let both = format!("postgres://postgres@{},{}/", place(&standby), place(&primary));
    let name = database.rsplit('/').next().unwrap().to_string();
    outbox.postgres.url = both + &name + "?target_session_attrs=read-write";
    let _relay = outbox.relay_process();
    outbox.publish("a", "{}", None).await;
    outbox.settled().await;

    let other = PgPool::connect(&standby.url("postgres")).await.unwrap();
    let sent: String =
        sqlx::query_scalar("select pg_current_wal_flush_lsn()::text").fetch_one(&outbox.pool).await.unwrap();
    let caught_up = format!("select pg_last_wal_replay_lsn() >= '{sent}'");
    eventually(SOON, "the standby has everything", async || {
        sqlx::query_scalar(AssertSqlSafe(&*caught_up)).fetch_one(&other).await.unwrap()
    })
    .await
    .unwrap();
    primary.kill().await.unwrap();
    sqlx::raw_sql("select pg_promote()").execute(&other).await.unwrap();
    outbox.pool = PgPool::connect(&standby.url(&name)).await.unwrap();
    outbox.publish("a", "{}", None).await;
    eventually(SOON, "the relay goes on with the new primary", async || outbox.stored().await == 2).await.unwrap();
    outbox.assert_complete().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_may_be_in_clear_is_warned_of() {
    let (database, nats) = (Database::migrated().await, Nats::shared().await.unwrap().url());
    let files = Directory::new();
    let log = files.path().join("log");
    // Addresses that lead nowhere.
    for (settings, words) in [
        ([("DATABASE_URL", "postgres://me:hunter2@192.0.2.1/db"), ("NATS_URL", &nats)], "PostgreSQL may be neither"),
        ([("DATABASE_URL", &database.config.url), ("NATS_URL", "nats://me:hunter2@192.0.2.1")], "NATS may be neither"),
    ] {
        let file = fs::File::create(&log).unwrap();
        let mut command = Command::new(RELAY);
        command.envs(settings).stdout(Stdio::null()).stderr(file);
        let _relay = RelayProcess(command.spawn().unwrap());
        let said = || fs::read_to_string(&log).unwrap();
        eventually(SOON, "the relay warns", async || said().contains(words))
            .await
            .unwrap_or_else(|_| panic!("{}", said()));
        assert!(said().lines().any(|line| line.contains(words) && line.contains("192.0.2.1")), "{}", said());
        assert!(!said().contains("hunter2"), "{}", said());
    }
}
