//! The leading relay serves queries of its outbox: those of subscribers' reconcilers, which have no access to the
//! publisher's database.
//!
//! Whoever asks names the subject of the answer, and it is published with the rights of the relay: so answers go to inboxes
//! only.

use std::sync::Arc;

use async_nats::{HeaderMap, HeaderValue, Message};
use futures_util::StreamExt;
use serde_json::json;

use super::reader::{OutboxReader, Refusal};
use super::wire::{Answer, END, Query, subject};
use crate::config::{Naming, PostgresConfig};
use crate::error::{Error, ErrorKind};
use crate::jetstream::Connection;
use crate::jetstream::service::is_inbox;

/// Answers the queries of a stream's outbox until it is dropped.
pub async fn answer(postgres: PostgresConfig, nats: Connection, naming: Arc<Naming>) {
    let mut queries = match Queries::subscribe(&nats, &naming.stream).await {
        Ok(queries) => queries,
        Err(error) => return tracing::warn!(error = error.report(), "queries of the outbox are not answered"),
    };
    let mut kept = None;
    while let Some((query, reply)) = queries.next().await {
        let mut reader = match kept.take() {
            Some(reader) => reader,
            None => match OutboxReader::serving(&postgres, &naming, reply.room()).await {
                Ok(reader) => reader,
                Err(error) => {
                    tracing::warn!(error = error.report(), "a query of the outbox cannot be answered");
                    reply.refuse("the outbox's database does not answer").await;
                    continue;
                }
            },
        };
        match reader.answer(query).await {
            Ok(answer) => {
                kept = Some(reader);
                reply.send(answer).await;
            }
            Err(Refusal::Told(why)) => {
                kept = Some(reader);
                reply.refuse(why).await;
            }
            Err(error) => {
                let error = Error::from(error);
                tracing::warn!(error = error.report(), "a query of the outbox cannot be answered");
                reply.refuse("the outbox cannot be read at present").await;
            }
        }
    }
}

/// The queries for one stream. Of several processes that serve it each query goes to one.
pub struct Queries {
    connection: Connection,
    subscription: async_nats::Subscriber,
}

impl Queries {
    /// Takes over queries for `stream` from now on.
    pub async fn subscribe(connection: &Connection, stream: &str) -> Result<Self, Error> {
        let subject = subject(stream);
        let subscription =
            connection.client.queue_subscribe(subject.clone(), "relay".into()).await.map_err(|error| {
                Error::with_source(ErrorKind::Broker, format!("cannot subscribe to {subject}"), error)
            })?;
        Ok(Self { connection: connection.clone(), subscription })
    }

    /// The next query that can be answered, and where the answer goes. None when the client is closed.
    pub async fn next(&mut self) -> Option<(Query, Reply)> {
        loop {
            let Message { reply, payload, .. } = self.subscription.next().await?;
            let Some(reply) = reply.filter(is_inbox) else { continue };
            let reply = Reply { connection: self.connection.clone(), subject: reply };
            match serde_json::from_slice(&payload) {
                Ok(query) => return Some((query, reply)),
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

    /// Answers that the query is not answered, and why.
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
