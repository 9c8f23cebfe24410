//! Reads a long range of a stream: whole messages in order, a batch at a time, through a consumer of its own. That costs
//! the server a fifth of what direct gets do, which it answers with headers that it makes anew for every message.
//!
//! What the consumer leaves out is asked of the stream's leader before it counts as missing.
//!
//! It needs the permissions to publish to `$JS.API.CONSUMER.{CREATE,DELETE,MSG.NEXT}.<stream>.<consumer>` and to
//! `$JS.API.STREAM.MSG.GET.<stream>`.

use std::ops::RangeInclusive;
use std::time::Duration;

use async_nats::StatusCode;
use async_nats::jetstream;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::ConsumerErrorKind;
use futures_util::StreamExt;
use serde_json::json;

use super::api;
use super::history::{BATCH, BATCH_BYTES, History, PATIENCE};
use crate::error::{Error, ErrorKind};

/// The server removes the consumer of a process that died after so long.
const INACTIVE: Duration = Duration::from_secs(30);

/// A range that is being read.
pub struct Sweep {
    history: History,
    consumer: String,
    next: u64,
    last: u64,
}

/// Why a pull ended.
enum End {
    /// It has as many messages as were wanted.
    Full,
    /// The next message would be too many bytes.
    Bytes,
    /// The consumer has no more.
    Nothing,
}

impl Sweep {
    /// Begins to read a range. Another sweep with a consumer of that name is broken off.
    pub async fn begin(history: &History, consumer: &str, range: RangeInclusive<u64>) -> Result<Self, Error> {
        let (next, last) = range.into_inner();
        let sweep = Self { history: history.clone(), consumer: consumer.into(), next, last };
        if next <= last {
            sweep.delete().await?;
            sweep.create().await?;
        }
        Ok(sweep)
    }

    /// The next messages, none at the end of the range. What is left out, the stream's leader does not have.
    pub async fn batch(&mut self) -> Result<Option<Vec<StreamMessage>>, Error> {
        if self.next > self.last {
            self.delete().await?;
            return Ok(None);
        }
        let wanted = BATCH.min(self.last - self.next + 1);
        let (mut messages, mut end) = self.pull(wanted, Some(BATCH_BYTES)).await?;
        if messages.is_empty() && matches!(end, End::Bytes) {
            (messages, end) = self.pull(1, None).await?;
        }
        let mut reached = messages.last().map_or(self.next - 1, |message| message.sequence);
        // What was read from the leader, because the consumer's replica did not have it yet, may come again.
        messages.retain(|message| (self.next..=self.last).contains(&message.sequence));
        if matches!(end, End::Nothing) {
            let next = self.next.max(reached + 1);
            let ahead = self.history.following(next).await?.filter(|ahead| ahead.sequence <= self.last);
            reached = ahead.as_ref().map_or(self.last, |ahead| ahead.sequence);
            messages.extend(ahead);
        }
        let reached = reached.clamp(self.next - 1, self.last);
        let messages = self.history.complete(messages, self.next, reached).await?;
        self.next = reached + 1;
        Ok(Some(messages))
    }

    async fn create(&self) -> Result<(), Error> {
        let config = pull::Config {
            name: Some(self.consumer.clone()),
            description: Some("reads the stream to compare it with the outbox".into()),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: self.next },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE,
            memory_storage: true,
            num_replicas: 1,
            ..Default::default()
        };
        match self.history.stream.create_consumer(config).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed("cannot create", error.into())),
        }
    }

    async fn delete(&self) -> Result<(), Error> {
        match self.history.stream.delete_consumer(&self.consumer).await {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                ConsumerErrorKind::JetStream(reason) if reason.error_code() == ErrorCode::CONSUMER_NOT_FOUND => Ok(()),
                _ => Err(self.failed("cannot delete", error.into())),
            },
        }
    }

    fn failed(&self, what: &str, error: Box<dyn std::error::Error + Send + Sync>) -> Error {
        let (consumer, stream) = (&self.consumer, &self.history.name);
        let problem = format!(
            "{what} the consumer {consumer} with which stream {stream} is read, for which the NATS user needs the rights \
             to publish to $JS.API.CONSUMER.CREATE.{stream}.{consumer}, $JS.API.CONSUMER.DELETE.{stream}.{consumer} and \
             $JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}{}",
            self.history.complaint()
        );
        Error::with_source(ErrorKind::Broker, problem, error)
    }

    async fn pull(&self, count: u64, max_bytes: Option<u64>) -> Result<(Vec<StreamMessage>, End), Error> {
        let client = &self.history.connection.client;
        let inbox = client.new_inbox();
        let subject = format!("CONSUMER.MSG.NEXT.{}.{}", self.history.name, self.consumer);
        let question = json!({ "batch": count, "max_bytes": max_bytes.unwrap_or(0), "no_wait": true });
        let mut answers =
            client.subscribe(inbox.clone()).await.map_err(|error| self.failed("cannot read", error.into()))?;
        let context = self.history.connection.jetstream();
        api::send(&context, &subject, &inbox, question.to_string().into())
            .await
            .map_err(|error| self.failed("cannot read", error.into()))?;
        let mut messages = Vec::new();
        loop {
            let answer = match tokio::time::timeout(PATIENCE, answers.next()).await {
                Ok(answer) => answer.ok_or_else(|| Error::new(ErrorKind::Broker, "the NATS client was closed"))?,
                Err(_) => return Err(self.failed("no answer from", "timed out".into())),
            };
            match answer.status {
                None => {
                    let message = stored(jetstream::Message { message: answer, context: context.clone() });
                    let message = message.map_err(|error| self.failed("a message is not from", error))?;
                    let ends = message.sequence >= self.last;
                    messages.push(message);
                    if ends || messages.len() as u64 == count {
                        return Ok((messages, End::Full));
                    }
                }
                Some(StatusCode::NOT_FOUND | StatusCode::TIMEOUT) => return Ok((messages, End::Nothing)),
                Some(status) => {
                    let description = answer.description.as_deref().unwrap_or_default();
                    if status.as_u16() == 409 && description.contains("MaxBytes") {
                        return Ok((messages, End::Bytes));
                    }
                    return Err(self.failed("cannot read", format!("{status} {description}").into()));
                }
            }
        }
    }
}

/// A message from a consumer as the stream has it.
fn stored(message: jetstream::Message) -> Result<StreamMessage, Box<dyn std::error::Error + Send + Sync>> {
    let info = message.info()?;
    let (sequence, time) = (info.stream_sequence, info.published);
    let (message, _) = message.split();
    let headers = message.headers.unwrap_or_default();
    Ok(StreamMessage { subject: message.subject, sequence, headers, payload: message.payload, time })
}
