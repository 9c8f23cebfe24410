//! The README's list "In production" says what is: its links, files, flags, variables, commands and numbers. Points 3, 4, 5, 6, 9 and 10 are
//! done here as they stand there. The rights of 1 are in tests/security/work.rs, servers as in 2 in tests/faults/power.rs and tests/relay/replicas.rs, TLS
//! and credentials in tests/system/connections.rs, PgBouncer and other schemas in tests/system/pgbouncer.rs and schema.rs.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::docs::{problem, root};
use crate::support::{Outbox, RelayProcess, SOON, Work, WorkerProcess, answers, free_address, get, succeeded};
use aftercommit::testing::eventually;
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

/// The value of a flag or variable in the list, such as `5m` of `AFTERCOMMIT_RECONCILE_EVERY=5m`.
fn in_the_list(name: &str) -> String {
    let list = list().join(" ");
    let found = code(&list).find_map(|code| code.strip_prefix(name)?.strip_prefix(['=', ' ']));
    found.unwrap_or_else(|| panic!("the list has no {name}")).to_string()
}

const APPLY: &str = "create function apply(event jsonb) returns void language sql as $$
    insert into effect (event_id, key, n) values ((event ->> 'id')::uuid, event ->> 'type', 1) $$";

fn receipts(types: &str) -> String {
    format!("[[subscriber]]\nname = \"receipts\"\ntypes = [{types}]\nsql = {{ function = \"apply\" }}\n")
}

/// A process with its database in a file, as the list has it, and where it answers.
fn start(mut command: Command, url: &str, name: &str) -> (std::process::Child, String) {
    let file = std::env::temp_dir().join(format!("{name}-{}.url", uuid::Uuid::now_v7()));
    fs::write(&file, url).unwrap();
    let address = free_address();
    let everywhere = in_the_list("--http").replace("9464", address.split(':').nth(1).unwrap());
    command.env_remove("DATABASE_URL").env("DATABASE_URL_FILE", file).args(["--http", &everywhere]);
    let every = in_the_list("AFTERCOMMIT_RECONCILE_EVERY");
    (command.env("AFTERCOMMIT_RECONCILE_EVERY", every).env("RUST_LOG", "off").spawn().unwrap(), address)
}

/// Two relays and two workers, of which one each is killed; a new type; and what tells whether all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_as_the_list_has_it_works_and_is_told_to_be_well() {
    let work = Work::shared().await;
    let Work { outbox, .. } = &work;
    sqlx::raw_sql(APPLY).execute(&outbox.pool).await.unwrap();
    let url = outbox.postgres.url.clone();
    let relay = || {
        let (child, address) = start(outbox.relay_command(), &url, "relay");
        (RelayProcess(child), address)
    };
    let worker = |types: &str| {
        let (child, address) = start(work.command(&receipts(types)), &url, "worker");
        (WorkerProcess(child), address)
    };
    let placed = "\"order.placed\"";
    let (mut relays, mut workers) = (vec![relay(), relay()], vec![worker(placed), worker(placed)]);
    for address in relays.iter().map(|(_, address)| address).chain(workers.iter().map(|(_, address)| address)) {
        for path in ["/readyz", "/healthz"] {
            answers(address, path, 200, "").await;
        }
        let metrics = get(address, "/metrics").await.unwrap().1;
        assert!(metrics.contains("aftercommit_reconciler_interval_seconds{") && metrics.contains("} 300"), "{metrics}");
    }
    outbox.publish("order.placed", "{}", None).await;
    work.wait_for(1).await;

    // One leads, the other takes over within seconds.
    for _ in 0..2 {
        // Killed; behind it comes a new one.
        drop((relays.remove(0), workers.remove(0)));
        relays.push(relay());
        workers.push(worker(placed));
        outbox.publish("order.placed", "{}", None).await;
    }
    work.wait_for(3).await;

    // A new type: the worker first, provision (`command` does that), then the publisher.
    let paid = "\"order.placed\", \"order.paid\"";
    workers = vec![worker(paid), worker(paid)];
    outbox.publish("order.paid", "{}", None).await;
    work.wait_for(4).await;

    let well = eventually(SOON, "`aftercommit status` says that all is well", async || {
        String::from_utf8(outbox.operator(&["status"]).stdout).unwrap().starts_with("OK: everything flows")
    });
    well.await.unwrap();
    let doctor = String::from_utf8(outbox.operator(&["doctor"]).stdout).unwrap();
    assert!(doctor.contains("1 of 1 subscribers have an active worker here, and nothing is stuck"), "{doctor}");
    let failed: Vec<&str> = doctor.lines().filter(|line| line.starts_with("FAIL")).collect();
    // The servers of tests do not write to the disk.
    assert!(failed.iter().all(|line| line.starts_with("FAIL  fsync")), "{failed:#?}");
    drop((relays, workers));
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
