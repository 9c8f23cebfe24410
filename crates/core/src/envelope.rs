//! An event with its metadata, and its two forms: NATS headers (CloudEvents 1.0 binary mode) and CloudEvents JSON.
//!
//! The binary mode for NATS is the one of the CloudEvents NATS protocol binding: attributes become headers with the
//! prefix `ce-`, their values percent-encoded as in the HTTP protocol binding, and the payload is the data as it is.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde_json::value::RawValue;
use uuid::Uuid;

use aftercommit_outbox::event::EventId;
use aftercommit_outbox::{TRACESTATE, TraceContext, is_traceparent};

/// The event's id; equal to `Nats-Msg-Id`.
pub const CE_ID: &str = "ce-id";
/// The event's type.
pub const CE_TYPE: &str = "ce-type";
/// The service that published it.
pub const CE_SOURCE: &str = "ce-source";
/// The CloudEvents version, `1.0`.
pub const CE_SPECVERSION: &str = "ce-specversion";
/// When it was written, RFC 3339.
pub const CE_TIME: &str = "ce-time";
/// The payload's media type.
pub const CE_DATACONTENTTYPE: &str = "ce-datacontenttype";
/// The ordering key; absent for events without one.
pub const CE_PARTITIONKEY: &str = "ce-partitionkey";
/// The outbox id: the position in the publisher's log.
pub const CE_SEQUENCE: &str = "ce-sequence";
/// The version of the payload's shape.
pub const CE_DATAVERSION: &str = "ce-dataversion";
/// JetStream's message id, by which the server drops repeats.
pub const NATS_MSG_ID: &str = "Nats-Msg-Id";
/// Set on messages that were published out of the outbox's order: `released` after they had been parked, `missing` when the
/// stream was found not to hold them.
pub const REPAIR: &str = "Aftercommit-Repair";
/// On the message of an event, the sequences of earlier messages that have its id and are not the event: somebody else
/// wrote them. A subscriber that has handled one of them handles the event all the same.
pub const REPLACES: &str = "Aftercommit-Replaces";
pub use aftercommit_outbox::{TOMBSTONE, TRACEPARENT};

/// What the HTTP protocol binding, section 3.1.3.2, encodes within ASCII: space, double quote and percent.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// An event as it travels: metadata and payload bytes.
#[derive(Clone, PartialEq)]
pub struct Envelope {
    /// The event's identity.
    pub id: EventId,
    /// Its type.
    pub event_type: String,
    /// The version of the payload's shape.
    pub version: u32,
    /// The ordering key.
    pub key: Option<String>,
    /// The CloudEvents source.
    pub source: String,
    /// When it was written.
    pub time: DateTime<Utc>,
    /// The outbox id. Zero or less when the event did not come from an outbox.
    pub sequence: i64,
    /// The publisher's own headers, `traceparent` among them.
    pub headers: BTreeMap<String, String>,
    /// The payload's media type.
    pub content_type: String,
    /// The payload, byte for byte as it was written.
    pub payload: Bytes,
    /// The sequences of earlier messages that have this event's id and are not the event, as the relay has found them.
    /// Not written with the other headers.
    pub replaces: Vec<u64>,
}

/// Why a message is not one of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A header that every event has is missing.
    #[error("header {0} is missing")]
    Missing(&'static str),
    /// A header has a value that cannot be read.
    #[error("header {0} cannot be read")]
    Malformed(&'static str),
}

impl Envelope {
    /// Whether it is what is left of an event whose payload was erased. No handler gets it.
    pub fn is_tombstone(&self) -> bool {
        self.content_type == TOMBSTONE
    }

    /// The key whose order a subscriber keeps. A tombstone has none: nothing is done with it, and an event of its key that fails
    /// would keep it from being taken, perhaps the event itself that was forgotten.
    pub fn order_key(&self) -> Option<&str> {
        self.key.as_deref().filter(|_| !self.is_tombstone())
    }

    /// The publisher's trace context, as it was written.
    pub fn traceparent(&self) -> Option<&str> {
        traceparent(&self.headers)
    }

    /// The same with the `tracestate`; none when it is no W3C trace context.
    pub fn trace_context(&self) -> Option<TraceContext> {
        let traceparent = self.traceparent().filter(|text| is_traceparent(text))?.to_string();
        Some(TraceContext { traceparent, tracestate: header(&self.headers, TRACESTATE).map(String::from) })
    }

    /// The headers of the NATS message, names and values, without those that steer a publish.
    pub fn to_headers(&self) -> Vec<(Cow<'_, str>, Cow<'_, str>)> {
        let own = self.headers.iter().map(|(name, value)| (name.into(), value.into()));
        let attributes = self.attributes_of_kind().into_iter().chain(self.attributes_of_event());
        attributes.map(|(name, value)| (name.into(), value)).chain(own).collect()
    }

    /// The headers that all events of the same source, type, version and content type share.
    pub(crate) fn attributes_of_kind(&self) -> [(&'static str, Cow<'_, str>); 5] {
        [
            (CE_SPECVERSION, "1.0".into()),
            (CE_TYPE, encode(&self.event_type)),
            (CE_SOURCE, encode(&self.source)),
            (CE_DATACONTENTTYPE, encode(&self.content_type)),
            (CE_DATAVERSION, self.version.to_string().into()),
        ]
    }

    /// The other headers that do not come from the publisher.
    pub(crate) fn attributes_of_event(&self) -> impl Iterator<Item = (&'static str, Cow<'_, str>)> {
        let id = self.id.to_string();
        let attributes = [
            (NATS_MSG_ID, id.clone().into()),
            (CE_ID, id.into()),
            (CE_TIME, self.time.to_rfc3339_opts(SecondsFormat::Micros, true).into()),
            (CE_SEQUENCE, self.sequence.to_string().into()),
        ];
        attributes.into_iter().chain(self.key.as_deref().map(|key| (CE_PARTITIONKEY, encode(key))))
    }

    /// Reads an event from the headers and payload of a NATS message. Headers that NATS and CloudEvents reserve are
    /// not among the result's own headers.
    ///
    /// # Errors
    /// When an attribute that CloudEvents requires is missing or unreadable. Foreign producers may leave out time,
    /// sequence, data version and content type.
    pub fn from_headers<'a>(
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        payload: Bytes,
    ) -> Result<Self, EnvelopeError> {
        // A handful: looking through them costs less than a map.
        let mut attributes: Vec<(&'a str, Cow<'a, str>)> = Vec::with_capacity(12);
        let mut own = BTreeMap::new();
        let mut replaces = Vec::new();
        for (name, value) in headers {
            if name.eq_ignore_ascii_case(REPLACES) {
                replaces = value.split(',').filter_map(|sequence| sequence.trim().parse().ok()).collect();
            } else if starts_with(name, "ce-") {
                attributes.push((name, percent_decode_str(value).decode_utf8_lossy()));
            } else if !is_reserved(name) {
                own.insert(name.to_string(), value.to_string());
            }
        }
        // Of several with one name the last one counts.
        let mut take = |name: &'static str| {
            let at = attributes.iter().rposition(|(given, _)| given.eq_ignore_ascii_case(name))?;
            Some(attributes.remove(at).1)
        };
        let id = take(CE_ID).ok_or(EnvelopeError::Missing(CE_ID))?;
        let id = Uuid::parse_str(&id).map_err(|_| EnvelopeError::Malformed(CE_ID))?;
        let time = match take(CE_TIME) {
            Some(time) => DateTime::parse_from_rfc3339(&time).map_err(|_| EnvelopeError::Malformed(CE_TIME))?.to_utc(),
            None => DateTime::UNIX_EPOCH,
        };
        let number = |name, value: Option<Cow<'_, str>>, default| match value {
            Some(value) => value.parse::<i64>().map_err(|_| EnvelopeError::Malformed(name)),
            None => Ok(default),
        };
        let sequence = number(CE_SEQUENCE, take(CE_SEQUENCE), 0)?;
        let version = number(CE_DATAVERSION, take(CE_DATAVERSION), 1)?;
        Ok(Self {
            id: id.into(),
            event_type: take(CE_TYPE).ok_or(EnvelopeError::Missing(CE_TYPE))?.into_owned(),
            version: u32::try_from(version).map_err(|_| EnvelopeError::Malformed(CE_DATAVERSION))?,
            key: take(CE_PARTITIONKEY).map(Cow::into_owned),
            source: take(CE_SOURCE).ok_or(EnvelopeError::Missing(CE_SOURCE))?.into_owned(),
            time,
            sequence,
            headers: own,
            content_type: take(CE_DATACONTENTTYPE).map_or_else(|| "application/json".into(), Cow::into_owned),
            payload,
            replaces,
        })
    }

    /// The headers of an HTTP request in CloudEvents' binary mode, without `content-type`. The publisher's headers are
    /// extension attributes, named as in [`Envelope::to_json`].
    pub fn to_http_headers(&self) -> BTreeMap<String, String> {
        let extensions = self.extensions().map(|(name, value)| (format!("ce-{name}"), encode(value).into_owned()));
        let mut headers: BTreeMap<String, String> = extensions.collect();
        let own = self.to_headers().into_iter().filter(|(name, _)| name.starts_with("ce-"));
        headers.extend(own.map(|(name, value)| (name.into_owned(), value.into_owned())));
        headers.remove(CE_DATACONTENTTYPE);
        headers
    }

    /// The publisher's headers as attributes of a CloudEvent.
    fn extensions(&self) -> impl Iterator<Item = (String, &str)> {
        let attribute = |name: &String| {
            let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
            let name = name.to_ascii_lowercase();
            // The other attributes of ours are always there and replace a header of their name; the key may be missing.
            (!matches!(name.as_str(), "" | "data" | "partitionkey")).then_some(name)
        };
        self.headers.iter().filter_map(move |(name, value)| Some((attribute(name)?, value.as_str())))
    }

    /// The event in the CloudEvents JSON format. JSON payloads are embedded as they were written, so that no digit of
    /// a number is lost; text becomes a string, anything else `data_base64`. The publisher's headers become extension
    /// attributes, their names in lower case without `-` and `_`, as CloudEvents wants attribute names.
    pub fn to_json(&self) -> String {
        self.to_json_and_problem().0
    }

    /// The same, for a reader who expects JSON where the content type says so: why the payload is none.
    pub fn to_json_strictly(&self) -> Result<String, String> {
        let (json, problem) = self.to_json_and_problem();
        match problem {
            None => Ok(json),
            Some(error) => Err(format!("the payload is no JSON, although it is {}: {error}", self.content_type)),
        }
    }

    fn to_json_and_problem(&self) -> (String, Option<serde_json::Error>) {
        let mut event = serde_json::Map::new();
        for (name, value) in self.extensions() {
            event.insert(name, value.into());
        }
        event.insert("specversion".into(), "1.0".into());
        event.insert("id".into(), self.id.to_string().into());
        event.insert("type".into(), self.event_type.as_str().into());
        event.insert("source".into(), self.source.as_str().into());
        event.insert("time".into(), self.time.to_rfc3339_opts(SecondsFormat::Micros, true).into());
        event.insert("datacontenttype".into(), self.content_type.as_str().into());
        event.insert("dataversion".into(), self.version.into());
        event.insert("sequence".into(), self.sequence.to_string().into());
        if let Some(key) = &self.key {
            event.insert("partitionkey".into(), key.as_str().into());
        }
        let json = is_json(&self.content_type).then(|| serde_json::from_slice::<&RawValue>(&self.payload)).transpose();
        let (json, problem) = json.map_or_else(|problem| (None, Some(problem)), |json| (json, None));
        let (name, data) = match (json, std::str::from_utf8(&self.payload)) {
            (Some(raw), _) => ("data", raw.get().to_string()),
            (None, Ok(text)) if self.content_type.starts_with("text/") => ("data", quoted(text)),
            _ => ("data_base64", quoted(&base64(&self.payload))),
        };
        let mut text = serde_json::Value::Object(event).to_string();
        text.pop();
        text.push_str(&format!(",\"{name}\":{data}}}"));
        (text, problem)
    }
}

/// Shows what identifies the event, never its payload or headers.
impl std::fmt::Debug for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Envelope")
            .field("id", &self.id)
            .field("event_type", &self.event_type)
            .field("sequence", &self.sequence)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// Whether a media type says JSON: `application/json` or any `+json`.
pub fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

/// The trace context among a publisher's headers, whose names may be in any case.
pub fn traceparent(headers: &BTreeMap<String, String>) -> Option<&str> {
    header(headers, TRACEPARENT)
}

fn header<'h>(headers: &'h BTreeMap<String, String>, name: &str) -> Option<&'h str> {
    headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// Whether a header with this name is none of a publisher's own.
pub(crate) fn is_reserved(name: &str) -> bool {
    ["ce-", "nats-", "aftercommit-"].iter().any(|prefix| starts_with(name, prefix))
}

/// Whether a header's name begins so, in whatever case.
fn starts_with(name: &str, prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

fn encode(value: &str) -> Cow<'_, str> {
    utf8_percent_encode(value, ENCODED).into()
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> Envelope {
        Envelope {
            id: EventId::new(),
            event_type: "order.placed".into(),
            version: 2,
            key: Some("Straße 1 %\"\n".into()),
            source: "/shop".into(),
            time: "2026-11-20T10:11:12.123456Z".parse().unwrap(),
            sequence: 42,
            headers: BTreeMap::from([("X-Tenant".into(), "a b".into())]),
            content_type: "application/json".into(),
            payload: Bytes::from_static(br#"{"n": 12345678901234567890.10}"#),
            replaces: Vec::new(),
        }
    }

    #[test]
    fn headers_round_trip() {
        let event = envelope();
        let headers = event.to_headers();
        for (name, value) in &headers {
            assert!(value.bytes().all(|b| (b' '..=b'~').contains(&b)), "{name}: {value:?}");
        }
        let back = Envelope::from_headers(headers.iter().map(|(n, v)| (n.as_ref(), v.as_ref())), event.payload.clone());
        assert_eq!(back, Ok(event));
    }

    /// Types of ours are plain tokens; those of foreign producers may be anything.
    #[test]
    fn a_foreign_type_is_written_as_it_was_read() {
        let foreign =
            [(CE_ID, "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), (CE_TYPE, "a%2541 %0A\u{1}"), (CE_SOURCE, "/s")];
        let event = Envelope::from_headers(foreign.into_iter(), Bytes::new()).unwrap();
        assert_eq!(event.event_type, "a%41 \n\u{1}");
        let headers = event.to_headers();
        assert!(headers.iter().all(|(_, value)| value.bytes().all(|b| (b' '..=b'~').contains(&b))), "{headers:?}");
        let back = Envelope::from_headers(headers.iter().map(|(n, v)| (n.as_ref(), v.as_ref())), Bytes::new());
        assert_eq!(back.unwrap().event_type, event.event_type);
    }

    #[test]
    fn what_an_event_replaces_is_read_and_is_no_header_of_its_own() {
        let mut headers = vec![(CE_ID, "01a1fbb7-bafe-75ab-a111-dc3a330bc524"), (CE_TYPE, "a"), (CE_SOURCE, "/s")];
        headers.push((REPLACES, "5, 9,x,-1"));
        let event = Envelope::from_headers(headers.into_iter(), Bytes::new()).unwrap();
        assert_eq!((event.replaces.as_slice(), event.headers.len()), ([5, 9].as_slice(), 0));
    }

    #[test]
    fn a_message_without_identity_is_refused() {
        let read = |headers: &[(&'static str, &'static str)]| {
            Envelope::from_headers(headers.iter().copied(), Bytes::new()).unwrap_err()
        };
        assert_eq!(read(&[]), EnvelopeError::Missing(CE_ID));
        assert_eq!(read(&[(CE_ID, "7")]), EnvelopeError::Malformed(CE_ID));
    }

    #[test]
    fn json_keeps_every_digit_and_names_extensions() {
        let json = envelope().to_json();
        assert!(json.contains(r#""data":{"n": 12345678901234567890.10}"#), "{json}");
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["xtenant"], "a b");
        assert_eq!(value["sequence"], "42");
        assert_eq!(value["partitionkey"], "Straße 1 %\"\n");
    }

    #[test]
    fn other_payloads_become_text_or_base64() {
        let mut event = envelope();
        event.payload = Bytes::from_static(b"not json");
        assert!(event.to_json().contains(r#""data_base64":"bm90IGpzb24=""#));
        event.content_type = "text/plain; charset=utf-8".into();
        assert!(event.to_json().contains(r#""data":"not json""#));
        event.payload = Bytes::from_static(&[0xff]);
        assert!(event.to_json().contains(r#""data_base64":"/w==""#));
    }

    #[test]
    fn debug_shows_no_payload() {
        let text = format!("{:?}", envelope());
        assert!(!text.contains("1234567890") && !text.contains("a b") && !text.contains("Straße"), "{text}");
    }
}
