//! A subscriber, as those see it who do not run it: reconcilers, and the tools.

use std::time::Duration;

use crate::config::{Naming, NatsConfig};
use crate::error::{Error, ErrorKind};
use crate::jetstream::consumer::ConsumerSpec;
use crate::jetstream::{self, Connection};

/// What pauses all subscribers of a database.
pub const ALL: &str = "subscriber:*";

/// What a subscriber's instances compete for.
pub fn lease_name(subscriber: &str) -> String {
    format!("subscriber:{subscriber}")
}

/// Checks a subscriber's name: it is a JetStream consumer name and a token of subjects.
pub fn check_name(name: &str) -> Result<(), String> {
    if is_name(name) {
        return Ok(());
    }
    Err(format!("{name:?} is not a subscriber name: use 1 to 64 letters, digits, '_' and '-'"))
}

/// Whether a text can be a subscriber's or a queue's name.
pub fn is_name(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(legal)
}

/// A subscriber as its reconcilers see it: what it reads and what it remembers. See
/// `worker::Subscriber::subscription`.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Stream, name and subjects of the consumer.
    pub spec: ConsumerSpec,
    /// The event types that it handles; none for all.
    pub types: Vec<String>,
    /// How long the inbox remembers an event that is done, at least.
    pub inbox_retention: Duration,
    /// What to do when the consumer is missing or wrong.
    pub remedy: String,
}

impl Subscription {
    /// The subscriber's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The subscriber of a consumer as that is, without its definition: its settings cannot be compared then, and its
    /// inbox is taken to remember what `worker::Subscriber::inbox_retention` defaults to.
    ///
    /// # Errors
    /// When NATS cannot be reached, or there is no such consumer.
    pub async fn discover(nats: &NatsConfig, naming: &Naming, name: &str) -> Result<Self, Error> {
        let connection = jetstream::connect(nats, "aftercommit-reconciler", "_INBOX_worker").await?;
        let context = connection.jetstream();
        let (stream, name) = (naming.stream.clone(), name.to_string());
        let mut spec = ConsumerSpec { stream, name, subjects: Vec::new(), ack_wait: Duration::ZERO, start: None };
        let remedy = "name its definition with --config worker.toml";
        let Some(survey) = jetstream::consumer::survey(&context, &spec).await? else {
            let problem = format!("stream {} has no consumer {}: {remedy}", spec.stream, spec.name);
            return Err(Error::new(ErrorKind::NotReady, problem));
        };
        spec.ack_wait = survey.position.ack_wait;
        spec.subjects = if survey.subjects.is_empty() { vec![">".into()] } else { survey.subjects };
        let types = spec.subjects.iter().map(|subject| naming.prefix.event_type(subject));
        let types = types.map(|event_type| event_type.filter(|event_type| *event_type != ">").map(str::to_string));
        Ok(Self {
            types: types.collect::<Option<Vec<_>>>().unwrap_or_default(),
            spec,
            inbox_retention: Duration::from_hours(30 * 24),
            remedy: "run `aftercommit provision --config worker.toml`, or the service with --provision".into(),
        })
    }

    /// Connects to NATS with an inbox that a worker's user may subscribe to.
    pub async fn connect(&self, nats: &NatsConfig) -> Result<Connection, Error> {
        jetstream::connect(nats, "aftercommit-reconciler", "_INBOX_worker").await
    }
}
