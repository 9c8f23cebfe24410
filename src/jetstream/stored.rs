//! Messages read straight from the stream, past any consumer.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind, Stream};
use futures_util::future::try_join_all;

use crate::envelope::{Envelope, EnvelopeError};
use crate::error::{Error, ErrorKind};

/// Requests that are under way at the same time.
const PIPELINE: u64 = 16;
/// Sequences that one of them walks through.
const STRIDE: u64 = 16;
/// How many sequences [`load`] covers at a time.
pub(crate) const SPAN: u64 = PIPELINE * STRIDE;

/// Reads the messages on `subjects` whose sequence is in `range`, in order. `range` should not be longer than [`SPAN`].
/// What the stream no longer holds is left out.
pub(crate) async fn load(
    context: &Context,
    stream: &str,
    subjects: &[String],
    range: RangeInclusive<u64>,
) -> Result<BTreeMap<u64, StreamMessage>, Error> {
    let stream = handle(context, stream).await?;
    let (first, last) = range.into_inner();
    let walks = (first..=last).step_by(STRIDE as usize).flat_map(|start| {
        let end = last.min(start + STRIDE - 1);
        subjects.iter().map(move |subject| (start, end, subject))
    });
    let found = try_join_all(walks.map(|(start, end, subject)| walk(&stream, subject, start, end))).await?;
    Ok(found.into_iter().flatten().map(|message| (message.sequence, message)).collect())
}

/// Follows one subject from message to message.
async fn walk(stream: &Stream<()>, subject: &str, start: u64, end: u64) -> Result<Vec<StreamMessage>, Error> {
    let mut found = Vec::new();
    let mut next = start;
    while next <= end {
        let request = stream.raw_message_builder().sequence(next).next_by_subject(subject);
        match request.send().await {
            Ok(message) if message.sequence <= end => {
                next = message.sequence + 1;
                found.push(message);
            }
            Ok(_) => break,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => break,
            Err(error) => return Err(unreadable(error)),
        }
    }
    Ok(found)
}

async fn handle(context: &Context, stream: &str) -> Result<Stream<()>, Error> {
    context
        .get_stream_no_info(stream)
        .await
        .map_err(|error| Error::with_source(ErrorKind::Config, format!("{stream:?} is not a stream name"), error))
}

/// Reads single events of one stream.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    context: Context,
    stream: String,
}

impl Source {
    pub(crate) fn new(context: &Context, stream: &str) -> Self {
        Self { context: context.clone(), stream: stream.to_string() }
    }

    pub(crate) fn stream(&self) -> &str {
        &self.stream
    }

    /// Reads the event at `sequence`; none when the stream no longer holds it.
    pub(crate) async fn read(&self, sequence: u64) -> Result<Option<Envelope>, Error> {
        let stream = handle(&self.context, &self.stream).await?;
        match stream.raw_message_builder().sequence(sequence).send().await {
            Ok(message) => Ok(event(&message).ok()),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(unreadable(error)),
        }
    }
}

fn unreadable(error: RawMessageError) -> Error {
    Error::with_source(ErrorKind::Broker, "a message of the stream cannot be read", error)
}

/// The event in a message of the stream.
pub(crate) fn event(message: &StreamMessage) -> Result<Envelope, EnvelopeError> {
    super::envelope(Some(&message.headers), message.payload.clone())
}
