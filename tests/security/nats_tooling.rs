//! docs/nats-tooling.md: what the program `nats` does as the operator of accounts.conf, command by command. What each of
//! them asks is tried without the program, too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use aftercommit::testing::eventually;
use async_nats::RequestErrorKind;
use futures_util::StreamExt;
use serde_json::Value;

use crate::stage::{SUBSCRIBER, Stage, password, started, succeeded};
use crate::support::{Outbox, SOON, WorkerProcess, get};

const PAGE: &str = include_str!("../../docs/nats-tooling.md");

/// A line of one of the page's tables: a command, and the subjects that it asks or listens to.
#[derive(Debug)]
struct Line {
    command: &'static str,
    subjects: Vec<&'static str>,
}

/// The table below this heading.
fn table(heading: &str) -> Vec<Line> {
    let (_, section) = PAGE.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading} in the page"));
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let lines: Vec<Line> = rows
        .skip(2)
        .map(|row| {
            let cells: Vec<&str> = row.split(" | ").collect();
            let codes = |cell: &'static str| cell.split('`').skip(1).step_by(2);
            let mut commands = codes(cells[0]);
            let (Some(command), None) = (commands.next(), commands.next()) else { panic!("not one command: {row}") };
            assert!(command.starts_with("nats "), "{row}");
            let subjects: Vec<&str> = codes(cells[1]).collect();
            assert!(!subjects.is_empty(), "{row}");
            Line { command, subjects }
        })
        .collect();
    assert!(lines.len() >= 3, "{heading}: {lines:?}");
    lines
}

fn works() -> Vec<Line> {
    table("## What works")
}

fn listens() -> Vec<Line> {
    table("## What goes on at the moment")
}

fn refused() -> Vec<Line> {
    table("## What is refused")
}

/// Servers with all that the commands of the page name: a relay, a worker, events, a retry, a dead letter, and the stream
/// in which that is announced.
struct Scene {
    stage: Stage,
    outbox: Outbox,
    _processes: [WorkerProcess; 2],
}

impl Scene {
    async fn new() -> Self {
        let stage = Stage::provisioned().await;
        let toml = stage.toml();
        succeeded(&stage.run("aftercommit", "", "vandal", &["provision", "--advisories", "--config", &toml]));
        let outbox = stage.outbox().await;
        let relay = started(stage.command("aftercommit-relay", "relay", "relay"), &stage.log("relay"));
        let mut worker = stage.command("aftercommit-worker", "worker", SUBSCRIBER);
        worker.args(["--config", &toml]);
        let worker = started(worker, &stage.log("worker"));
        let scene = Self { stage, outbox, _processes: [relay, worker] };
        scene.outbox.publish("order.placed", r#"{"order": 7}"#, Some("order-7")).await;
        for n in 1..=3 {
            scene.outbox.publish("test.number", &format!("{{\"n\": {n}}}"), None).await;
        }
        let kept = scene.outbox.js().await.get_stream("EVENTS_ADVISORIES").await.unwrap();
        eventually(SOON, "the dead letter is announced", async || kept.get_raw_message(1).await.is_ok()).await.unwrap();
        // Both are asked by the page.
        for service in ["$SRV.PING.aftercommit-relay", "$SRV.PING.aftercommit-worker"] {
            eventually(SOON, service, async || scene.ask(service, "").await.is_some()).await.unwrap();
        }
        scene
    }

    /// What is answered to the operator; nothing when nobody does.
    async fn ask(&self, subject: &str, body: &str) -> Option<String> {
        let client = self.stage.options("operator").connect(self.stage.nats.url()).await.unwrap();
        match client.request(subject.to_string(), body.to_string().into()).await {
            Ok(answer) => Some(String::from_utf8_lossy(&answer.payload).into_owned()),
            Err(error) if error.kind() == RequestErrorKind::NoResponders => None,
            Err(error) => panic!("{subject}: {error}"),
        }
    }

    /// The command as the page has it, as the operator.
    fn nats(&self, program: &Path, command: &str) -> Command {
        self.nats_as(program, "operator", "--no-context --js-api-prefix JS.API", command)
    }

    /// With the flags that the page has for the user.
    fn nats_as(&self, program: &Path, user: &str, flags: &str, command: &str) -> Command {
        let rest = command.strip_prefix("nats ").unwrap();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("exec \"$0\" {flags} {rest}")])
            .arg(program)
            .current_dir(self.stage.files.path())
            .env("NATS_URL", self.stage.nats.url())
            .env("NATS_USER", user)
            .env("NATS_PASSWORD", password(user))
            .stdin(Stdio::null());
        shell
    }

    /// All that could be changed: what the streams hold, and which consumers there are.
    async fn state(&self) -> Vec<String> {
        let js = self.outbox.js().await;
        let mut state = Vec::new();
        for name in ["EVENTS", "EVENTS_ADVISORIES"] {
            let mut stream = js.get_stream(name).await.unwrap();
            let mut consumers: Vec<String> = stream.consumer_names().map(Result::unwrap).collect().await;
            consumers.sort();
            let info = stream.info().await.unwrap();
            let config = serde_json::to_value(&info.config).unwrap();
            state.push(format!("{name} {} {consumers:?} {config}", info.state.messages));
        }
        let streams: Vec<String> = js.stream_names().map(Result::unwrap).collect().await;
        state.push(format!("{} streams", streams.len()));
        state
    }
}

/// The program, where it is installed.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let go = std::env::var_os("HOME").map(|home| PathBuf::from(home).join("go/bin"));
    let found =
        std::env::split_paths(&path).chain(go).map(|directory| directory.join("nats")).find(|file| file.is_file());
    if found.is_none() {
        eprintln!("skipped: the program `nats` is not installed, neither on PATH nor in go/bin");
    }
    found
}

/// Runs it to its end. One that goes on for ever does not do what the page says.
async fn ended(command: Command) -> Output {
    let words = format!("{command:?}");
    let output = tokio::process::Command::from(command).kill_on_drop(true).output();
    tokio::time::timeout(SOON, output).await.unwrap_or_else(|_| panic!("it does not end: {words}")).unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A request that is in order.
fn body(subject: &str) -> &'static str {
    if subject.contains(".GET.") { r#"{"seq":1}"# } else { "" }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_page_get_what_they_ask() {
    let scene = Scene::new().await;
    for line in works() {
        for subject in line.subjects {
            let answer = scene.ask(subject, body(subject)).await;
            let answer = answer.unwrap_or_else(|| panic!("{}: nobody answers {subject}", line.command));
            assert!(!answer.contains("\"error\""), "{}: {subject} answers {answer}", line.command);
        }
    }
    let before = scene.state().await;
    for line in refused() {
        for subject in line.subjects {
            assert_eq!(scene.ask(subject, body(subject)).await, None, "{}: {subject}", line.command);
        }
    }
    assert_eq!(scene.state().await, before);
}

/// The subjects that a message of this kind goes to.
fn advisory(kind: &str) -> String {
    format!("$JS.EVENT.ADVISORY.{kind}")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_hears_advisories_and_no_requests() {
    let scene = Scene::new().await;
    let client = scene.stage.options("operator").connect(scene.stage.nats.url()).await.unwrap();
    let subjects: BTreeSet<&str> = listens().into_iter().flat_map(|line| line.subjects).collect();
    let mut ears = Vec::new();
    for subject in &subjects {
        ears.push((subject, client.subscribe(subject.to_string()).await.unwrap()));
    }
    client.flush().await.unwrap();
    // Many requests, an attempt that fails, another dead letter, a consumer that comes and goes, and a change of the stream.
    let js = scene.outbox.js().await;
    scene.outbox.publish("test.number", r#"{"n": 3}"#, None).await;
    let letters = async || {
        let count = "select count(*) from aftercommit.dead_letter";
        sqlx::query_scalar::<_, i64>(count).fetch_one(&scene.outbox.pool).await.unwrap() == 2
    };
    eventually(SOON, "it is given up", letters).await.unwrap();
    let mut stream = js.get_stream("EVENTS").await.unwrap();
    let config = async_nats::jetstream::consumer::pull::Config { name: Some("tail".into()), ..Default::default() };
    stream.create_consumer(config).await.unwrap();
    stream.delete_consumer("tail").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    config.max_age += std::time::Duration::from_secs(1);
    js.update_stream(config).await.unwrap();

    let expected: BTreeSet<String> = [
        "CONSUMER.MSG_NAKED.EVENTS.receipts",
        "CONSUMER.MSG_TERMINATED.EVENTS.receipts",
        "CONSUMER.CREATED.EVENTS.tail",
        "CONSUMER.DELETED.EVENTS.tail",
        "STREAM.UPDATED.EVENTS",
    ]
    .map(advisory)
    .into();
    for (subject, mut ear) in ears {
        let prefix = subject.trim_end_matches('>');
        let wanted: BTreeSet<&String> = expected.iter().filter(|one| one.starts_with(prefix)).collect();
        assert!(!wanted.is_empty(), "{subject}");
        let mut heard = BTreeSet::new();
        while !wanted.iter().all(|one| heard.contains(*one)) {
            let message = tokio::time::timeout(SOON, ear.next()).await;
            let message = message.unwrap_or_else(|_| panic!("{subject}: only {heard:?}")).unwrap();
            heard.insert(message.subject.to_string());
        }
        assert!(heard.iter().all(|one| expected.contains(one)), "{subject}: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_does_as_the_operator_what_the_page_says() {
    let Some(program) = program() else { return };
    let scene = Scene::new().await;
    let run = async |command: &str| ended(scene.nats(&program, command)).await;
    for line in works() {
        let output = run(line.command).await;
        assert!(output.status.success() && !output.stdout.is_empty(), "{}: {}", line.command, said(&output));
    }
    let before = scene.state().await;
    for line in refused() {
        let output = run(line.command).await;
        assert!(!output.status.success(), "{} works: {}", line.command, said(&output));
    }
    // It believes that it has published.
    let output = run("nats pub events.order.placed '{}'").await;
    assert!(said(&output).contains("Published"), "{}", said(&output));
    assert_eq!(scene.state().await, before);

    for user in ["receipts", "provisioner", "system"] {
        let row = PAGE.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{user}` | `--")));
        let cells: Vec<&str> = row.unwrap_or_else(|| panic!("no flags for {user}")).split(" | ").collect();
        let flags = format!("--no-context {}", cells[1].trim_matches('`').replace("--no-context ", ""));
        for command in cells[2].split('`').skip(1).step_by(2) {
            let command = match command {
                "stream edit" => "stream edit EVENTS --max-age 15d -f",
                "consumer rm" => "consumer rm EVENTS stream_pager_1 -f",
                "consumer info" => "consumer info EVENTS receipts",
                "stream info" => "stream info EVENTS",
                "stream get" => "stream get EVENTS 2",
                other => other.strip_prefix("nats ").unwrap_or_else(|| panic!("{other} is not known here")),
            };
            if command.starts_with("consumer rm") {
                let name = Some("stream_pager_1".into());
                let pager = async_nats::jetstream::consumer::pull::Config { durable_name: name, ..Default::default() };
                let stream = scene.outbox.js().await.get_stream("EVENTS").await.unwrap();
                stream.create_consumer(pager).await.unwrap();
            }
            let output = ended(scene.nats_as(&program, user, &flags, &format!("nats {command}"))).await;
            assert!(output.status.success(), "{user}: {command}: {}", said(&output));
        }
    }

    // What the page quotes.
    let info = said(&run("nats consumer info EVENTS receipts").await);
    for name in
        ["Acknowledgment Floor", "Outstanding Acks", "Redelivered Messages", "Unprocessed Messages", "Waiting Pulls"]
    {
        assert!(info.contains(name) && PAGE.contains(name), "{name}: {info}");
    }
    let message = said(&run("nats stream get EVENTS --last-for events.order.placed").await);
    assert!(message.contains("ce-partitionkey: order-7") && message.contains(r#"{"order": 7}"#), "{message}");
    let kept = said(&run("nats stream get EVENTS_ADVISORIES 1").await);
    let advisory = kept.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{kept}"));
    let advisory: Value = serde_json::from_str(advisory).unwrap();
    assert_eq!((&advisory["stream_seq"], &advisory["consumer"]), (&4.into(), &SUBSCRIBER.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_shows_a_dead_letter_when_it_happens_and_no_requests() {
    let Some(program) = program() else { return };
    let scene = Scene::new().await;
    let mut children = Vec::new();
    for (number, line) in listens().into_iter().enumerate() {
        let log = scene.stage.log(&format!("nats-{number}"));
        let child = started(scene.nats(&program, line.command), &log);
        children.push((line, child, log));
    }
    // They say that they listen before they do.
    let monitor = scene.stage.nats.monitor_url().replace("http://", "");
    let listen = async || {
        let (_, connections) = get(&monitor, "/connz?subs=1").await.unwrap_or_default();
        connections.matches("\"$JS.EVENT.ADVISORY.").count() == children.len()
    };
    eventually(SOON, "all of them listen", listen).await.unwrap();
    assert!(scene.ask("JS.API.STREAM.INFO.EVENTS", "").await.is_some());
    scene.outbox.publish("test.number", r#"{"n": 3}"#, None).await;
    for (line, child, log) in children {
        let read = || std::fs::read_to_string(&log).unwrap();
        let shown = eventually(SOON, "it is shown", async || read().contains("never")).await;
        assert!(shown.is_ok(), "{}: {}", line.command, read());
        assert!(!read().contains("API"), "{}: {}", line.command, read());
        child.kill();
    }
}
