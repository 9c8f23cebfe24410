//! How the programs log, and how a container asks whether they are well.

use std::process::{Command, Output};

use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use serde_json::Value;

use crate::support::{Directory, Outbox, RelayProcess, SOON, free_address};

fn health(url: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aftercommit")).args(["health", "--url", url, "--timeout", "10s"]).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn json_logs_have_one_object_per_line() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let files = Directory::new();
    let path = files.path().join("relay.log");
    let mut command = outbox.relay_command();
    command.args(["--http", "127.0.0.1:0", "--log-format", "json"]).env("RUST_LOG", "debug,async_nats=warn,sqlx=warn");
    command.stderr(std::fs::File::create(&path).unwrap());
    let mut relay = RelayProcess(command.spawn().unwrap());
    outbox.publish("test.number", "{\"secret\": \"sauce\"}", Some("a")).await;
    outbox.settled().await;
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("sauce") && !text.contains('\u{1b}'), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    };
    let published = |line: &Value| line["message"] == "event published" && line["event_id"].is_string();
    eventually(SOON, "the event is in the log", async || lines().iter().any(published)).await.unwrap();
    let line = lines().into_iter().find(published).unwrap();
    for field in ["timestamp", "level", "target", "stream", "sequence", "outbox_id"] {
        assert!(!line[field].is_null(), "{field}: {line}");
    }
    let serving = lines().into_iter().find(|line| line["address"].is_string()).unwrap();
    let address = serving["address"].as_str().unwrap();
    let well = health(&format!("http://{address}/readyz"));
    assert!(well.status.success(), "{}", said(&well));
    let unknown = health(&format!("http://{address}/nowhere"));
    assert_eq!(unknown.status.code(), Some(1), "{}", said(&unknown));
    relay.signal("-TERM");
    relay.wait();
}

#[test]
fn nobody_who_answers_is_not_well() {
    for (url, status, told) in [
        (format!("http://{}/readyz", free_address()), 1, "does not answer"),
        ("https://127.0.0.1/readyz".into(), 2, "must begin with http://"),
        ("http://me:secret@127.0.0.1/readyz".into(), 2, "no user"),
    ] {
        let output = health(&url);
        assert!(output.status.code() == Some(status) && said(&output).contains(told), "{}", said(&output));
    }
}
