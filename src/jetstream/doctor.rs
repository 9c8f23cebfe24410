//! What `aftercommit doctor` wants to know of server, stream and consumers.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, Info};
use futures_util::StreamExt;

use super::topology::{self, Problem};
use super::{Connection, context, stream::StreamReader};
use crate::config::Naming;
use crate::error::{Error, ErrorKind};

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
    /// None when it keeps messages for ever.
    pub(crate) max_age: Option<Duration>,
    /// The durable ones: others belong to people who look.
    pub(crate) consumers: Vec<Consumer>,
}

/// A subscriber's consumer.
#[derive(Debug, Clone)]
pub(crate) struct Consumer {
    pub(crate) name: String,
    pub(crate) max_deliver: i64,
    /// The ack policy when it is not `explicit`.
    pub(crate) odd_ack_policy: Option<String>,
    pub(crate) paused: bool,
}

/// The server at the other end.
pub(crate) fn server(connection: &Connection) -> Server {
    Server { version: connection.client.server_info().version, problem: topology::server_problem(connection) }
}

/// The stream, judged as the relay judges it at its start.
pub(crate) async fn stream(connection: &Connection, naming: &Naming, shared: bool) -> Result<Stream, Error> {
    let config = StreamReader::new(connection, &naming.stream).info().await?.config;
    Ok(Stream {
        problems: topology::problems(&config, naming, shared),
        replicas: config.num_replicas,
        max_age: Some(config.max_age).filter(|age| !age.is_zero()),
        consumers: consumers(connection, &naming.stream).await?,
    })
}

async fn consumers(connection: &Connection, name: &str) -> Result<Vec<Consumer>, Error> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot list the consumers of stream {name}"), error)
    };
    let stream = context(&connection.client).get_stream(name).await.map_err(|error| failed(error.into()))?;
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
    Consumer {
        name: info.name.clone(),
        max_deliver: info.config.max_deliver,
        odd_ack_policy: (*policy != AckPolicy::Explicit).then(|| format!("{policy:?}").to_lowercase()),
        paused: info.paused,
    }
}
