//! What is in the stream: its last sequence and single messages, always as its leader says.

use std::ops::RangeInclusive;

use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::{Context, stream};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use uuid::Uuid;

use super::api::Described;
use super::consumer::DESCRIPTION;
use super::witness::{self, Witness};
use super::{Connection, api, stored};
use crate::config::Naming;
use crate::digest::Digest;
use crate::envelope::REPAIR;
use crate::error::{Error, ErrorKind};

/// A stream that is looked at, never administered.
#[derive(Clone)]
pub struct StreamReader {
    context: Context,
    name: String,
}

/// Filters of a consumer that are looked at for its oldest message.
const FILTERS: usize = 8;
/// Messages that are read at the same time.
const READS: usize = 32;

/// What there is of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In whole microseconds.
    pub created: DateTime<Utc>,
    /// The sequence of the first message, one above `last` when there is none.
    pub first: u64,
    /// The sequence of the last message, also when it was deleted; 0 when there never was one.
    pub last: u64,
    /// Whether several servers keep it.
    pub replicated: bool,
    /// Whether it takes atomic batches.
    pub batches: bool,
}

impl Extent {
    /// Takes it from what the server says of the stream.
    pub fn of(info: &stream::Info) -> Self {
        let micros = i64::try_from(info.created.unix_timestamp_nanos() / 1000).ok();
        let created = micros.and_then(DateTime::from_timestamp_micros).unwrap_or_default();
        let last = info.state.last_sequence;
        let first = if info.state.messages == 0 { last + 1 } else { info.state.first_sequence };
        let replicated = info.config.num_replicas > 1;
        Self { created, first, last, replicated, batches: info.config.allow_atomic_publish }
    }
}

/// Who a stored message says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its sequence in the stream.
    pub sequence: u64,
    /// The subject under which it lies.
    pub subject: String,
    /// None for a message that is no event.
    pub identity: Option<Identity>,
    /// Whether it was published out of the outbox's order.
    pub repair: bool,
}

/// Which event a message says it is, and what it is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type, such as `order.placed`.
    pub event_type: String,
    /// The source: names the outbox that it comes from.
    pub source: String,
    /// The id of its row in the outbox.
    pub outbox_id: i64,
    /// The digest of what the event is made of, computed from the message.
    pub digest: Digest,
}

impl Stored {
    /// Where this event of the outbox lies and should not: nats-server has put it under another subject than that on which
    /// it was published. None when it lies right, or is not of this outbox.
    pub fn misplaced(&self, naming: &Naming) -> Option<String> {
        let Identity { event_id, event_type, .. } = self.identity.as_ref().filter(|one| one.source == naming.source)?;
        let right = naming.prefix.subject(event_type);
        (right != self.subject).then(|| {
            format!(
                "message {}, event {event_id}, was published on {right} and lies under {}",
                self.sequence, self.subject
            )
        })
    }
}

/// The way out of [`Stored::misplaced`].
pub const UNMAP: &str = "subscribers miss such events: take the `mappings` of these subjects out of nats-server's \
     configuration, or out of the account, then run `aftercommit reconcile --comparison outbox --full --repair`";

/// Where a consumer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerPosition {
    /// Name of the consumer. A subscriber's is the subscriber's name.
    pub name: String,
    /// Messages not delivered yet.
    pub pending: u64,
    /// Delivered and not acknowledged.
    pub in_flight: u64,
    /// Those of them that were delivered more than once.
    pub redelivered: u64,
    /// Whether it outlives its readers; a subscriber's does.
    pub durable: bool,
    /// The subjects that are delivered; none for all.
    pub subjects: Vec<String>,
    /// The last stream sequence that was delivered.
    pub delivered: u64,
    /// Everything up to this stream sequence is acknowledged.
    pub ack_floor: u64,
    /// Whether the server delivers nothing for now.
    pub paused: bool,
    /// Whether it was made for a subscriber, as its description says.
    pub ours: bool,
}

impl ConsumerPosition {
    fn new(info: Info) -> Self {
        let config = info.config;
        let single = Some(config.filter_subject).filter(|subject| !subject.is_empty());
        Self {
            name: info.name,
            pending: info.num_pending,
            in_flight: info.num_ack_pending as u64,
            redelivered: info.num_redelivered as u64,
            durable: config.durable_name.is_some(),
            subjects: config.filter_subjects.into_iter().chain(single).collect(),
            delivered: info.delivered.stream_sequence,
            ack_floor: info.ack_floor.stream_sequence,
            paused: info.paused,
            ours: config.description.is_some_and(|text| text.starts_with(DESCRIPTION)),
        }
    }
}

/// When the server stored a message.
fn time_of(message: &StreamMessage) -> Option<DateTime<Utc>> {
    let nanos = i64::try_from(message.time.unix_timestamp_nanos()).ok()?;
    Some(DateTime::from_timestamp_nanos(nanos))
}

impl StreamReader {
    /// Reads the stream of this name.
    pub fn new(connection: &Connection, name: &str) -> Self {
        Self { context: connection.jetstream(), name: name.into() }
    }

    /// The stream's configuration and state.
    pub async fn info(&self) -> Result<stream::Info, Error> {
        Ok(self.described().await?.info)
    }

    /// The same, with all that the server says of the configuration.
    pub async fn described(&self) -> Result<Described<stream::Info>, Error> {
        let failed = |error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {}", self.name), error);
        api::stream(&self.context, &self.name).await.map_err(failed)?.ok_or_else(|| {
            let problem = format!("there is no stream {}: create it with `aftercommit provision`", self.name);
            Error::new(ErrorKind::NotReady, problem)
        })
    }

    /// Where the stream begins and ends.
    pub async fn extent(&self) -> Result<Extent, Error> {
        Ok(Extent::of(&self.info().await?))
    }

    /// The messages in a range of sequences, in order. What was deleted is left out.
    pub async fn messages(&self, range: RangeInclusive<u64>) -> Result<Vec<Stored>, Error> {
        let reads = futures_util::stream::iter(range).map(|sequence| self.message(sequence)).buffered(READS);
        reads.try_filter_map(async |message| Ok(message)).try_collect().await
    }

    /// Name of the stream.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The newest message.
    pub(super) async fn newest(&self) -> Result<Option<Witness>, Error> {
        let failed = |error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {}", self.name), error);
        Ok(api::newest(&self.context, &self.name).await.map_err(failed)?.as_ref().map(Witness::of))
    }

    /// The message under a sequence; none when it was deleted or never existed.
    pub(super) async fn at(&self, sequence: u64) -> Result<Option<Witness>, Error> {
        witness::at(&self.context, &self.name, sequence).await
    }

    /// The sequence of the first message from one on.
    pub(super) async fn following(&self, sequence: u64) -> Result<Option<u64>, Error> {
        let next = stored::following(&self.context, &self.name, ">", sequence).await?;
        Ok(next.map(|message| message.sequence))
    }

    /// When the oldest message that a consumer has not acknowledged was stored. Of a consumer with many filters only the
    /// first ones are looked at.
    pub async fn oldest_behind(&self, consumer: &ConsumerPosition) -> Result<Option<DateTime<Utc>>, Error> {
        let all = [">".to_string()];
        let subjects = if consumer.subjects.is_empty() { &all[..] } else { &consumer.subjects };
        let from = consumer.ack_floor + 1;
        let looks =
            subjects.iter().take(FILTERS).map(|subject| stored::following(&self.context, &self.name, subject, from));
        let found = futures_util::future::try_join_all(looks).await?;
        let stored = found.into_iter().flatten().min_by_key(|message| message.sequence);
        Ok(stored.and_then(|message| time_of(&message)))
    }

    /// Where all consumers of the stream stand.
    pub async fn consumers(&self) -> Result<Vec<ConsumerPosition>, Error> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::with_source(ErrorKind::Broker, format!("cannot list the consumers of stream {}", self.name), error)
        };
        let stream = self.context.get_stream_no_info(&self.name).await.map_err(|error| failed(error.into()))?;
        let mut consumers = stream.consumers();
        let mut positions = Vec::new();
        while let Some(info) = consumers.next().await {
            positions.push(ConsumerPosition::new(info.map_err(|error| failed(error.into()))?));
        }
        Ok(positions)
    }

    /// Where one consumer stands; none when there is no such consumer.
    pub async fn consumer(&self, name: &str) -> Result<Option<ConsumerPosition>, Error> {
        let failed = |error| {
            let problem = format!("the consumer {name} of stream {} cannot be looked at", self.name);
            Error::with_source(ErrorKind::Broker, problem, error)
        };
        let info = api::consumer(&self.context, &self.name, name).await.map_err(failed)?;
        Ok(info.map(|described| ConsumerPosition::new(described.info)))
    }

    /// The message under a sequence; none when it was deleted or never existed.
    pub async fn message(&self, sequence: u64) -> Result<Option<Stored>, Error> {
        Ok(self.raw(sequence).await?.map(|message| {
            // Without a position in an outbox it is nobody's event.
            let event = stored::event(&message).ok().filter(|event| event.sequence > 0);
            let identity = event.map(|event| Identity {
                event_id: event.id.as_uuid(),
                outbox_id: event.sequence,
                digest: event.digest(),
                event_type: event.event_type,
                source: event.source,
            });
            let repair = message.headers.get(REPAIR).is_some();
            Stored { sequence, subject: message.subject.to_string(), identity, repair }
        }))
    }

    /// When the first message from a sequence on was stored; none when there is none.
    pub async fn stored_at(&self, sequence: u64) -> Result<Option<DateTime<Utc>>, Error> {
        let next = stored::following(&self.context, &self.name, ">", sequence).await?;
        Ok(next.as_ref().and_then(time_of))
    }

    /// The same as it is.
    pub async fn raw(&self, sequence: u64) -> Result<Option<StreamMessage>, Error> {
        let failed = |error| {
            let problem = format!("cannot read message {sequence} of stream {}", self.name);
            Error::with_source(ErrorKind::Broker, problem, error)
        };
        api::message(&self.context, &self.name, sequence, None).await.map_err(failed)
    }
}
