//! What is in the stream: its last sequence and single messages, always as its leader says.

use std::ops::RangeInclusive;

use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::{self, Context, stream};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use uuid::Uuid;

use super::{Connection, api};
use crate::envelope::{CE_ID, CE_SEQUENCE, CE_SOURCE, REPAIR};
use crate::error::{Error, ErrorKind};

/// A stream that is looked at, never administered.
#[derive(Clone)]
pub(crate) struct StreamReader {
    context: Context,
    name: String,
}

/// Messages that are read at the same time.
const READS: usize = 32;

/// What there is of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// In whole microseconds.
    pub(crate) created: DateTime<Utc>,
    /// The sequence of the first message, one above `last` when there is none.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Whether several servers keep it.
    pub(crate) replicated: bool,
    /// Whether it takes atomic batches.
    pub(crate) batches: bool,
}

/// Who a stored message says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) sequence: u64,
    pub(crate) subject: String,
    /// The event's id, its source and its outbox id; none for a message that is no event.
    pub(crate) identity: Option<(Uuid, String, i64)>,
    /// Whether it was published out of the outbox's order.
    pub(crate) repair: bool,
}

/// Where a consumer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConsumerPosition {
    pub(crate) name: String,
    /// Messages not delivered yet.
    pub(crate) pending: u64,
    /// Delivered and not acknowledged.
    pub(crate) in_flight: u64,
    /// Those of them that were delivered more than once.
    pub(crate) redelivered: u64,
    /// Whether it outlives its readers; a subscriber's does.
    pub(crate) durable: bool,
    /// The subjects that are delivered; none for all.
    pub(crate) subjects: Vec<String>,
    /// The last stream sequence that was delivered.
    pub(crate) delivered: u64,
    /// Everything up to this stream sequence is acknowledged.
    pub(crate) ack_floor: u64,
    /// Whether the server delivers nothing for now.
    pub(crate) paused: bool,
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
        }
    }
}

impl StreamReader {
    pub(crate) fn new(connection: &Connection, name: &str) -> Self {
        Self { context: jetstream::new(connection.client.clone()), name: name.into() }
    }

    /// The stream's configuration and state.
    pub(crate) async fn info(&self) -> Result<stream::Info, Error> {
        let failed = |error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {}", self.name), error);
        api::stream(&self.context, &self.name).await.map_err(failed)?.ok_or_else(|| {
            let problem = format!("there is no stream {}: create it with `aftercommit provision`", self.name);
            Error::new(ErrorKind::NotReady, problem)
        })
    }

    /// Where the stream begins and ends.
    pub(crate) async fn extent(&self) -> Result<Extent, Error> {
        let info = self.info().await?;
        let micros = i64::try_from(info.created.unix_timestamp_nanos() / 1000).ok();
        let created = micros.and_then(DateTime::from_timestamp_micros).unwrap_or_default();
        let last = info.state.last_sequence;
        let first = if info.state.messages == 0 { last + 1 } else { info.state.first_sequence };
        let replicated = info.config.num_replicas > 1;
        Ok(Extent { created, first, last, replicated, batches: info.config.allow_atomic_publish })
    }

    /// The messages in a range of sequences, in order. What was deleted is left out.
    pub(crate) async fn messages(&self, range: RangeInclusive<u64>) -> Result<Vec<Stored>, Error> {
        let reads = futures_util::stream::iter(range).map(|sequence| self.message(sequence)).buffered(READS);
        reads.try_filter_map(async |message| Ok(message)).try_collect().await
    }

    /// Where all consumers of the stream stand.
    pub(crate) async fn consumers(&self) -> Result<Vec<ConsumerPosition>, Error> {
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
    pub(crate) async fn consumer(&self, name: &str) -> Result<Option<ConsumerPosition>, Error> {
        let failed = |error| {
            let problem = format!("the consumer {name} of stream {} cannot be looked at", self.name);
            Error::with_source(ErrorKind::Broker, problem, error)
        };
        let info = api::consumer(&self.context, &self.name, name).await.map_err(failed)?;
        Ok(info.map(ConsumerPosition::new))
    }

    /// The message under a sequence; none when it was deleted or never existed.
    pub(crate) async fn message(&self, sequence: u64) -> Result<Option<Stored>, Error> {
        Ok(self.raw(sequence).await?.map(|message| {
            let header = |name: &str| message.headers.get(name).map(|value| value.as_str().to_string());
            let identity = || {
                let id = Uuid::parse_str(&header(CE_ID)?).ok()?;
                Some((id, header(CE_SOURCE)?, header(CE_SEQUENCE)?.parse().ok()?))
            };
            Stored {
                sequence,
                subject: message.subject.to_string(),
                identity: identity(),
                repair: header(REPAIR).is_some(),
            }
        }))
    }

    /// The same as it is.
    pub(crate) async fn raw(&self, sequence: u64) -> Result<Option<StreamMessage>, Error> {
        let failed = |error| {
            let problem = format!("cannot read message {sequence} of stream {}", self.name);
            Error::with_source(ErrorKind::Broker, problem, error)
        };
        api::message(&self.context, &self.name, sequence, None).await.map_err(failed)
    }
}
