//! What `aftercommit doctor` wants to know of server, stream and consumers.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::stream::{Config, State};
use futures_util::{StreamExt, TryStreamExt};

use super::api::{self, Described};
use super::consumer::{self, ConsumerSpec, DESCRIPTION, Oddities};
use super::settings::Findings;
use super::topology;
use super::{Connection, stream::StreamReader};
use crate::config::Naming;
use crate::error::{Error, ErrorKind};
use crate::owner::Owner;
use aftercommit_outbox::subject;

/// The server.
#[derive(Debug, Clone)]
pub struct Server {
    /// The version of nats-server, such as `2.12.8`.
    pub version: String,
    /// Why it cannot be used at all.
    pub problem: Option<String>,
    /// How many bytes a message may have.
    pub max_payload: usize,
}

/// The stream and its consumers.
#[derive(Debug, Clone)]
pub struct Stream {
    /// What is wrong with its settings, or cannot be judged.
    pub findings: Findings,
    /// That its newest event lies under another subject than that on which it was published.
    pub misplaced: Option<String>,
    /// The outbox that it is stamped with; none when it has no stamp.
    pub owner: Option<Owner>,
    /// How many servers keep the stream.
    pub replicas: usize,
    /// Whether it takes atomic batches.
    pub batches: bool,
    /// None when it keeps messages for ever.
    pub max_age: Option<Duration>,
    /// How full it is: each limit that it has, what is there, and how much there may be.
    pub room: Vec<(&'static str, u64, u64)>,
    /// Those that stay: others belong to people who look.
    pub consumers: Vec<Consumer>,
    /// The event types that it holds.
    pub types: usize,
    /// Those of them that no such consumer gets.
    pub unread: Vec<String>,
}

/// A subscriber's consumer.
#[derive(Debug, Clone)]
pub struct Consumer {
    /// Its durable name: the subscriber's.
    pub name: String,
    /// What of its settings is not as subscribers need it.
    pub oddities: Oddities,
    /// Whether the server has paused it, so that it delivers nothing.
    pub paused: bool,
    /// Whether it was made for a subscriber, as its description says.
    pub ours: bool,
    /// The subjects that it gets; none when it gets all.
    pub filters: Vec<String>,
    /// How long the server waits for a sign of life of a delivered message.
    pub ack_wait: Duration,
    /// Whose inbox it feeds; none when it does not say.
    pub owner: Option<Owner>,
}

impl Consumer {
    fn gets(&self, subject: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| subject::matches(filter, subject))
    }
}

/// The server at the other end.
pub fn server(connection: &Connection) -> Server {
    let info = connection.client.server_info();
    Server { version: info.version, problem: topology::server_problem(connection), max_payload: info.max_payload }
}

/// The stream, judged as the relay judges it at its start; consumers by what their subscribers need, where that is known.
pub async fn stream(
    connection: &Connection,
    naming: &Naming,
    shared: bool,
    wanted: &[ConsumerSpec],
) -> Result<Stream, Error> {
    let reader = StreamReader::new(connection, &naming.stream);
    let described = reader.described().await?;
    let newest = match described.info.state.last_sequence {
        0 => None,
        last => reader.message(last).await?,
    };
    let config = &described.info.config;
    let consumers = consumers(connection, &naming.stream, wanted).await?;
    let subjects = subjects(connection, &naming.stream).await?;
    let types: Vec<(&String, &str)> =
        subjects.iter().filter_map(|subject| Some((subject, naming.prefix.event_type(subject)?))).collect();
    let unread = types.iter().filter(|(subject, _)| !consumers.iter().any(|consumer| consumer.gets(subject)));
    Ok(Stream {
        types: types.len(),
        unread: unread.map(|(_, event_type)| event_type.to_string()).collect(),
        findings: topology::findings(&described.config, naming, shared),
        misplaced: newest.and_then(|message| message.misplaced(naming)),
        owner: topology::owner(&described.config),
        replicas: config.num_replicas,
        batches: config.allow_atomic_publish,
        max_age: Some(config.max_age).filter(|age| !age.is_zero()),
        room: room(config, &described.info.state),
        consumers,
    })
}

/// The subjects of all messages in a stream, and its consumers that stay.
pub async fn flow(connection: &Connection, stream: &str) -> Result<(BTreeSet<String>, Vec<Consumer>), Error> {
    Ok((subjects(connection, stream).await?, consumers(connection, stream, &[]).await?))
}

/// The subjects of all messages in the stream, sorted.
async fn subjects(connection: &Connection, name: &str) -> Result<BTreeSet<String>, Error> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot list the subjects of stream {name}"), error)
    };
    let stream = connection.jetstream().get_stream_no_info(name).await.map_err(|error| failed(error.into()))?;
    let listed = stream.info_with_subjects(">").await.map_err(|error| failed(error.into()))?;
    listed.map(|subject| subject.map(|(subject, _)| subject)).try_collect().await.map_err(|error| failed(error.into()))
}

async fn consumers(connection: &Connection, name: &str, wanted: &[ConsumerSpec]) -> Result<Vec<Consumer>, Error> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot list the consumers of stream {name}"), error)
    };
    let stream = connection.jetstream().get_stream_no_info(name).await.map_err(|error| failed(error.into()))?;
    let mut listed = stream.consumers();
    let mut found = Vec::new();
    let context = connection.jetstream();
    while let Some(info) = listed.next().await {
        let info = info.map_err(|error| failed(error.into()))?;
        // The list is of what the client knows. With its leader's answer comes what the server says.
        if stays(&info)
            && let Some(described) = api::consumer(&context, name, &info.name).await.map_err(failed)?
        {
            found.push(consumer(&described, wanted.iter().find(|spec| spec.name == info.name)));
        }
    }
    Ok(found)
}

/// Whether a consumer is made to stay. The one of `nats stream view` is durable and goes when nobody has used it for an hour.
fn stays(info: &Info) -> bool {
    info.config.durable_name.is_some() && (is_ours(info) || info.config.inactive_threshold.is_zero())
}

/// Whether it was made for a subscriber.
fn is_ours(info: &Info) -> bool {
    info.config.description.as_deref().is_some_and(|text| text.starts_with(DESCRIPTION))
}

/// Each limit of a stream beside what there is.
fn room(config: &Config, state: &State) -> Vec<(&'static str, u64, u64)> {
    let limit =
        |name, used, limit| u64::try_from(limit).ok().filter(|limit| *limit > 0).map(|limit| (name, used, limit));
    let limits =
        [limit("max_bytes", state.bytes, config.max_bytes), limit("max_msgs", state.messages, config.max_messages)];
    limits.into_iter().flatten().collect()
}

fn consumer(described: &Described<Info>, wanted: Option<&ConsumerSpec>) -> Consumer {
    let info = &described.info;
    let single = Some(&info.config.filter_subject).filter(|subject| !subject.is_empty());
    let filters = info.config.filter_subjects.iter().chain(single);
    Consumer {
        name: info.name.clone(),
        oddities: match wanted {
            Some(spec) => Oddities::of(&described.config, spec),
            None => Oddities::by_itself(described),
        },
        paused: info.paused,
        ours: is_ours(info),
        filters: filters.cloned().collect(),
        ack_wait: info.config.ack_wait,
        owner: consumer::owner(info),
    }
}
