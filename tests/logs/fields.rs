//! The table of log fields in the documentation has exactly the fields that the code logs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The product's sources: not those that measure and test it.
fn sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut directories = vec![root.join("src"), root.join("crates")];
    let mut files = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let skipped = ["bench", "testing", "target", "tests"]
                .iter()
                .any(|name| path.file_name().is_some_and(|own| own == *name));
            match path.is_dir() {
                true if !skipped => directories.push(path),
                false if path.extension().is_some_and(|end| end == "rs") => files.push(path),
                _ => {}
            }
        }
    }
    files
}

/// What stands between the commas of a macro's arguments, up to its closing parenthesis.
fn arguments(text: &str) -> Vec<String> {
    let (mut all, mut current, mut depth, mut quoted, mut escaped) = (Vec::new(), String::new(), 0, false, false);
    let text: String =
        text.lines().map(|line| line.split(" // ").next().unwrap_or_default().to_string() + "\n").collect();
    let text: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| line.to_string() + "\n").collect();
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth == 0 => break,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                all.push(std::mem::take(&mut current));
                continue;
            }
            _ => {}
        }
        current.push(c);
    }
    all.push(current);
    all.into_iter().map(|argument| argument.trim().to_string()).collect()
}

/// The name of a field, if the argument of a macro of `tracing` is one.
fn field(argument: &str) -> Option<String> {
    let named = argument.split_once('=').map(|(name, _)| name.trim());
    // `stream = …`, or `epoch`, `%job`, `?wait`; of `tenure.epoch` the last part.
    let name = match named {
        Some(name) => name,
        None => argument.trim_start_matches(['%', '?']),
    };
    let legal = !name.is_empty()
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.'));
    legal.then(|| name.to_string())
}

fn logged() -> BTreeSet<String> {
    const LEVELS: [&str; 5] = ["trace", "debug", "info", "warn", "error"];
    let mut fields = BTreeSet::new();
    for file in sources() {
        let text = std::fs::read_to_string(&file).unwrap();
        for level in LEVELS {
            for (suffix, of_span) in [("!(", false), ("_span!(", true)] {
                for (at, call) in text.match_indices(&format!("tracing::{level}{suffix}")) {
                    let arguments = arguments(&text[at + call.len()..]);
                    let options =
                        |argument: &&String| !argument.starts_with("parent:") && !argument.starts_with("target:");
                    let mut arguments = arguments.iter().filter(options).collect::<Vec<_>>();
                    if of_span {
                        arguments.remove(0);
                    }
                    // Behind the message come what it has in its braces.
                    let before = arguments.into_iter().take_while(|argument| !argument.starts_with('"'));
                    fields.extend(before.filter_map(|argument| field(argument)));
                }
            }
        }
    }
    fields
}

#[test]
fn the_table_of_log_fields_has_all_of_them_and_no_other() {
    let text = include_str!("../../docs/telemetry.md");
    let (_, table) = text.split_once("| Field | Meaning |").expect("docs/telemetry.md has a table of fields");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let names = rows.flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2));
    let documented: BTreeSet<String> = names.map(String::from).collect();
    let logged = logged();
    assert!(logged.len() > 50, "the fields of the code are not found: {logged:?}");
    let missing: Vec<_> = logged.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&logged).collect();
    assert!(missing.is_empty() && stale.is_empty(), "not documented: {missing:?}; not logged: {stale:?}");
}
