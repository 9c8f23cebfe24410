//! The durable pull consumer of a subscriber: provisioning, checking, and where it stands.

mod table;

use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{
    AckPolicy, DeliverPolicy, FromConsumer, Info, PriorityPolicy, ReplayPolicy, pull,
};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};

use super::api::{self, Described};
use crate::error::{Error, ErrorKind};
use crate::owner::{OWNER, Owner};
use aftercommit_outbox::subject;
pub use table::Oddities;
use table::filters;

/// How many delivered messages may be without ack. Events that wait behind a failing one of their key are among
/// them, so this bounds how many can gather before JetStream stops delivering to the subscriber: JetStream's default of
/// 1,000 would let one bad key stop all others within seconds. A pending message costs the server some 30 bytes.
const MAX_ACK_PENDING: i64 = 100_000;

/// What the description of a subscriber's consumer begins with.
pub(super) const DESCRIPTION: &str = "aftercommit subscriber ";

/// What a subscriber needs of its consumer.
#[derive(Debug, Clone)]
pub struct ConsumerSpec {
    /// The stream it reads.
    pub stream: String,
    /// The durable name: the subscriber's.
    pub name: String,
    /// The subjects that are delivered.
    pub subjects: Vec<String>,
    /// How long the server waits for a sign of life of a delivered message.
    pub ack_wait: Duration,
    /// The sequence of the first message that is delivered; none for the oldest.
    pub start: Option<u64>,
}

/// Where a consumer stands.
#[derive(Debug, Clone)]
pub struct Position {
    /// Tells a consumer from its successor of the same name, see [`is_successor`].
    pub created: String,
    /// Everything up to this stream sequence is acked.
    pub ack_floor: u64,
    /// The last stream sequence that was delivered.
    pub delivered: u64,
    /// The number of deliveries, redeliveries included.
    pub deliveries: u64,
    /// Whether delivered messages wait for their ack.
    pub outstanding: bool,
    /// The consumer's own ack wait.
    pub ack_wait: Duration,
    /// Whose inbox it feeds; none when it was provisioned where that was not known.
    pub owner: Option<Owner>,
}

/// Who provisions a consumer, or a stream. Two databases on one consumer would each lack what the other gets, and two services under one
/// name would each have the other's events filtered away.
#[derive(Debug, Clone, Default)]
pub struct Claim {
    /// The subscriber's database, or the outbox's; none when it is not known.
    pub owner: Option<Owner>,
    /// Whether it is taken over as it is: from another database, and a consumer with subjects that are not wanted.
    pub adopt: bool,
}

impl Claim {
    /// Why the consumer is to stay as it is.
    fn obstacle(&self, spec: &ConsumerSpec, described: &Described<Info>) -> Option<String> {
        if self.adopt {
            return None;
        }
        if let (Some(ours), Some(theirs)) = (&self.owner, owner(&described.info))
            && *ours != theirs
        {
            return Some(foreign(&theirs, ours));
        }
        let wanted = |held: &str| spec.subjects.iter().any(|wanted| wanted == held || subject::matches(wanted, held));
        let dropped: Vec<&str> = filters(&described.config).into_iter().filter(|held| !wanted(held)).collect();
        (!dropped.is_empty()).then(|| {
            format!(
                "delivers {}, which this subscriber does not want: another service may have a subscriber of that name. Give \
                 this one another name; or, if it shall have these events no more, provision it with --adopt (`Worker::adopt`)",
                dropped.join(", ")
            )
        })
    }
}

/// What is said of a consumer of another database.
fn foreign(theirs: &Owner, ours: &Owner) -> String {
    format!(
        "feeds the inbox of {theirs}, and this is {ours}: each would lack what the other gets. Give this subscriber another \
         name; or, if its database was restored or moved here and no worker serves the other one any more, provision it with \
         --adopt (`Worker::adopt`)"
    )
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
        (config.max_batch, config.max_bytes, config.max_expires) = (0, 0, Duration::ZERO);
        config.inactive_threshold = Duration::ZERO;
        config.num_replicas = 0;
        (config.priority_policy, config.priority_groups) = (PriorityPolicy::None, Vec::new());
        config.priority_timeout = Duration::ZERO;
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
pub async fn provision(context: &Context, spec: &ConsumerSpec, claim: &Claim) -> Result<Vec<String>, Error> {
    let (mut config, changes) = match info(context, spec).await? {
        None => (
            pull::Config {
                deliver_policy: match spec.start {
                    Some(start_sequence) => DeliverPolicy::ByStartSequence { start_sequence },
                    None => DeliverPolicy::All,
                },
                ack_policy: AckPolicy::Explicit,
                replay_policy: ReplayPolicy::Instant,
                description: Some(format!("{DESCRIPTION}{}", spec.name)),
                ..pull::Config::default()
            },
            vec![format!("created the {}", spec.named())],
        ),
        Some(described) => {
            let found = Oddities::of(&described.config, spec);
            if let Some(obstacle) = found.unfit.first() {
                return Err(not_ready(
                    spec,
                    &format!(
                        "{obstacle}, which cannot be changed: delete it (`nats consumer rm {} {}`) and provision again; the \
                     inbox keeps events that are done from taking effect again",
                        spec.stream, spec.name
                    ),
                ));
            }
            if let Some(obstacle) = claim.obstacle(spec, &described) {
                return Err(not_ready(spec, &obstacle));
            }
            let mut changes = found.differences;
            let held = owner(&described.info);
            if let Some(ours) = claim.owner.as_ref().filter(|ours| held.as_ref() != Some(ours)) {
                let before = held.map_or_else(|| "not known".into(), |held| held.to_string());
                changes.push(format!("whose it is: {before} -> {ours}"));
            }
            if changes.is_empty() {
                return Ok(changes);
            }
            let config = pull::Config::try_from_consumer_config(described.info.config)
                .map_err(|error| not_ready(spec, &format!("cannot be used: {error}")))?;
            (config, changes.into_iter().map(|change| format!("corrected the {}: {change}", spec.named())).collect())
        }
    };
    spec.apply(&mut config);
    if let Some(owner) = &claim.owner {
        config.metadata.insert(OWNER.into(), owner.stamp());
    }
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

/// Looks whether the consumer is there, is that of the subscriber's database, and delivers what the subscriber needs; `remedy`
/// is the way out.
pub async fn check(context: &Context, spec: &ConsumerSpec, ours: &Owner, remedy: &str) -> Result<Position, Error> {
    let Some(described) = info(context, spec).await? else {
        return Err(not_ready(spec, &format!("does not exist: {remedy}")));
    };
    is_of(spec, owner(&described.info).as_ref(), ours)?;
    let Oddities { unfit, differences, unknown } = Oddities::of(&described.config, spec);
    let found = unfit.into_iter().next().or_else(|| {
        // A shorter or longer wait only changes when the server repeats itself, and this worker adapts to it. How many
        // servers keep the consumer matters only when one is lost.
        differences.into_iter().find(|change| !change.starts_with("ack_wait:") && !change.starts_with("num_replicas:"))
    });
    for setting in unknown {
        tracing::warn!(
            subscriber = spec.name,
            setting,
            "the consumer has a setting that this version does not know; what it does to events cannot be told"
        );
    }
    match found {
        Some(found) => Err(not_ready(spec, &format!("is not as this subscriber needs it ({found}): {remedy}"))),
        None => Ok(position(&described.info)),
    }
}

/// Makes sure that a consumer is not that of another database.
pub fn is_of(spec: &ConsumerSpec, theirs: Option<&Owner>, ours: &Owner) -> Result<(), Error> {
    match theirs.filter(|theirs| *theirs != ours) {
        Some(theirs) => Err(not_ready(spec, &foreign(theirs, ours))),
        None => Ok(()),
    }
}

/// A consumer as those see it who do not read it.
#[derive(Debug)]
pub struct Survey {
    /// How far it has come, and its ack wait.
    pub position: Position,
    /// What is wrong with it and can only be changed by making a new one.
    pub unfit: Option<String>,
    /// What differs from the settings that a subscriber needs and can be corrected.
    pub differences: Vec<String>,
    /// The subjects that are delivered.
    pub subjects: Vec<String>,
    /// Messages not delivered yet.
    pub pending: u64,
    /// Messages delivered and not acked.
    pub in_flight: usize,
    /// Requests for messages that wait.
    pub requests: usize,
    /// Whether the server has paused it, so that it delivers nothing.
    pub paused: bool,
    /// When a message was delivered last.
    pub delivered_at: Option<DateTime<Utc>>,
}

/// Looks at the consumer; none when it does not exist.
pub async fn survey(context: &Context, spec: &ConsumerSpec) -> Result<Option<Survey>, Error> {
    let Some(described) = info(context, spec).await? else { return Ok(None) };
    let info = &described.info;
    let found = Oddities::of(&described.config, spec);
    let single = Some(&info.config.filter_subject).filter(|subject| !subject.is_empty());
    Ok(Some(Survey {
        position: position(info),
        unfit: found.unfit.into_iter().next(),
        differences: found.differences,
        subjects: info.config.filter_subjects.iter().chain(single).cloned().collect(),
        pending: info.num_pending,
        in_flight: info.num_ack_pending,
        requests: info.num_waiting,
        paused: info.paused,
        delivered_at: info.delivered.last_active.map(|time| SystemTime::from(time).into()),
    }))
}

/// Deletes the consumer. Nothing is lost with it that the inbox does not know.
pub async fn delete(context: &Context, spec: &ConsumerSpec) -> Result<(), Error> {
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
pub async fn locate(context: &Context, spec: &ConsumerSpec) -> Result<Option<Position>, Error> {
    Ok(info(context, spec).await?.map(|described| position(&described.info)))
}

/// What waits at a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Messages that were not delivered yet.
    pub pending: u64,
    /// Messages that were delivered and not acked.
    pub in_flight: u64,
    /// Whether so many are not acked that no more are delivered.
    pub full: bool,
    /// Whether somebody has paused it in JetStream.
    pub paused: bool,
}

/// What waits at the consumer; none when it does not exist.
pub async fn load(context: &Context, spec: &ConsumerSpec) -> Result<Option<Load>, Error> {
    let load = |Described { info, .. }: Described<Info>| Load {
        pending: info.num_pending,
        in_flight: info.num_ack_pending as u64,
        full: i64::try_from(info.num_ack_pending).is_ok_and(|waiting| waiting >= MAX_ACK_PENDING),
        paused: info.paused,
    };
    Ok(info(context, spec).await?.map(load))
}

async fn info(context: &Context, spec: &ConsumerSpec) -> Result<Option<Described<Info>>, Error> {
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
        owner: owner(info),
    }
}

/// Whose it is, as far as it says that.
pub(super) fn owner(info: &Info) -> Option<Owner> {
    info.config.metadata.get(OWNER)?.parse().ok()
}

/// Whether a consumer that was created `now` is another one than that which was created `before`. At its first restart
/// nats-server 2.11 moves the time of the same consumer by some microseconds.
pub fn is_successor(now: &str, before: &str) -> bool {
    let time = |text: &str| NaiveDateTime::parse_from_str(text.rsplit_once(' ')?.0, "%Y-%m-%d %H:%M:%S%.f").ok();
    match (time(now), time(before)) {
        (Some(now), Some(before)) => (now - before).abs() >= TimeDelta::milliseconds(100),
        _ => now != before,
    }
}

fn not_ready(spec: &ConsumerSpec, problem: &str) -> Error {
    Error::new(ErrorKind::NotReady, format!("the {} {problem}", spec.named()))
}

fn broker(spec: &ConsumerSpec, problem: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::with_source(ErrorKind::Broker, format!("the {} {problem}", spec.named()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_younger_by_a_tenth_of_a_second_is_another_one() {
        // As nats-server 2.11.11 told it before and after a restart.
        let before = "2026-11-29 23:33:33.102004015 +00:00:00";
        assert!(!is_successor("2026-11-29 23:33:33.102154697 +00:00:00", before));
        assert!(!is_successor(before, before));
        assert!(is_successor("2026-11-29 23:33:33.202004015 +00:00:00", before));
        assert!(is_successor("2026-11-29 23:33:33.102004015 +00:00:00", "something else"));
        assert!(!is_successor("2026-11-30 0:00:00.0 +00:00:00", "2026-11-29 23:59:59.999 +00:00:00"));
    }
}
