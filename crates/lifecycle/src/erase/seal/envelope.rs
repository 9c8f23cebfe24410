//! What is in the payload of a sealed event.

use aftercommit_outbox::{Event, RawEvent};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::error::{SealError, SealErrorKind};

/// The content type of sealed events.
pub const SEALED_CONTENT_TYPE: &str = "application/vnd.aftercommit.sealed+json";

/// An event that may be sealed: what a handler subscribes to, as `Handler<Sealed<OrderPlaced>>`. It has the type and version of the
/// event. [`Sealer::open`](super::Sealer::open) says what is in it.
pub enum Sealed<E> {
    /// It is sealed.
    #[doc(hidden)]
    Sealed(Envelope),
    /// It was published before sealing began.
    #[doc(hidden)]
    Plain(E),
}

/// What is in the payload of a sealed event: a reference to the key, and what it encrypts.
#[derive(Clone)]
#[doc(hidden)]
pub struct Envelope {
    pub(super) key: Uuid,
    /// Nonce and ciphertext.
    pub(super) data: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Outer {
    sealed: Inner,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inner {
    /// The format of `data`.
    v: u8,
    key: Uuid,
    data: String,
}

/// The only format that there is: 24 bytes of nonce and XChaCha20-Poly1305.
const FORMAT: u8 = 1;

impl Envelope {
    pub(super) fn new(key: Uuid, data: Vec<u8>) -> Self {
        Self { key, data }
    }

    fn outer(&self) -> Outer {
        Outer { sealed: Inner { v: FORMAT, key: self.key, data: BASE64_STANDARD.encode(&self.data) } }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        let Inner { v, key, data } = self.outer().sealed;
        // A number, a UUID and base64: nothing in it needs to be escaped.
        format!(r#"{{"sealed":{{"v":{v},"key":"{key}","data":"{data}"}}}}"#).into_bytes()
    }

    fn read(json: &str) -> Option<Result<Self, String>> {
        let Outer { sealed: Inner { v, key, data } } = serde_json::from_str(json).ok()?;
        if v != FORMAT {
            return Some(Err(format!("the event is sealed in format {v}, this version knows up to {FORMAT}")));
        }
        let data = BASE64_STANDARD.decode(data).map_err(|_| "the sealed data is no base64".to_string());
        Some(data.map(|data| Self { key, data }))
    }
}

/// The JSON of an event, as it would be published.
pub(super) fn payload<E: Event>(event: &E) -> Result<Vec<u8>, SealError> {
    // What JSON cannot hold is refused as it is for any event.
    RawEvent::of(event).map_err(SealError::event)?;
    serde_json::to_vec(event)
        .map_err(|_| SealError::new(SealErrorKind::Event, format!("event {:?} cannot be written as JSON", E::TYPE)))
}

/// The event in an opened payload.
pub(super) fn event<E: Event>(payload: &[u8]) -> Result<E, SealError> {
    // The error may quote the payload.
    serde_json::from_slice(payload)
        .map_err(|_| SealError::new(SealErrorKind::Event, format!("the opened payload cannot be read as {}", E::TYPE)))
}

impl<E: Serialize> Serialize for Sealed<E> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Sealed(envelope) => envelope.outer().serialize(serializer),
            Self::Plain(event) => event.serialize(serializer),
        }
    }
}

impl<'de, E: Event> Deserialize<'de> for Sealed<E> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Box::<RawValue>::deserialize(deserializer)?;
        match Envelope::read(json.get()) {
            Some(envelope) => envelope.map(Self::Sealed).map_err(D::Error::custom),
            None => serde_json::from_str(json.get()).map(Self::Plain).map_err(D::Error::custom),
        }
    }
}

impl<E: Event> Event for Sealed<E> {
    const TYPE: &'static str = E::TYPE;
    const VERSION: u32 = E::VERSION;

    fn key(&self) -> Option<String> {
        match self {
            Self::Sealed(_) => None,
            Self::Plain(event) => event.key(),
        }
    }
}

/// Shows whether it is sealed, never what is in it.
impl<E> std::fmt::Debug for Sealed<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Sealed(_) => "Sealed(..)",
            Self::Plain(_) => "Plain(..)",
        })
    }
}
