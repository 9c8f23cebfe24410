//! What is done with input that others write, and what must hold of it.

use std::collections::BTreeMap;

use aftercommit::envelope::Envelope;
use aftercommit::outbox::RawEvent;
use aftercommit::subject::{SubjectPrefix, check_tokens};
use aftercommit::testing::parsers;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// Lines of `name: value` up to an empty line, then the payload: a message as it may come from the stream.
pub fn message(input: &[u8]) {
    let Some(event) = envelope(&String::from_utf8_lossy(input)) else { return };
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

fn envelope(text: &str) -> Option<Envelope> {
    let (head, payload) = text.split_once("\n\n").unwrap_or((text, ""));
    let headers = head.lines().filter_map(|line| line.split_once(": "));
    Envelope::from_headers(headers, payload.as_bytes().to_vec().into()).ok()
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

/// Type, key, content type and headers in lines, then the payload: what may be written becomes a message with just that,
/// and what is read of the message is the event.
pub fn event(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (head, payload) = text.split_once("\n\n").unwrap_or((&text, ""));
    let mut lines = head.split('\n');
    let mut field = || lines.next().unwrap_or_default();
    let mut raw = RawEvent::new(field(), field(), payload).key(field());
    for (name, value) in head.split('\n').skip(3).filter_map(|line| line.split_once(": ")) {
        raw = raw.header(name, value);
    }
    let Ok((event, (subject, headers))) = parsers::message(raw) else { return };
    assert_eq!(subject, format!("events.{}", event.event_type));
    assert!(headers.iter().all(|(name, _)| name.bytes().all(|b| b.is_ascii_graphic() && b != b':')), "{headers:?}");
    assert!(headers.iter().all(|(_, value)| value.bytes().all(|b| (b' '..=b'~').contains(&b))), "{headers:?}");
    let pairs = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    assert_eq!(Envelope::from_headers(pairs, event.payload.clone()).as_ref(), Ok(&event));
    cloud_event(&event);
}

/// What the server answers to a message, or on its monitoring port.
pub fn server_answer(input: &[u8]) {
    _ = parsers::is_monitoring(&String::from_utf8_lossy(input));
    let Some(sequence) = parsers::stored_under(input) else { return };
    // What is not looked at may be no text, and a number that is none.
    let Ok(answer) = serde_json::from_str::<Value>(&String::from_utf8_lossy(input)) else { return };
    assert!(sequence > 0 && answer["seq"] == json!(sequence) && answer["error"].is_null(), "{answer}");
}

/// A question to the relay, or a place in a token: read as it was written.
pub fn question(input: &[u8]) {
    for read in [parsers::query, parsers::place] {
        let Some(value) = read(input) else { continue };
        assert_eq!(read(value.to_string().as_bytes()), Some(value));
    }
}

/// What is answered on the relay's subject: the last message, then whole events behind empty lines of `---`.
pub fn outbox_answer(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let mut parts = text.split("\n---\n");
    let last = parts.next().unwrap_or_default().as_bytes();
    let after = json!("before");
    for digest in [false, true] {
        if let Some((ids, next, more)) = parsers::page(last, Some(&after), &["a".into()], digest) {
            assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{ids:?}");
            assert!(!more || next != after);
        }
    }
    if let Some((next, more)) = parsers::displaced(last, Some(&after)) {
        assert!(!more || next != after);
    }
    let events: Vec<Envelope> = parts.filter_map(envelope).collect();
    let id = |n| serde_json::from_value(json!(format!("00000000-0000-0000-0000-00000000000{n}"))).expect("an id");
    let asked = [1, 2, 3].map(id);
    if let Some(left_out) = parsers::events(&asked, &events, last) {
        assert!(left_out.len() + events.len() <= asked.len() && left_out.iter().all(|id| asked.contains(id)));
        assert!(
            events.iter().all(|event| asked.contains(&event.id.as_uuid()) && !left_out.contains(&event.id.as_uuid()))
        );
    }
    let keys = ["k".to_string()];
    if let Some(next) = parsers::of_keys(&keys, 5, &events, last) {
        assert!(events.iter().all(|event| event.key.as_ref() == Some(&keys[0]) && event.sequence >= 5));
        assert!(next.is_none_or(|next| next > 5));
    }
}

/// What is before and what is behind the password of a URL: it is read or refused, and the password not told.
pub fn url(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (before, behind) = text.split_once('\n').unwrap_or((&text, ""));
    if is_a_word(before, behind) {
        return;
    }
    let url = format!("{before}hunter2{behind}");
    for error in [parsers::postgres_url(&url), parsers::nats_urls(&url)].into_iter().filter_map(Result::err) {
        assert!(!error.report().contains("hunter2"), "{}", error.report());
    }
}

/// Whether what is put in between becomes a scheme, the name of a parameter or that of a file, which an error names.
fn is_a_word(before: &str, behind: &str) -> bool {
    let scheme = !before.rsplit(',').next().unwrap_or_default().contains("://") && behind.contains("://");
    let parameter = before.contains('?').then(|| before.rsplit(['?', '&']).next().unwrap_or_default());
    let files = ["sslrootcert", "sslcert", "sslkey", "ssl-root-cert", "ssl-ca", "ssl-cert", "ssl-key"];
    let named = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) => files.contains(&name),
        None => true,
    };
    scheme || (!behind.contains('@') && parameter.is_some_and(named))
}

/// The arguments of a relay, one in a line: durations, sizes and names are in their bounds.
pub fn command_line(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    // A file is read for its secret, and there are files without an end.
    let arguments: Vec<&str> = text.lines().filter(|line| !line.contains("-file")).collect();
    let Some(config) = parsers::relay_arguments(&arguments) else { return };
    assert!(config.retention <= std::time::Duration::from_secs(36_500 * 86_400));
    assert!(!config.naming.stream.is_empty() && !config.naming.stream.contains(['.', '*', '>', ' ']));
}
