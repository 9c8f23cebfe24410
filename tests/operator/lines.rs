//! The command lines: what is told, with which exit status, and what they do to a terminal and to the process.

use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::support::{Act, Number, Outbox, Record, SOON, Work, answers, free_address, succeeded};
use aftercommit::operator;
use aftercommit::testing::eventually;
use aftercommit::worker::{HandlerError, Subscriber};
use serde_json::{Value, json};

fn printed(outbox: &Outbox, arguments: &[&str]) -> Value {
    let text = succeeded(outbox.operator(arguments));
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{arguments:?}: {text}"))
}

fn refused(outbox: &Outbox, arguments: &[&str]) -> (Option<i32>, String) {
    let output = outbox.operator(arguments);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

const NOBODY: &str = "01a1fc42-0bc3-7cc0-af42-b56e125f1d94";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_named_and_not_there_is_told_with_status_1() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let worker = work.run(Subscriber::new("mails").on::<Number>(Record::good())).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    work.wait_until_acked("mails").await;
    worker.stop().await;
    let handled: String =
        sqlx::query_scalar("select event_id::text from aftercommit.inbox").fetch_one(&outbox.pool).await.unwrap();
    let replay = ["replay", "--subscriber", "mails", "--stream-only"];
    let (status, error) = refused(outbox, &[&replay[..], &[NOBODY]].concat());
    assert!(status == Some(1) && error.contains(&format!("0 events sent to mails; not found: {NOBODY}")), "{error}");
    let known = succeeded(outbox.operator(&[&replay[..], &[&handled]].concat()));
    assert!(known.starts_with("0 events sent to mails; 1 left out"), "{known}");
    let both = outbox.operator(&[&replay[..], &[&handled, NOBODY, "--again", "--json"]].concat());
    assert_eq!(both.status.code(), Some(1));
    let both: Value = serde_json::from_slice(&both.stdout).unwrap();
    assert_eq!((&both["events"], &both["unknown"]), (&json!(1), &json!([NOBODY])), "{both}");
    for (arguments, status) in [
        (&["parked", "release", NOBODY][..], 1),
        (&["dead", "retry", NOBODY], 1),
        (&["dead", "retry", "17"], 1),
        (&["dead", "retry", "seventeen"], 2),
        (&["dead", "show", "17"], 1),
        (&["explain", NOBODY], 1),
        (&["explain", "seventeen"], 2),
        (&["peek", "--subscriber", "nobody"], 1),
        (&["worker", "pause", "--subscriber", "nobody"], 1),
        (&["audit", "--since", "yesterday"], 2),
    ] {
        let (code, error) = refused(outbox, arguments);
        assert_eq!(code, Some(status), "{arguments:?}: {error}");
    }
    let missing = outbox.operator(&["dead", "discard", "17", "--json"]);
    assert_eq!(missing.status.code(), Some(1));
    let missing: Value = serde_json::from_slice(&missing.stdout).unwrap();
    assert_eq!(missing, json!({ "count": 0, "missing": ["17"], "letters": [] }));
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_print_json_too_and_leave_an_entry() {
    let outbox = Work::shared().await.outbox;
    assert_eq!(printed(&outbox, &["migrate", "--json"]), json!({ "applied": [], "corrected": [] }));
    outbox.js().await.delete_stream(&outbox.naming.stream).await.unwrap();
    let changes = printed(&outbox, &["provision", "--json"])["changes"].as_array().unwrap().len();
    assert!(changes > 0);
    assert_eq!(printed(&outbox, &["provision", "--json"]), json!({ "changes": [] }));
    let event = printed(&outbox, &["publish", "a", "--payload", "{}", "--json"])["event_id"].clone();
    assert_eq!(event.as_str().map(str::len), Some(36));
    let pause = ["relay", "pause", "--json"];
    assert_eq!(printed(&outbox, &pause), json!({ "result": "paused", "changed": true }));
    assert_eq!(printed(&outbox, &pause), json!({ "result": "unchanged", "changed": false }));
    let reason = printed(&outbox, &["relay", "pause", "--reason", "why", "--json"]);
    assert_eq!(reason, json!({ "result": "reason_changed", "changed": true }));
    assert_eq!(printed(&outbox, &["relay", "resume", "--json"]), json!({ "changed": true }));
    let none = json!({ "count": 0, "missing": [], "events": [], "released": 0 });
    assert_eq!(printed(&outbox, &["parked", "release", "--all", "--yes", "--json"]), none);
    let dry = printed(&outbox, &["parked", "discard", "--older-than", "2026-03-01", "--dry-run", "--json"]);
    assert_eq!(dry, json!({ "dry_run": true, "count": 0 }));
    let audit = printed(&outbox, &["audit", "--since", "2026-03-01T00:00:00Z", "--json"]);
    let acts: Vec<(&str, &str)> = audit
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["who"].as_str().unwrap(), entry["action"].as_str().unwrap()))
        .collect();
    let expected = [("jane", "provision"), ("jane", "relay pause"), ("jane", "relay pause"), ("jane", "relay resume")];
    assert_eq!(acts, expected, "{audit}");
    assert_eq!(printed(&outbox, &["audit", "--since", "2999-01-01", "--json"]), json!([]));
}

/// A terminal obeys nothing that a key, a type's neighbour or an error brings along.
#[tokio::test(flavor = "multi_thread")]
async fn control_characters_never_reach_a_terminal_raw() {
    const EVIL: &str = "\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}";
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let fail = Record::new(|_| Act::Fail(HandlerError::retry(format!("oh{EVIL}no"))));
    let reject = Record::new(|_| Act::Fail(HandlerError::reject(format!("oh{EVIL}no"))));
    let failing = work.run(Subscriber::new("failing").on::<Number>(fail)).await;
    let rejecting = work.run(Subscriber::new("rejecting").on::<Number>(reject)).await;
    let event = work.envelope(Some(EVIL), 1);
    work.put(&event).await;
    let reason = format!("stop{EVIL}");
    let parked = "insert into aftercommit.parked (outbox_id, event_id, type, key, code, reason)
                  values (1, gen_random_uuid(), $1, $1, 1, $1)";
    sqlx::query(parked).bind(EVIL).execute(&outbox.pool).await.unwrap();
    eventually(SOON, "one is given up and one fails", async || {
        work.dead_letters().await.len() == 1 && work.attempts().await.len() == 1
    })
    .await
    .unwrap();
    succeeded(outbox.operator(&["relay", "pause", "--reason", &reason, "--as", EVIL]));
    let id = event.id.to_string();
    for arguments in [
        &["status"][..],
        &["doctor"],
        &["explain", &id],
        &["peek", "--subscriber", "failing"],
        &["parked", "list"],
        &["dead", "list"],
        &["dead", "list", "--group"],
        &["dead", "show", "1"],
        &["audit"],
        &["replay", "--subscriber", "failing", "--stream-only", "--dry-run", "--again"],
    ] {
        let output = outbox.operator(arguments);
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let raw: Vec<char> = text.chars().filter(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}').collect();
        assert!(raw.is_empty() && !text.is_empty(), "{arguments:?}: {raw:?} in {text:?}");
    }
    failing.stop().await;
    rejecting.stop().await;
}

#[tokio::test]
async fn man_pages_have_names_of_their_own_and_shells_get_completions() {
    let directory = std::env::temp_dir().join(aftercommit::testing::unique_name("man"));
    let aftercommit = |arguments: &[&str]| {
        succeeded(Command::new(env!("CARGO_BIN_EXE_aftercommit")).args(arguments).output().unwrap())
    };
    let told = aftercommit(&["man", directory.to_str().unwrap()]);
    let mut names: Vec<String> =
        std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    for name in [
        "aftercommit.1",
        "aftercommit-relay.1",
        "aftercommit-relay.8",
        "aftercommit-relay-pause.1",
        "aftercommit-worker.8",
    ] {
        assert!(names.iter().any(|found| found == name), "{name} in {names:?}");
    }
    assert!(told.starts_with(&format!("{} pages written", names.len())), "{told}");
    let daemon = std::fs::read_to_string(directory.join("aftercommit-relay.8")).unwrap();
    assert!(daemon.contains("retention") && !daemon.contains("bench"), "{daemon}");
    std::fs::remove_dir_all(&directory).unwrap();
    for (shell, program) in [("bash", "aftercommit"), ("zsh", "aftercommit-relay"), ("fish", "aftercommit-worker")] {
        let script = aftercommit(&["completions", shell, "--program", program]);
        assert!(script.contains(program) && script.len() > 1000, "{script}");
    }
    let help = aftercommit(&["--help"]);
    assert!(help.contains("\nSee what is:\n  status ") && help.contains("Exit status: 0"), "{help}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_shall_publish_once_ends_when_another_one_leads() {
    let outbox = Work::shared().await.outbox;
    let leader = outbox.relay();
    outbox.publish("a", "{}", None).await;
    outbox.assert_complete().await;
    let once = outbox.relay_command().arg("--once").stderr(Stdio::piped()).output().unwrap();
    assert_eq!(once.status.code(), Some(1));
    let error = String::from_utf8(once.stderr).unwrap();
    assert!(error.contains("another relay leads"), "{error}");
    leader.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_stops_in_order_and_a_chosen_port_is_told() {
    let outbox = Work::shared().await.outbox;
    let log = std::env::temp_dir().join(aftercommit::testing::unique_name("log"));
    let mut command = outbox.relay_command();
    command.args(["--http", "127.0.0.1:0"]).env("RUST_LOG", "info").stderr(std::fs::File::create(&log).unwrap());
    let mut relay = crate::support::RelayProcess(command.spawn().unwrap());
    let mut address = None;
    eventually(SOON, "the port is told", async || {
        let text = std::fs::read_to_string(&log).unwrap();
        let at = text.split("address=\"").nth(1).and_then(|rest| rest.split('"').next());
        address = at.map(str::to_string);
        address.is_some() && text.contains("relay started")
    })
    .await
    .unwrap();
    let address = address.unwrap();
    assert!(!address.ends_with(":0"), "{address}");
    answers(&address, "/healthz", 200, "").await;
    relay.signal("-HUP");
    assert_eq!(relay.ends(SOON).await.code(), Some(0));
    assert!(std::fs::read_to_string(&log).unwrap().contains("relay stopped"));
    std::fs::remove_file(&log).unwrap();
}

/// Who opens many connections and sends nothing takes no more file descriptors than a few.
#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_port_cannot_starve_the_process_of_descriptors() {
    let outbox = Work::shared().await.outbox;
    let address = free_address();
    let mut command = outbox.relay_command();
    let relay = crate::support::RelayProcess(command.args(["--http", &address]).spawn().unwrap());
    answers(&address, "/healthz", 200, "").await;
    let open: Vec<TcpStream> = (0..300).filter_map(|_| TcpStream::connect(&address).ok()).collect();
    assert!(open.len() > 200, "{}", open.len());
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", relay.id())).unwrap().count();
    assert!(descriptors() < 150, "{}", descriptors());
    // Those that send nothing are dropped after a while, although their owner keeps them.
    answers(&address, "/metrics", 200, "aftercommit_").await;
    drop(open);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_shows_no_handler_text() {
    let work = Work::shared().await;
    let away = Record::new(|_| Act::Fail(HandlerError::unavailable("card 4711 of Mrs Smith")));
    let worker = work.run(Subscriber::new("mails").on::<Number>(away)).await;
    work.send("a", 1).await;
    let mut health = String::new();
    eventually(SOON, "it says that a service is not available", async || {
        health = worker.report().subscribers[0].health.clone();
        health.contains("a service that the handler needs is not available")
    })
    .await
    .unwrap();
    assert!(!health.contains("4711"), "{health}");
    // Who may read the database sees it.
    eventually(SOON, "the status says it", async || {
        let status =
            operator::status::status(&work.outbox.postgres, &work.outbox.nats, &work.outbox.naming).await.unwrap();
        status.problems.iter().any(|problem| problem.what.contains("card 4711"))
    })
    .await
    .unwrap();
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_status_is_printed_repeatedly_until_its_reader_goes() {
    use std::io::{BufRead, BufReader};
    let outbox = Work::shared().await.outbox;
    let mut watching = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["status", "--watch=100ms"])
        .env("DATABASE_URL", &outbox.postgres.url)
        .env("NATS_URL", &outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines().map_while(Result::ok);
    let verdicts = lines.filter(|line| line.contains("OK: everything flows"));
    assert_eq!(verdicts.take(3).collect::<Vec<_>>(), ["OK: everything flows"; 3], "without what a terminal would obey");
    // Its reader is gone.
    let mut ended = None;
    eventually(SOON, "it ends", async || {
        ended = watching.try_wait().unwrap();
        ended.is_some()
    })
    .await
    .unwrap();
    assert_eq!(ended.unwrap().code(), Some(0));
}
