use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::error::PublishError;
use crate::event::{Event, EventId};
use crate::json;

/// The content type of JSON.
const JSON: &str = "application/json";

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
    pub(crate) id: Option<EventId>,
    pub(crate) event_type: String,
    pub(crate) version: u32,
    pub(crate) key: Option<String>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) payload: Vec<u8>,
    pub(crate) content_type: String,
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

    /// A typed event as [`publish`](crate::publish) would write it, to add headers or an id to.
    ///
    /// # Errors
    /// [`Invalid`](crate::PublishErrorKind::Invalid) when JSON cannot hold the event, naming the field.
    pub fn of<E: Event>(event: &E) -> Result<Self, PublishError> {
        let payload = json::payload(event).map_err(|problem| PublishError::invalid(E::TYPE, problem))?;
        let raw = Self::new(E::TYPE, JSON, payload).version(E::VERSION);
        Ok(Self { key: event.key(), ..raw })
    }

    /// An event whose payload is the JSON of a value, for types that are written here and read elsewhere: they need
    /// not be an [`Event`], nor read their own JSON. What JSON cannot hold is refused as for a typed event.
    ///
    /// ```
    /// use aftercommit::outbox::RawEvent;
    ///
    /// #[derive(serde::Serialize)]
    /// struct OrderPlaced<'a> {
    ///     order: i64,
    ///     customer: &'a str,
    /// }
    /// let event = RawEvent::json("order.placed", &OrderPlaced { order: 7, customer: "ann" })?.key("order-7");
    /// # Ok::<(), aftercommit::outbox::PublishError>(())
    /// ```
    ///
    /// # Errors
    /// [`Invalid`](crate::PublishErrorKind::Invalid) when JSON cannot hold the value, naming the field.
    pub fn json(event_type: impl Into<String>, payload: &impl Serialize) -> Result<Self, PublishError> {
        let event_type = event_type.into();
        match json::written(payload) {
            Ok(payload) => Ok(Self::new(event_type, JSON, payload)),
            Err(problem) => Err(PublishError::invalid(&event_type, problem)),
        }
    }

    /// The event's identity, when it has one already. While an event with this id is in the outbox, a second one is a
    /// [`Duplicate`](crate::PublishErrorKind::Duplicate). Defaults to a new id.
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
