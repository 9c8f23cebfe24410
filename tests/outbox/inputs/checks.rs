//! What is done with input that others write, and what must hold of it.

use std::collections::BTreeMap;

use aftercommit::envelope::Envelope;
use aftercommit::subject::{SubjectPrefix, check_tokens};
use serde_json::value::RawValue;

/// Lines of `name: value` up to an empty line, then the payload: a message as it may come from the stream.
pub fn message(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (head, payload) = text.split_once("\n\n").unwrap_or((&text, ""));
    let headers: Vec<(&str, &str)> = head.lines().filter_map(|line| line.split_once(": ")).collect();
    let Ok(event) = Envelope::from_headers(headers.iter().copied(), payload.as_bytes().to_vec().into()) else { return };
    // What was read is read the same again from what is written of it.
    let written = event.to_headers();
    let pairs = written.iter().map(|(name, value)| (&**name, &**value));
    let again = Envelope::from_headers(pairs, event.payload.clone()).expect("what we write can be read");
    assert_eq!(event.id, again.id);
    assert_eq!(event.key, again.key);
    assert_eq!(event.event_type, again.event_type);
    assert_eq!(event.source, again.source);
    assert_eq!(event.content_type, again.content_type);
    assert_eq!(event.sequence, again.sequence);
    assert_eq!(event.version, again.version);
    assert_eq!(event.headers, again.headers);
    cloud_event(&event);
}

/// The JSON form is JSON, and no header of the publisher passes for an attribute of ours.
fn cloud_event(event: &Envelope) {
    // Not as values: those may not nest deeply, which a payload may.
    let json: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&event.to_json()).expect("it is JSON");
    let text = |name: &str| json.get(name).map(|value| serde_json::from_str::<String>(value.get()).expect("a string"));
    assert_eq!(text("id"), Some(event.id.to_string()));
    assert_eq!(text("type").as_ref(), Some(&event.event_type));
    assert_eq!(text("source").as_ref(), Some(&event.source));
    assert_eq!(text("partitionkey"), event.key);
    assert!(json.contains_key("data") != json.contains_key("data_base64"));
}

/// An event type or a prefix, and a subject.
pub fn subject(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (prefix, event_type) = text.split_once(' ').unwrap_or((&text, "a"));
    let Ok(prefix) = SubjectPrefix::new(prefix) else { return };
    _ = prefix.event_type(event_type);
    if check_tokens(event_type).is_ok() {
        assert_eq!(prefix.event_type(&prefix.subject(event_type)), Some(event_type));
        assert!(prefix.subject(event_type).bytes().all(|byte| byte.is_ascii_graphic() && !b"*>".contains(&byte)));
    }
}

/// A `worker.toml`, which is read or refused by name.
pub fn worker_toml(input: &[u8]) {
    let path = std::env::temp_dir().join(format!("aftercommit-{}-worker.toml", std::process::id()));
    std::fs::write(&path, input).expect("a temporary file");
    match aftercommit::worker::read_file(&path) {
        Ok(subscribers) => assert!(!subscribers.is_empty()),
        Err(error) => assert!(error.to_string().contains("worker.toml"), "{error}"),
    }
}
