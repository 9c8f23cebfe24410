//! The durable pull consumer of a subscriber: provisioning, checking, and where it stands.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{
    AckPolicy, DeliverPolicy, FromConsumer, Info, PriorityPolicy, ReplayPolicy, pull,
};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};

use serde_json::{Value, json};

use super::api::{self, Described};
use super::settings::{self, Fields, Rule, Table, is_set, number, text, texts};
use crate::error::{Error, ErrorKind};
use crate::owner::Owner;
use crate::subject;

/// How many delivered messages may be without ack. Events that wait behind a failing one of their key are among
/// them, so this bounds how many can gather before JetStream stops delivering to the subscriber: JetStream's default of
/// 1,000 would let one bad key stop all others within seconds. A pending message costs the server some 30 bytes.
const MAX_ACK_PENDING: i64 = 100_000;

/// What the description of a subscriber's consumer begins with.
pub(super) const DESCRIPTION: &str = "aftercommit subscriber ";

/// Under what the consumer's metadata says whose it is.
const OWNER: &str = "aftercommit.owner";

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
    /// The sequence of the first message that is delivered; none for the oldest.
    pub(crate) start: Option<u64>,
}

/// Where a consumer stands.
#[derive(Debug, Clone)]
pub(crate) struct Position {
    /// Tells a consumer from its successor of the same name, see [`is_successor`].
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
    /// Whose inbox it feeds; none when it was provisioned where that was not known.
    pub(crate) owner: Option<Owner>,
}

/// Who provisions a consumer. Two databases on one consumer would each lack what the other gets, and two services under one
/// name would each have the other's events filtered away.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claim {
    /// The subscriber's database; none when it is not known.
    pub(crate) owner: Option<Owner>,
    /// Whether the consumer is taken over as it is: from another database, and with subjects that are not wanted.
    pub(crate) adopt: bool,
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
pub(crate) async fn provision(context: &Context, spec: &ConsumerSpec, claim: &Claim) -> Result<Vec<String>, Error> {
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
            if let Some(obstacle) = fixed_difference(spec, &described) {
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
            let mut changes = settings::differences(CONSUMER, &described.config, spec);
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
pub(crate) async fn check(
    context: &Context,
    spec: &ConsumerSpec,
    ours: &Owner,
    remedy: &str,
) -> Result<Position, Error> {
    let Some(described) = info(context, spec).await? else {
        return Err(not_ready(spec, &format!("does not exist: {remedy}")));
    };
    is_of(spec, owner(&described.info).as_ref(), ours)?;
    let found = fixed_difference(spec, &described).or_else(|| {
        let differences = settings::differences(CONSUMER, &described.config, spec);
        // A shorter or longer wait only changes when the server repeats itself, and this worker adapts to it. How many
        // servers keep the consumer matters only when one is lost.
        differences.into_iter().find(|change| !change.starts_with("ack_wait:") && !change.starts_with("num_replicas:"))
    });
    for setting in unknown(spec, &described) {
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
pub(crate) fn is_of(spec: &ConsumerSpec, theirs: Option<&Owner>, ours: &Owner) -> Result<(), Error> {
    match theirs.filter(|theirs| *theirs != ours) {
        Some(theirs) => Err(not_ready(spec, &foreign(theirs, ours))),
        None => Ok(()),
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
    let Some(described) = info(context, spec).await? else { return Ok(None) };
    let info = &described.info;
    let single = Some(&info.config.filter_subject).filter(|subject| !subject.is_empty());
    Ok(Some(Survey {
        position: position(info),
        unfit: fixed_difference(spec, &described),
        differences: settings::differences(CONSUMER, &described.config, spec),
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
    Ok(info(context, spec).await?.map(|described| position(&described.info)))
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
fn owner(info: &Info) -> Option<Owner> {
    info.config.metadata.get(OWNER)?.parse().ok()
}

/// Whether a consumer that was created `now` is another one than that which was created `before`. At its first restart
/// nats-server 2.11 moves the time of the same consumer by some microseconds.
pub(crate) fn is_successor(now: &str, before: &str) -> bool {
    let time = |text: &str| NaiveDateTime::parse_from_str(text.rsplit_once(' ')?.0, "%Y-%m-%d %H:%M:%S%.f").ok();
    match (time(now), time(before)) {
        (Some(now), Some(before)) => (now - before).abs() >= TimeDelta::milliseconds(100),
        _ => now != before,
    }
}

/// All settings of a consumer that nats-server 2.15 knows (`ConsumerConfig`).
#[rustfmt::skip]
static CONSUMER: &Table<ConsumerSpec> = &[
    ("durable_name", Rule::Refused(|value, _, _| (!is_set(value)).then(|| "is not durable".into()), ANEW)),
    ("name", Rule::Harmless("it is the one that was asked for")),
    ("description", Rule::Harmless("only people read it")),
    ("deliver_policy", Rule::Refused(
        |value, spec, fields| {
            let starts = value == "by_start_sequence" && spec.start == Some(number(fields, "opt_start_seq").cast_unsigned());
            (value != "all" && !starts).then(|| format!("has the deliver policy {value}"))
        },
        ANEW,
    )),
    ("opt_start_seq", Rule::Harmless("it belongs to a deliver policy that is refused")),
    ("opt_start_time", Rule::Harmless("it belongs to a deliver policy that is refused")),
    ("ack_policy", Rule::Refused(
        |value, _, _| (value != "explicit").then(|| format!("has the ack policy {value}")), ANEW,
    )),
    ("ack_wait", Rule::Corrected(
        |_, spec, fields| (number(fields, "ack_wait") != nanos(spec.ack_wait)).then(String::new),
        |spec, _| json!(nanos(spec.ack_wait)),
    )),
    // It would give events up that the database still counts attempts of.
    ("max_deliver", Rule::Corrected(|value, _, _| (*value != -1).then(String::new), |_, _| json!(-1))),
    // A list of waits would replace ack_wait.
    ("backoff", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    ("filter_subject", Rule::Harmless("it is judged together with filter_subjects")),
    ("filter_subjects", Rule::Corrected(
        |_, spec, fields| {
            let (is, shall_be) = (filters(fields), wanted(spec));
            (is != shall_be).then(|| format!("subjects: {is:?} -> {shall_be:?}"))
        },
        |spec, _| json!(spec.subjects),
    )),
    ("replay_policy", Rule::Refused(
        |value, _, _| (value == "original").then(|| "delivers as slowly as messages were published".into()), ANEW,
    )),
    ("rate_limit_bps", Rule::Harmless("it is for consumers that push")),
    ("sample_freq", Rule::Harmless("the server tells of acks")),
    ("max_waiting", Rule::Refused(
        |_, _, fields| (1..FEWEST_PULLS).contains(&number(fields, "max_waiting"))
            .then(|| "takes too few requests at a time (max_waiting)".into()),
        ANEW,
    )),
    ("max_ack_pending", Rule::Corrected(|value, _, _| (*value != MAX_ACK_PENDING).then(String::new), |_, _| json!(MAX_ACK_PENDING))),
    ("flow_control", Rule::Harmless("it is for consumers that push")),
    ("headers_only", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    // The server sets it where its own `max_request_batch` is set.
    ("max_batch", Rule::Harmless("no more is requested at a time than it allows")),
    // Requests for more are refused, again and again.
    ("max_expires", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    ("max_bytes", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    ("deliver_subject", Rule::Refused(|value, _, _| is_set(value).then(|| "pushes its messages".into()), ANEW)),
    ("deliver_group", Rule::Harmless("it is for consumers that push")),
    ("idle_heartbeat", Rule::Harmless("it is for consumers that push")),
    // The server removes it when the worker is away for so long.
    ("inactive_threshold", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    // 0: on as many servers as the stream. With fewer it is lost with one of them.
    ("num_replicas", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| json!(0))),
    ("mem_storage", Rule::Refused(
        |value, _, _| is_set(value).then(|| "is kept in memory, and its position is gone when the server stops".into()), ANEW,
    )),
    ("direct", Rule::Harmless("it is for the server itself")),
    ("sourcing", Rule::Harmless("it is for the server itself")),
    ("metadata", Rule::Harmless("only people and tools read it")),
    ("pause_until", Rule::Harmless("a pause is told by itself")),
    // Requests without a group are refused.
    ("priority_groups", Rule::Corrected(|value, _, _| is_set(value).then(String::new), |_, _| Value::Null)),
    ("priority_policy", Rule::Corrected(
        |value, _, _| (is_set(value) && value != "none").then(String::new), |_, _| Value::Null,
    )),
    ("priority_timeout", Rule::Harmless("it belongs to priority groups")),
];

/// The way out of what cannot be corrected is told where the stream and the consumer are known.
const ANEW: &str = "delete it and provision it anew";
/// Requests for messages that a worker may have at the same time.
const FEWEST_PULLS: i64 = 8;

/// What is wrong with the consumer and can only be changed by making a new one.
fn fixed_difference(spec: &ConsumerSpec, described: &Described<Info>) -> Option<String> {
    let problems = settings::judge(CONSUMER, &described.config, spec, PROVISION).problems;
    problems.into_iter().find(|problem| problem.remedy == ANEW).map(|problem| problem.why)
}

const PROVISION: &str = "run `aftercommit provision`";

/// What is odd about a consumer whose subscriber is not known: its subjects, its wait and its start are taken as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Oddities {
    /// What a new consumer would cure.
    pub(crate) unfit: Vec<String>,
    /// What `aftercommit provision` corrects.
    pub(crate) differences: Vec<String>,
    /// Settings that this version does not know.
    pub(crate) unknown: Vec<String>,
}

/// Judges a consumer by its settings alone.
pub(super) fn oddities(described: &Described<Info>) -> Oddities {
    let fields = &described.config;
    let spec = ConsumerSpec {
        stream: described.info.stream_name.clone(),
        name: described.info.name.clone(),
        subjects: filters(fields).into_iter().map(String::from).collect(),
        ack_wait: described.info.config.ack_wait,
        start: is_set(fields.get("opt_start_seq").unwrap_or(&Value::Null))
            .then(|| number(fields, "opt_start_seq").cast_unsigned()),
    };
    let found = settings::judge(CONSUMER, fields, &spec, PROVISION);
    Oddities {
        unfit: found.problems.into_iter().filter(|problem| problem.remedy == ANEW).map(|problem| problem.why).collect(),
        differences: settings::differences(CONSUMER, fields, &spec),
        unknown: found.unknown,
    }
}

/// Settings that this version does not know.
fn unknown(spec: &ConsumerSpec, described: &Described<Info>) -> Vec<String> {
    settings::judge(CONSUMER, &described.config, spec, PROVISION).unknown
}

/// The subjects that are delivered.
fn filters(fields: &Fields) -> BTreeSet<&str> {
    let single = Some(text(fields, "filter_subject")).filter(|subject| !subject.is_empty());
    fields.get("filter_subjects").map(texts).unwrap_or_default().into_iter().chain(single).collect()
}

/// The subjects that are to be delivered.
fn wanted(spec: &ConsumerSpec) -> BTreeSet<&str> {
    spec.subjects.iter().map(String::as_str).collect()
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
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
    fn a_consumer_is_another_one_when_it_is_younger_by_a_tenth_of_a_second() {
        // As nats-server 2.11.11 told it before and after a restart.
        let before = "2026-11-29 23:33:33.102004015 +00:00:00";
        assert!(!is_successor("2026-11-29 23:33:33.102154697 +00:00:00", before));
        assert!(!is_successor(before, before));
        assert!(is_successor("2026-11-29 23:33:33.202004015 +00:00:00", before));
        assert!(is_successor("2026-11-29 23:33:33.102004015 +00:00:00", "something else"));
        assert!(!is_successor("2026-11-30 0:00:00.0 +00:00:00", "2026-11-29 23:59:59.999 +00:00:00"));
    }

    fn spec(subjects: &[&str]) -> ConsumerSpec {
        let subjects = subjects.iter().map(ToString::to_string).collect();
        ConsumerSpec {
            stream: "EVENTS".into(),
            name: "c".into(),
            subjects,
            ack_wait: Duration::from_secs(30),
            start: None,
        }
    }

    /// What nats-server 2.15.1 says of a consumer that was just provisioned.
    fn good() -> Fields {
        let config = json!({
            "durable_name": "c", "name": "c", "deliver_policy": "all", "ack_policy": "explicit", "max_deliver": -1,
            "ack_wait": 30_000_000_000_i64, "replay_policy": "instant", "max_waiting": 512, "num_replicas": 0,
            "max_ack_pending": MAX_ACK_PENDING, "filter_subject": "events.a", "metadata": { "_nats.ver": "2.15.1" },
        });
        config.as_object().unwrap().clone()
    }

    fn with(settings: Value) -> Fields {
        let mut config = good();
        config.extend(settings.as_object().unwrap().clone());
        config
    }

    #[test]
    fn a_new_consumer_is_as_it_should_be() {
        let findings = settings::judge(CONSUMER, &good(), &spec(&["events.a"]), PROVISION);
        assert_eq!(findings, settings::Findings::default());
    }

    #[test]
    fn every_setting_that_loses_or_stalls_is_named() {
        for (setting, config) in [
            ("durable_name", json!({ "durable_name": null })),
            ("deliver_policy", json!({ "deliver_policy": "new" })),
            ("ack_policy", json!({ "ack_policy": "none" })),
            ("ack_wait", json!({ "ack_wait": 1 })),
            ("max_deliver", json!({ "max_deliver": 3 })),
            ("backoff", json!({ "backoff": [1_000_000_000] })),
            ("replay_policy", json!({ "replay_policy": "original" })),
            ("max_waiting", json!({ "max_waiting": 1 })),
            ("max_ack_pending", json!({ "max_ack_pending": 1 })),
            ("max_ack_pending", json!({ "max_ack_pending": null })),
            ("headers_only", json!({ "headers_only": true })),
            ("max_expires", json!({ "max_expires": 1_000_000_000 })),
            ("max_bytes", json!({ "max_bytes": 10 })),
            ("deliver_subject", json!({ "deliver_subject": "push" })),
            ("inactive_threshold", json!({ "inactive_threshold": 1_000_000_000 })),
            ("num_replicas", json!({ "num_replicas": 1 })),
            ("mem_storage", json!({ "mem_storage": true })),
            ("priority_groups", json!({ "priority_groups": ["a"] })),
            ("priority_policy", json!({ "priority_policy": "pinned_client" })),
        ] {
            let findings = settings::judge(CONSUMER, &with(config.clone()), &spec(&["events.a"]), PROVISION);
            let found: Vec<_> = findings.problems.iter().map(|problem| problem.setting).collect();
            assert_eq!(found, [setting], "{config}");
        }
        let config = with(json!({ "skip_every_second": true }));
        assert_eq!(settings::judge(CONSUMER, &config, &spec(&["events.a"]), PROVISION).unknown, ["skip_every_second"]);
    }

    #[test]
    fn a_start_counts_only_where_it_is_on_record() {
        let config = with(json!({ "deliver_policy": "by_start_sequence", "opt_start_seq": 7 }));
        let problems = |start| {
            let spec = ConsumerSpec { start, ..spec(&["events.a"]) };
            settings::judge(CONSUMER, &config, &spec, PROVISION).problems.len()
        };
        assert_eq!((problems(Some(7)), problems(Some(8)), problems(None)), (0, 1, 1));
    }

    #[test]
    fn filters_are_compared_however_they_are_written() {
        let differences = |config: &Fields, subjects: &[&str]| settings::differences(CONSUMER, config, &spec(subjects));
        let list = with(json!({ "filter_subject": null, "filter_subjects": ["events.b", "events.a"] }));
        assert_eq!(differences(&list, &["events.a", "events.b"]), [""; 0]);
        let single = with(json!({ "filter_subject": null, "filter_subjects": ["events.a"] }));
        assert_eq!(differences(&single, &["events.a"]), [""; 0]);
        let found = differences(&good(), &["events.a", "events.b"]);
        assert_eq!(found, [r#"subjects: {"events.a"} -> {"events.a", "events.b"}"#]);
        assert_eq!(
            differences(&with(json!({ "ack_wait": 5_000_000_000_i64 })), &["events.a"]),
            ["ack_wait: 5s -> 30s"]
        );
    }
}
