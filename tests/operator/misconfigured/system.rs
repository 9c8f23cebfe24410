//! A small production system with the shipped roles and users, and what doctor says of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};

use aftercommit::config::PostgresConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use serde_json::Value;

use crate::stage::{SUBSCRIBER, Stage, accounts, password, started, succeeded};
use crate::support::{Database, SOON, WorkerProcess};

/// Who looks: the relay's login with all its roles, or an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Relay,
    Operator,
}

/// A line of doctor: status, name, what was found, what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    pub status: String,
    pub name: String,
    pub finding: String,
    pub remedy: String,
}

/// Everything that one machine has in production; all is well with it.
pub struct System {
    pub postgres: Postgres,
    pub stage: Stage,
    pub relay: Option<WorkerProcess>,
    pub worker: Option<WorkerProcess>,
}

impl System {
    pub async fn new() -> Self {
        Self::with(Vec::new()).await
    }

    /// With settings for PostgreSQL.
    pub async fn with(settings: Vec<(String, String)>) -> Self {
        let postgres = Postgres::start(PostgresOptions { fsync: true, settings }).await.unwrap();
        let options = NatsOptions {
            config: accounts(password),
            jetstream: "sync_interval: always".into(),
            ..NatsOptions::default()
        };
        let database = Database { config: PostgresConfig::new(postgres.create_database().await.unwrap()) };
        let stage = Stage::on(database, Nats::start(options).await.unwrap()).await.provision().await;
        let mut system = Self { postgres, stage, relay: None, worker: None };
        for login in ["leader", "operator"] {
            // As the line of doctor has it that cannot look.
            system.sql(&format!("grant pg_read_all_stats to {}", system.stage.login(login))).await;
        }
        system.provision(&[]);
        system.start_relay(&[]);
        system.start_worker();
        system.sql("select aftercommit.publish('test.number', '{\"n\": 1}', 'k')").await;
        system.is_well().await;
        system
    }

    pub fn start_relay(&mut self, more: &[(&str, &str)]) {
        let mut relay = self.stage.command("aftercommit-relay", "leader", "relay");
        relay.env("AFTERCOMMIT_RECONCILE_EVERY", "5m").envs(more.iter().copied());
        self.relay = Some(started(relay, &self.stage.log("relay")));
    }

    pub fn start_worker(&mut self) {
        let mut worker = self.stage.command("aftercommit-worker", "active", SUBSCRIBER);
        worker.env("AFTERCOMMIT_RECONCILE_EVERY", "5m").args(["--config", &self.stage.toml()]);
        self.worker = Some(started(worker, &self.stage.log("worker")));
    }

    /// `aftercommit provision` as docs/deploy.md has it: with both databases, and the subscriber.
    pub fn provision(&self, more: &[&str]) {
        let mut command = self.stage.command("aftercommit", "operator", "provisioner");
        command.args(["provision", "--config", &self.stage.toml()]).args(more);
        succeeded(&command.env("OUTBOX_DATABASE_URL", self.stage.url_of("operator")).output().unwrap());
    }

    /// As a superuser.
    pub async fn sql(&self, sql: &str) {
        for statement in sql.split(";;") {
            self.stage.database.execute(statement).await;
        }
    }

    /// A setting of the whole server, read anew.
    pub async fn set(&self, setting: &str) {
        self.sql(&format!("alter system {setting};; select pg_reload_conf()")).await;
    }

    /// What an operator or the relay's administrator types.
    pub fn doctor(&self, who: Who) -> Command {
        let login = if who == Who::Relay { "leader" } else { "operator" };
        let mut doctor = self.stage.command("aftercommit", login, "operator");
        doctor.args(["doctor", "--json", "--nats-monitor", &self.stage.nats.monitor_url()]);
        match who {
            Who::Relay => doctor.args(["--role", "relay,outbox_reconciler"]),
            Who::Operator => doctor.args(["--role", "operator", "--config", &self.stage.toml()]),
        };
        doctor
    }

    /// Everything that is not OK, once the report has settled: nothing for both who look.
    pub async fn is_well(&self) {
        for who in [Who::Relay, Who::Operator] {
            let mut wrong = Vec::new();
            let mut status = None;
            eventually(SOON, "doctor finds all right", async || {
                let output = self.doctor(who).output().unwrap();
                status = output.status.code();
                wrong = lines(&output).into_iter().filter(|line| line.status != "OK").collect();
                wrong.is_empty()
            })
            .await
            .unwrap_or_else(|error| panic!("{error}: {who:?} sees {wrong:#?}"));
            assert_eq!(status, Some(0));
        }
    }

    /// See [`names_in`].
    pub async fn names(&self, who: Who, names: &[&str], status: &str, words: &[&str]) -> Vec<Line> {
        names_in(|| self.doctor(who), names, status, words).await
    }

    /// Runs what the remedy has between its first backquotes, or all of it where it has none.
    pub async fn apply(&self, line: &Line) {
        let command = line.remedy.split('`').nth(1).unwrap_or(&line.remedy);
        match command.split_once(' ') {
            Some(("aftercommit", rest)) => self.aftercommit(rest),
            Some(("nats", rest)) => self.nats(rest).await,
            _ => self.sql(command).await,
        }
    }

    /// With the login and the user that docs/deploy.md has for the command.
    fn aftercommit(&self, arguments: &str) {
        let toml = self.stage.toml();
        let arguments = arguments.replace("worker.toml", &toml);
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let (login, user) = match arguments[0] {
            "migrate" => ("owner", ""),
            "provision" => ("operator", "provisioner"),
            _ => ("operator", "operator"),
        };
        succeeded(&self.stage.command("aftercommit", login, user).args(arguments).output().unwrap());
    }

    /// The program `nats` as the provisioner; where it is not installed the same request by hand.
    async fn nats(&self, arguments: &str) {
        if let Some(program) = nats_program() {
            let mut nats = Command::new(program);
            nats.env("NATS_URL", self.stage.nats.url()).env("NATS_USER", "provisioner");
            nats.env("NATS_PASSWORD", password("provisioner")).args(["--no-context", "--inbox-prefix", "_INBOX_prov"]);
            succeeded(&nats.args(arguments.split(' ')).arg("--force").output().unwrap());
            return;
        }
        eprintln!("skipped: the program `nats` is not installed; `nats {arguments}` is asked for by hand");
        let js = self.stage.outbox().await.js().await;
        match arguments.split(' ').collect::<Vec<_>>()[..] {
            ["consumer", "rm", stream, name] => {
                js.get_stream(stream).await.unwrap().delete_consumer(name).await.unwrap();
            }
            ["stream", "edit", stream, "--max-age", age] => {
                let mut config = js.get_stream(stream).await.unwrap().cached_info().config.clone();
                let hours: u64 = age.trim_end_matches('h').parse().unwrap();
                config.max_age = std::time::Duration::from_hours(hours);
                js.update_stream(config).await.unwrap();
            }
            _ => panic!("nats {arguments}"),
        }
    }
}

/// Waits until doctor says of exactly these checks that something is wrong, the first of them with this status and these
/// words, and returns what is wrong.
pub async fn names_in(doctor: impl Fn() -> Command, names: &[&str], status: &str, words: &[&str]) -> Vec<Line> {
    let expected: BTreeSet<&str> = names.iter().copied().collect();
    let mut found = Vec::new();
    let mut code = None;
    let all = eventually(SOON, "doctor names it", async || {
        let output = doctor().output().unwrap();
        code = output.status.code();
        found = lines(&output).into_iter().filter(|line| line.status != "OK").collect();
        let told: BTreeSet<&str> = found.iter().map(|line| line.name.as_str()).collect();
        let says = |line: &Line| words.iter().all(|word| format!("{} {}", line.finding, line.remedy).contains(word));
        told == expected && found.iter().any(|line| line.name == names[0] && line.status == status && says(line))
    });
    all.await.unwrap_or_else(|error| panic!("{error}: {names:?} {status} {words:?}, and it says {found:#?}"));
    let failed = found.iter().any(|line| line.status == "FAIL");
    assert_eq!(code, Some(i32::from(failed)), "{found:#?}");
    found
}

pub fn lines(output: &Output) -> Vec<Line> {
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let line = |check: &Value| Line {
        status: text(&check["status"]),
        name: text(&check["name"]),
        finding: text(&check["finding"]),
        remedy: text(&check["remedy"]),
    };
    report["checks"].as_array().unwrap().iter().map(line).collect()
}

/// NATS's own program, where somebody has installed it.
pub fn nats_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let go = std::env::var_os("HOME").map(|home| PathBuf::from(home).join("go/bin"));
    std::env::split_paths(&path).chain(go).map(|directory| directory.join("nats")).find(|file| file.is_file())
}
