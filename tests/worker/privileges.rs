//! G8 at the worker: it works with the rights that docs/worker.md lists, and with nothing more.

use std::process::{Command, Stdio};

use crate::support::{Directory, SOON, Work, WorkerProcess, free_address, get, metric};
use aftercommit::admin::worker::{Which, pause, resume};
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::testing::{eventually, unique_name};
use sqlx::AssertSqlSafe;

/// Fails once for one number, and always for another one.
const APPLY: &str = "create function apply(event jsonb) returns void language plpgsql as $$
    begin
        if event -> 'data' ->> 'n' = '3' then raise exception 'never'; end if;
        if event -> 'data' ->> 'n' = '2' and nextval('tries') = 1 then raise exception 'once'; end if;
        insert into effect (event_id, key, n, attempt)
        values ((event ->> 'id')::uuid, event -> 'data' ->> 'key', (event -> 'data' ->> 'n')::bigint, 1);
    end $$";

/// The documented block of this kind that begins with `start`.
fn documented(kind: &str, start: &str) -> String {
    let page = include_str!("../../docs/worker.md");
    let fence = format!("```{kind}\n");
    let mut blocks = page.split(&fence).skip(1).map(|block| block.split("```").next().unwrap());
    blocks.find(|block| block.starts_with(start)).unwrap().to_string()
}

/// The documented subjects behind `verb`, for this stream and subscriber.
fn subjects(verb: &str, stream: &str) -> String {
    let block = documented("text", "publish    $JS.API.CONSUMER");
    let line = block.lines().find_map(|line| line.strip_prefix(verb)).unwrap();
    let subject = |subject: &str| {
        let tokens = subject.split('.').map(|token| match token {
            "S" => stream,
            "C" => "receipts",
            other => other,
        });
        format!("\"{}\"", tokens.collect::<Vec<_>>().join("."))
    };
    line.split_whitespace().map(subject).collect::<Vec<_>>().join(", ")
}

/// The worker's program as the role and the user that only have their rights.
fn limited(work: &Work, role: &str, toml: &str) -> Command {
    let mut command = work.command(toml);
    let url = work.outbox.postgres.url.replace("//postgres@", &format!("//{role}@"));
    command.env("DATABASE_URL", url).env("NATS_USER", "worker").env("NATS_PASSWORD", "worker");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_needs_the_documented_rights_and_no_more() {
    // The stream's name is known only when the server runs, and the permissions are needed before: they are included.
    let files = Directory::new();
    let permissions = |stream: &str| {
        files.write(
            "users.conf",
            format!(
                "no_auth_user: admin, authorization {{ users: [ {{ user: admin, password: admin }}, \
                 {{ user: worker, password: worker, permissions: {{ publish: [ {} ], subscribe: [ {} ] }} }} ] }}",
                subjects("publish", stream),
                subjects("subscribe", stream),
            ),
        )
    };
    permissions("NONE");
    let include = format!("include \"../{}/users.conf\"", files.path().file_name().unwrap().display());
    let mut nats = Nats::start(NatsOptions { config: include, ..Default::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let work = Work::on(database, nats.url()).await;
    permissions(&work.outbox.naming.stream);
    nats.restart().await.unwrap();

    let role = unique_name("worker");
    let grants = documented("sql", "grant usage on schema aftercommit").replace("to worker;", &format!("to {role};"));
    let execute =
        async |sql: String| sqlx::raw_sql(AssertSqlSafe(sql)).execute(&work.outbox.pool).await.map(drop).unwrap();
    execute("create sequence tries".into()).await;
    execute(APPLY.into()).await;
    execute(format!("create role {role} login; {grants}")).await;
    execute(format!("grant insert on effect to {role}; grant usage on sequence tries to {role}")).await;

    let toml = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n\
                max_attempts = 2\nack_wait = \"1s\"\nbackoff = { first = \"50ms\", max = \"100ms\" }\n";
    let log = files.path().join("log");
    let mut command = limited(&work, &role, toml);
    command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap()).env("RUST_LOG", "info,async_nats=warn");
    let worker = WorkerProcess(command.spawn().unwrap());
    // Handled, failed once, dead, and behind it.
    for n in 1..=4 {
        work.send("a", n).await;
    }
    work.wait_for(3).await;
    assert_eq!(work.numbers("a").await, [1, 2, 4]);
    assert_eq!(work.dead_letters().await.len(), 1);
    work.wait_until_acked("receipts").await;

    pause(&work.outbox.postgres, Which::All, "me", None).await.unwrap();
    let paused = || std::fs::read_to_string(&log).unwrap().contains("paused with all subscribers");
    eventually(SOON, "it is paused", async || paused()).await.unwrap();
    work.send("a", 5).await;
    // Dead while it was paused: the next one takes over what is in the stream.
    worker.kill();
    let mut command = limited(&work, &role, toml);
    let address = free_address();
    command.args(["--http", &address]).stderr(std::fs::File::options().append(true).open(&log).unwrap());
    let worker = WorkerProcess(command.spawn().unwrap());
    resume(&work.outbox.postgres, Which::All, "me").await.unwrap();
    work.wait_for(4).await;
    work.wait_until_acked("receipts").await;
    // It reads the tables of which it tells, too.
    let letters = "aftercommit_worker_dead_letters{subscriber=\"receipts\"}";
    eventually(SOON, "it counts the dead letter", async || {
        let metrics = get(&address, "/metrics").await.unwrap_or_default().1;
        metric(&metrics, letters) == Some(1.0)
    })
    .await
    .unwrap();
    // What was dead runs again.
    execute(APPLY.replace("create function", "create or replace function").replace("= '3'", "= '33'")).await;
    let retried = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["dead", "retry", "--subscriber", "receipts", "--yes"])
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .output()
        .unwrap();
    assert!(retried.status.success(), "{}", String::from_utf8_lossy(&retried.stderr));
    work.wait_for(5).await;
    assert_eq!(worker.stop(), Some(0));
    let complaints = ["permission denied", "Permissions Violation", "cannot be"];
    let said = std::fs::read_to_string(&log).unwrap();
    let found: Vec<&str> =
        said.lines().filter(|line| complaints.iter().any(|complaint| line.contains(complaint))).collect();
    // The one warning about `nats micro`.
    assert!(
        found.len() <= 2 && found.iter().all(|line| line.contains("$SRV") || line.contains("micro service")),
        "{found:?}"
    );
}

/// What a worker's role must not do.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_not_do_what_operators_and_publishers_do() {
    let work = Work::shared().await;
    let role = unique_name("worker");
    let grants = documented("sql", "grant usage on schema aftercommit").replace("to worker;", &format!("to {role};"));
    let setup = format!("create role {role} login; {grants}");
    sqlx::raw_sql(AssertSqlSafe(setup)).execute(&work.outbox.pool).await.unwrap();
    let url = work.outbox.postgres.url.replace("//postgres@", &format!("//{role}@"));
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    for statement in [
        "select from aftercommit.outbox",
        "delete from aftercommit.outbox",
        "insert into aftercommit.pause (name) values ('relay')",
        "delete from aftercommit.pause",
        "update aftercommit.inbox set outcome = 'handled'",
        "delete from aftercommit.dead_letter",
        "insert into aftercommit.audit (who, action) values ('me', 'x')",
        "delete from aftercommit.audit",
        "insert into aftercommit.relay_status select",
        "update aftercommit.parked set state = 'released'",
        "create table aftercommit.mine ()",
    ] {
        let error = sqlx::raw_sql(statement).execute(&pool).await.unwrap_err().to_string();
        assert!(error.contains("permission denied"), "{statement}: {error}");
    }
}
