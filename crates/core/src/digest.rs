//! A digest of what an event is made of, so that a message with an event's ids can be told from the event.
//!
//! It is made anew on both sides, of a row of the outbox and of a message of the stream: in a header it could be copied.

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};

use crate::envelope::{self, Envelope};

/// SHA-256 over [`Contents`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}{:02x}…", self.0[0], self.0[1])
    }
}

/// What an event is made of, beside its ids and its source.
pub struct Contents<'a> {
    /// The event's type, such as `order.placed`.
    pub event_type: &'a str,
    /// The version of the type, from 1.
    pub version: u32,
    /// The event's key; none when its order does not matter.
    pub key: Option<&'a str>,
    /// The media type of the payload, such as `application/json`.
    pub content_type: &'a str,
    /// When the event was written, by the database's clock. Only whole microseconds count.
    pub time: DateTime<Utc>,
    /// The publisher's headers. Those with reserved names do not count.
    pub headers: &'a BTreeMap<String, String>,
    /// The SHA-256 of the payload.
    pub payload: &'a [u8],
}

impl Digest {
    /// A digest as a database keeps it; none when it has another length.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Computes the digest.
    pub fn of(contents: &Contents<'_>) -> Self {
        let Contents { event_type, version, key, content_type, time, headers, payload } = contents;
        let mut hash = Sha256::new();
        // With its length in front, so that nothing moves from one part into the next.
        let mut add = |part: &[u8]| {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        };
        add(event_type.as_bytes());
        add(&version.to_be_bytes());
        add(key.map_or(&[][..], |_| &[1]));
        add(key.unwrap_or_default().as_bytes());
        add(content_type.as_bytes());
        add(&time.timestamp_micros().to_be_bytes());
        add(payload);
        // Those that a message cannot have as an event's own are in no message.
        for (name, value) in headers.iter().filter(|(name, _)| !envelope::is_reserved(name)) {
            add(name.as_bytes());
            add(value.trim().as_bytes());
        }
        Self(hash.finalize().into())
    }
}

impl Envelope {
    /// The digest of what it is made of.
    pub fn digest(&self) -> Digest {
        Digest::of(&Contents {
            event_type: &self.event_type,
            version: self.version,
            key: self.key.as_deref(),
            content_type: &self.content_type,
            time: self.time,
            headers: &self.headers,
            payload: &Sha256::digest(&self.payload),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> Envelope {
        Envelope {
            id: uuid::Uuid::nil().into(),
            event_type: "order.placed".into(),
            version: 1,
            key: Some("a".into()),
            source: "/shop".into(),
            time: DateTime::UNIX_EPOCH,
            sequence: 7,
            headers: [("x".to_string(), "y".to_string())].into(),
            content_type: "application/json".into(),
            payload: "{}".into(),
            replaces: Vec::new(),
        }
    }

    #[test]
    fn every_part_of_an_event_changes_its_digest() {
        let changes: [fn(&mut Envelope); 10] = [
            |e| e.event_type = "order.paid".into(),
            |e| e.version = 2,
            |e| e.key = None,
            |e| e.key = Some(String::new()),
            |e| e.content_type = "text/plain".into(),
            |e| e.time += chrono::TimeDelta::microseconds(1),
            |e| e.payload = "[]".into(),
            |e| e.headers.clear(),
            |e| _ = e.headers.insert("x".into(), "z".into()),
            |e| (e.event_type, e.content_type) = ("order.placeda".into(), "pplication/json".into()),
        ];
        let original = envelope().digest();
        for (n, change) in changes.into_iter().enumerate() {
            let mut changed = envelope();
            change(&mut changed);
            assert_ne!(changed.digest(), original, "{n}");
        }
    }

    #[test]
    fn what_a_message_carries_beside_the_event_does_not() {
        let mut event = envelope();
        let headers = event.to_headers();
        let read = Envelope::from_headers(headers.iter().map(|(n, v)| (n.as_ref(), v.as_ref())), event.payload.clone());
        assert_eq!(read.unwrap().digest(), event.digest());
        let reserved = event.headers.insert("Aftercommit-Repair".into(), "written before it was reserved".into());
        assert_eq!((reserved, event.digest()), (None, envelope().digest()));
    }
}
