//! What others may send us: nothing of it makes us panic, and what is read is what was written. What must hold is in
//! functions of bytes, as fuzz targets want them.

mod checks;

use proptest::collection::vec;
use proptest::prelude::*;

const ID: &str = "ce-id: 01a1fbb7-bafe-75ab-a111-dc3a330bc524\nce-type: a.b\nce-source: /shop";

type Check = fn(&[u8]);

/// Each fuzz target and its check.
const CHECKS: &[(&str, Check)] = &[
    ("command_line", checks::command_line),
    ("event", checks::event),
    ("message", checks::message),
    ("outbox_answer", checks::outbox_answer),
    ("question", checks::question),
    ("server_answer", checks::server_answer),
    ("subject", checks::subject),
    ("url", checks::url),
    ("worker_toml", checks::worker_toml),
];

/// Headers that matter somewhere, with values that do or do not.
fn lines() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &[
        "ce-id",
        "CE-Type",
        "ce-source",
        "ce-time",
        "ce-sequence",
        "ce-dataversion",
        "ce-partitionkey",
        "ce-",
        "Nats-Msg-Id",
        "partitionkey",
        "Partition-Key",
        "data",
        "data_base64",
        "time",
        "specversion",
        "traceparent",
        "datacontenttype",
        "ce-datacontenttype",
    ];
    let name = prop_oneof![4 => prop::sample::select(NAMES).prop_map(String::from), 1 => "\\PC{0,12}"];
    const VALUES: &[&str] =
        &["1", "-1", "99999999999", "2026-01-01T00:00:00Z", "%", "%zz", "%41%0d%0a", "text/plain", "application/json"];
    let value =
        prop_oneof![2 => prop::sample::select(VALUES).prop_map(String::from), 1 => "\\PC{0,40}", 1 => any::<String>()];
    vec((name, value).prop_map(|(name, value)| format!("{name}: {value}")), 0..8).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_none(input in vec(any::<u8>(), 0..400)) {
        CHECKS.iter().for_each(|(_, check)| check(&input));
    }

    #[test]
    fn a_message_is_read_as_it_was_written(lines in lines(), payload in ".{0,60}") {
        checks::message(format!("{ID}\n{lines}\n\n{payload}").as_bytes());
        checks::message(format!("{lines}\n\n{payload}").as_bytes());
    }

    #[test]
    fn a_url_is_read_or_refused_without_its_password(
        before in "(postgres|postgresql|nats|tls|jdbc:postgresql|mysql)://[a-c:@/?#&=%,.0-9]{0,12}",
        behind in "[a-c:@/?#&=%,.0-9]{0,12}(@(db|[a-c:@/?#]{0,6}))?(/db)?(\\?[a-z_]{0,8}(sslmode|sslmod|port|host)=[a-z0-9]{0,5})?",
    ) {
        checks::url(format!("{before}\n{behind}").as_bytes());
    }

    #[test]
    fn a_subject_is_taken_apart_as_it_was_made(prefix in "[$A-Za-z0-9_.*>-]{1,12}", event_type in "[A-Za-z0-9_. *>-]{0,12}") {
        checks::subject(format!("{prefix} {event_type}").as_bytes());
    }
}

#[test]
fn a_deeply_nested_payload_stays_json() {
    checks::message(format!("{ID}\n\n{}{}", "[".repeat(50_000), "]".repeat(50_000)).as_bytes());
}

#[test]
fn a_header_does_not_pass_for_the_key_of_an_event_without_one() {
    checks::message(format!("{ID}\nPartition-Key: somebody\n\n{{}}").as_bytes());
}

#[test]
fn the_fuzz_targets_begin_with_values_that_pass() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let targets = std::fs::read_dir(fuzz.join("fuzz_targets")).unwrap().count();
    assert_eq!(targets, CHECKS.len());
    for (target, check) in CHECKS {
        for seed in std::fs::read_dir(fuzz.join("seeds").join(target)).unwrap() {
            check(&std::fs::read(seed.unwrap().path()).unwrap());
        }
    }
}
