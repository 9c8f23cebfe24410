//! `aftercommit publish`: one event by hand.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::support::{Database, succeeded};
use serde_json::{Value, json};

fn publish(url: &str, arguments: &[&str], standard_input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .arg("publish")
        .args(arguments)
        .env("DATABASE_URL", url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    command.stdin.take().unwrap().write_all(standard_input).unwrap();
    command.wait_with_output().unwrap()
}

#[tokio::test]
async fn an_event_is_written_and_its_id_printed() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let url = &database.config.url;
    let first = succeeded(publish(
        url,
        &["order.placed", "--key", "order-7", "--header", "tenant=a=b", "--header", "x=y", "--payload", r#"{"a": 1}"#],
        b"",
    ));
    let bytes: Vec<u8> = (0..=255).collect();
    let second = succeeded(publish(url, &["a", "--payload", "-", "--content-type", "application/pdf"], &bytes));
    let third = succeeded(publish(url, &["a", "--payload", "-"], b"[1]\n"));

    type Row = (sqlx::types::Uuid, Option<String>, Value, Vec<u8>, String);
    let rows: Vec<Row> =
        sqlx::query_as("select event_id, key, headers, payload, content_type from aftercommit.outbox order by id")
            .fetch_all(&pool)
            .await
            .unwrap();
    let ids: Vec<String> = rows.iter().map(|row| format!("{}\n", row.0)).collect();
    assert_eq!(ids, [first, second, third]);
    assert_eq!((rows[0].1.as_deref(), &rows[0].2), (Some("order-7"), &json!({"tenant": "a=b", "x": "y"})));
    assert_eq!((rows[0].3.as_slice(), rows[0].4.as_str()), (br#"{"a": 1}"#.as_slice(), "application/json"));
    assert_eq!((&rows[1].3, rows[1].4.as_str()), (&bytes, "application/pdf"));
    assert_eq!(rows[2].3, b"[1]\n");
}

#[tokio::test]
async fn the_exit_status_tells_the_callers_faults_from_the_databases() {
    let database = Database::migrated().await;
    let url = &database.config.url;
    for (arguments, words) in [
        (&["a", "--payload", "{"][..], "not JSON"),
        (&["a..b", "--payload", "{}"], "empty token"),
        (&["a", "--payload", "{}", "--header", "ce-id=1"], "reserved"),
        (&["a", "--payload", "{}", "--header", "tenant"], "NAME=VALUE"),
        (&["a", "--payload", "{}", "--key", ""], "key is empty"),
        (&["a"], "--payload"),
    ] {
        let output = publish(url, arguments, b"");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
    let bare = Database::empty().await;
    let output = publish(&bare.config.url, &["a", "--payload", "{}"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("aftercommit migrate"));
}

/// As deployments leave a setting out.
#[tokio::test]
async fn a_variable_that_is_set_to_nothing_is_as_good_as_none() {
    let database = Database::migrated().await;
    let tool = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command.args([name, "--payload", "{}", "a"]).env("DATABASE_URL", &database.config.url);
        command
    };
    let empty = ["DATABASE_URL_FILE", "AFTERCOMMIT_PGBOUNCER"];
    succeeded(tool("publish").envs(empty.map(|name| (name, ""))).output().unwrap());
    // The worker has most of them. It complains of the file that is not there, and of nothing before.
    let worker = || Command::new(env!("CARGO_BIN_EXE_aftercommit-worker"));
    let help = String::from_utf8(worker().arg("--help").output().unwrap().stdout).unwrap();
    let names: Vec<&str> = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next()).collect();
    assert!(names.len() > 20 && names.contains(&"NATS_CREDS"), "{names:?}");
    let nothing = names.iter().map(|name| (name, ""));
    let refused = worker().args(["--config", "/nowhere/worker.toml"]).envs(nothing).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("/nowhere/worker.toml"), "{said}");
}
