//! The stream as it should be: created, corrected, and checked for settings that would lose events.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, PersistenceMode, RetentionPolicy, StorageType};

use super::{Connection, api};
use crate::config::Naming;
use crate::error::{Error, ErrorKind};

/// The outbox's largest message: payload, the publisher's headers and ours.
const LARGEST_MESSAGE: i32 = 1_000_000 + 16_384 + 4_096;
/// Shorter than this, the server may have forgotten a message id while the relay still retries.
const SHORTEST_DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// What a new stream gets. An existing one keeps its own limits.
#[derive(Debug, Clone)]
pub(crate) struct StreamSettings {
    pub(crate) replicas: Option<usize>,
    pub(crate) max_age: Option<Duration>,
    pub(crate) max_bytes: Option<i64>,
}

/// A new stream keeps messages for this long: longer than the outbox keeps its rows.
const MAX_AGE: Duration = Duration::from_hours(14 * 24);
const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

/// A setting of the stream that would lose, change or re-order events, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) setting: &'static str,
    pub(crate) why: String,
    pub(crate) remedy: &'static str,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; {}", self.setting, self.why, self.remedy)
    }
}

/// Creates the stream, or corrects what would lose events. Returns what was changed, empty when nothing.
pub(crate) async fn provision_stream(
    connection: &Connection,
    naming: &Naming,
    settings: &StreamSettings,
) -> Result<Vec<String>, Error> {
    let context = jetstream::new(connection.client.clone());
    let name = &naming.stream;
    let existing = api::stream(&context, name)
        .await
        .map_err(|error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {name}"), error))?;
    let atomic = connection.client.is_server_compatible(2, 12, 0);
    let Some(Info { config: current, .. }) = existing else {
        let config = new_stream(naming, settings, atomic);
        context
            .create_stream(config)
            .await
            .map_err(|error| Error::with_source(ErrorKind::Broker, format!("cannot create stream {name}"), error))?;
        return Ok(vec![format!("stream {name}: created, subjects {}", naming.prefix.wildcard())]);
    };
    let (wanted, changes) = corrected(&current, naming, settings, atomic);
    if !changes.is_empty() {
        context.update_stream(&wanted).await.map_err(|error| {
            Error::with_source(
                ErrorKind::Broker,
                format!("cannot change stream {name} ({})", changes.join(", ")),
                error,
            )
        })?;
    }
    if let Some(problem) = problems(&wanted, naming, false).first() {
        return Err(Error::new(ErrorKind::NotReady, format!("stream {name} cannot be corrected: {problem}")));
    }
    Ok(changes.into_iter().map(|change| format!("stream {name}: {change}")).collect())
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
fn corrected(current: &Config, naming: &Naming, settings: &StreamSettings, atomic: bool) -> (Config, Vec<String>) {
    let mut config = current.clone();
    let mut changes = Vec::new();
    let mut set = |what: &str, from: String, to: String| changes.push(format!("{what} {from} -> {to}"));
    if !covers(&config.subjects, naming) {
        let before = config.subjects.join(",");
        config.subjects.push(naming.prefix.wildcard());
        set("subjects", before, config.subjects.join(","));
    }
    if config.no_ack {
        config.no_ack = false;
        set("no_ack", "true".into(), "false".into());
    }
    if config.allow_rollup {
        config.allow_rollup = false;
        set("allow_rollup_hdrs", "true".into(), "false".into());
    }
    if config.duplicate_window < SHORTEST_DUPLICATE_WINDOW && !too_old_for_window(&config) {
        set("duplicate_window", format!("{:?}", config.duplicate_window), format!("{DUPLICATE_WINDOW:?}"));
        config.duplicate_window = DUPLICATE_WINDOW;
    }
    if config.discard == DiscardPolicy::Old && limited(&config) {
        config.discard = DiscardPolicy::New;
        set("discard", "old".into(), "new".into());
    }
    if config.max_message_size > 0 && config.max_message_size < LARGEST_MESSAGE {
        set("max_msg_size", config.max_message_size.to_string(), "-1".into());
        config.max_message_size = -1;
    }
    if let Some(max_age) = settings.max_age.filter(|max_age| *max_age != config.max_age) {
        set("max_age", format!("{:?}", config.max_age), format!("{max_age:?}"));
        config.max_age = max_age;
    }
    if let Some(max_bytes) = settings.max_bytes.filter(|max_bytes| *max_bytes != config.max_bytes) {
        set("max_bytes", config.max_bytes.to_string(), max_bytes.to_string());
        config.max_bytes = max_bytes;
    }
    if let Some(replicas) = settings.replicas.filter(|replicas| *replicas != config.num_replicas) {
        set("replicas", config.num_replicas.to_string(), replicas.to_string());
        config.num_replicas = replicas;
    }
    if config.num_replicas > 1 && atomic && !config.allow_atomic_publish {
        // Else the relay can have one message under way only.
        config.allow_atomic_publish = true;
        set("allow_atomic", "false".into(), "true".into());
    }
    (config, changes)
}

/// A duplicate window cannot be longer than the stream keeps its messages.
fn too_old_for_window(config: &Config) -> bool {
    !config.max_age.is_zero() && config.max_age < DUPLICATE_WINDOW
}

fn limited(config: &Config) -> bool {
    config.max_bytes > 0 || config.max_messages > 0 || config.max_messages_per_subject > 0
}

fn covers(subjects: &[String], naming: &Naming) -> bool {
    let prefix = naming.prefix.to_string();
    subjects.iter().any(|subject| {
        let Some(front) = subject.strip_suffix(".>").or_else(|| (subject == ">").then_some("")) else { return false };
        front.is_empty() || {
            let (mut wanted, mut given) = (prefix.split('.'), front.split('.'));
            given.all(|token| wanted.next().is_some_and(|want| token == "*" || token == want))
        }
    })
}

/// Why the server cannot be used at all; none when it can.
pub(crate) fn server_problem(connection: &Connection) -> Option<String> {
    let version = connection.client.server_info().version;
    let old = !connection.client.is_server_compatible(2, 11, 0);
    old.then(|| format!("nats-server {version} is too old: 2.11 or newer is needed"))
}

/// Everything about a stream that would lose, change or re-order events of the outbox, or double them where it is
/// `shared` with other writers.
pub(crate) fn problems(config: &Config, naming: &Naming, shared: bool) -> Vec<Problem> {
    const PROVISION: &str = "run `aftercommit provision`";
    const RECREATE: &str = "it cannot be changed in place: create another stream and name it with --stream";
    let mut found = Vec::new();
    let mut check = |wrong: bool, setting: &'static str, why: String, remedy: &'static str| {
        if wrong {
            found.push(Problem { setting, why, remedy });
        }
    };
    check(
        config.storage == StorageType::Memory,
        "storage",
        "messages are kept in memory and are gone when the server stops".into(),
        RECREATE,
    );
    check(
        config.retention != RetentionPolicy::Limits,
        "retention",
        "messages are removed when consumers acknowledge them, so nothing can be checked or replayed".into(),
        RECREATE,
    );
    check(config.sealed, "sealed", "nothing can be published to it any more".into(), RECREATE);
    check(config.mirror.is_some(), "mirror", "a mirror takes no messages of its own".into(), RECREATE);
    check(
        config.persist_mode == Some(PersistenceMode::Async),
        "persist_mode",
        "messages are acknowledged before they are written".into(),
        RECREATE,
    );
    check(config.no_ack, "no_ack", "it does not acknowledge messages".into(), PROVISION);
    check(
        !covers(&config.subjects, naming),
        "subjects",
        format!("{} do not cover {}", config.subjects.join(","), naming.prefix.wildcard()),
        PROVISION,
    );
    check(
        config.discard == DiscardPolicy::Old && limited(config),
        "discard",
        "with a size limit and `old`, events are evicted before they are read, and publishing still succeeds".into(),
        PROVISION,
    );
    check(
        config.allow_rollup,
        "allow_rollup_hdrs",
        "one message with the header Nats-Rollup can wipe the stream".into(),
        PROVISION,
    );
    check(
        config.allow_message_ttl,
        "allow_msg_ttl",
        "single messages can be made to expire before they are read".into(),
        RECREATE,
    );
    check(
        shared && config.duplicate_window < SHORTEST_DUPLICATE_WINDOW,
        "duplicate_window",
        format!(
            "{:?} is shorter than the {SHORTEST_DUPLICATE_WINDOW:?} for which a relay may send an event again",
            config.duplicate_window
        ),
        PROVISION,
    );
    check(
        config.max_message_size > 0 && config.max_message_size < LARGEST_MESSAGE,
        "max_msg_size",
        format!("{} is less than the {LARGEST_MESSAGE} bytes that an outbox event can have", config.max_message_size),
        PROVISION,
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Config {
        let settings = StreamSettings { replicas: None, max_age: None, max_bytes: None };
        new_stream(&Naming::default(), &settings, true)
    }

    #[test]
    fn a_new_stream_has_no_problems() {
        assert_eq!(problems(&good(), &Naming::default(), true), []);
    }

    #[test]
    fn every_lossy_setting_is_named() {
        type Spoil = fn(&mut Config);
        let cases: [(&str, Spoil); 11] = [
            ("duplicate_window", |c| c.duplicate_window = Duration::from_secs(5)),
            ("storage", |c| c.storage = StorageType::Memory),
            ("retention", |c| c.retention = RetentionPolicy::WorkQueue),
            ("sealed", |c| c.sealed = true),
            ("persist_mode", |c| c.persist_mode = Some(PersistenceMode::Async)),
            ("no_ack", |c| c.no_ack = true),
            ("subjects", |c| c.subjects = vec!["other.>".into()]),
            ("discard", |c| (c.discard, c.max_bytes) = (DiscardPolicy::Old, 1)),
            ("allow_rollup_hdrs", |c| c.allow_rollup = true),
            ("allow_msg_ttl", |c| c.allow_message_ttl = true),
            ("max_msg_size", |c| c.max_message_size = 1_000_000),
        ];
        for (setting, spoil) in cases {
            let mut config = good();
            spoil(&mut config);
            let found = problems(&config, &Naming::default(), true);
            assert_eq!(found.iter().map(|problem| problem.setting).collect::<Vec<_>>(), [setting]);
        }
    }

    #[test]
    fn what_provision_can_correct_it_corrects() {
        let naming = Naming::default();
        let settings = StreamSettings { replicas: None, max_age: None, max_bytes: None };
        let mut config = good();
        (config.no_ack, config.allow_rollup, config.max_message_size) = (true, true, 10);
        (config.discard, config.max_bytes) = (DiscardPolicy::Old, 1);
        config.subjects = vec!["other.>".into()];
        let (config, changes) = corrected(&config, &naming, &settings, true);
        assert_eq!(problems(&config, &naming, true), []);
        assert_eq!(changes.len(), 5, "{changes:?}");
        assert_eq!(corrected(&config, &naming, &settings, true).1, [""; 0], "again it finds nothing");
    }

    #[test]
    fn a_stream_with_replicas_is_to_take_batches_where_the_server_can() {
        let settings = StreamSettings { replicas: None, max_age: None, max_bytes: None };
        for (replicas, atomic, expected) in [(3, true, true), (3, false, false), (1, true, false)] {
            let current = Config { num_replicas: replicas, allow_atomic_publish: false, ..good() };
            let (config, changes) = corrected(&current, &Naming::default(), &settings, atomic);
            assert_eq!((config.allow_atomic_publish, changes.len()), (expected, usize::from(expected)), "{changes:?}");
        }
    }

    #[test]
    fn covering_follows_tokens() {
        let naming = Naming { prefix: crate::subject::SubjectPrefix::new("shop.events").unwrap(), ..Naming::default() };
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
            assert_eq!(covers(&[subject.into()], &naming), covered, "{subject}");
        }
    }
}
