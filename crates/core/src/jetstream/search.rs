//! Finding one event in a stream, and reading what waits for a consumer, without taking anything.

use std::ops::RangeInclusive;

use async_nats::jetstream::message::StreamMessage;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::Connection;
use super::stored::{self, event};
use super::stream::StreamReader;
use crate::envelope::{Envelope, NATS_MSG_ID, REPAIR};
use crate::error::Error;
use aftercommit_outbox::subject::SubjectPrefix;

/// A range that is gone through message by message; a longer one is halved first.
const WALK: u64 = 4096;

/// A message of the stream.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its sequence in the stream.
    pub sequence: u64,
    /// When the server stored it.
    pub stored_at: DateTime<Utc>,
    /// Its header `Nats-Msg-Id`; none when it has none.
    pub message_id: Option<String>,
    /// Whether it was published out of the outbox's order.
    pub repair: bool,
    /// None for a message that is no event.
    pub event: Option<Envelope>,
}

/// What is known of an event that is looked for.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The event's id.
    pub id: Uuid,
    /// The event's type; none when nobody knows it, which makes the search slower.
    pub event_type: Option<&'a str>,
    /// Its position in the outbox of this source.
    pub outbox: Option<(i64, &'a str)>,
    /// When it was written; with some allowance for clocks, it was not stored before.
    pub not_before: Option<DateTime<Utc>>,
    /// Where it may be.
    pub range: RangeInclusive<u64>,
}

/// Looks at one stream.
pub struct Searcher<'a> {
    reader: StreamReader,
    connection: &'a Connection,
    stream: &'a str,
    prefix: &'a SubjectPrefix,
}

impl<'a> Searcher<'a> {
    /// Looks at `stream`, whose events are published on subjects with this prefix.
    pub fn new(connection: &'a Connection, stream: &'a str, prefix: &'a SubjectPrefix) -> Self {
        Self { reader: StreamReader::new(connection, stream), connection, stream, prefix }
    }

    /// Reads single messages of the same stream.
    pub fn reader(&self) -> &StreamReader {
        &self.reader
    }

    /// The message at `sequence`, when it is this event.
    pub async fn at(&self, sequence: u64, id: Uuid) -> Result<Option<Found>, Error> {
        let found = self.reader.raw(sequence).await?.map(found);
        Ok(found.filter(|found| is(found, id)))
    }

    /// The first message of the event in a range; and the range that was gone through in the end, none when there was
    /// nothing to go through.
    pub async fn search(&self, wanted: &Wanted<'_>) -> Result<(Option<Found>, Option<RangeInclusive<u64>>), Error> {
        let (mut first, mut last) = wanted.range.clone().into_inner();
        if let Some(not_before) = wanted.not_before
            && last.saturating_sub(first) >= WALK
        {
            first = self.halve(first, last, |message| message.stored_at < not_before).await?;
        }
        if last.saturating_sub(first) >= WALK
            && let Some((outbox_id, source)) = wanted.outbox
        {
            // In a window, and nearly so beyond, the stream has the outbox's order.
            let before = |message: &Found| {
                let event = message.event.as_ref().filter(|event| event.source == source && !message.repair);
                event.is_some_and(|event| event.sequence < outbox_id)
            };
            let near = self.halve(first, last, before).await?;
            first = first.max(near.saturating_sub(WALK / 2));
        }
        last = last.min(first.saturating_add(WALK));
        if first > last {
            return Ok((None, None));
        }
        let subjects = [wanted.event_type.map_or_else(|| self.prefix.wildcard(), |name| self.prefix.subject(name))];
        let context = self.connection.jetstream();
        let mut next = Some(first);
        while let Some(from) = next {
            let stretch = stored::load(&context, self.stream, &subjects, from, last).await?;
            let hit = stretch.messages.into_values().map(found).find(|message| is(message, wanted.id));
            if hit.is_some() {
                return Ok((hit, Some(first..=last)));
            }
            next = stretch.next;
        }
        Ok((None, Some(first..=last)))
    }

    /// The first sequence that is not `before`, when all that are lie before all that are not.
    async fn halve(&self, mut first: u64, mut last: u64, before: impl Fn(&Found) -> bool) -> Result<u64, Error> {
        let context = self.connection.jetstream();
        while first < last {
            let middle = first + (last - first) / 2;
            match stored::following(&context, self.stream, &self.prefix.wildcard(), middle).await?.map(found) {
                Some(message) if message.sequence <= last && before(&message) => first = message.sequence + 1,
                _ => last = middle,
            }
        }
        Ok(first)
    }
}

fn is(message: &Found, id: Uuid) -> bool {
    message.event.as_ref().is_some_and(|event| event.id.as_uuid() == id)
}

/// A message as it is shown.
pub fn found(message: StreamMessage) -> Found {
    let nanos = i64::try_from(message.time.unix_timestamp_nanos()).unwrap_or_default();
    Found {
        sequence: message.sequence,
        stored_at: DateTime::from_timestamp_nanos(nanos),
        message_id: message.headers.get(NATS_MSG_ID).map(|id| id.as_str().to_string()),
        repair: message.headers.get(REPAIR).is_some(),
        event: event(&message).ok(),
    }
}
