//! The rules for what may be written: those of the constraints of `aftercommit.outbox`, value for value, and checked
//! before the database is asked, because a violated constraint would cost the caller the transaction.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::error::{Problem, PublishError, shown};
use crate::event::EventId;
use crate::raw::RawEvent;
use crate::subject::check_tokens;
use crate::trace::{self, TRACEPARENT, TRACESTATE, TraceContext};

/// The largest payload in bytes. With headers and subject it stays below the 1 MiB that nats-server takes by default.
pub const MAX_PAYLOAD_BYTES: usize = 1_000_000;
/// The longest ordering key in bytes.
pub const MAX_KEY_BYTES: usize = 512;
/// The most that the headers of one event may take, in bytes of their `jsonb` text (`{"name": "value", …}`).
pub const MAX_HEADERS_BYTES: usize = 16_384;
/// The longest content type in bytes.
pub const MAX_CONTENT_TYPE_BYTES: usize = 128;

/// The content type of what is left of an event whose payload was erased. Publishers may not use it: subscribers would not
/// handle the event.
pub const TOMBSTONE: &str = "application/vnd.aftercommit-tombstone+json";

/// One row to be, in the columns that a publisher may write. All of it is legal.
pub struct NewEvent {
    /// The event's identity.
    pub event_id: Uuid,
    /// Its type.
    pub event_type: String,
    /// The version of the payload's shape, from 1.
    pub version: i32,
    /// The ordering key.
    pub key: Option<String>,
    /// The publisher's headers, `traceparent` among them.
    pub headers: BTreeMap<String, String>,
    /// The payload.
    pub payload: Vec<u8>,
    /// The payload's media type.
    pub content_type: String,
}

/// Takes an event that can be published, with its id and the trace context, or says which field stands in the way.
pub fn admit(event: RawEvent) -> Result<NewEvent, PublishError> {
    match admit_fields(event) {
        Ok(event) => Ok(event),
        Err((event_type, problem)) => Err(PublishError::invalid(&event_type, problem)),
    }
}

fn admit_fields(event: RawEvent) -> Result<NewEvent, (String, Problem)> {
    let RawEvent { id, event_type, version, key, mut headers, payload, content_type } = event;
    add_trace_context(&mut headers);
    let checked = check_type(&event_type)
        .and_then(|()| check_key(key.as_deref()))
        .and_then(|()| check_headers(&headers))
        .and_then(|()| check_payload(&payload))
        .and_then(|()| check_content_type(&content_type))
        .and_then(|()| check_version(version));
    match checked {
        Ok(version) => {
            let event_id = id.unwrap_or_else(EventId::new).as_uuid();
            Ok(NewEvent { event_id, event_type, version, key, headers, payload, content_type })
        }
        Err(problem) => Err((event_type, problem)),
    }
}

/// The caller's own `traceparent` stays, and headers that are full stay as they are.
fn add_trace_context(headers: &mut BTreeMap<String, String>) {
    if has_header(headers, TRACEPARENT) {
        return;
    }
    let Some(TraceContext { traceparent, tracestate }) = trace::current_context() else { return };
    let mut add = |name: &str, value| {
        if has_header(headers, name) {
            return false;
        }
        headers.insert(name.into(), value);
        let fits = jsonb_bytes(headers) <= MAX_HEADERS_BYTES;
        if !fits {
            headers.remove(name);
        }
        fits
    };
    if add(TRACEPARENT, traceparent)
        && let Some(tracestate) = tracestate
    {
        add(TRACESTATE, tracestate);
    }
}

fn has_header(headers: &BTreeMap<String, String>, name: &str) -> bool {
    headers.keys().any(|own| own.eq_ignore_ascii_case(name))
}

fn check_type(event_type: &str) -> Result<(), Problem> {
    check_tokens(event_type).map_err(|error| Problem::new("type", error.to_string()))
}

fn check_version(version: u32) -> Result<i32, Problem> {
    match i32::try_from(version) {
        Ok(version) if version >= 1 => Ok(version),
        _ => Err(Problem::new("version", format!("is {version}, not from 1 to {}", i32::MAX))),
    }
}

fn check_key(key: Option<&str>) -> Result<(), Problem> {
    match key {
        Some("") => Err(Problem::new("key", "is empty; an event without an order has no key")),
        Some(key) if key.len() > MAX_KEY_BYTES => {
            Err(Problem::new("key", format!("has {} bytes, more than {MAX_KEY_BYTES}", key.len())))
        }
        Some(key) if key.contains('\0') => Err(Problem::new("key", "has a NUL, which PostgreSQL cannot store")),
        _ => Ok(()),
    }
}

/// Whether an event may carry these headers; else what stands in the way.
pub fn headers_are_legal(headers: &BTreeMap<String, String>) -> Result<(), String> {
    check_headers(headers).map_err(|Problem { field, why }| format!("{field} {why}"))
}

fn check_headers(headers: &BTreeMap<String, String>) -> Result<(), Problem> {
    for (name, value) in headers {
        let refuse = |why| Err(Problem::new(format!("headers.{}", shown_name(name)), why));
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
            return refuse("is not a header name: letters, digits, '_' and '-' are allowed");
        }
        let lower = name.to_ascii_lowercase();
        if ["nats-", "ce-", "aftercommit-"].iter().any(|reserved| lower.starts_with(reserved)) {
            return refuse(
                "has a reserved prefix: Nats-* belongs to NATS, ce-* to CloudEvents, Aftercommit-* to the relay",
            );
        }
        if !is_trimmed_ascii(value) {
            return refuse("has a value other than printable ASCII without a space at either end");
        }
    }
    let size = jsonb_bytes(headers);
    if size > MAX_HEADERS_BYTES {
        return Err(Problem::new("headers", format!("take {size} bytes, more than {MAX_HEADERS_BYTES}")));
    }
    Ok(())
}

/// A legal name as it is, any other quoted.
fn shown_name(name: &str) -> String {
    let legal = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if legal { name.into() } else { shown(name) }
}

/// The length of `headers::text` in PostgreSQL, for values without control characters.
fn jsonb_bytes(headers: &BTreeMap<String, String>) -> usize {
    let escaped = |text: &str| text.len() + text.bytes().filter(|b| matches!(b, b'"' | b'\\')).count();
    let entries: usize = headers.iter().map(|(name, value)| r#""": "", "#.len() + name.len() + escaped(value)).sum();
    "{}".len() + entries.saturating_sub(", ".len())
}

fn check_payload(payload: &[u8]) -> Result<(), Problem> {
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(Problem::new("payload", format!("has {} bytes, more than {MAX_PAYLOAD_BYTES}", payload.len())));
    }
    Ok(())
}

fn check_content_type(content_type: &str) -> Result<(), Problem> {
    if content_type.is_empty() || content_type.len() > MAX_CONTENT_TYPE_BYTES || !is_trimmed_ascii(content_type) {
        return Err(Problem::new(
            "content_type",
            format!("is not 1 to {MAX_CONTENT_TYPE_BYTES} characters of printable ASCII without a space at either end"),
        ));
    }
    if content_type.eq_ignore_ascii_case(TOMBSTONE) {
        return Err(Problem::new("content_type", "is the one of erased events: no subscriber would handle the event"));
    }
    Ok(())
}

fn is_trimmed_ascii(text: &str) -> bool {
    text.bytes().all(|b| (b' '..=b'~').contains(&b)) && !text.starts_with(' ') && !text.ends_with(' ')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PublishErrorKind;

    fn event() -> RawEvent {
        RawEvent::new("order.placed", "text/plain", "hello")
    }

    fn refused(event: RawEvent) -> (String, String) {
        let error = admit(event).err().unwrap();
        assert_eq!(error.kind(), PublishErrorKind::Invalid);
        (error.field().unwrap().into(), error.to_string())
    }

    #[test]
    fn every_illegal_field_is_named() {
        let long = "x".repeat(1_000);
        for (field, event) in [
            ("type", RawEvent::new("order..placed", "text/plain", "")),
            ("version", event().version(0)),
            ("version", event().version(u32::MAX)),
            ("key", event().key("")),
            ("key", event().key("a\0b")),
            ("key", event().key(&long)),
            ("headers.Nats-Msg-Id", event().header("Nats-Msg-Id", "7")),
            ("headers.CE-id", event().header("CE-id", "7")),
            ("headers.aftercommit-Repair", event().header("aftercommit-Repair", "missing")),
            ("headers.a:b", event().header("a:b", "7")),
            ("headers.\"a\\r\\nb\"", event().header("a\r\nb", "7")),
            ("headers.tenant", event().header("tenant", "a\r\nNats-Rollup: all")),
            ("headers", (0..20).fold(event(), |event, n| event.header(format!("h{n}"), &long))),
            ("payload", RawEvent::new("a", "text/plain", vec![0; MAX_PAYLOAD_BYTES + 1])),
            ("content_type", RawEvent::new("a", "text/plain ", "")),
            ("content_type", RawEvent::new("a", TOMBSTONE, "")),
        ] {
            let (named, message) = refused(event);
            assert_eq!(named, field, "{message}");
            assert!(message.starts_with("event \"") && message.contains(field), "{message}");
        }
    }

    #[test]
    fn messages_show_neither_values_nor_endless_names() {
        let (_, message) = refused(event().header("tenant", "secret\u{7f}"));
        assert!(!message.contains("secret"), "{message}");
        let (_, message) = refused(RawEvent::new("\n".repeat(500), "text/plain", ""));
        assert!(message.len() < 400 && !message.contains('\n'), "{message}");
    }

    #[test]
    fn the_largest_legal_values_are_taken() {
        let event = RawEvent::new("a".repeat(200), "b".repeat(MAX_CONTENT_TYPE_BYTES), vec![0; MAX_PAYLOAD_BYTES])
            .version(i32::MAX as u32)
            .key("c".repeat(MAX_KEY_BYTES))
            .header("h", "d".repeat(MAX_HEADERS_BYTES - r#"{"h": ""}"#.len()));
        assert!(admit(event).is_ok());
    }
}
