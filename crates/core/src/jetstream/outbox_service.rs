//! The questions that subscribers' reconcilers ask of a publisher's outbox over NATS, and how they are served.
//! `docs/reconciliation.md` describes what goes over the wire.
//!
//! The asker names the subject of the answer, and it is published with the rights of the relay: so answers go to inboxes
//! only.

use async_nats::{HeaderMap, HeaderValue, Message};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Connection;
use super::service::is_inbox;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind};

/// On the last message of an answer in several messages.
pub(super) const END: &str = "Aftercommit-End";

/// The subject on which the leading relay of a stream's outbox answers.
pub fn subject(stream: &str) -> String {
    format!("aftercommit.outbox.{stream}")
}

/// What can be asked. Tokens are opaque to the asker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// The events that lie in the stream at or before `up_to`, behind the token.
    Page {
        up_to: u64,
        #[serde(default)]
        after: Option<Value>,
        /// All when there are none.
        #[serde(default)]
        types: Vec<String>,
    },
    /// The same, only their number and a digest of their ids.
    Digest {
        up_to: u64,
        #[serde(default)]
        after: Option<Value>,
        #[serde(default)]
        types: Vec<String>,
    },
    /// Events that are not where the outbox's order would have them, behind the token.
    Displaced {
        #[serde(default)]
        after: Option<Value>,
    },
    /// Whole events by their ids.
    Events { ids: Vec<Uuid> },
    /// Whole events of some keys, from an outbox id on, whether they are in the stream or not: at least all that do not lie
    /// there at or before `behind`.
    Keys { keys: Vec<String>, from: i64, behind: u64 },
}

/// An event as a page tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    pub id: i64,
    pub event_id: Uuid,
    #[serde(rename = "type")]
    pub event_type: String,
    pub key: Option<String>,
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
    pub id: i64,
    pub event_id: Uuid,
    pub key: Option<String>,
    /// `queued`: it is missing in the stream; `published`: it is at `sequence`; `refused`: the stream will not take it.
    pub state: String,
    pub sequence: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Displaced {
    pub events: Vec<Moved>,
    pub next: Value,
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
    One(Value),
    /// Whole events, each a message as it is in the stream, and what stands behind them.
    Events(Vec<(String, Envelope)>, Rest),
}

/// Takes the questions for one stream. Of several processes that serve it each question goes to one.
pub struct Questions {
    connection: Connection,
    subscription: async_nats::Subscriber,
}

impl Questions {
    pub async fn subscribe(connection: &Connection, stream: &str) -> Result<Self, Error> {
        let subject = subject(stream);
        let subscription =
            connection.client.queue_subscribe(subject.clone(), "relay".into()).await.map_err(|error| {
                Error::with_source(ErrorKind::Broker, format!("cannot subscribe to {subject}"), error)
            })?;
        Ok(Self { connection: connection.clone(), subscription })
    }

    /// The next question that can be answered, and where the answer goes. None when the client is closed.
    pub async fn next(&mut self) -> Option<(Question, Reply)> {
        loop {
            let Message { reply, payload, .. } = self.subscription.next().await?;
            let Some(reply) = reply.filter(is_inbox) else { continue };
            let reply = Reply { connection: self.connection.clone(), subject: reply };
            match serde_json::from_slice(&payload) {
                Ok(question) => return Some((question, reply)),
                Err(error) => reply.refuse(&format!("invalid request: {error}")).await,
            }
        }
    }
}

/// Where an answer goes.
pub struct Reply {
    connection: Connection,
    subject: async_nats::Subject,
}

impl Reply {
    /// How many bytes a message of an answer may have.
    pub fn room(&self) -> usize {
        self.connection.client.server_info().max_payload
    }

    pub async fn refuse(&self, why: &str) {
        self.send(Answer::One(json!({ "error": why }))).await;
    }

    /// Sends an answer. One that does not arrive is asked for again.
    pub async fn send(&self, answer: Answer) {
        let client = &self.connection.client;
        let (events, last, headers) = match answer {
            Answer::One(value) => (Vec::new(), value, HeaderMap::new()),
            Answer::Events(events, rest) => {
                let mut end = HeaderMap::new();
                end.insert(END, "1");
                (events, json!(rest), end)
            }
        };
        for (subject, event) in events {
            let mut headers = HeaderMap::new();
            for (name, value) in event.to_headers() {
                headers.append(name.as_ref(), HeaderValue::from(value.as_ref()));
            }
            headers.insert("Aftercommit-Subject", subject);
            _ = client.publish_with_headers(self.subject.clone(), headers, event.payload).await;
        }
        _ = client.publish_with_headers(self.subject.clone(), headers, last.to_string().into()).await;
    }
}
