//! The README's list "In production" says what is: its links, files, flags, variables, commands and numbers.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::docs::{problem, root};
use crate::support::{Outbox, succeeded};
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::Subscriber;

const RELAY: &str = env!("CARGO_BIN_EXE_aftercommit-relay");
const WORKER: &str = env!("CARGO_BIN_EXE_aftercommit-worker");
const OPERATOR: &str = env!("CARGO_BIN_EXE_aftercommit");

/// The list, a line each, without its numbers.
fn list() -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let section = readme.split("\n### In production\n").nth(1).unwrap();
    let lines = section.lines().skip_while(|line| line.is_empty()).take_while(|line| !line.is_empty());
    let lines = lines.enumerate().map(|(n, line)| line.strip_prefix(&format!("{}. ", n + 1)).unwrap().to_string());
    let lines: Vec<String> = lines.collect();
    assert_eq!(lines.len(), 10, "{lines:#?}");
    lines
}

/// What stands between backticks.
fn code(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

fn help(program: &str, arguments: &[&str]) -> String {
    succeeded(Command::new(program).args(arguments).arg("--help").output().unwrap())
}

/// The programs that the list is about: whoever connects to both servers.
fn helps() -> [(&'static str, String); 3] {
    [
        ("aftercommit-relay", help(RELAY, &[])),
        ("aftercommit-worker", help(WORKER, &[])),
        ("aftercommit", help(OPERATOR, &["doctor"])),
    ]
}

fn is_variable(name: &str) -> bool {
    name.contains('_') && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
}

/// A program whose settings are read before anything else: it fails, but not over this variable.
fn takes(program: &str, variable: &str, value: &str) {
    let mut command = Command::new(program);
    command.env_remove("DATABASE_URL_FILE").env("DATABASE_URL", "no URL").env(variable, value);
    let output = command.current_dir(env!("CARGO_TARGET_TMPDIR")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !text.contains("invalid value"), "{program}: {variable}={value}: {text}");
}

#[test]
fn what_the_list_links_to_exists() {
    let page = root().join("README.md");
    let mut links = 0;
    for line in list() {
        for (at, _) in line.match_indices("](") {
            let text = line[..at].rsplit('[').next().unwrap();
            let target = line[at + 2..].split(')').next().unwrap();
            assert_eq!(problem(&page, text, target), None, "{target}");
            links += 1;
        }
    }
    assert!(links >= 6, "only {links} links were found");
}

#[test]
fn what_the_list_names_exists() {
    let helps = helps();
    let mut kinds = BTreeSet::new();
    for line in list() {
        for name in code(&line) {
            kinds.insert(match name.split_once(['=', ' ']).map_or((name, None), |(name, rest)| (name, Some(rest))) {
                (flag, value) if flag.starts_with("--") => {
                    // Health checks are of what runs for long; the others are about servers.
                    let programs = if flag == "--http" { &helps[..2] } else { &helps[..] };
                    for (program, help) in programs {
                        let mut flags = help.split_ascii_whitespace().filter(|word| word.starts_with("--"));
                        assert!(flags.any(|word| word == flag), "{program} has no {flag}");
                    }
                    assert!(value.is_none_or(|value| value.parse::<SocketAddr>().is_ok()), "{name}");
                    "flag"
                }
                (variable, value) if is_variable(variable) => {
                    // The operator's tool compares when it is told to.
                    let programs = if variable.contains("RECONCILE") { &helps[..2] } else { &helps[..] };
                    for (program, help) in programs {
                        assert!(help.contains(&format!("[env: {variable}=")), "{program} does not read {variable}");
                    }
                    for program in value.map_or(&[][..], |_| &[RELAY, WORKER]) {
                        takes(program, variable, value.unwrap_or_default());
                    }
                    "variable"
                }
                ("aftercommit", Some(command)) => {
                    help(OPERATOR, &command.split(' ').collect::<Vec<_>>());
                    "command"
                }
                ("outbox::set_pooled", None) => {
                    let _: fn(bool) = aftercommit::outbox::set_pooled;
                    "function"
                }
                ("sync_interval:", Some(_)) => {
                    let shipped = fs::read_to_string(root().join("deploy/nats/nats-server.conf")).unwrap();
                    assert!(shipped.lines().any(|line| line.trim() == name), "nats-server.conf has no {name}");
                    "setting"
                }
                (path, None) if path.starts_with('/') => {
                    let http = helps[0].1.lines().find(|line| line.contains("/healthz")).unwrap();
                    assert!(
                        http.contains(&format!("{path}, ")) || http.contains(&format!("{path} ")),
                        "{path}: {http}"
                    );
                    "path"
                }
                (file, None) if file.contains('/') => {
                    assert!(root().join(file).is_file(), "there is no file {file}");
                    "file"
                }
                _ => panic!("nothing checks `{name}`: {line}"),
            });
        }
    }
    let all = ["command", "file", "flag", "function", "path", "setting", "variable"];
    assert_eq!(Vec::from_iter(kinds), all);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lists_retention_is_what_nobody_has_to_set() {
    let list = list();
    let [line] = list.iter().filter(|line| line.starts_with("Retention:")).collect::<Vec<_>>()[..] else {
        panic!("{list:#?}")
    };
    let words: Vec<&str> = line.split([' ', ',', '.']).collect();
    let days = |who: &str| {
        let behind = words.iter().skip_while(|word| **word != who);
        let days: u64 = behind.filter_map(|word| word.parse().ok()).next().unwrap_or_else(|| panic!("{who}: {line}"));
        Duration::from_hours(24 * days)
    };

    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.max_age;
    let inbox = Subscriber::new("receipts").subscription(&outbox.naming).inbox_retention;
    assert_eq!(days("outbox"), outbox.relay_config().retention);
    assert_eq!(days("stream"), stream);
    assert_eq!(days("inbox"), inbox);
    assert!(line.ends_with("The inbox must be longer than the other two together."), "{line}");
    assert!(inbox > outbox.relay_config().retention + stream);
}
