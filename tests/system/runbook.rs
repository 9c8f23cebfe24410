//! docs/runbook.md says what is: each alert has a section, and the commands of each section, run in a system that is in that situation, say what the
//! page shows.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::docs::root;
use crate::support::{
    Database, Endpoint, Outbox, RelayProcess, Reply, Roles, SOON, Work, WorkerProcess, answers, free_address, reaches,
    succeeded,
};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures_util::{StreamExt, future, stream};
use sqlx::Connection;

/// What the page calls things that have another name in each system.
const EVENT: &str = "019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11";
const JOB: &str = "019aa1d0-0b6e-7c44-8f0a-5f6d1f3a2c90";
const RELAY: &str = "http://relay-1:9464";
const WORKER: &str = "http://worker-1:9465";

/// What the handler does, by the event's key.
const APPLY: &str = "create function apply(event jsonb) returns void language plpgsql as $$
    begin
        if event ->> 'partitionkey' = 'bad' then raise exception 'the printer is on fire'; end if;
        if event ->> 'partitionkey' = 'slow' then perform pg_sleep(50); end if;
        insert into effect (event_id, key, n) values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'n')::bigint);
    end $$";

fn page() -> String {
    fs::read_to_string(root().join("docs/runbook.md")).unwrap()
}

/// The sections of alerts, by name.
fn sections() -> Vec<(String, String)> {
    let page = page();
    let sections = page.split("\n### ").skip(1).map(|section| section.split("\n## ").next().unwrap());
    sections
        .map(|section| section.split_once('\n').unwrap())
        .map(|(name, text)| (name.to_string(), text.to_string()))
        .collect()
}

/// What is typed, and the lines that the page shows behind it.
#[derive(Debug)]
struct Typed {
    command: String,
    shown: Vec<String>,
}

fn typed(section: &str) -> Vec<Typed> {
    let mut all: Vec<Typed> = Vec::new();
    for block in section.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap().lines() {
            match line.strip_prefix("$ ") {
                Some(command) => {
                    let command = command.split("   #").next().unwrap().trim().to_string();
                    all.push(Typed { command, shown: Vec::new() });
                }
                None => all.last_mut().expect("output stands behind a command").shown.push(line.to_string()),
            }
        }
    }
    all
}

/// Words as they compare: numbers, dates and ids differ from system to system.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace()
        .map(|word| {
            let mut plain = String::new();
            for c in word.chars() {
                let c = if c.is_ascii_digit() { '#' } else { c };
                if c != '#' || !plain.ends_with('#') {
                    plain.push(c);
                }
            }
            let id = word.len() > 30 && word.matches('-').count() == 4;
            // A process: host, number, and a part of an id, which the page shortens.
            let process =
                word.matches(':').count() == 2 && word.split(':').nth(1).is_some_and(|n| n.parse::<u32>().is_ok());
            let table = word.chars().all(|c| c == '-' || c == '+');
            if process && !word.contains("//") {
                return "PROCESS".into();
            }
            if id || table { "ID".into() } else { plain }
        })
        .collect()
}

/// Whether a line is like one of the page, in which … stands for anything.
fn like(shown: &[String], real: &[String]) -> bool {
    let Some((first, rest)) = shown.split_first() else { return real.is_empty() };
    if first == "…" {
        return (0..=real.len()).any(|skipped| like(rest, &real[skipped..]));
    }
    let Some((word, behind)) = real.split_first() else { return false };
    let same = match first.split_once('…') {
        Some((before, after)) => {
            word.len() >= before.len() + after.len() && word.starts_with(before) && word.ends_with(after)
        }
        None => first == word,
    };
    same && like(rest, behind)
}

/// The first line of the page that is not in the output, in this order.
fn missing<'a>(shown: &'a [String], said: &str) -> Option<&'a str> {
    let mut lines = said.lines();
    let wanted = shown.iter().filter(|line| line.trim() != "…" && !line.trim().is_empty());
    wanted.into_iter().find(|line| !lines.any(|real| like(&words(line), &words(real)))).map(String::as_str)
}

/// A system, and what its things are called there.
struct Stage {
    work: Work,
    relays: Vec<RelayProcess>,
    workers: Vec<WorkerProcess>,
    nats: Option<Nats>,
    names: Vec<(String, String)>,
    environment: Vec<(&'static str, String)>,
    toml: &'static str,
    /// What has to stay for the situation to last.
    kept: Vec<Box<dyn Any>>,
}

const TOML: &str = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\nmax_batch = 1\n\
                    backoff = { first = \"1s\", max = \"5s\" }\n";

/// Somebody does not want rows to be removed.
const KEPT: &str = "create function keep() returns trigger language plpgsql as $$ begin raise exception 'nothing goes before the audit'; end $$;
    create trigger keep before delete on aftercommit.outbox for each statement execute function keep()";

const ASKS_AGAIN: &str = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n\
                          [[coordinator]]\nask_again = \"1s\"\n";

impl Stage {
    async fn on(nats: String) -> Self {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        let work = Work::on(database, nats).await;
        sqlx::raw_sql(APPLY).execute(&work.outbox.pool).await.unwrap();
        let names = vec![("EVENTS".to_string(), work.outbox.naming.stream.clone())];
        let (relays, workers) = (Vec::new(), Vec::new());
        Self { work, relays, workers, nats: None, names, environment: Vec::new(), toml: TOML, kept: Vec::new() }
    }

    async fn new() -> Self {
        Self::on(Nats::shared().await.unwrap().url()).await
    }

    /// With a nats-server of its own, which can be stopped.
    async fn alone() -> Self {
        let nats = Nats::start(NatsOptions::default()).await.unwrap();
        let mut stage = Self::on(nats.url()).await;
        stage.nats = Some(nats);
        stage
    }

    /// A relay and a worker that have handled an event.
    async fn well(mut self) -> Self {
        self.relay().await;
        self.worker().await;
        self.event("a").await;
        self.work.wait_for(1).await;
        self
    }

    fn name(&mut self, of_the_page: &str, real: impl Into<String>) {
        self.names.retain(|(name, _)| name != of_the_page);
        self.names.push((of_the_page.into(), real.into()));
    }

    async fn relay(&mut self) {
        let address = free_address();
        let mut command = self.work.outbox.relay_command();
        command.args(["--http", &address, "--unhealthy-after", "1s"]);
        command.env("AFTERCOMMIT_RECONCILE_EVERY", "1s").env("RUST_LOG", "off");
        self.relays.push(RelayProcess(command.spawn().unwrap()));
        answers(&address, "/readyz", 200, "").await;
        self.name(RELAY, format!("http://{address}"));
    }

    async fn worker(&mut self) {
        let address = free_address();
        let mut command = self.work.command(self.toml);
        command.args(["--http", &address, "--unhealthy-after", "1s"]).env("RUST_LOG", "off");
        self.workers.push(WorkerProcess(command.spawn().unwrap()));
        answers(&address, "/readyz", 200, "").await;
        self.name(WORKER, format!("http://{address}"));
    }

    /// Writes an event, which the page calls by its name.
    async fn event(&mut self, key: &str) {
        let event = self.work.outbox.written(key, 1).await;
        self.name(EVENT, event);
    }

    /// A worker whose subscriber sends events to an endpoint.
    fn webhook(&mut self, endpoint: &str) {
        let toml = format!("[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\n{endpoint}\n");
        self.workers.push(WorkerProcess(self.work.command(&toml).env("RUST_LOG", "off").spawn().unwrap()));
    }

    async fn change_stream(&self, change: impl FnOnce(&mut Config)) {
        let js = self.work.outbox.js().await;
        let mut config = js.get_stream(&self.work.outbox.naming.stream).await.unwrap().cached_info().config.clone();
        change(&mut config);
        js.update_stream(config).await.unwrap();
    }

    fn operator(&self, arguments: &[&str]) -> String {
        succeeded(self.work.outbox.operator(arguments))
    }

    /// Ends them, and what they held.
    async fn kill(&mut self) {
        self.relays.clear();
        self.workers.clear();
        self.work.outbox.expire_leases().await;
    }

    /// Text of the page, of this system.
    fn here(&self, text: &str) -> String {
        self.names.iter().fold(text.to_string(), |text, (name, real)| text.replace(name, real))
    }

    /// Runs a command as it is typed, and returns all that it says.
    async fn run(&self, command: &str) -> (bool, String) {
        let Outbox { postgres, .. } = &self.work.outbox;
        let mut shell = self.work.outbox.operator_command(&[]);
        let programs = std::path::Path::new(env!("CARGO_BIN_EXE_aftercommit")).parent().unwrap();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let environment: Vec<_> =
            shell.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
        shell = Command::new("bash");
        for (name, value) in environment {
            shell.env(name, value.unwrap_or_default());
        }
        shell.envs(self.environment.iter().map(|(name, value)| (*name, value.as_str())));
        shell.args(["-c", &self.here(command)]).env("PATH", path).env("PGDATABASE_URL", &postgres.url);
        let output =
            tokio::process::Command::from(shell).current_dir(env!("CARGO_TARGET_TMPDIR")).output().await.unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), said)
    }

    /// Runs it until it says what the page shows; what acts is run once.
    async fn says(&self, typed: &Typed) -> Result<(), String> {
        let acts = ["resume", "retry", "release", "discard", "--repair", "pause", "provision", "terminate"];
        let acts = acts.iter().any(|word| typed.command.contains(word)) && !typed.command.contains("--dry-run");
        let shown: Vec<String> = typed.shown.iter().map(|line| self.here(line)).collect();
        let as_shown =
            |ended_well: bool, said: &str| missing(&shown, said).is_none() && (ended_well || !shown.is_empty());
        let mut last = self.run(&typed.command).await;
        let waited = eventually(SOON, "it says what the page shows", async || {
            if !acts && !as_shown(last.0, &last.1) {
                last = self.run(&typed.command).await;
            }
            acts || as_shown(last.0, &last.1)
        });
        _ = waited.await;
        match as_shown(last.0, &last.1) {
            true => Ok(()),
            false => Err(format!("`{}` does not say {:?}:\n{}", typed.command, missing(&shown, &last.1), last.1)),
        }
    }

    async fn all(self, section: &str) -> Result<(), String> {
        let typed = typed(section);
        assert!(!typed.is_empty(), "there are no commands: {section}");
        for one in &typed {
            self.says(one).await?;
        }
        Ok(())
    }
}

/// A system in the situation that the alert tells of.
async fn situation(alert: &str) -> Stage {
    let mut stage = match alert {
        "AftercommitRelayStalled" | "AftercommitReconcilerFails" => Stage::alone().await.well().await,
        "AftercommitDeadLetters" => {
            let mut stage = Stage::new().await;
            stage.toml = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\nmax_attempts = 1\n";
            stage.well().await
        }
        "AftercommitSubscriberStalled" | "AftercommitServiceUnavailable" => Stage::new().await,
        "AftercommitSweepsFail" => {
            let stage = Stage::new().await;
            sqlx::raw_sql(KEPT).execute(&stage.work.outbox.pool).await.unwrap();
            stage.well().await
        }
        "AftercommitJobsOverdue" => {
            let mut stage = Stage::new().await;
            stage.toml = ASKS_AGAIN;
            stage.well().await
        }
        _ => Stage::new().await.well().await,
    };
    match alert.trim_start_matches("Aftercommit") {
        "NoRelayLeads" | "ProcessDown" => {
            // What it has published is no backlog any more.
            stage.work.outbox.settled().await;
            stage.kill().await;
            stage.worker().await;
            stage.event("a").await;
        }
        "RelayStalled" | "ReconcilerFails" => {
            stage.nats.as_mut().unwrap().stop().await.unwrap();
            stage.event("a").await;
        }
        "BacklogOld" => {
            stage.operator(&["relay", "pause", "--reason", "the stream moves"]);
            answers(stage.here(RELAY).trim_start_matches("http://"), "/healthz", 200, "paused").await;
            stage.event("a").await;
        }
        "BacklogUnknown" | "SubscriberTablesUnknown" => lose_a_right(&mut stage, alert).await,
        "ParkedEvents" => {
            stage.change_stream(|config| config.max_message_size = 4096).await;
            stage.work.outbox.publish("order.large", &format!("\"{}\"", "x".repeat(10_000)), Some("order-7")).await;
            stage.work.outbox.publish("order.paid", "{}", Some("order-7")).await;
            let event = "select event_id::text from aftercommit.outbox where type = 'order.large'";
            let event: String = sqlx::query_scalar(event).fetch_one(&stage.work.outbox.pool).await.unwrap();
            stage.name(EVENT, event);
        }
        "RelayInterrupted" => {
            stage.change_stream(|config| (config.max_messages, config.discard) = (1, DiscardPolicy::New)).await;
            stage.event("a").await;
        }
        "LongTransaction" => {
            let mut open = sqlx::PgConnection::connect(&stage.work.outbox.postgres.url).await.unwrap();
            sqlx::raw_sql("set application_name = 'nightly-report'; begin; select pg_current_xact_id()")
                .execute(&mut open)
                .await
                .unwrap();
            stage.kept.push(Box::new(open));
        }
        "NoWorkerActive" => {
            stage.workers.clear();
            stage.work.outbox.expire_leases().await;
            stage.event("a").await;
        }
        "SubscriberStalled" => {
            stage.relay().await;
            stage.event("a").await;
            // Nobody listens there.
            stage.webhook("http.url = \"http://127.0.0.1:9/\"");
        }
        "ServiceUnavailable" => {
            stage.relay().await;
            stage.event("a").await;
            let endpoint = Endpoint::start(|_, _| Reply::Status(503)).await;
            stage.webhook(&format!("http.url = \"http://{}/\"", endpoint.address));
            stage.kept.push(Box::new(endpoint));
        }
        "SubscriberBehind" | "SubscriberLate" => {
            for _ in 0..4 {
                stage.event("slow").await;
            }
        }
        "SubscriberPaused" => {
            stage.operator(&["worker", "pause", "--subscriber", "receipts", "--reason", "the printer moves"]);
            answers(stage.here(WORKER).trim_start_matches("http://"), "/healthz", 200, "paused").await;
            stage.event("a").await;
        }
        "DeadLetters" | "EventsFailing" => {
            stage.event("bad").await;
            stage.name("show 17", "show 1");
        }
        "RelayWithoutStandby" => stage.relay().await,
        "SubscriberWithoutStandby" => stage.worker().await,
        "Findings" => {
            stage.event("a").await;
            stage.work.wait_for(2).await;
            stage.work.outbox.settled().await;
            let stream = stage.work.outbox.js().await.get_stream(&stage.work.outbox.naming.stream).await.unwrap();
            stream.delete_message(1).await.unwrap();
            // It fails because it finds something.
            _ = stage.work.outbox.operator(&["reconcile", "--comparison", "outbox", "--full"]);
        }
        "JobsOverdue" => {
            let file = std::env::temp_dir().join(format!("{}-erase.toml", stage.work.outbox.naming.stream));
            fs::write(&file, "[[subject]]\nkind = 'tenant'\nparticipants = ['pos']\ndue_after = '1s'\n").unwrap();
            stage.operator(&["erase", "request", "tenant", "7", "--config", file.to_str().unwrap()]);
            let job = "select id::text from aftercommit.job";
            let job: String = sqlx::query_scalar(job).fetch_one(&stage.work.outbox.pool).await.unwrap();
            stage.name(JOB, job);
            // The alert goes by that.
            let worker = stage.here(WORKER);
            let overdue = "aftercommit_jobs_overdue{kind=\"erasure\"}";
            reaches(worker.trim_start_matches("http://"), overdue, |jobs| jobs == 1.0).await;
        }
        _ => {}
    }
    stage
}

/// The operator logs in as a relay, or a worker, whose role lacks a grant.
async fn lose_a_right(stage: &mut Stage, alert: &str) {
    let database = Database { config: stage.work.outbox.postgres.clone() };
    let roles = Roles::of(&database);
    let (role, table) = if alert.contains("Backlog") { ("relay", "outbox") } else { ("worker", "dead_letter") };
    let login = roles.login(&database, role, &[role]).await;
    database.execute(&format!("revoke select on aftercommit.{table} from {}{role}", roles.0)).await;
    stage.environment.push(("DATABASE_URL", database.url_of(&login)));
    let named = if role == "relay" { "shop_relay" } else { "receipts_worker" };
    stage.name(named, login);
}

/// Runs what their sections have, a few at a time.
async fn works(alerts: &[&str]) {
    let sections = sections();
    let running = sections.iter().filter(|(name, _)| alerts.contains(&name.as_str())).map(async |(name, section)| {
        let done = situation(name).await.all(section).await;
        done.err().map(|problem| format!("{name}: {problem}"))
    });
    // Each has programs with connections of their own.
    let problems: Vec<String> = stream::iter(running).buffer_unordered(3).filter_map(future::ready).collect().await;
    assert!(problems.is_empty(), "{}", problems.join("\n\n"));
}

const OF_THE_RELAY: &[&str] = &[
    "AftercommitNothingScraped",
    "AftercommitProcessDown",
    "AftercommitNoRelayLeads",
    "AftercommitTwoRelaysLead",
    "AftercommitRelayWithoutStandby",
    "AftercommitRelayStalled",
    "AftercommitBacklogOld",
    "AftercommitBacklogUnknown",
    "AftercommitParkedEvents",
    "AftercommitRelayInterrupted",
    "AftercommitRelayFlapping",
    "AftercommitSlowAcknowledgements",
];
const OF_THE_WORKER: &[&str] = &[
    "AftercommitNoWorkerActive",
    "AftercommitSubscriberWithoutStandby",
    "AftercommitSubscriberStalled",
    "AftercommitServiceUnavailable",
    "AftercommitSubscriberBehind",
    "AftercommitSubscriberLate",
    "AftercommitSubscriberFlapping",
    "AftercommitSubscriberPaused",
    "AftercommitDeadLetters",
    "AftercommitEventsFailing",
    "AftercommitSubscriberTablesUnknown",
];
const OF_UPKEEP: &[&str] = &[
    "AftercommitLongTransaction",
    "AftercommitReconcilerFails",
    "AftercommitReconcilerOverdue",
    "AftercommitFindings",
    "AftercommitSweepsFail",
    "AftercommitJobsOverdue",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_for_alerts_of_the_relay_say_what_is_shown() {
    works(OF_THE_RELAY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_for_alerts_of_workers_say_what_is_shown() {
    works(OF_THE_WORKER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_for_alerts_of_upkeep_say_what_is_shown() {
    works(OF_UPKEEP).await;
}

/// What stands before the alerts.
#[tokio::test(flavor = "multi_thread")]
async fn the_commands_for_a_first_look_say_what_is_shown() {
    let page = page();
    let stage = Stage::new().await.well().await;
    stage.all(page.split("\n### ").next().unwrap()).await.unwrap();
}

#[test]
fn every_alert_has_a_section_that_a_test_runs() {
    let rules = fs::read_to_string(root().join("deploy/prometheus/alerts.yml")).unwrap();
    let alerts: BTreeSet<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let sections = sections();
    assert_eq!(sections.iter().map(|(name, _)| name.as_str()).collect::<BTreeSet<_>>(), alerts);
    let run: BTreeSet<&str> = [OF_THE_RELAY, OF_THE_WORKER, OF_UPKEEP].concat().into_iter().collect();
    assert_eq!(run, alerts);
    for alert in alerts {
        let runbook = format!("runbook: docs/runbook.md#{}", alert.to_lowercase());
        assert!(rules.contains(&format!("{runbook}\n")), "{alert} does not say {runbook}");
    }
    for (name, section) in sections {
        for part in ["**At risk:**", "**Look:**", "**Do:**", "**Over**"] {
            assert!(section.contains(part), "{name} does not say {part}");
        }
    }
}

/// What is named within a sentence is not run, but it is there.
#[test]
fn every_command_that_is_named_exists() {
    let page = page();
    let mut named = 0;
    let outside = page.split("```").step_by(2).collect::<String>();
    for code in outside.split('`').skip(1).step_by(2).filter(|code| code.starts_with("aftercommit ")) {
        named += 1;
        let words = code
            .split(' ')
            .skip(1)
            .take_while(|word| word.chars().all(|c| c.is_ascii_lowercase()) && *word != "receipts");
        let help = Command::new(env!("CARGO_BIN_EXE_aftercommit")).args(words).arg("--help").output().unwrap();
        assert!(help.status.success(), "{code}");
        let help = String::from_utf8(help.stdout).unwrap();
        for flag in code.split(' ').filter(|word| word.starts_with("--")) {
            assert!(help.contains(flag), "{code}: there is no {flag}");
        }
    }
    assert!(named > 10, "only {named} commands were found");
}
