//! What only the bench asks of NATS: floors beside which the product is measured, and what is in a stream.

pub(crate) mod delivery;

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::header::{NATS_EXPECTED_LAST_MESSAGE_ID, NATS_EXPECTED_LAST_SEQUENCE, NATS_MESSAGE_ID};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use serde::Deserialize;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::publisher::Outgoing;
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::jetstream::{Connection, envelope};

/// Messages in flight, as the relay has them by default.
const WINDOW: u64 = 2048;

/// A message with everything that goes out with it.
pub(crate) struct Ready {
    subject: Subject,
    headers: HeaderMap,
    payload: Bytes,
}

/// Messages for an empty stream, each naming its predecessor as those of the relay do.
pub(crate) fn chained(messages: impl Iterator<Item = Outgoing>) -> Vec<Ready> {
    let mut before: Option<String> = None;
    let ready = messages.enumerate().map(|(number, message)| {
        let (subject, mut headers, payload) = message.into_parts();
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, number.to_string());
        let id = headers.get(NATS_MESSAGE_ID).map(|id| id.as_str().to_string());
        if let Some(before) = std::mem::replace(&mut before, id) {
            headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID, before);
        }
        Ready { subject, headers, payload }
    });
    ready.collect()
}

#[derive(Deserialize)]
struct Stored {
    seq: u64,
}

/// A floor: publishes messages with many in flight, and sees that each is stored in its place. One inbox for all
/// answers, no task per message: the quickest way that this client has.
pub(crate) async fn publish(connection: &Connection, messages: Vec<Ready>) -> Result<(), Error> {
    let client = &connection.client;
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(format!("{inbox}.*")).await.map_err(|error| failed(error.into()))?;
    let (mut sent, mut stored, all) = (0_u64, 0_u64, messages.len() as u64);
    let mut messages = messages.into_iter();
    while stored < all {
        while sent < stored + WINDOW
            && let Some(Ready { subject, headers, payload }) = messages.next()
        {
            sent += 1;
            let published = client.publish_with_reply_and_headers(subject, format!("{inbox}.{sent}"), headers, payload);
            published.await.map_err(|error| failed(error.into()))?;
        }
        let mut next = answers.next().await;
        while let Some(answer) = next {
            let stored_as: Stored = serde_json::from_slice(&answer.payload).map_err(|error| failed(error.into()))?;
            stored += 1;
            if stored_as.seq != stored {
                return Err(Error::new(ErrorKind::Integrity, format!("message {stored} became {}", stored_as.seq)));
            }
            next = answers.next().now_or_never().flatten();
        }
    }
    Ok(())
}

/// Messages of an atomic batch, and batches in flight. More batches than two do not make it faster.
const BATCH: usize = 1000;
const BATCHES: usize = 2;

/// Messages in atomic batches, as the relay makes them.
pub(crate) fn batched(messages: impl Iterator<Item = Outgoing>) -> Vec<Vec<Ready>> {
    let mut batches: Vec<Vec<Ready>> = Vec::new();
    for (number, message) in messages.enumerate() {
        let (subject, mut headers, payload) = message.into_parts();
        let position = number % BATCH + 1;
        headers.insert("Nats-Batch-Id", format!("batch-{}", number / BATCH));
        headers.insert("Nats-Batch-Sequence", position.to_string());
        if position == 1 {
            headers.insert(NATS_EXPECTED_LAST_SEQUENCE, number.to_string());
            batches.push(Vec::with_capacity(BATCH));
        }
        if let Some(batch) = batches.last_mut() {
            batch.push(Ready { subject, headers, payload });
        }
    }
    for last in batches.iter_mut().filter_map(|batch| batch.last_mut()) {
        last.headers.insert("Nats-Batch-Commit", "1");
    }
    batches
}

/// A floor: publishes atomic batches, the next while the last one is being stored.
pub(crate) async fn publish_batches(connection: &Connection, batches: Vec<Vec<Ready>>) -> Result<(), Error> {
    let client = &connection.client;
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(format!("{inbox}.*")).await.map_err(|error| failed(error.into()))?;
    let (mut in_flight, mut stored) = (VecDeque::new(), 0);
    let mut batches = batches.into_iter().enumerate();
    loop {
        while in_flight.len() < BATCHES
            && let Some((number, batch)) = batches.next()
        {
            in_flight.push_back(batch.len() as u64);
            let last = batch.len() - 1;
            for (position, Ready { subject, headers, payload }) in batch.into_iter().enumerate() {
                let published = if position == last {
                    let reply = format!("{inbox}.{number}");
                    client.publish_with_reply_and_headers(subject, reply, headers, payload).await
                } else {
                    client.publish_with_headers(subject, headers, payload).await
                };
                published.map_err(|error| failed(error.into()))?;
            }
        }
        let Some(size) = in_flight.pop_front() else { return Ok(()) };
        stored += size;
        let Some(answer) = answers.next().await else { return Err(failed("the client was closed".into())) };
        let stored_as: Stored = serde_json::from_slice(&answer.payload).map_err(|error| failed(error.into()))?;
        if stored_as.seq != stored {
            return Err(Error::new(ErrorKind::Integrity, format!("message {stored} became {}", stored_as.seq)));
        }
    }
}

/// An event in a stream, and when the server stored it.
pub(crate) struct Arrival {
    pub(crate) event: Envelope,
    pub(crate) stored: DateTime<Utc>,
}

/// All messages of a stream, in order.
pub(crate) async fn contents(connection: &Connection, name: &str) -> Result<Vec<Arrival>, Error> {
    let stream = connection.jetstream().get_stream(name).await.map_err(|error| failed(error.into()))?;
    let left = usize::try_from(stream.cached_info().state.messages).unwrap_or(usize::MAX);
    if left == 0 {
        return Ok(Vec::new());
    }
    let config = pull::Config { ack_policy: AckPolicy::None, ..Default::default() };
    let consumer = stream.create_consumer(config).await.map_err(|error| failed(error.into()))?;
    let messages = consumer.stream().max_messages_per_batch(5000).messages().await;
    let messages = messages.map_err(|error| failed(error.into()))?.take(left).map_err(|error| failed(error.into()));
    let read = |message: async_nats::jetstream::Message| async move {
        let stored = message.info().map_err(failed)?.published.unix_timestamp_nanos();
        let stored = DateTime::from_timestamp_nanos(i64::try_from(stored).unwrap_or_default());
        let message = message.message;
        let event = envelope(message.headers.as_ref(), message.payload).map_err(|error| failed(error.into()))?;
        Ok(Arrival { event, stored })
    };
    messages.and_then(read).try_collect().await
}

/// The time between the storing of two messages of a stream.
pub(crate) async fn time_between(stream: &StreamReader, first: u64, last: u64) -> Result<Duration, Error> {
    let missing = |sequence| Error::new(ErrorKind::Integrity, format!("message {sequence} is missing"));
    let (one, other) = (stream.raw(first).await?, stream.raw(last).await?);
    let (one, other) = (one.ok_or_else(|| missing(first))?, other.ok_or_else(|| missing(last))?);
    Duration::try_from(other.time - one.time).map_err(|error| failed(error.into()))
}

/// Deletes a stream.
pub(crate) async fn delete(connection: &Connection, name: &str) -> Result<(), Error> {
    connection.jetstream().delete_stream(name).await.map(drop).map_err(|error| failed(error.into()))
}

pub(crate) fn failed(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::with_source(ErrorKind::Broker, "the bench's request failed", error)
}
