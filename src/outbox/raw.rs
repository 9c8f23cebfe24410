use std::collections::BTreeMap;
use std::fmt;

use super::error::PublishError;
use super::json;
use crate::event::{Event, EventId};

/// An event as bytes, for payloads that are not one Rust type's JSON, and for headers and ids of the caller's own.
///
/// ```
/// use aftercommit::outbox::RawEvent;
///
/// let event = RawEvent::new("label.printed", "application/pdf", b"%PDF-1.7 ...")
///     .key("parcel-7")
///     .header("tenant", "acme");
/// ```
#[derive(Clone, PartialEq)]
pub struct RawEvent {
    pub(super) id: Option<EventId>,
    pub(super) event_type: String,
    pub(super) version: u32,
    pub(super) key: Option<String>,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) payload: Vec<u8>,
    pub(super) content_type: String,
}

impl RawEvent {
    /// An event of version 1 without key and headers. The payload is not looked into, whatever its content type.
    pub fn new(event_type: impl Into<String>, content_type: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            id: None,
            event_type: event_type.into(),
            version: 1,
            key: None,
            headers: BTreeMap::new(),
            payload: payload.into(),
            content_type: content_type.into(),
        }
    }

    /// A typed event as [`publish`](super::publish) would write it, to add headers or an id to.
    ///
    /// # Errors
    /// [`Invalid`](super::PublishErrorKind::Invalid) when JSON cannot hold the event, naming the field.
    pub fn of<E: Event>(event: &E) -> Result<Self, PublishError> {
        let payload = json::payload(event).map_err(|problem| PublishError::invalid(E::TYPE, problem))?;
        let raw = Self::new(E::TYPE, "application/json", payload).version(E::VERSION);
        Ok(Self { key: event.key(), ..raw })
    }

    /// The event's identity, when it has one already. While an event with this id is in the outbox, a second one is a
    /// [`Duplicate`](super::PublishErrorKind::Duplicate). Defaults to a new id.
    pub fn id(self, id: EventId) -> Self {
        Self { id: Some(id), ..self }
    }

    /// The version of the payload's shape, from 1. Defaults to 1.
    pub fn version(self, version: u32) -> Self {
        Self { version, ..self }
    }

    /// The ordering key, see [`Event::key`]. Defaults to none.
    pub fn key(self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// A header of the message, in addition to those that the relay writes. The name is of letters, digits, `_` and
    /// `-`, without the reserved prefixes `Nats-`, `ce-` and `Aftercommit-`; the value is printable ASCII without a space at either
    /// end. The second of two with one name counts.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }
}

/// Shows what identifies the event, never its payload or headers.
impl fmt::Debug for RawEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawEvent")
            .field("id", &self.id)
            .field("event_type", &self.event_type)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}
