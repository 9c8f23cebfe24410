//! docs/sizing.md: how many bytes an event takes, and what the processes hold. It measures all of it anew, prints it, and fails where
//! the page says something else.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

use crate::support::{Outbox, SOON, WorkerProcess, succeeded};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};

const PAGE: &str = include_str!("../../docs/sizing.md");
const EVENTS: i64 = 4_000;
/// How far the page may be off: pages of tables and indexes are full to different degrees.
const TOLERANCE: f64 = 0.15;

/// JSON of so many bytes that no compression makes smaller.
fn payload(bytes: usize) -> String {
    let noise =
        std::iter::repeat_with(|| STANDARD.encode(Uuid::new_v4().as_bytes())).flat_map(|text| text.into_bytes());
    let noise: Vec<u8> = noise.take(bytes - r#"{"d":""}"#.len()).collect();
    format!(r#"{{"d":"{}"}}"#, String::from_utf8(noise).unwrap())
}

async fn number(pool: &PgPool, sql: &str) -> f64 {
    sqlx::query_scalar(AssertSqlSafe(format!("select ({sql})::float8"))).fetch_one(pool).await.unwrap()
}

/// The most memory that a process has held, in MiB.
fn memory(process: &WorkerProcess) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    line.split_ascii_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// How much processor time a process has used, in microseconds.
fn processor(process: &WorkerProcess) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.0.id())).unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_ascii_whitespace()
        .skip(1)
        .map_while(|field| field.parse().ok())
        .collect();
    // In hundredths of a second, those of the system as well.
    fields.get(10..12).map_or(0.0, |times| times.iter().sum::<f64>() * 10_000.0)
}

/// One of the programs: of the tests' build, or of a release build in the directory that `AFTERCOMMIT_SIZING_BIN` names.
fn program(own: &str) -> PathBuf {
    let own = Path::new(own);
    std::env::var_os("AFTERCOMMIT_SIZING_BIN")
        .map_or_else(|| own.into(), |place| PathBuf::from(place).join(own.file_name().unwrap()))
}

/// Starts a program with the environment of this command.
fn started(like: &Command, own: &str, arguments: &[&str]) -> WorkerProcess {
    let mut command = Command::new(program(own));
    command.args(arguments).envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    WorkerProcess(command.env("RUST_LOG", "warn").stdin(Stdio::null()).spawn().unwrap())
}

/// The row of the page's table that begins with this.
fn page(first: &str) -> Vec<f64> {
    let row =
        PAGE.lines().find(|line| line.starts_with(&format!("| {first} |"))).unwrap_or_else(|| panic!("no {first}"));
    let cells = row.split('|').skip(2).map(|cell| cell.trim().replace(',', ""));
    cells.filter_map(|cell| cell.split(' ').next().unwrap_or_default().parse().ok()).collect()
}

/// Bytes of an event: its outbox row, the WAL of its transaction, the WAL of the relay, its message, its inbox row, the WAL of the
/// worker.
async fn measured(bytes: usize) -> Vec<f64> {
    let settings = vec![("autovacuum".into(), "off".into()), ("max_wal_size".into(), "4GB".into())];
    let postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), nats.url()).await;
    let pool = &outbox.pool;
    let wal = async || number(pool, "pg_current_wal_insert_lsn() - '0/0'").await;
    let each = |bytes: f64| bytes / EVENTS as f64;
    sqlx::raw_sql("create function public.nothing(event jsonb) returns void language sql as ''; checkpoint")
        .execute(pool)
        .await
        .unwrap();

    let (empty, before) = (number(pool, "pg_total_relation_size('aftercommit.outbox')").await, wal().await);
    for n in 0..EVENTS {
        let insert = "insert into aftercommit.outbox (event_id, type, key, payload) values (aftercommit.new_event_id(), 'order.placed', $1, $2)";
        let row = sqlx::query(insert).bind(format!("order-{}", n % 1_000)).bind(payload(bytes).into_bytes());
        row.execute(pool).await.unwrap();
    }
    let published = wal().await - before;
    let row = number(pool, "pg_total_relation_size('aftercommit.outbox')").await - empty;

    let before = wal().await;
    let relay = started(&outbox.relay_command(), env!("CARGO_BIN_EXE_aftercommit-relay"), &[]);
    outbox.settled().await;
    eventually(SOON, "all is in the stream", async || outbox.stored().await == EVENTS.unsigned_abs()).await.unwrap();
    let relayed = wal().await - before;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    let message = stream.cached_info().state.bytes as f64;

    let toml = "[[subscriber]]\nname = \"sizes\"\ntypes = [\"*\"]\nsql = { function = \"public.nothing\" }\n";
    let files = crate::support::Directory::new();
    let toml = files.write("worker.toml", toml).display().to_string();
    succeeded(outbox.operator(&["provision", "--config", &toml]));
    let before = wal().await;
    let worker = started(&outbox.operator_command(&[]), env!("CARGO_BIN_EXE_aftercommit-worker"), &["--config", &toml]);
    eventually(SOON, "all is handled", async || {
        number(pool, "select count(*) from aftercommit.inbox").await as i64 == EVENTS
    })
    .await
    .unwrap();
    let handled = wal().await - before;
    let inbox = number(pool, "pg_total_relation_size('aftercommit.inbox')").await;
    let connections = async |program: &str| {
        number(pool, &format!("select count(*) from pg_stat_activity where application_name = '{program}'")).await
    };
    for (name, process) in [("aftercommit-relay", &relay), ("aftercommit-worker", &worker)] {
        println!(
            "{bytes} B, {name}: {:.0} MiB, {} connections, {:.0} µs of processor time for each event",
            memory(process),
            connections(name).await,
            each(processor(process))
        );
    }
    vec![each(row), each(published), each(relayed), each(message), each(inbox), each(handled)]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn an_event_takes_as_many_bytes_as_the_page_says() {
    let mut wrong = Vec::new();
    for (name, bytes) in [("256 B", 256), ("4 KiB", 4_096)] {
        let found = measured(bytes).await;
        println!("| {name} | {} |", found.iter().map(|one| format!("{one:.0}")).collect::<Vec<_>>().join(" | "));
        let said = page(name);
        assert_eq!(said.len(), found.len(), "{name}: {said:?}");
        for (n, (found, said)) in found.iter().zip(&said).enumerate() {
            if (found - said).abs() > TOLERANCE * found.max(200.0) {
                wrong.push(format!("{name}, column {}: the page says {said}, and it is {found:.0}", n + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
