//! A database with the roles of roles.sql and a nats-server with the users of accounts.conf.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use aftercommit::config::{Naming, NatsConfig};
use aftercommit::testing::servers::{Nats, NatsOptions};
use async_nats::ConnectOptions;

use crate::support::{Database, Directory, Outbox, Roles};

const ACCOUNTS: &str = include_str!("../../deploy/nats/accounts.conf");
pub const SUBSCRIBER: &str = "receipts";

/// The subscriber without Rust code: fails once for one number, and always for another one.
pub const TOML: &str = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n\
    max_attempts = 2\nack_wait = \"1s\"\nbackoff = { first = \"50ms\", max = \"100ms\" }\n";
const APPLY: &str =
    "create table public.effect (id bigint generated always as identity, event_id uuid, key text, n bigint, attempt int);
    create sequence public.tries;
    create function public.apply(event jsonb) returns void language plpgsql set search_path = pg_catalog, public as $$
    begin
        if event -> 'data' ->> 'n' = '3' then raise exception 'never'; end if;
        if event -> 'data' ->> 'n' = '2' and nextval('tries') = 1 then raise exception 'once'; end if;
        insert into effect (event_id, key, n, attempt)
        values ((event ->> 'id')::uuid, event -> 'data' ->> 'key', (event -> 'data' ->> 'n')::bigint, 1);
    end $$";

/// The configuration of nats-server as it is shipped, with `password` of each user.
pub fn accounts(password: impl Fn(&str) -> String) -> String {
    let variables = ACCOUNTS.match_indices("$AFTERCOMMIT_").map(|(at, _)| {
        let name = ACCOUNTS[at + 1..].split(|c: char| !c.is_ascii_uppercase() && c != '_').next().unwrap();
        let user = name.strip_prefix("AFTERCOMMIT_").and_then(|name| name.strip_suffix("_PASSWORD")).unwrap();
        // What is defined in the file is as good as what is in the environment.
        format!("{name}: \"{}\"\n", password(&user.to_lowercase()))
    });
    // Somebody has to stand for whoever damages a stream: none of the shipped users can.
    let vandal = "jetstream: enabled\n    users: [\n      { user: vandal, password: of-vandal }";
    variables.collect::<String>() + &ACCOUNTS.replace("jetstream: enabled\n    users: [", vandal)
}

/// The password of a user of [`Stage`]; `user` is as in the name of its variable.
pub fn password(user: &str) -> String {
    format!("of-{}", user.replace('-', "_"))
}

pub struct Stage {
    pub nats: Nats,
    pub database: Database,
    pub roles: Roles,
    pub naming: Naming,
    pub files: Directory,
}

impl Stage {
    /// The servers, the schema and the roles; the stream and the consumers are not there yet.
    pub async fn new() -> Self {
        Self::on(Database::empty().await, server(None).await.unwrap()).await
    }

    /// The same in a database that has seen something before, and on this nats-server.
    pub async fn on(database: Database, nats: Nats) -> Self {
        // Without a schema it makes the roles, and then the owner makes the schema.
        let roles = Roles::of(&database);
        for (login, granted) in [
            ("owner", &["owner"][..]),
            ("publisher", &["publisher"]),
            ("relay", &["relay"]),
            ("leader", &["relay", "outbox_reconciler"]),
            ("worker", &["worker"]),
            ("active", &["worker", "inbox_reconciler"]),
            ("outbox_reconciler", &["outbox_reconciler"]),
            ("inbox_reconciler", &["inbox_reconciler"]),
            ("own_reconciler", &["own_reconciler"]),
            ("pruner", &["pruner"]),
            ("requester", &["requester"]),
            ("eraser", &["eraser"]),
            ("reader", &["reader"]),
            ("operator", &["operator"]),
        ] {
            roles.login(&database, login, granted).await;
        }
        let naming = Naming { source: "/test".into(), ..Naming::default() };
        let stage = Self { nats, database, roles, naming, files: Directory::new() };
        succeeded(&stage.run("aftercommit", "owner", "", &["migrate"]));
        stage.roles.grant(&stage.database);
        stage
    }

    /// With stream and consumers, and the subscriber's tables in the same database.
    pub async fn provisioned() -> Self {
        Self::new().await.provision().await
    }

    pub async fn provision(self) -> Self {
        let stage = self;
        stage.database.execute(APPLY).await;
        for login in ["worker", "active"] {
            let login = stage.login(login);
            stage
                .database
                .execute(&format!("grant insert on effect to {login}; grant usage on sequence tries to {login}"))
                .await;
        }
        let toml = stage.toml();
        succeeded(&stage.run("aftercommit", "", "provisioner", &["provision", "--config", &toml]));
        stage
    }

    /// The file with the subscriber's definition.
    pub fn toml(&self) -> String {
        self.files.write("worker.toml", TOML).display().to_string()
    }

    pub fn log(&self, name: &str) -> std::path::PathBuf {
        self.files.path().join(name)
    }

    /// The name of the login that has the role.
    pub fn login(&self, role: &str) -> String {
        format!("{}{role}_login", self.roles.0)
    }

    pub fn url_of(&self, role: &str) -> String {
        self.database.url_of(&self.login(role))
    }

    /// One of the programs as the login of a role and a user of NATS.
    pub fn command(&self, program: &str, role: &str, user: &str) -> Command {
        let path = match program {
            "aftercommit-relay" => env!("CARGO_BIN_EXE_aftercommit-relay"),
            "aftercommit-worker" => env!("CARGO_BIN_EXE_aftercommit-worker"),
            _ => env!("CARGO_BIN_EXE_aftercommit"),
        };
        let mut command = Command::new(path);
        command
            .env("NATS_URL", self.nats.url())
            .env("AFTERCOMMIT_SOURCE", "/test")
            .env("RUST_LOG", "info")
            .stdin(Stdio::null());
        if !role.is_empty() {
            command.env("DATABASE_URL", self.url_of(role));
        }
        if !user.is_empty() {
            command.env("NATS_USER", user).env("NATS_PASSWORD", password(user));
        }
        match inbox(user) {
            Some(inbox) => command.env("NATS_INBOX_PREFIX", inbox),
            None if has_own_account(user) => command.env("NATS_API_PREFIX", "JS.API"),
            None => &mut command,
        };
        command
    }

    /// Runs it to its end.
    pub fn run(&self, program: &str, role: &str, user: &str, arguments: &[&str]) -> Output {
        self.command(program, role, user).args(arguments).output().unwrap()
    }

    /// The outbox and its stream, for those who may do everything.
    pub async fn outbox(&self) -> Outbox {
        let url = self.nats.url().replace("nats://", "nats://vandal:of-vandal@");
        let nats = NatsConfig { url, ..NatsConfig::default() };
        let pool = self.database.pool().await;
        Outbox { postgres: self.database.config.clone(), nats, naming: self.naming.clone(), pool }
    }

    /// A client as this user, whose answers come to its inbox.
    pub fn options(&self, user: &str) -> ConnectOptions {
        let inbox = inbox(user).map_or(format!("_INBOX_{user}"), str::to_string);
        ConnectOptions::with_user_and_password(user.into(), password(user)).custom_inbox_prefix(inbox)
    }
}

/// A nats-server with the users of accounts.conf; of this version, or of the one that all tests use.
pub async fn server(version: Option<&str>) -> Result<Nats, aftercommit::Error> {
    let version = version.map(str::to_string);
    Nats::start(NatsOptions { config: accounts(password), version, ..Default::default() }).await
}

/// What accounts.conf says at the user.
fn inbox(user: &str) -> Option<&'static str> {
    Some(match user {
        "provisioner" => "_INBOX_prov",
        "outbox_reconciler" => "_INBOX_reconciler",
        _ => return None,
    })
}

/// Whether the user is outside of the stream's account.
pub fn has_own_account(user: &str) -> bool {
    OWN_ACCOUNTS.contains(&user)
}

/// The users outside of the stream's account, each in one of its own.
pub const OWN_ACCOUNTS: [&str; 5] = ["receipts", "branch-balance", "receipts_reconciler", "eraser", "operator"];

pub fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Starts a program with its output in a file.
pub fn started(mut command: Command, log: &Path) -> crate::support::WorkerProcess {
    let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
    command.stdout(log.try_clone().unwrap()).stderr(log);
    crate::support::WorkerProcess(command.spawn().unwrap())
}
