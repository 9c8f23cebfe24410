//! Floors and controls of the way out of a stream.

use std::time::{Duration, Instant};

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull;
use futures_util::StreamExt;
use futures_util::stream::ReadyChunks;

use super::failed;
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::publisher::Outgoing;
use aftercommit_core::jetstream::{Connection, envelope};

/// One of several readers of a durable consumer.
pub(crate) struct Puller {
    messages: ReadyChunks<pull::Stream>,
}

/// Messages that were delivered together, to be acknowledged together.
pub(crate) struct Delivered {
    messages: Vec<Message>,
}

/// Makes a durable consumer for all messages of a stream, with as many readers, which get up to `batch` messages at a time.
pub(crate) async fn pullers(
    connection: &Connection,
    stream: &str,
    name: &str,
    readers: usize,
    batch: usize,
) -> Result<Vec<Puller>, Error> {
    let stream = connection.jetstream().get_stream(stream).await.map_err(|error| failed(error.into()))?;
    let config = pull::Config { durable_name: Some(name.into()), max_ack_pending: 100_000, ..Default::default() };
    let consumer = stream.create_consumer(config).await.map_err(|error| failed(error.into()))?;
    let mut pullers = Vec::new();
    for _ in 0..readers {
        let messages = consumer.stream().max_messages_per_batch(batch * 2).messages().await;
        pullers.push(Puller { messages: messages.map_err(|error| failed(error.into()))?.ready_chunks(batch) });
    }
    Ok(pullers)
}

impl Puller {
    /// What there is; none when nothing comes within `patience`.
    pub(crate) async fn next(&mut self, patience: Duration) -> Result<Option<Delivered>, Error> {
        let Ok(next) = tokio::time::timeout(patience, self.messages.next()).await else { return Ok(None) };
        let messages = next.unwrap_or_default().into_iter().collect::<Result<Vec<_>, _>>();
        Ok(Some(Delivered { messages: messages.map_err(|error| failed(error.into()))? }))
    }
}

impl Delivered {
    pub(crate) fn events(&self) -> Result<Vec<Envelope>, Error> {
        let read = |message: &Message| envelope(message.headers.as_ref(), message.payload.clone());
        self.messages.iter().map(read).collect::<Result<_, _>>().map_err(|error| failed(error.into()))
    }

    pub(crate) async fn ack(self) -> Result<(), Error> {
        for message in &self.messages {
            message.ack().await.map_err(failed)?;
        }
        Ok(())
    }
}

/// A floor: how long it takes from publishing a message to having it from a pull that waits for it, one after another.
pub(crate) async fn publish_to_deliver(
    publisher: &Connection,
    subscriber: &Connection,
    stream: &str,
    messages: impl Iterator<Item = Outgoing>,
) -> Result<Vec<Duration>, Error> {
    let stream = subscriber.jetstream().get_stream(stream).await.map_err(|error| failed(error.into()))?;
    let config = pull::Config { durable_name: Some("floor".into()), ..Default::default() };
    let consumer = stream.create_consumer(config).await.map_err(|error| failed(error.into()))?;
    let mut delivered = consumer.stream().messages().await.map_err(|error| failed(error.into()))?;
    let mut answers = publisher.client.subscribe("_INBOX.floor").await.map_err(|error| failed(error.into()))?;
    let mut took = Vec::new();
    for message in messages {
        let (subject, headers, payload) = message.into_parts();
        let started = Instant::now();
        let published = publisher.client.publish_with_reply_and_headers(subject, "_INBOX.floor", headers, payload);
        published.await.map_err(|error| failed(error.into()))?;
        let message = delivered.next().await.ok_or_else(ended)?.map_err(|error| failed(error.into()))?;
        took.push(started.elapsed());
        message.ack().await.map_err(failed)?;
        answers.next().await.ok_or_else(ended)?;
    }
    Ok(took)
}

fn ended() -> Error {
    Error::new(ErrorKind::Broker, "the bench's subscription ended")
}
