//! Reads a range of a stream fast: whole messages in order, a batch at a time, whatever the range's length.
//!
//! Batches come by direct get (ADR-31 of the NATS architecture), which any replica answers. What is missing in them is
//! asked of the stream's leader before it counts as missing.
//!
//! It needs the permissions to publish to `$JS.API.DIRECT.GET.<stream>` and `$JS.API.STREAM.MSG.GET.<stream>`, and none
//! to create a consumer.

use std::ops::RangeInclusive;
use std::time::Duration;

use async_nats::StatusCode;
use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::Stream;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::json;

use super::Connection;
use super::api;
use super::stored::following;
use crate::error::{Error, ErrorKind};

/// Messages in a batch.
pub(super) const BATCH: u64 = 1000;
/// Bytes in a batch, unless a single message is larger.
pub(super) const BATCH_BYTES: u64 = 4 << 20;
/// How long the next message of a batch may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// With so many wanted messages in it, the whole batch is read.
const DENSE: usize = 100;
/// Questions to the leader that are in flight at the same time.
const QUESTIONS: usize = 32;

/// A stream that is read from one sequence to another.
#[derive(Clone)]
pub struct History {
    pub(super) connection: Connection,
    context: Context,
    pub(super) name: String,
    pub(super) stream: Stream<()>,
    /// How long the next message of a batch may take.
    patience: Duration,
}

/// Messages that follow each other in a stream.
#[derive(Debug)]
pub struct Batch {
    /// The messages, by their sequences. Those that were deleted are left out.
    pub messages: Vec<StreamMessage>,
    /// Where to go on; none at the end of the range.
    pub next: Option<u64>,
}

/// What a direct get answered.
enum Answer {
    /// These, and whether more follow.
    Messages(Vec<StreamMessage>, bool),
    /// The stream does not allow direct gets, or nobody answers them at present.
    Nobody,
}

impl History {
    /// Reads the stream of this name. The server is not asked yet.
    pub async fn new(connection: &Connection, name: &str) -> Result<Self, Error> {
        let context = connection.jetstream();
        let stream = context
            .get_stream_no_info(name)
            .await
            .map_err(|error| Error::with_source(ErrorKind::Config, format!("{name:?} is not a stream name"), error))?;
        Ok(Self { connection: connection.clone(), context, name: name.into(), stream, patience: PATIENCE })
    }

    /// For callers that have another way when there are no answers, as where the user lacks the right to ask.
    pub(super) fn hasty(self) -> Self {
        Self { patience: Duration::from_secs(2), ..self }
    }

    /// The next messages of a range. What it leaves out, the stream's leader does not have.
    pub async fn batch(&self, range: RangeInclusive<u64>) -> Result<Batch, Error> {
        let (first, last) = range.into_inner();
        if first > last {
            return Ok(Batch { messages: Vec::new(), next: None });
        }
        let end = last.min(first + BATCH - 1);
        let (messages, end) = match self.direct(first, BATCH.min(last - first + 1)).await? {
            Answer::Nobody => (Vec::new(), end),
            Answer::Messages(mut messages, more) => {
                let reached =
                    messages.last().map(|message| message.sequence).filter(|_| more).unwrap_or(last).min(last);
                messages.retain(|message| message.sequence <= last);
                (messages, reached)
            }
        };
        let messages = self.complete(messages, first, end).await?;
        Ok(Batch { messages, next: Some(end + 1).filter(|next| *next <= last) })
    }

    /// The first of the messages under these ascending sequences, as far as the stream's leader has them, and for how many
    /// of the sequences that is.
    pub async fn some(&self, sequences: &[u64]) -> Result<(Vec<StreamMessage>, usize), Error> {
        let Some(first) = sequences.first().copied() else { return Ok((Vec::new(), 0)) };
        let near = sequences.partition_point(|sequence| *sequence < first + BATCH);
        if near >= DENSE {
            let last = sequences.get(near - 1).copied().unwrap_or(first);
            let Batch { mut messages, next } = self.batch(first..=last).await?;
            messages.retain(|message| sequences.binary_search(&message.sequence).is_ok());
            return Ok((messages, next.map_or(near, |next| sequences.partition_point(|sequence| *sequence < next))));
        }
        let few: Vec<u64> = sequences.iter().copied().take(QUESTIONS).collect();
        let looked_for = few.len();
        let messages = futures_util::stream::iter(few).map(|sequence| self.one(sequence)).buffered(QUESTIONS);
        let messages: Vec<Option<StreamMessage>> = messages.try_collect().await?;
        Ok((messages.into_iter().flatten().collect(), looked_for))
    }

    /// The message under a sequence, as the stream's leader has it.
    pub async fn one(&self, sequence: u64) -> Result<Option<StreamMessage>, Error> {
        let message = self.following(sequence).await?;
        Ok(message.filter(|message| message.sequence == sequence))
    }

    /// The first message from a sequence on, as the stream's leader has it.
    pub(super) async fn following(&self, sequence: u64) -> Result<Option<StreamMessage>, Error> {
        following(&self.context, &self.name, ">", sequence).await
    }

    /// The sequence from which on messages were stored at `time` or later, between two sequences or right behind them.
    pub async fn since(&self, first: u64, last: u64, time: DateTime<Utc>) -> Result<u64, Error> {
        let (mut low, mut high) = (first, last + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.following(middle).await? {
                Some(message) if message.sequence < high && message.time.unix_timestamp() < time.timestamp() => {
                    low = message.sequence + 1;
                }
                _ => high = middle,
            }
        }
        Ok(low)
    }

    async fn direct(&self, first: u64, count: u64) -> Result<Answer, Error> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::with_source(ErrorKind::Broker, format!("cannot read stream {}", self.name), error)
        };
        let client = &self.connection.client;
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| failed(error.into()))?;
        let subject = format!("DIRECT.GET.{}", self.name);
        // The subject lets it begin behind a message that was deleted.
        let question = json!({ "seq": first, "batch": count, "max_bytes": BATCH_BYTES, "next_by_subj": ">" });
        api::send(&self.context, &subject, &inbox, question.to_string().into())
            .await
            .map_err(|error| failed(error.into()))?;
        let mut messages = Vec::new();
        loop {
            let Ok(answer) = tokio::time::timeout(self.patience, answers.next()).await else {
                let problem =
                    format!("no answer on $JS.API.{subject}, for which the NATS user needs the right to publish");
                return Err(Error::new(ErrorKind::Broker, problem + &self.complaint()));
            };
            let answer = answer.ok_or_else(|| Error::new(ErrorKind::Broker, "the NATS client was closed"))?;
            match answer.status {
                None => messages.push(StreamMessage::try_from(answer).map_err(|error| failed(error.into()))?),
                Some(StatusCode::NO_RESPONDERS) => return Ok(Answer::Nobody),
                Some(StatusCode::NOT_FOUND) => return Ok(Answer::Messages(messages, false)),
                Some(status) if status.as_u16() == 204 => {
                    let pending = answer.headers.as_ref().and_then(|headers| headers.get("Nats-Num-Pending"));
                    return Ok(Answer::Messages(messages, pending.is_some_and(|pending| pending.as_str() != "0")));
                }
                Some(status) => {
                    let description = answer.description.map(|text| text.to_string()).unwrap_or_default();
                    return Err(Error::new(
                        ErrorKind::Broker,
                        format!("$JS.API.{subject} answers {status} {description}"),
                    ));
                }
            }
        }
    }

    /// What the server has complained of lately, for the end of a sentence.
    pub(super) fn complaint(&self) -> String {
        self.connection.complaint().map(|text| format!(": {text}")).unwrap_or_default()
    }

    /// Asks the leader for what a part of the stream lacks.
    pub(super) async fn complete(
        &self,
        messages: Vec<StreamMessage>,
        first: u64,
        last: u64,
    ) -> Result<Vec<StreamMessage>, Error> {
        let gaps = gaps(messages.iter().map(|message| message.sequence), first, last);
        if gaps.is_empty() {
            return Ok(messages);
        }
        let found: Vec<Vec<StreamMessage>> = futures_util::stream::iter(gaps)
            .map(|gap| self.within(gap))
            .buffer_unordered(QUESTIONS)
            .try_collect()
            .await?;
        let mut messages = messages;
        messages.extend(found.into_iter().flatten());
        messages.sort_unstable_by_key(|message| message.sequence);
        Ok(messages)
    }

    /// What the leader has in a range, most often nothing.
    async fn within(&self, gap: RangeInclusive<u64>) -> Result<Vec<StreamMessage>, Error> {
        let (mut next, last) = gap.into_inner();
        let mut found = Vec::new();
        while next <= last {
            match self.following(next).await? {
                Some(message) if message.sequence <= last => {
                    next = message.sequence + 1;
                    found.push(message);
                }
                _ => break,
            }
        }
        Ok(found)
    }
}

/// The ranges between `first` and `last` that ascending sequences leave out.
fn gaps(sequences: impl Iterator<Item = u64>, first: u64, last: u64) -> Vec<RangeInclusive<u64>> {
    let mut gaps = Vec::new();
    let mut expected = first;
    for sequence in sequences {
        if sequence > expected {
            gaps.push(expected..=sequence - 1);
        }
        expected = sequence + 1;
    }
    if expected <= last {
        gaps.push(expected..=last);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_is_left_out() {
        let gaps = |sequences: &[u64], first, last| gaps(sequences.iter().copied(), first, last);
        assert_eq!(gaps(&[1, 2, 3], 1, 3), []);
        assert_eq!(gaps(&[2, 3, 6], 1, 9), [1..=1, 4..=5, 7..=9]);
        assert_eq!(gaps(&[], 4, 4), [4..=4]);
        assert_eq!(gaps(&[], 5, 4), []);
    }
}
