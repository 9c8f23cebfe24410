//! What `aftercommit doctor` wants to know of server, stream and consumers.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, Info};
use futures_util::{StreamExt, TryStreamExt};

use super::topology::{self, Problem};
use super::{Connection, context, stream::StreamReader};
use crate::config::Naming;
use crate::error::{Error, ErrorKind};
use crate::subject;

/// The server.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) version: String,
    /// Why it cannot be used at all.
    pub(crate) problem: Option<String>,
}

/// The stream and its consumers.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    pub(crate) problems: Vec<Problem>,
    pub(crate) replicas: usize,
    /// Whether it takes atomic batches.
    pub(crate) batches: bool,
    /// None when it keeps messages for ever.
    pub(crate) max_age: Option<Duration>,
    /// The durable ones: others belong to people who look.
    pub(crate) consumers: Vec<Consumer>,
    /// The event types that it holds.
    pub(crate) types: usize,
    /// Those of them that no durable consumer gets.
    pub(crate) unread: Vec<String>,
}

/// A subscriber's consumer.
#[derive(Debug, Clone)]
pub(crate) struct Consumer {
    pub(crate) name: String,
    pub(crate) max_deliver: i64,
    /// The ack policy when it is not `explicit`.
    pub(crate) odd_ack_policy: Option<String>,
    pub(crate) paused: bool,
    /// The subjects that it gets; none when it gets all.
    pub(crate) filters: Vec<String>,
}

impl Consumer {
    fn gets(&self, subject: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| subject::matches(filter, subject))
    }
}

/// The server at the other end.
pub(crate) fn server(connection: &Connection) -> Server {
    Server { version: connection.client.server_info().version, problem: topology::server_problem(connection) }
}

/// The stream, judged as the relay judges it at its start.
pub(crate) async fn stream(connection: &Connection, naming: &Naming, shared: bool) -> Result<Stream, Error> {
    let config = StreamReader::new(connection, &naming.stream).info().await?.config;
    let consumers = consumers(connection, &naming.stream).await?;
    let subjects = subjects(connection, &naming.stream).await?;
    let types: Vec<(&String, &str)> =
        subjects.iter().filter_map(|subject| Some((subject, naming.prefix.event_type(subject)?))).collect();
    let unread = types.iter().filter(|(subject, _)| !consumers.iter().any(|consumer| consumer.gets(subject)));
    Ok(Stream {
        types: types.len(),
        unread: unread.map(|(_, event_type)| event_type.to_string()).collect(),
        problems: topology::problems(&config, naming, shared),
        replicas: config.num_replicas,
        batches: config.allow_atomic_publish,
        max_age: Some(config.max_age).filter(|age| !age.is_zero()),
        consumers,
    })
}

/// The subjects of all messages in the stream, sorted.
async fn subjects(connection: &Connection, name: &str) -> Result<BTreeSet<String>, Error> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot list the subjects of stream {name}"), error)
    };
    let stream = context(&connection.client).get_stream_no_info(name).await.map_err(|error| failed(error.into()))?;
    let listed = stream.info_with_subjects(">").await.map_err(|error| failed(error.into()))?;
    listed.map(|subject| subject.map(|(subject, _)| subject)).try_collect().await.map_err(|error| failed(error.into()))
}

async fn consumers(connection: &Connection, name: &str) -> Result<Vec<Consumer>, Error> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot list the consumers of stream {name}"), error)
    };
    let stream = context(&connection.client).get_stream_no_info(name).await.map_err(|error| failed(error.into()))?;
    let mut listed = stream.consumers();
    let mut found = Vec::new();
    while let Some(info) = listed.next().await {
        let info = info.map_err(|error| failed(error.into()))?;
        if info.config.durable_name.is_some() {
            found.push(consumer(&info));
        }
    }
    Ok(found)
}

fn consumer(info: &Info) -> Consumer {
    let policy = &info.config.ack_policy;
    let single = Some(&info.config.filter_subject).filter(|subject| !subject.is_empty());
    let filters = info.config.filter_subjects.iter().chain(single);
    Consumer {
        name: info.name.clone(),
        max_deliver: info.config.max_deliver,
        odd_ack_policy: (*policy != AckPolicy::Explicit).then(|| format!("{policy:?}").to_lowercase()),
        paused: info.paused,
        filters: filters.cloned().collect(),
    }
}
