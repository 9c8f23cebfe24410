//! The stream as it should be: created, corrected, and checked for settings that would lose events.

use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde_json::{Value, json};

use super::consumer::Claim;
use super::settings::{Fields, Findings, Rule, Table, correct, is_set, judge, number, set, text, texts};
use super::{Connection, api};
use crate::config::Naming;
use crate::error::{Error, ErrorKind};
use crate::owner::{OWNER, Owner};

/// The outbox's largest message: payload, the publisher's headers and ours.
pub const LARGEST_MESSAGE: i32 = 1_000_000 + 16_384 + 4_096;
/// Shorter than this, the server may have forgotten a message id while the relay still retries.
const SHORTEST_DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// What a new stream gets. An existing one keeps its own limits.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    /// How many servers keep it. None: one for a new stream; an existing one keeps what it has.
    pub replicas: Option<usize>,
    /// How long it keeps messages. None: 14 days for a new stream; an existing one keeps what it has.
    pub max_age: Option<Duration>,
    /// How many bytes of messages it keeps. None: no limit for a new stream; an existing one keeps what it has.
    pub max_bytes: Option<i64>,
}

/// A new stream keeps messages for this long: longer than the outbox keeps its rows.
const MAX_AGE: Duration = Duration::from_hours(14 * 24);
const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

/// What a stream's settings are judged by.
pub(super) struct By {
    naming: Naming,
    /// Whether others write to it, too.
    shared: bool,
}

const ACKNOWLEDGED: &str =
    "messages are removed when consumers acknowledge them, so nothing can be checked or replayed";
const PROVISION: &str = "run `aftercommit provision`";
const RECREATE: &str = "it cannot be changed in place: create another stream and name it with --stream";

/// All settings of a stream that nats-server 2.15 knows (`StreamConfig`).
#[rustfmt::skip]
static STREAM: &Table<By> = &[
    ("name", Rule::Harmless("it is the one that was asked for")),
    ("description", Rule::Harmless("only people read it")),
    ("subjects", Rule::Corrected(
        |value, by, _| {
            let subjects = texts(value);
            let wanted = by.naming.prefix.wildcard();
            (!covers(&subjects, &by.naming)).then(|| format!("{} do not cover {wanted}", subjects.join(",")))
        },
        |by, fields| {
            let mut subjects = fields.get("subjects").cloned().unwrap_or_else(|| json!([]));
            if let Some(list) = subjects.as_array_mut() {
                list.push(by.naming.prefix.wildcard().into());
            }
            subjects
        },
    )),
    ("retention", Rule::Corrected(
        |value, _, _| (value != "limits" && value != "workqueue").then(|| ACKNOWLEDGED.into()),
        |_, _| "limits".into(),
    )),
    // The server changes one retention into the other, but this one never.
    ("retention", Rule::Refused(|value, _, _| (value == "workqueue").then(|| ACKNOWLEDGED.into()), RECREATE)),
    ("max_consumers", Rule::Harmless("a consumer too many is refused when it is provisioned")),
    ("max_msgs", Rule::Harmless("with `discard: new` a full stream is back-pressure")),
    ("max_bytes", Rule::Harmless("with `discard: new` a full stream is back-pressure")),
    ("max_age", Rule::Harmless("the outbox still has what the stream forgets; doctor compares the two")),
    ("max_msgs_per_subject", Rule::Corrected(
        |_, _, fields| (number(fields, "max_msgs_per_subject") > 0 && !refuses_per_subject(fields))
            .then(|| "the oldest events of a type are evicted before they are read, although publishing succeeds".into()),
        |_, _| json!(-1),
    )),
    ("max_msg_size", Rule::Corrected(
        |_, _, fields| {
            let size = number(fields, "max_msg_size");
            (size > 0 && size < LARGEST_MESSAGE.into())
                .then(|| format!("{size} is less than the {LARGEST_MESSAGE} bytes that an outbox event can have"))
        },
        |_, _| json!(-1),
    )),
    ("discard", Rule::Corrected(
        |value, _, fields| (value == "old" && limited(fields))
            .then(|| "with a size limit and `old`, events are evicted before they are read, and publishing still succeeds".into()),
        |_, _| "new".into(),
    )),
    ("storage", Rule::Refused(
        |value, _, _| (value == "memory").then(|| "messages are kept in memory and are gone when the server stops".into()),
        RECREATE,
    )),
    ("num_replicas", Rule::Harmless("doctor says what one server alone means")),
    ("no_ack", Rule::Corrected(
        |value, _, _| is_set(value).then(|| "it does not acknowledge messages".into()),
        |_, _| Value::Null,
    )),
    ("duplicate_window", Rule::Corrected(
        |_, by, fields| {
            let window = Duration::from_nanos(number(fields, "duplicate_window").unsigned_abs());
            (by.shared && window < SHORTEST_DUPLICATE_WINDOW).then(|| format!(
                "{window:?} is shorter than the {SHORTEST_DUPLICATE_WINDOW:?} for which a relay may send an event again"
            ))
        },
        |_, fields| match number(fields, "max_age") {
            // A window cannot be longer than the stream keeps its messages.
            age if age > 0 && age < nanos(DUPLICATE_WINDOW) => json!(age),
            _ => json!(nanos(DUPLICATE_WINDOW)),
        },
    )),
    ("placement", Rule::Harmless("it says on which servers the messages are")),
    ("mirror", Rule::Refused(
        |value, _, _| is_set(value).then(|| "a mirror takes no messages of its own".into()),
        RECREATE,
    )),
    ("sources", Rule::Refused(
        |value, by, _| (is_set(value) && !by.shared)
            .then(|| "the server copies messages of other streams in between, and an exclusive stream has one writer".into()),
        "take the sources out of the stream (`nats stream edit`), or run the relay with --mode shared",
    )),
    ("compression", Rule::Harmless("messages come out as they went in")),
    ("first_seq", Rule::Harmless("it says where a new stream begins")),
    ("subject_transform", Rule::Corrected(
        |value, _, _| is_set(value).then(|| "messages are stored under other subjects, of which no subscriber gets any".into()),
        |_, _| Value::Null,
    )),
    ("republish", Rule::Refused(
        |value, by, _| comes_back(value.get("dest").and_then(Value::as_str)?, &by.naming)
            .then(|| "the server copies each message to a subject that is the stream's, JetStream's or an inbox".into()),
        "take `republish` out of the stream (`nats stream edit`), or name another destination",
    )),
    ("allow_direct", Rule::Harmless("without it reads go to the stream's leader")),
    ("mirror_direct", Rule::Harmless("it is about mirrors of the stream")),
    ("discard_new_per_subject", Rule::Harmless("a full subject is back-pressure")),
    ("sealed", Rule::Refused(
        |value, _, _| is_set(value).then(|| "nothing can be published to it any more".into()),
        RECREATE,
    )),
    ("deny_delete", Rule::Harmless("no program here deletes single messages")),
    ("deny_purge", Rule::Harmless("no program here purges")),
    ("allow_rollup_hdrs", Rule::Corrected(
        |value, _, _| is_set(value).then(|| "one message with the header Nats-Rollup can wipe the stream".into()),
        |_, _| json!(false),
    )),
    ("consumer_limits", Rule::Corrected(
        |value, _, _| is_set(value)
            .then(|| "subscribers' consumers are removed when nobody reads from them for long, or get too few messages at a time".into()),
        |_, _| json!({}),
    )),
    ("allow_msg_ttl", Rule::Refused(
        |value, _, _| is_set(value).then(|| "single messages can be made to expire before they are read".into()),
        RECREATE,
    )),
    ("subject_delete_marker_ttl", Rule::Corrected(
        |value, _, _| is_set(value).then(|| "the server stores messages of its own between the events".into()),
        |_, _| Value::Null,
    )),
    ("allow_msg_counter", Rule::Refused(
        |value, _, _| is_set(value).then(|| "it takes numbers to be added up, and no events".into()),
        RECREATE,
    )),
    ("allow_atomic", Rule::Harmless("the relay looks whether it may send batches")),
    ("allow_msg_schedules", Rule::Refused(
        |value, _, _| is_set(value).then(|| "messages can have the server publish others, later and under other subjects".into()),
        RECREATE,
    )),
    ("persist_mode", Rule::Refused(
        |value, _, _| (value == "async").then(|| "messages are acknowledged before they are written".into()),
        RECREATE,
    )),
    ("allow_batched", Rule::Harmless("the relay does not publish that way")),
    ("metadata", Rule::Harmless("it may say whose the stream is, which `is_of` judges")),
];

/// Everything about a stream that would lose, change or re-order events of the outbox, or double them where it is
/// `shared` with other writers; and what is not known of it.
pub fn findings(config: &Fields, naming: &Naming, shared: bool) -> Findings {
    judge(STREAM, config, &By { naming: naming.clone(), shared }, PROVISION)
}

/// Creates the stream, or corrects what would lose events, and stamps it with its outbox where that is known. Returns what was
/// changed, empty when nothing. The stream of another outbox is left as it is, unless it is to be adopted.
pub async fn provision_stream(
    connection: &Connection,
    naming: &Naming,
    settings: &StreamSettings,
    claim: &Claim,
) -> Result<Vec<String>, Error> {
    let context = connection.jetstream();
    let name = &naming.stream;
    let existing = api::stream(&context, name).await.map_err(|error| unreadable(name, error))?;
    let atomic = connection.client.is_server_compatible(2, 12, 0);
    let Some(api::Described { config: current, .. }) = existing else {
        let mut config = new_stream(naming, settings, atomic);
        config.metadata.extend(claim.owner.as_ref().map(|owner| (OWNER.into(), owner.stamp())));
        context
            .create_stream(config)
            .await
            .map_err(|error| Error::with_source(ErrorKind::Broker, format!("cannot create stream {name}"), error))?;
        return Ok(vec![format!("stream {name}: created, subjects {}", naming.prefix.wildcard())]);
    };
    let held = owner(&current);
    if let (Some(ours), false) = (&claim.owner, claim.adopt) {
        is_of(name, held.as_ref(), ours)?;
    }
    let (mut wanted, mut changes) = corrected(&current, naming, settings, atomic);
    if let Some(ours) = claim.owner.as_ref().filter(|ours| held.as_ref() != Some(ours)) {
        let metadata = wanted.get("metadata").and_then(Value::as_object).cloned();
        let mut metadata = metadata.unwrap_or_default();
        metadata.insert(OWNER.into(), json!(ours.stamp()));
        wanted.insert("metadata".into(), metadata.into());
        let before = held.map_or_else(|| "not known".into(), |held| held.to_string());
        changes.push(format!("whose it is: {before} -> {ours}"));
    }
    if !changes.is_empty() {
        let failed = |error: api::Failure| {
            let problem = format!("cannot change stream {name} ({})", changes.join(", "));
            Error::with_source(ErrorKind::Broker, problem, error)
        };
        // As the server sent it, so that nothing is taken away which this program does not know.
        let answer: Response<Value> =
            context.request(format!("STREAM.UPDATE.{name}"), &wanted).await.map_err(|error| failed(error.into()))?;
        if let Response::Err { error } = answer {
            return Err(failed(error.into()));
        }
    }
    if let Some(problem) = findings(&wanted, naming, false).problems.first() {
        return Err(Error::new(ErrorKind::NotReady, format!("stream {name} cannot be corrected: {problem}")));
    }
    Ok(changes.into_iter().map(|change| format!("stream {name}: {change}")).collect())
}

/// The outbox that a stream is stamped with; none when it has no stamp.
pub fn owner(config: &Fields) -> Option<Owner> {
    config.get("metadata")?.get(OWNER)?.as_str()?.parse().ok()
}

/// Makes sure that a stream is not that of another outbox.
pub fn is_of(name: &str, theirs: Option<&Owner>, ours: &Owner) -> Result<(), Error> {
    let Some(theirs) = theirs.filter(|theirs| *theirs != ours) else { return Ok(()) };
    let problem = format!(
        "stream {name} belongs to the outbox in {theirs}, and this is {ours}: of two relays each would take the other's events \
         for forgeries. {FOREIGN}"
    );
    Err(Error::new(ErrorKind::NotReady, problem))
}

/// The way out when a stream is another outbox's.
pub const FOREIGN: &str = "Give this outbox a stream of its own (--stream, --subject-prefix); or, if its database was restored or \
     moved here and no relay publishes the other one any more, run `aftercommit provision --adopt` with OUTBOX_DATABASE_URL";

/// How long the stream keeps messages; none for ever, or when there is no stream.
pub async fn max_age(context: &Context, stream: &str) -> Result<Option<Duration>, Error> {
    let described = api::stream(context, stream).await.map_err(|error| unreadable(stream, error))?;
    Ok(described.map(|described| described.info.config.max_age).filter(|age| !age.is_zero()))
}

fn unreadable(stream: &str, error: api::Failure) -> Error {
    Error::with_source(ErrorKind::Broker, format!("cannot read stream {stream}"), error)
}

fn new_stream(naming: &Naming, settings: &StreamSettings, atomic: bool) -> Config {
    Config {
        name: naming.stream.clone(),
        description: Some(format!("Events of the outbox {}, published by aftercommit-relay only", naming.source)),
        subjects: vec![naming.prefix.wildcard()],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        max_age: settings.max_age.unwrap_or(MAX_AGE),
        max_bytes: settings.max_bytes.unwrap_or(-1),
        num_replicas: settings.replicas.unwrap_or(1),
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        allow_atomic_publish: atomic,
        ..Default::default()
    }
}

/// The configuration with everything put right that can be, and what was wrong in words.
fn corrected(current: &Fields, naming: &Naming, settings: &StreamSettings, atomic: bool) -> (Fields, Vec<String>) {
    let mut config = current.clone();
    // For either mode of the relay, which is not known here.
    let mut changes = correct(STREAM, &mut config, &By { naming: naming.clone(), shared: true });
    let mut wanted = |name: &str, value: Option<Value>| {
        changes.extend(value.and_then(|value| set(&mut config, name, value)));
    };
    wanted("max_age", settings.max_age.map(|age| json!(nanos(age))));
    wanted("max_bytes", settings.max_bytes.map(|bytes| json!(bytes)));
    wanted("num_replicas", settings.replicas.map(|replicas| json!(replicas)));
    if number(&config, "num_replicas") > 1 && atomic {
        // Else the relay can have one message in flight only.
        changes.extend(set(&mut config, "allow_atomic", json!(true)));
    }
    (config, changes)
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn limited(fields: &Fields) -> bool {
    ["max_bytes", "max_msgs", "max_msgs_per_subject"].iter().any(|limit| number(fields, limit) > 0)
}

/// Whether a message too many of a subject is refused, and the others stay.
fn refuses_per_subject(fields: &Fields) -> bool {
    text(fields, "discard") == "new" && fields.get("discard_new_per_subject").is_some_and(is_set)
}

/// Whether what the server copies to `destination` can come back to the stream, or be taken for an answer or a request.
fn comes_back(destination: &str, naming: &Naming) -> bool {
    let wildcard = naming.prefix.wildcard();
    let mut stream = wildcard.split('.');
    let system = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
    let reserved = destination.starts_with('_') || destination.strip_prefix('$').is_some_and(system);
    for token in destination.split('.') {
        // `$1`, `{{wildcard(1)}}` and `>` stand for anything.
        let numbered = token.strip_prefix('$').is_some_and(|number| number.parse::<u32>().is_ok());
        let any = token.starts_with("{{") || numbered;
        match stream.next() {
            None | Some(">") => return true,
            Some(_) if token == ">" => return true,
            Some(own) if any || own == token => {}
            Some(_) => return reserved,
        }
    }
    reserved
}

fn covers(subjects: &[&str], naming: &Naming) -> bool {
    let prefix = naming.prefix.to_string();
    subjects.iter().any(|subject| {
        let Some(front) = subject.strip_suffix(".>").or_else(|| (*subject == ">").then_some("")) else { return false };
        front.is_empty() || {
            let (mut wanted, mut given) = (prefix.split('.'), front.split('.'));
            given.all(|token| wanted.next().is_some_and(|want| token == "*" || token == want))
        }
    })
}

/// Why the server cannot be used at all; none when it can.
pub fn server_problem(connection: &Connection) -> Option<String> {
    let version = connection.client.server_info().version;
    let old = !connection.client.is_server_compatible(2, 11, 0);
    old.then(|| format!("nats-server {version} is too old: 2.11 or newer is needed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: StreamSettings = StreamSettings { replicas: None, max_age: None, max_bytes: None };

    /// What nats-server 2.15.1 says of a stream that was just provisioned.
    fn good() -> Fields {
        let config = json!({
            "name": "EVENTS", "description": "Events", "subjects": ["events.>"], "retention": "limits",
            "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 1_209_600_000_000_000_i64,
            "max_msgs_per_subject": -1, "max_msg_size": -1, "discard": "new", "storage": "file", "num_replicas": 1,
            "duplicate_window": 600_000_000_000_i64, "compression": "none", "allow_direct": true, "mirror_direct": false,
            "sealed": false, "deny_delete": false, "deny_purge": false, "allow_rollup_hdrs": false, "consumer_limits": {},
            "allow_msg_ttl": false, "allow_atomic": true, "metadata": { "_nats.level": "5", "_nats.ver": "2.15.1" },
        });
        config.as_object().unwrap().clone()
    }

    fn with(settings: Value) -> Fields {
        let mut config = good();
        config.extend(settings.as_object().unwrap().clone());
        config
    }

    fn named(config: &Fields, shared: bool) -> Vec<&'static str> {
        findings(config, &Naming::default(), shared).problems.iter().map(|problem| problem.setting).collect()
    }

    #[test]
    fn every_setting_is_explained_to_operators() {
        let docs = include_str!("../../../../docs/operations.md");
        for (name, _) in STREAM {
            assert!(docs.contains(&format!("`{name}")), "docs/operations.md does not say what {name} means");
        }
    }

    #[test]
    fn a_new_stream_has_no_problems() {
        assert_eq!(findings(&good(), &Naming::default(), true), Findings::default());
    }

    #[test]
    fn every_lossy_setting_is_named() {
        for (setting, config) in [
            ("duplicate_window", json!({ "duplicate_window": 5_000_000_000_i64 })),
            ("storage", json!({ "storage": "memory" })),
            ("retention", json!({ "retention": "workqueue" })),
            ("retention", json!({ "retention": "interest" })),
            ("sealed", json!({ "sealed": true })),
            ("persist_mode", json!({ "persist_mode": "async" })),
            ("no_ack", json!({ "no_ack": true })),
            ("subjects", json!({ "subjects": ["other.>"] })),
            ("subjects", json!({ "subjects": null })),
            ("discard", json!({ "discard": "old", "max_bytes": 1 })),
            ("max_msgs_per_subject", json!({ "max_msgs_per_subject": 10 })),
            ("allow_rollup_hdrs", json!({ "allow_rollup_hdrs": true })),
            ("allow_msg_ttl", json!({ "allow_msg_ttl": true })),
            ("max_msg_size", json!({ "max_msg_size": 1_000_000 })),
            ("mirror", json!({ "mirror": { "name": "OTHER" } })),
            ("subject_transform", json!({ "subject_transform": { "src": "events.>", "dest": "gone.>" } })),
            ("republish", json!({ "republish": { "src": ">", "dest": "events.copy.>" } })),
            ("republish", json!({ "republish": { "src": ">", "dest": "$JS.API.STREAM.PURGE.OTHER" } })),
            ("consumer_limits", json!({ "consumer_limits": { "inactive_threshold": 1_000_000_000 } })),
            ("subject_delete_marker_ttl", json!({ "subject_delete_marker_ttl": 1_000_000_000 })),
            ("allow_msg_counter", json!({ "allow_msg_counter": true })),
            ("allow_msg_schedules", json!({ "allow_msg_schedules": true })),
        ] {
            assert_eq!(named(&with(config.clone()), true), [setting], "{config}");
        }
        let sources = with(json!({ "sources": [{ "name": "OTHER" }] }));
        assert_eq!((named(&sources, false), named(&sources, true)), (vec!["sources"], vec![]));
        assert_eq!(named(&with(json!({ "duplicate_window": 5_000_000_000_i64 })), false), [""; 0]);
    }

    #[test]
    fn what_loses_nothing_is_left_alone() {
        for config in [
            json!({ "max_msgs": 10, "max_bytes": 1000 }),
            json!({ "max_msgs_per_subject": 10, "discard_new_per_subject": true }),
            json!({ "deny_delete": true, "deny_purge": true, "allow_batched": true, "compression": "s2" }),
            json!({ "placement": { "cluster": "C" }, "num_replicas": 3, "first_seq": 7, "max_consumers": 3 }),
            json!({ "republish": { "src": "events.>", "dest": "copy.>" }, "persist_mode": "default" }),
        ] {
            let config = with(config);
            assert_eq!(findings(&config, &Naming::default(), true), Findings::default(), "{config:?}");
            assert_eq!(corrected(&config, &Naming::default(), &SETTINGS, false), (config, vec![]));
        }
    }

    #[test]
    fn a_setting_that_is_not_known_is_named() {
        let config = with(json!({ "evict_on_tuesdays": true, "future_default": false }));
        assert_eq!(findings(&config, &Naming::default(), false).unknown, ["evict_on_tuesdays"]);
        let (config, changes) = corrected(&config, &Naming::default(), &SETTINGS, true);
        assert!(changes.is_empty() && config.contains_key("evict_on_tuesdays"), "and it is left as it is");
    }

    #[test]
    fn what_provision_can_correct_it_corrects() {
        let naming = Naming::default();
        let config = with(json!({
            "no_ack": true, "allow_rollup_hdrs": true, "max_msg_size": 10, "discard": "old", "max_bytes": 1,
            "subjects": ["other.>"], "max_msgs_per_subject": 10, "subject_transform": { "src": ">", "dest": "gone.>" },
            "consumer_limits": { "max_ack_pending": 1 }, "duplicate_window": 5_000_000_000_i64, "retention": "interest",
            "subject_delete_marker_ttl": 1_000_000_000,
        }));
        let (config, changes) = corrected(&config, &naming, &SETTINGS, false);
        assert_eq!(findings(&config, &naming, true), Findings::default());
        assert_eq!(changes.len(), 11, "{changes:?}");
        assert_eq!(config["subjects"], json!(["other.>", "events.>"]));
        assert_eq!(corrected(&config, &naming, &SETTINGS, false).1, [""; 0], "again it finds nothing");
    }

    #[test]
    fn no_correction_evicts() {
        // What `discard: new` alone would turn it into.
        let config = with(json!({ "discard": "old", "max_msgs_per_subject": 10 }));
        let (config, _) = corrected(&config, &Naming::default(), &SETTINGS, true);
        assert_eq!((number(&config, "max_msgs_per_subject"), text(&config, "discard")), (-1, "old"));
        assert!(!limited(&config), "nothing is left that evicts");
    }

    #[test]
    fn a_stream_with_replicas_is_to_take_batches_where_the_server_can() {
        for (replicas, atomic, expected) in [(3, true, true), (3, false, false), (1, true, false)] {
            let mut current = with(json!({ "num_replicas": replicas }));
            current.remove("allow_atomic");
            let (config, changes) = corrected(&current, &Naming::default(), &SETTINGS, atomic);
            assert_eq!(config.get("allow_atomic").is_some_and(is_set), expected);
            assert_eq!(changes.len(), usize::from(expected), "{changes:?}");
        }
    }

    #[test]
    fn a_copy_comes_back_where_it_could_be_taken_for_something_else() {
        let naming = Naming {
            prefix: aftercommit_outbox::subject::SubjectPrefix::new("shop.events").unwrap(),
            ..Naming::default()
        };
        for (destination, back) in [
            ("copy.>", false),
            ("shop.copy.>", false),
            ("shop.events.copy", true),
            ("$1.$2.x", true),
            ("$1.copy", false),
            ("shop.{{wildcard(1)}}.x", true),
            (">", true),
            ("$JS.ACK.EVENTS.receipts.1.1.1.1.0", true),
            ("_INBOX.x", true),
        ] {
            assert_eq!(comes_back(destination, &naming), back, "{destination}");
        }
    }

    #[test]
    fn covering_follows_tokens() {
        let naming = Naming {
            prefix: aftercommit_outbox::subject::SubjectPrefix::new("shop.events").unwrap(),
            ..Naming::default()
        };
        for (subject, covered) in [
            (">", true),
            ("shop.>", true),
            ("shop.events.>", true),
            ("*.events.>", true),
            ("shop.events", false),
            ("shop.events.*", false),
            ("shop.events.order.>", false),
            ("shopping.>", false),
        ] {
            assert_eq!(covers(&[subject], &naming), covered, "{subject}");
        }
    }
}
