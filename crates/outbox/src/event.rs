//! What an event is: a serialisable value with a stable type name.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// A fact that a transaction commits and others must learn of.
///
/// Implement it for one struct per kind of event, in a crate that publishers and subscribers share. The payload is
/// the struct's JSON.
///
/// ```
/// use aftercommit::Event;
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct OrderPlaced {
///     order: u64,
///     cents: i64,
/// }
///
/// impl Event for OrderPlaced {
///     const TYPE: &'static str = "order.placed";
///
///     fn key(&self) -> Option<String> {
///         Some(format!("order-{}", self.order))
///     }
/// }
/// ```
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The stable name, in the past tense, one per kind of event: the tokens of a NATS subject (letters, digits,
    /// `_`, `-`, separated by dots; at most 200 bytes). It never changes once published.
    const TYPE: &'static str;

    /// The version of the payload's shape. Raise it when old subscribers can no longer read the payload. Defaults to 1.
    const VERSION: u32 = 1;

    /// The ordering key, usually the id of the changed aggregate: events with one key reach each subscriber in commit
    /// order. At most 512 bytes. Defaults to none: no order is promised.
    fn key(&self) -> Option<String> {
        None
    }
}

/// The identity of one event, made once when it is written: the CloudEvents `id`, the `Nats-Msg-Id` and the key of
/// every subscriber's inbox.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct EventId(Uuid);

impl EventId {
    /// A new id: a version 7 UUID, so that ids of later events sort behind earlier ones of the same process.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id as a UUID.
    pub fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl Default for EventId {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Uuid> for EventId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
