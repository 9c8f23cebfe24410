//! What each setting of a consumer means for its subscriber, and what of one is not as it should be.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use serde_json::{Value, json};

use super::{ConsumerSpec, MAX_ACK_PENDING};
use crate::jetstream::api::Described;
use crate::jetstream::settings::{self, Fields, Rule, Table, is_set, number, text, texts};

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

const PROVISION: &str = "run `aftercommit provision`";

/// What of a consumer is not as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Oddities {
    /// What a new consumer would cure.
    pub unfit: Vec<String>,
    /// What `aftercommit provision` corrects.
    pub differences: Vec<String>,
    /// Settings that this version does not know.
    pub unknown: Vec<String>,
}

impl Oddities {
    /// Of the consumer of a subscriber that needs this.
    pub(in crate::jetstream) fn of(config: &Fields, spec: &ConsumerSpec) -> Self {
        let found = settings::judge(CONSUMER, config, spec, PROVISION);
        let unfit = found.problems.into_iter().filter(|problem| problem.remedy == ANEW);
        Self {
            unfit: unfit.map(|problem| problem.why).collect(),
            differences: settings::differences(CONSUMER, config, spec),
            unknown: found.unknown,
        }
    }

    /// Of one whose subscriber is not known: its subjects, its wait and its start are taken as they are.
    pub(in crate::jetstream) fn by_itself(described: &Described<Info>) -> Self {
        let (info, config) = (&described.info, &described.config);
        let starts = config.get("opt_start_seq").is_some_and(is_set);
        let spec = ConsumerSpec {
            stream: info.stream_name.clone(),
            name: info.name.clone(),
            subjects: filters(config).into_iter().map(String::from).collect(),
            ack_wait: info.config.ack_wait,
            start: starts.then(|| number(config, "opt_start_seq").cast_unsigned()),
        };
        Self::of(config, &spec)
    }
}

/// The subjects that are delivered.
pub(super) fn filters(fields: &Fields) -> BTreeSet<&str> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
