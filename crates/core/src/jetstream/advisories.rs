//! A stream that keeps what JetStream announces of the consumers of another one. The server itself keeps nothing of it.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use super::Connection;
use super::api;
use crate::error::{Error, ErrorKind};

/// How long announcements are kept in a stream that is made here.
const MAX_AGE: Duration = Duration::from_hours(30 * 24);

/// The name of the stream for announcements about `stream`.
fn name(stream: &str) -> String {
    format!("{stream}_ADVISORIES")
}

/// What is kept: events that were given up, and those that the server stops delivering by itself. The subjects are those of
/// nats-server 2.11 (`consumer.go`, `JSAdvisoryConsumerMsgTerminatedPre` and `JSAdvisoryConsumerMaxDeliveryExceedPre`).
fn subjects(stream: &str) -> Vec<String> {
    ["MSG_TERMINATED", "MAX_DELIVERIES"].map(|kind| format!("$JS.EVENT.ADVISORY.CONSUMER.{kind}.{stream}.*")).to_vec()
}

/// Creates the stream, or corrects its subjects. Returns what was changed, in words; nothing when all was right.
pub async fn provision(connection: &Connection, stream: &str) -> Result<Vec<String>, Error> {
    let (context, name, wanted) = (connection.jetstream(), name(stream), subjects(stream));
    let failed = |doing: &str, error: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Broker, format!("cannot {doing} stream {name}"), error)
    };
    let existing = api::stream(&context, &name).await.map_err(|error| failed("read", error))?;
    let Some(existing) = existing else {
        let watched = api::stream(&context, stream).await.map_err(|error| failed("read", error))?;
        let config = Config {
            name: name.clone(),
            description: Some(format!("What JetStream announced of the consumers of stream {stream}")),
            subjects: wanted.clone(),
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::Old,
            max_age: MAX_AGE,
            num_replicas: watched.map_or(1, |watched| watched.info.config.num_replicas),
            allow_direct: true,
            ..Config::default()
        };
        context.create_stream(config).await.map_err(|error| failed("create", error.into()))?;
        return Ok(vec![format!("stream {name}: created, subjects {}", wanted.join(", "))]);
    };
    let config = existing.info.config;
    let has: BTreeSet<&String> = config.subjects.iter().collect();
    if wanted.iter().all(|subject| has.contains(subject)) {
        return Ok(Vec::new());
    }
    let all: BTreeSet<String> = config.subjects.iter().chain(&wanted).cloned().collect();
    let config = Config { subjects: all.into_iter().collect(), ..config };
    let changed = format!("stream {name}: subjects {}", config.subjects.join(", "));
    context.update_stream(config).await.map_err(|error| failed("change", error.into()))?;
    Ok(vec![changed])
}
