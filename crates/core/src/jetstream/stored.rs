//! Messages read straight from the stream, past any consumer.

use std::collections::{BTreeMap, HashSet};
use std::time::SystemTime;

use async_nats::jetstream::Context;
pub use async_nats::jetstream::message::StreamMessage;
use chrono::{DateTime, Utc};
use futures_util::future::try_join_all;

use super::{Connection, api};
use crate::envelope::{Envelope, EnvelopeError};
use crate::error::{Error, ErrorKind};
use crate::outbox_query::client::OutboxClient;
use aftercommit_outbox::event::EventId;
use aftercommit_outbox::subject;

/// Requests that are in flight at the same time, per subject.
const PIPELINE: u64 = 64;
/// Sequences that one of them walks through.
const STRIDE: u64 = 8;
/// How many sequences [`load`] covers at a time.
const SPAN: u64 = PIPELINE * STRIDE;

/// Some messages of a stream, in order.
#[derive(Debug)]
pub struct Stretch {
    /// The messages by their sequences.
    pub messages: BTreeMap<u64, StreamMessage>,
    /// Where to go on; none when nothing follows.
    pub next: Option<u64>,
}

/// Up to so many subjects are followed one by one. With more of them the stream is read as it is and sorted out here: most
/// subjects would be asked for again and again in vain.
pub(super) const FEW_SUBJECTS: usize = 2;

/// Reads messages on `subjects` from the sequence `first` on, to `last` at most. What the stream no longer holds is left
/// out.
pub async fn load(
    context: &Context,
    stream: &str,
    subjects: &[String],
    first: u64,
    last: u64,
) -> Result<Stretch, Error> {
    if subjects.len() <= FEW_SUBJECTS {
        return follow(context, stream, subjects, first, last).await;
    }
    let mut stretch = follow(context, stream, &[">".to_string()], first, last).await?;
    let filter = Filter::of(subjects);
    stretch.messages.retain(|_, message| filter.passes(&message.subject));
    Ok(stretch)
}

/// Subjects to pick messages by.
pub(super) struct Filter<'a> {
    plain: HashSet<&'a str>,
    wild: Vec<&'a str>,
}

impl<'a> Filter<'a> {
    pub(super) fn of(subjects: &'a [String]) -> Self {
        let (wild, plain): (Vec<_>, Vec<_>) =
            subjects.iter().map(String::as_str).partition(|subject| subject.contains(['*', '>']));
        Self { plain: plain.into_iter().collect(), wild }
    }

    pub(super) fn passes(&self, subject: &str) -> bool {
        self.plain.contains(subject) || self.wild.iter().any(|filter| subject::matches(filter, subject))
    }
}

/// [`load`], with a look for each subject.
async fn follow(context: &Context, stream: &str, subjects: &[String], first: u64, last: u64) -> Result<Stretch, Error> {
    // One look per subject skips what is empty.
    let heads = try_join_all(subjects.iter().map(|subject| following(context, stream, subject, first))).await?;
    let heads: Vec<(&String, StreamMessage)> = subjects
        .iter()
        .zip(heads)
        .filter_map(|(subject, head)| Some((subject, head.filter(|head| head.sequence <= last)?)))
        .collect();
    let Some(start) = heads.iter().map(|(_, head)| head.sequence).min() else {
        return Ok(Stretch { messages: BTreeMap::new(), next: None });
    };
    let end = last.min(start + SPAN - 1);
    let heads = heads.into_iter().filter(|(_, head)| head.sequence <= end);
    let (subjects, heads): (Vec<&String>, Vec<StreamMessage>) = heads.unzip();
    let walks = subjects.iter().zip(&heads).flat_map(|(subject, head)| {
        let starts = (head.sequence + 1..=end).step_by(STRIDE as usize);
        starts.map(|start| walk(context, stream, subject, start, end.min(start + STRIDE - 1)))
    });
    let found = try_join_all(walks).await?;
    let messages = heads.into_iter().chain(found.into_iter().flatten());
    let messages = messages.map(|message| (message.sequence, message)).collect();
    Ok(Stretch { messages, next: Some(end + 1).filter(|next| *next <= last) })
}

/// Follows one subject from message to message.
async fn walk(
    context: &Context,
    stream: &str,
    subject: &str,
    start: u64,
    end: u64,
) -> Result<Vec<StreamMessage>, Error> {
    let mut found = Vec::new();
    let mut next = start;
    while next <= end {
        match following(context, stream, subject, next).await? {
            Some(message) if message.sequence <= end => {
                next = message.sequence + 1;
                found.push(message);
            }
            _ => break,
        }
    }
    Ok(found)
}

/// The first message on a subject from a sequence on.
pub(super) async fn following(
    context: &Context,
    stream: &str,
    subject: &str,
    sequence: u64,
) -> Result<Option<StreamMessage>, Error> {
    api::message(context, stream, sequence, Some(subject)).await.map_err(unreadable)
}

/// Reads single events of one stream.
#[derive(Debug, Clone)]
pub struct Source {
    /// None where events do not come from a stream.
    connection: Option<Connection>,
    stream: String,
}

impl Source {
    /// Reads the stream of this name.
    pub fn new(connection: &Connection, stream: &str) -> Self {
        Self { connection: Some(connection.clone()), stream: stream.to_string() }
    }

    /// Where events are handed on without a stream, under the name of what they come from.
    #[cfg(feature = "testing")]
    pub fn none(name: &str) -> Self {
        Self { connection: None, stream: name.to_string() }
    }

    /// Name of the stream, or of what events come from without one.
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// The sequence and the time of the first message that the stream holds, on whatever subject; none when it is empty.
    pub async fn oldest(&self) -> Result<Option<(i64, DateTime<Utc>)>, Error> {
        let Some(context) = self.context() else { return Ok(None) };
        let first = following(&context, &self.stream, ">", 1).await?;
        Ok(first.map(|message| {
            (i64::try_from(message.sequence).unwrap_or(i64::MAX), SystemTime::from(message.time).into())
        }))
    }

    /// Reads the event at `sequence`.
    pub async fn read(&self, sequence: u64) -> Result<Read, Error> {
        let Some(context) = self.context() else { return Ok(Read::Removed) };
        if let Some(event) = self.event_at(&context, sequence).await? {
            return Ok(Read::Event(event));
        }
        let info = api::stream(&context, &self.stream).await.map_err(unreadable)?;
        if info.is_none_or(|info| info.info.state.last_sequence < sequence) {
            return Ok(Read::Ended);
        }
        // What was lost may have been filled in between the two answers.
        Ok(self.event_at(&context, sequence).await?.map_or(Read::Removed, Read::Event))
    }

    /// The event as the outbox has it, which the leading relay is asked for; none when it is not there any more.
    pub async fn ask_outbox(&self, id: EventId) -> Result<Option<Envelope>, Error> {
        let Some(connection) = &self.connection else { return Ok(None) };
        let outbox = OutboxClient::new(connection, &self.stream).asking_once();
        Ok(outbox.events(&[id.as_uuid()]).await?.pop())
    }

    fn context(&self) -> Option<Context> {
        self.connection.as_ref().map(Connection::jetstream)
    }

    async fn event_at(&self, context: &Context, sequence: u64) -> Result<Option<Box<Envelope>>, Error> {
        let message = api::message(context, &self.stream, sequence, None).await.map_err(unreadable)?;
        Ok(message.and_then(|message| event(&message).ok()).map(Box::new))
    }
}

/// What there is at a sequence.
pub enum Read {
    /// This event.
    Event(Box<Envelope>),
    /// Nothing any more.
    Removed,
    /// Nothing: the stream ends before it.
    Ended,
}

fn unreadable(error: api::Failure) -> Error {
    Error::with_source(ErrorKind::Broker, "a message of the stream cannot be read", error)
}

/// The event in a message of the stream.
pub fn event(message: &StreamMessage) -> Result<Envelope, EnvelopeError> {
    super::envelope(Some(&message.headers), message.payload.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_picked_by_plain_subjects_and_by_wildcards() {
        let subjects = ["events.a", "events.b.c", "other.>", "*.d"].map(String::from);
        let filter = Filter::of(&subjects);
        for passes in ["events.a", "events.b.c", "other.a", "other.a.b", "events.d"] {
            assert!(filter.passes(passes), "{passes}");
        }
        for held in ["events", "events.b", "events.a.a", "other", "a.b.d"] {
            assert!(!filter.passes(held), "{held}");
        }
    }
}
