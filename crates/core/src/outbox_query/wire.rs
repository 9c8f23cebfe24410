//! What goes over the wire: queries and their answers. `docs/reconciliation.md` describes them.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::envelope::Envelope;

/// On the last message of an answer in several messages.
pub(super) const END: &str = "Aftercommit-End";

/// The subject on which the leading relay of a stream's outbox answers.
pub fn subject(stream: &str) -> String {
    format!("aftercommit.outbox.{stream}")
}

/// What can be asked of an outbox. Tokens are opaque to the asker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Query {
    /// The events that lie in the stream at or before `up_to`, behind the token.
    Page {
        /// The last stream sequence that counts.
        up_to: u64,
        /// The token of the page before; none for the first page.
        #[serde(default)]
        after: Option<Value>,
        /// All when there are none.
        #[serde(default)]
        types: Vec<String>,
    },
    /// The same, only their number and a digest of their ids.
    Digest {
        /// The last stream sequence that counts.
        up_to: u64,
        /// The token of the digest before; none for the first one.
        #[serde(default)]
        after: Option<Value>,
        /// Event types that count; all when there are none.
        #[serde(default)]
        types: Vec<String>,
    },
    /// Events that are not where the outbox's order would have them, behind the token.
    Displaced {
        /// The token of the answer before; none for the first one.
        #[serde(default)]
        after: Option<Value>,
    },
    /// Whole events by their ids.
    Events {
        /// The ids of the events.
        ids: Vec<Uuid>,
    },
    /// Whole events of some keys, from an outbox id on, whether they are in the stream or not: at least all that do not lie
    /// there at or before `behind`.
    Keys {
        /// The keys.
        keys: Vec<String>,
        /// The first outbox id that counts.
        from: i64,
        /// Events at or before this stream sequence may be left out.
        behind: u64,
    },
}

/// An event as a page tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    /// The id of its row in the outbox.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// When it was written, by the database's clock.
    pub time: DateTime<Utc>,
}

/// A page, or the digest of a range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The part of the stream that it is about: behind this sequence …
    pub behind: u64,
    /// … and up to this one, except for repairs.
    pub to: u64,
    /// In the order of the outbox; empty in a digest.
    #[serde(default)]
    pub events: Vec<Listed>,
    /// Only in a digest: how many events there are, and the sum of the first 60 bits of the MD5 of each id.
    #[serde(default)]
    pub count: Option<u64>,
    /// Only in a digest: the sum that `count` speaks of, as a decimal number. It is text because JSON's numbers are too
    /// short for it.
    #[serde(default)]
    pub digest: Option<String>,
    /// What to ask behind next time.
    pub next: Value,
    /// Whether there is more now.
    pub more: bool,
    /// Behind the last event: what was committed before this time lies before it.
    #[serde(default)]
    pub complete_to: Option<DateTime<Utc>>,
}

/// An event that is not where the outbox's order would have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// The id of its row in the outbox.
    pub id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// `queued`: it is missing in the stream; `published`: it is at `sequence`; `refused`: the stream will not take it.
    pub state: String,
    /// Where it lies in the stream; none when it does not.
    pub sequence: Option<u64>,
}

/// The answer to [`Query::Displaced`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Displaced {
    /// The events, in the order of the outbox.
    pub events: Vec<Moved>,
    /// The token to ask behind next time.
    pub next: Value,
    /// Whether there is more now.
    pub more: bool,
}

/// What stands behind whole events.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rest {
    /// The outbox id to go on behind; none when there is no more.
    pub next: Option<i64>,
    /// Asked for and not sent: ask for them again, alone.
    pub left_out: Vec<Uuid>,
}

/// What is answered.
pub enum Answer {
    /// One JSON value in one message.
    One(Value),
    /// Whole events, each a message as it is in the stream, and what stands behind them.
    Events(Vec<(String, Envelope)>, Rest),
}
