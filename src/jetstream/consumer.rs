//! The durable pull consumer of a subscriber: provisioning, checking, and where it stands.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, FromConsumer, Info, ReplayPolicy, pull};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use chrono::{DateTime, Utc};

use super::api;
use crate::error::{Error, ErrorKind};

/// How many delivered messages may be without ack. Events that wait behind a failing one of their key are among
/// them, so this bounds how many can gather before JetStream stops delivering to the subscriber: JetStream's default of
/// 1,000 would let one bad key stop all others within seconds. A pending message costs the server some 30 bytes.
const MAX_ACK_PENDING: i64 = 100_000;

/// What a subscriber needs of its consumer.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerSpec {
    /// The stream it reads.
    pub(crate) stream: String,
    /// The durable name: the subscriber's.
    pub(crate) name: String,
    /// The subjects that are delivered.
    pub(crate) subjects: Vec<String>,
    /// How long the server waits for a sign of life of a delivered message.
    pub(crate) ack_wait: Duration,
}

/// Where a consumer stands.
#[derive(Debug, Clone)]
pub(crate) struct Position {
    /// Tells a consumer from its successor of the same name.
    pub(crate) created: String,
    /// Everything up to this stream sequence is acked.
    pub(crate) ack_floor: u64,
    /// The last stream sequence that was delivered.
    pub(crate) delivered: u64,
    /// The number of deliveries, redeliveries included.
    pub(crate) deliveries: u64,
    /// Whether delivered messages wait for their ack.
    pub(crate) outstanding: bool,
    /// The consumer's own ack wait.
    pub(crate) ack_wait: Duration,
}

impl ConsumerSpec {
    fn apply(&self, config: &mut pull::Config) {
        config.durable_name = Some(self.name.clone());
        config.name = Some(self.name.clone());
        config.ack_wait = self.ack_wait;
        config.max_deliver = -1;
        config.max_ack_pending = MAX_ACK_PENDING;
        // A list of waits would replace ack_wait.
        config.backoff = Vec::new();
        config.headers_only = false;
        match self.subjects.as_slice() {
            [subject] => {
                config.filter_subject = subject.clone();
                config.filter_subjects = Vec::new();
            }
            subjects => {
                config.filter_subject = String::new();
                config.filter_subjects = subjects.to_vec();
            }
        }
    }

    fn named(&self) -> String {
        format!("consumer {} of stream {}", self.name, self.stream)
    }
}

/// Creates the consumer or corrects it, and returns what was changed, in words.
pub(crate) async fn provision(context: &Context, spec: &ConsumerSpec) -> Result<Vec<String>, Error> {
    let (mut config, changes) = match info(context, spec).await? {
        None => (
            pull::Config {
                deliver_policy: DeliverPolicy::All,
                ack_policy: AckPolicy::Explicit,
                replay_policy: ReplayPolicy::Instant,
                description: Some(format!("aftercommit subscriber {}", spec.name)),
                ..pull::Config::default()
            },
            vec![format!("created the {}", spec.named())],
        ),
        Some(info) => {
            if let Some(obstacle) = fixed_difference(&info) {
                return Err(not_ready(
                    spec,
                    &format!(
                        "{obstacle}, which cannot be changed: delete it (`nats consumer rm {} {}`) and provision again; the \
                     inbox keeps events that are done from taking effect again",
                        spec.stream, spec.name
                    ),
                ));
            }
            let changes = differences(spec, &info);
            if changes.is_empty() {
                return Ok(changes);
            }
            let config = pull::Config::try_from_consumer_config(info.config)
                .map_err(|error| not_ready(spec, &format!("cannot be used: {error}")))?;
            (config, changes.into_iter().map(|change| format!("corrected the {}: {change}", spec.named())).collect())
        }
    };
    spec.apply(&mut config);
    context.create_consumer_on_stream(config, &spec.stream).await.map_err(|error| {
        let hint = match error.kind() {
            ConsumerErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                " (the stream does not exist: provision it first)"
            }
            _ => "",
        };
        broker(spec, &format!("cannot be created or corrected{hint}"), error)
    })?;
    Ok(changes)
}

/// Looks whether the consumer is there and delivers what the subscriber needs; `remedy` is the way out.
pub(crate) async fn check(context: &Context, spec: &ConsumerSpec, remedy: &str) -> Result<Position, Error> {
    let Some(info) = info(context, spec).await? else {
        return Err(not_ready(spec, &format!("does not exist: {remedy}")));
    };
    // A shorter or longer wait only changes when the server repeats itself, and this worker adapts to it.
    let found = fixed_difference(&info)
        .or_else(|| differences(spec, &info).into_iter().find(|change| !change.starts_with("ack_wait")));
    match found {
        Some(found) => Err(not_ready(spec, &format!("is not as this subscriber needs it ({found}): {remedy}"))),
        None => Ok(position(&info)),
    }
}

/// A consumer as those see it who do not read it.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) position: Position,
    /// What is wrong with it and can only be changed by making a new one.
    pub(crate) unfit: Option<String>,
    /// What differs from the settings that a subscriber needs and can be corrected.
    pub(crate) differences: Vec<String>,
    /// The subjects that are delivered.
    pub(crate) subjects: Vec<String>,
    /// Messages not delivered yet.
    pub(crate) pending: u64,
    /// Messages delivered and not acked.
    pub(crate) in_flight: usize,
    /// Requests for messages that wait.
    pub(crate) requests: usize,
    pub(crate) paused: bool,
    /// When a message was delivered last.
    pub(crate) delivered_at: Option<DateTime<Utc>>,
}

/// Looks at the consumer; none when it does not exist.
pub(crate) async fn survey(context: &Context, spec: &ConsumerSpec) -> Result<Option<Survey>, Error> {
    let Some(info) = info(context, spec).await? else { return Ok(None) };
    let single = Some(&info.config.filter_subject).filter(|subject| !subject.is_empty());
    Ok(Some(Survey {
        position: position(&info),
        unfit: fixed_difference(&info),
        differences: differences(spec, &info),
        subjects: info.config.filter_subjects.iter().chain(single).cloned().collect(),
        pending: info.num_pending,
        in_flight: info.num_ack_pending,
        requests: info.num_waiting,
        paused: info.paused,
        delivered_at: info.delivered.last_active.map(|time| SystemTime::from(time).into()),
    }))
}

/// Deletes the consumer. Nothing is lost with it that the inbox does not know.
pub(crate) async fn delete(context: &Context, spec: &ConsumerSpec) -> Result<(), Error> {
    let subject = format!("CONSUMER.DELETE.{}.{}", spec.stream, spec.name);
    let nothing = serde_json::Map::new();
    let response: Response<serde_json::Value> =
        context.request(subject, &nothing).await.map_err(|error| broker(spec, "cannot be deleted", error))?;
    match response {
        Response::Err { error } if error.error_code() != ErrorCode::CONSUMER_NOT_FOUND => {
            Err(broker(spec, "cannot be deleted", error))
        }
        _ => Ok(()),
    }
}

/// Where the consumer stands; none when it does not exist.
pub(crate) async fn locate(context: &Context, spec: &ConsumerSpec) -> Result<Option<Position>, Error> {
    Ok(info(context, spec).await?.as_ref().map(position))
}

/// What waits at a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Messages that were not delivered yet.
    pub(crate) pending: u64,
    /// Messages that were delivered and not acked.
    pub(crate) in_flight: u64,
    /// Whether so many are not acked that no more are delivered.
    pub(crate) full: bool,
    /// Whether somebody has paused it in JetStream.
    pub(crate) paused: bool,
}

/// What waits at the consumer; none when it does not exist.
pub(crate) async fn load(context: &Context, spec: &ConsumerSpec) -> Result<Option<Load>, Error> {
    let load = |info: Info| Load {
        pending: info.num_pending,
        in_flight: info.num_ack_pending as u64,
        full: i64::try_from(info.num_ack_pending).is_ok_and(|waiting| waiting >= MAX_ACK_PENDING),
        paused: info.paused,
    };
    Ok(info(context, spec).await?.map(load))
}

async fn info(context: &Context, spec: &ConsumerSpec) -> Result<Option<Info>, Error> {
    api::consumer(context, &spec.stream, &spec.name).await.map_err(|error| broker(spec, "cannot be looked at", error))
}

fn position(info: &Info) -> Position {
    Position {
        created: info.created.to_string(),
        ack_floor: info.ack_floor.stream_sequence,
        delivered: info.delivered.stream_sequence,
        deliveries: info.delivered.consumer_sequence,
        outstanding: info.num_ack_pending > 0,
        ack_wait: info.config.ack_wait,
    }
}

/// What is wrong with the consumer and can only be changed by making a new one.
fn fixed_difference(info: &Info) -> Option<String> {
    let config = &info.config;
    if config.deliver_subject.is_some() {
        return Some("pushes its messages".into());
    }
    if config.durable_name.is_none() {
        return Some("is not durable".into());
    }
    if config.ack_policy != AckPolicy::Explicit {
        return Some(format!("has the ack policy {:?}", config.ack_policy));
    }
    if config.deliver_policy != DeliverPolicy::All {
        return Some(format!("has the deliver policy {:?}", config.deliver_policy));
    }
    None
}

/// What differs and can be corrected, as `setting: is -> shall be`.
fn differences(spec: &ConsumerSpec, info: &Info) -> Vec<String> {
    let config = &info.config;
    let mut found = Vec::new();
    let mut differ = |name: &str, is: String, shall: String| {
        if is != shall {
            found.push(format!("{name}: {is} -> {shall}"));
        }
    };
    let single = Some(&config.filter_subject).filter(|subject| !subject.is_empty());
    let is: BTreeSet<&String> = config.filter_subjects.iter().chain(single).collect();
    let shall: BTreeSet<&String> = spec.subjects.iter().collect();
    differ("subjects", format!("{is:?}"), format!("{shall:?}"));
    differ("max_deliver", config.max_deliver.to_string(), "-1".into());
    differ("max_ack_pending", config.max_ack_pending.to_string(), MAX_ACK_PENDING.to_string());
    differ("backoff", format!("{:?}", config.backoff), "[]".into());
    differ("headers_only", config.headers_only.to_string(), "false".into());
    differ("ack_wait", format!("{:?}", config.ack_wait), format!("{:?}", spec.ack_wait));
    found
}

fn not_ready(spec: &ConsumerSpec, problem: &str) -> Error {
    Error::new(ErrorKind::NotReady, format!("the {} {problem}", spec.named()))
}

fn broker(spec: &ConsumerSpec, problem: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::with_source(ErrorKind::Broker, format!("the {} {problem}", spec.named()), error)
}
