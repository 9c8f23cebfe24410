//! What is done with input that others write, and what must hold of it.

use std::collections::BTreeMap;

use aftercommit::envelope::Envelope;
use aftercommit::subject::{SubjectPrefix, check_tokens};

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
    let json: BTreeMap<String, serde_json::Value> = serde_json::from_str(&event.to_json()).expect("it is JSON");
    assert_eq!(json["id"], event.id.to_string());
    assert_eq!(json["type"], event.event_type.as_str());
    assert_eq!(json["source"], event.source.as_str());
    assert_eq!(json.get("partitionkey").and_then(|key| key.as_str()), event.key.as_deref());
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
