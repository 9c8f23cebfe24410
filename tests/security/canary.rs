//! G8: what must stay secret is called "canary" here, everything goes wrong, the programs say all that they can say, and
//! no canary sings.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use aftercommit::backoff::Backoff;
use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::outbox::RawEvent;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sqlx::PgTransaction;

use crate::stage::started;
use crate::support::{Database, Directory, Endpoint, Number, Reply, SOON, Work, child_worker};

const CANARY: &str = "canary";
const PASSWORD: &str = "canary-database-password";
const NATS: &str = "no_auth_user: admin, authorization { users: [
    { user: admin, password: admin }, { user: me, password: canary-nats-password } ] }";

/// Handlers that fail with an error of the server which knows the payload, one kind each.
const HANDLERS: [(&str, &str); 5] = [
    ("doubled", "insert into word select event -> 'data' ->> 'text' from generate_series(1, 2);"),
    ("checked", "insert into number (n, text) values (-1, event -> 'data' ->> 'text');"),
    ("whole", "perform (event -> 'data' ->> 'text')::int;"),
    ("timed", "perform (event -> 'data' ->> 'text')::timestamptz;"),
    ("document", "perform (event -> 'data' ->> 'text')::jsonb;"),
];

/// A number whose payload has more in it than the handler knows, and the wrong type for another one.
fn event(event_type: &str, n: i64) -> RawEvent {
    let payload = format!("{{\"key\": \"k\", \"n\": {n}, \"text\": \"canary-payload\"}}");
    RawEvent::new(event_type, "application/json", payload).key("k").header("x-secret", "canary-header")
}

/// Every way in which a canary could be written.
fn canaries() -> Vec<String> {
    let bytes = CANARY.as_bytes();
    let mut all = vec![CANARY.to_string(), CANARY.to_uppercase()];
    all.push(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
    all.push(bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", "));
    // The six letters at each of the three places of a base64 group, without those that depend on their neighbours.
    for (before, from, to) in [("", 0, 8), ("a", 2, 9), ("aa", 3, 10)] {
        all.push(STANDARD_NO_PAD.encode(format!("{before}{CANARY}"))[from..to].to_string());
    }
    all
}

fn assert_silent(what: &str, text: &str) {
    for canary in canaries() {
        let found = text.lines().find(|line| line.contains(&canary));
        assert_eq!(found, None, "{what} says {canary:?}");
    }
}

fn read(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

struct Cage {
    nats: Nats,
    work: Work,
    /// With the password in it.
    url: String,
    files: Directory,
    endpoint: Endpoint,
}

impl Cage {
    async fn new() -> (Self, Postgres) {
        let files = Directory::new();
        let access = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        let access = files.write("pg_hba.conf", access).display().to_string();
        let settings = vec![("hba_file".into(), access), ("password_encryption".into(), "scram-sha-256".into())];
        let postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
        let nats = Nats::start(NatsOptions { config: NATS.into(), ..Default::default() }).await.unwrap();
        let database = Database { config: PostgresConfig::new(postgres.create_database().await.unwrap()) };
        database.execute(&format!("create role app login superuser password '{PASSWORD}'")).await;
        let url = database.url_of(&format!("app:{PASSWORD}"));
        let work = Work::on(database.config.url.clone(), nats.url()).await;
        database
            .execute("create table word (text text unique); create table number (n int check (n > 0), text text)")
            .await;
        for (name, statement) in HANDLERS {
            database
                .execute(&format!(
                    "create function {name}(event jsonb) returns void language plpgsql as $$ begin {statement} end $$"
                ))
                .await;
        }
        let endpoint = Endpoint::start(|_, n| match n % 5 {
            0 => Reply::With(500, "X-Secret: canary-answer\r\n".into()),
            1 => Reply::Cut,
            2 => Reply::With(302, "Location: http://canary.example/\r\n".into()),
            3 => Reply::Hang,
            _ => Reply::Status(400),
        })
        .await;
        (Self { nats, work, url, files, endpoint }, postgres)
    }

    fn toml(&self) -> String {
        let mut text = String::new();
        let settings = "max_attempts = 2\nbackoff = { first = \"20ms\", max = \"50ms\" }\nack_wait = \"1s\"\n";
        for (name, _) in HANDLERS {
            let sql = format!("sql = {{ function = \"{name}\" }}");
            text += &format!("[[subscriber]]\nname = \"{name}\"\ntypes = [\"test.number\"]\n{sql}\n{settings}");
        }
        let url = format!("http://{}/canary-path?token=canary-query", self.endpoint.address);
        text += &format!(
            "[[subscriber]]\nname = \"webhook\"\ntypes = [\"test.number\"]\n{}[subscriber.http]\nurl = \"{url}\"\ntimeout = \"500ms\"\n\
             headers = {{ Authorization = \"env:SHOP_TOKEN\" }}\n",
            settings.replace("max_attempts = 2", "max_attempts = 5"),
        );
        self.files.write("worker.toml", text).display().to_string()
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("DATABASE_URL", &self.url)
            .env("NATS_URL", self.nats.url())
            .env("NATS_USER", "me")
            .env("NATS_PASSWORD", "canary-nats-password")
            .env("SHOP_TOKEN", "canary-token")
            .env("AFTERCOMMIT_STREAM", &self.work.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", self.work.outbox.naming.prefix.to_string())
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "full")
            .stdin(Stdio::null());
        command
    }

    /// What the operator's tool prints, whatever comes of it.
    fn tool(&self, arguments: &[&str]) -> String {
        let output = self.command(env!("CARGO_BIN_EXE_aftercommit"), arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    async fn dead_letters(&self, subscriber: &str) -> i64 {
        sqlx::query_scalar("select count(*) from aftercommit.dead_letter where subscriber = $1")
            .bind(subscriber)
            .fetch_one(&self.work.outbox.pool)
            .await
            .unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_said_when_everything_goes_wrong() {
    let (mut cage, _postgres) = Cage::new().await;
    let (relay_log, worker_log, child_log) =
        (cage.files.path().join("relay"), cage.files.path().join("worker"), cage.files.path().join("child"));
    let toml = cage.toml();
    let provisioned = cage.tool(&["provision", "--config", &toml]);
    assert!(provisioned.contains("created"), "{provisioned}");
    let every = ["--reconcile-every", "1s", "--reconcile-repair"];
    let relay = cage.command(env!("CARGO_BIN_EXE_aftercommit-relay"), &every);
    let _relay = started(relay, &relay_log);
    let mut worker = cage.command(env!("CARGO_BIN_EXE_aftercommit-worker"), &every);
    worker.args(["--config", &toml]);
    let _worker = started(worker, &worker_log);
    let mut child = cage.work.child("canary::child");
    child.env("RUST_LOG", "aftercommit=trace");
    cage.work.worker_with(Subscriber::new("rust").on::<Number>(Leaky).on::<Text>(Unread)).provision().await.unwrap();
    let _child = started(child, &child_log);

    let broken = RawEvent::new("test.number", "application/json", "{\"text\": canary-payload");
    for event in [event("test.number", 1), broken, event("test.text", 1)] {
        operator::publish(&PostgresConfig::new(&cage.url), event.header("x-other", "canary-header")).await.unwrap();
    }
    for (name, letters) in HANDLERS.iter().map(|(name, _)| (*name, 1)).chain([("webhook", 2), ("rust", 3)]) {
        let mut found = 0;
        let waited = eventually(SOON, "dead letters", async || {
            found = cage.dead_letters(name).await;
            found >= letters
        })
        .await;
        assert!(waited.is_ok(), "{name}: {found} of {letters}");
    }
    // Lost connections, and reconciliation of all that.
    cage.nats.restart().await.unwrap();
    let connected =
        async || [&relay_log, &worker_log].iter().all(|log| read(log).matches("connected to nats").count() > 2);
    eventually(SOON, "they are connected again", connected).await.unwrap();
    what_operators_see(&cage, &toml).await;
    wrong_logins(&cage, &toml).await;
    for (what, log, wanted) in [
        ("the relay", &relay_log, "event published"),
        ("the worker", &worker_log, "event became a dead letter"),
        ("a service", &child_log, "event became a dead letter"),
    ] {
        let text = read(log);
        assert!(text.contains(wanted) && text.contains(" DEBUG "), "{what} is talkative");
        assert_silent(what, &text);
    }
    // What went wrong is told all the same.
    let said = read(&worker_log);
    for part in [
        "word_text_key",
        "number_n_check",
        "invalid input syntax for type integer",
        "invalid input syntax for type json",
    ] {
        assert!(said.contains(part), "{part}");
    }
}

async fn what_operators_see(cage: &Cage, toml: &str) {
    let event: String = sqlx::query_scalar("select event_id::text from aftercommit.dead_letter limit 1")
        .fetch_one(&cage.work.outbox.pool)
        .await
        .unwrap();
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["doctor"],
        &["explain", &event],
        &["explain", &event, "--json"],
        &["peek", "--subscriber", "webhook"],
        &["dead", "list"],
        &["dead", "list", "--json"],
        &["dead", "list", "--group"],
        &["dead", "retry", "1"],
        &["dead", "edit", "2", "--header", "x-secret=canary-edited"],
        &["dead", "discard", "2"],
        &["audit"],
        &["audit", "--json"],
        &["parked", "list"],
        &["findings", "--all"],
        &["runs"],
        &["reconcile", "--leg", "outbox", "--full"],
        &["reconcile", "--config", toml, "--leg", "inbox", "--full"],
        &["replay", "--subscriber", "whole", "--type", "test.number", "--dry-run"],
        &["replay", "--subscriber", "whole", "--type", "test.number", "--again", "--yes"],
        // Refused, for what stands in them.
        &["publish", "test.number", "--payload", "{\"text\": canary"],
        &["publish", "test.number", "--payload", "{}", "--header", "x-secret=canary\u{e9}"],
        &["publish", "test.number", "--payload", "{}", "--header", "x-secret=canary "],
        &["dead", "edit", "3", "--payload", "@/nowhere"],
    ] {
        assert_silent(&arguments.join(" "), &cage.tool(arguments));
    }
    // This one shows headers, as it is asked to, and no payload.
    let shown = cage.tool(&["dead", "show", "3"]);
    assert!(shown.contains("canary-header") && !shown.contains("canary-payload"), "{shown}");
}

async fn wrong_logins(cage: &Cage, toml: &str) {
    let wrong = |program: &str, arguments: &[&str], name: &str, value: &str| {
        let mut command = cage.command(program, arguments);
        command.env(name, value);
        command
    };
    let database = cage.url.replace(PASSWORD, "canary-wrong");
    let relay = env!("CARGO_BIN_EXE_aftercommit-relay");
    let worker = env!("CARGO_BIN_EXE_aftercommit-worker");
    let tool = env!("CARGO_BIN_EXE_aftercommit");
    for (what, mut command) in [
        ("status, PostgreSQL", wrong(tool, &["status"], "DATABASE_URL", &database)),
        ("migrate, a URL that is none", wrong(tool, &["migrate"], "DATABASE_URL", "postgres:/canary:canary@nowhere")),
        ("status, NATS", wrong(tool, &["status"], "NATS_PASSWORD", "canary-wrong")),
        ("doctor, NATS", wrong(tool, &["doctor"], "NATS_PASSWORD", "canary-wrong")),
        ("doctor, PostgreSQL", wrong(tool, &["doctor"], "DATABASE_URL", &database)),
        ("two logins", wrong(relay, &[], "NATS_TOKEN", "canary-token")),
    ] {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!said.is_empty(), "{what}");
        assert_silent(what, &said);
    }
    for (what, command) in [
        ("relay-database", wrong(relay, &[], "DATABASE_URL", &database)),
        ("relay-nats", wrong(relay, &[], "NATS_PASSWORD", "canary-wrong")),
        ("worker-database", wrong(worker, &["--config", toml], "DATABASE_URL", &database)),
        ("worker-nats", wrong(worker, &["--config", toml], "NATS_PASSWORD", "canary-wrong")),
    ] {
        let log = cage.files.path().join(what);
        let _process = started(command, &log);
        let told = async || {
            ["authentication failed", "authorization violation"]
                .iter()
                .any(|words| read(&log).to_lowercase().contains(words))
        };
        eventually(SOON, &format!("{what} is refused"), told).await.unwrap();
        assert_silent(what, &read(&log));
    }
}

/// Its payload has a text where a number is expected.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Text {
    text: i64,
}

impl aftercommit::Event for Text {
    const TYPE: &'static str = "test.text";
}

struct Unread;

impl Handler<Text> for Unread {
    async fn handle(&self, _: &mut PgTransaction<'_>, _: &Delivery<Text>) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Fails with an error of the server whose DETAIL is a row.
struct Leaky;

impl Handler<Number> for Leaky {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        let secret = delivery.headers.get("x-secret").map_or("", String::as_str);
        sqlx::query("insert into number (n, text) values (-1, $1)").bind(secret).execute(&mut **tx).await?;
        Ok(())
    }
}

/// Not a test: the process of a service with handlers in Rust.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a process of a test"]
async fn child() {
    let Some(worker) = child_worker() else { return };
    let subscriber = Subscriber::new("rust").on::<Number>(Leaky).on::<Text>(Unread).max_attempts(2);
    let subscriber = subscriber.backoff(Backoff { first: Duration::from_millis(20), max: Duration::from_millis(50) });
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    worker.subscriber(subscriber).run(tokio_util::sync::CancellationToken::new()).await.unwrap();
}
