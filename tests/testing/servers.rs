//! The servers that the other tests run on: they start, they crash like real ones, and nothing of them is left over.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use async_nats::jetstream::{self, stream};
use sqlx::{Connection, PgConnection};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(30);

async fn query(url: &str, sql: &'static str) -> Result<Vec<String>, sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::query_scalar(sql).fetch_all(&mut connection).await
}

async fn listens(url: &str) -> bool {
    let address = url.rsplit(['@', '/']).find(|part| part.contains(':'));
    TcpStream::connect(address.unwrap_or(url)).await.is_ok()
}

#[tokio::test]
async fn postgres_keeps_what_was_committed_when_it_crashes() {
    let settings = vec![("track_commit_timestamp".into(), "on".into())];
    let mut postgres = Postgres::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let url = postgres.create_database().await.unwrap();
    assert_eq!(query(&url, "show track_commit_timestamp").await.unwrap(), ["on"]);
    // Only a crash empties an unlogged table, so it tells one from an orderly stop.
    query(&url, "create table kept as select 'kept'::text as line").await.unwrap();
    query(&url, "create unlogged table emptied as select 'there'::text as line").await.unwrap();

    postgres.kill().await.unwrap();
    assert!(!listens(&url).await);
    assert!(postgres.kill().await.is_err(), "it does not run");
    postgres.restart().await.unwrap();

    assert_eq!(query(&url, "select line from kept").await.unwrap(), ["kept"]);
    assert_eq!(query(&url, "select line from emptied").await.unwrap(), [""; 0]);

    query(&url, "insert into emptied values ('there')").await.unwrap();
    postgres.restart().await.unwrap();
    assert_eq!(query(&url, "select line from emptied").await.unwrap(), ["there"]);
}

#[tokio::test]
async fn each_test_has_a_database_of_its_own_on_the_shared_server() {
    let postgres = Postgres::shared().await.unwrap();
    let (one, other) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    query(&one, "create table mine ()").await.unwrap();
    assert_eq!(
        query(&other, "select to_regclass('mine')::text where to_regclass('mine') is not null").await.unwrap(),
        [""; 0]
    );
}

#[tokio::test]
async fn nats_keeps_a_stream_when_it_is_killed() {
    let options = NatsOptions {
        config: "max_payload: 4096".into(),
        jetstream: "sync_interval: always".into(),
        ..Default::default()
    };
    let mut nats = Nats::start(options).await.unwrap();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    assert_eq!(context.client().server_info().max_payload, 4096);
    assert_eq!(context.client().server_info().version, nats.version());
    let name = unique_name("KEPT");
    let config = stream::Config { name: name.clone(), subjects: vec!["kept".into()], ..Default::default() };
    context.create_stream(config).await.unwrap();
    context.publish("kept", "1".into()).await.unwrap().await.unwrap();

    nats.kill().await.unwrap();
    assert!(!listens(&nats.url()).await);
    nats.restart().await.unwrap();

    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = context.get_stream(&name).await.unwrap();
    assert_eq!(stream.get_raw_message(1).await.unwrap().payload, "1");
}

#[tokio::test]
async fn a_paused_nats_answers_nothing_until_it_is_resumed() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    assert!(pong(&nats).await);
    nats.pause().unwrap();
    assert!(!pong(&nats).await);
    nats.resume().unwrap();
    eventually(SOON, "the server answers again", async || pong(&nats).await).await.unwrap();
}

#[tokio::test]
async fn a_nats_that_has_ended_cannot_be_paused() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let pid = std::fs::read_to_string(nats.store_directory().with_file_name("pid")).unwrap();
    Command::new("sh").args(["-c", &format!("kill -s KILL {pid}")]).status().unwrap();
    let ended = nats.pause().unwrap_err().to_string();
    assert!(ended.contains("has ended") && ended.contains("Server is ready"), "{ended}");
    nats.kill().await.unwrap();
    let gone = nats.pause().unwrap_err().to_string();
    assert!(gone.contains("does not run"), "{gone}");
}

/// Whether the server answers a new client.
async fn pong(nats: &Nats) -> bool {
    matches!(tokio::time::timeout(Duration::from_millis(200), async_nats::connect(nats.url())).await, Ok(Ok(_)))
}

#[tokio::test]
async fn nothing_is_left_of_a_dropped_server() {
    let postgres = Postgres::start(PostgresOptions { fsync: false, ..Default::default() }).await.unwrap();
    let url = postgres.url("postgres");
    let data = query(&url, "show data_directory").await.unwrap().remove(0);
    assert!(Path::new(&data).exists());
    drop(postgres);
    assert!(!listens(&url).await);
    assert!(!Path::new(&data).parent().unwrap().exists());
}

#[tokio::test]
async fn nothing_is_left_of_the_servers_of_a_killed_process() {
    let directory = std::env::temp_dir().join(unique_name("aftercommit-killed"));
    std::fs::create_dir(&directory).unwrap();
    std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755)).unwrap();
    let left = || std::fs::read_dir(&directory).unwrap().count();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "servers::runs_servers_until_it_is_killed", "--nocapture"])
        .env("TMPDIR", &directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let urls: Vec<String> = BufReader::new(process.stdout.take().unwrap())
        .lines()
        .filter_map(|line| Some(line.unwrap().split_once("runs on ")?.1.to_string()))
        .take(2)
        .collect();
    assert!(listens(&urls[0]).await && listens(&urls[1]).await);
    assert_eq!(left(), 2);

    process.kill().unwrap();
    process.wait().unwrap();

    eventually(SOON, "both directories are removed", async || left() == 0).await.unwrap();
    assert!(!listens(&urls[0]).await && !listens(&urls[1]).await);
    std::fs::remove_dir(&directory).unwrap();
}

/// Not a test: the process that the test above kills.
#[tokio::test]
#[ignore = "run by another test"]
async fn runs_servers_until_it_is_killed() {
    println!("runs on {}", Postgres::shared().await.unwrap().url("postgres"));
    let nats = Nats::shared().await.unwrap();
    // Only root may, and not everywhere.
    let mount = ["-t", "tmpfs", "-o", "size=1m", "none"];
    _ = Command::new("mount").args(mount).arg(nats.store_directory()).stderr(Stdio::null()).status();
    println!("runs on {}", nats.url());
    std::future::pending().await
}
