//! `worker.toml`: subscribers whose handlers need no Rust code.
//!
//! ```toml
//! [[subscriber]]
//! name = "branch-balance"            # durable name: JetStream consumer and inbox key
//! types = ["pgbench.history"]        # event types; "*" for all
//! sql = { function = "demo.apply_history" }
//! concurrency = 16                   # transactions at the same time
//! max_attempts = 10                  # then the event becomes a dead letter
//! max_crashes = 3                    # of the process while an event runs alone in it; then the same
//! max_batch = 100                    # events in one transaction
//! ack_wait = "30s"                   # set on the consumer by `aftercommit provision`
//! time_limit = "1m"                  # of one handler
//! inbox_retention = "30d"            # how long the inbox remembers what is done, at least
//! backoff = { first = "1s", max = "5m" }
//! debounce = "30s"                   # wait for more events of a key; not when left out
//! failure_policy = "block"           # "skip": a failed event lets the later ones of its key pass
//! queue = "heavy"                    # "default" when not given
//! stream = "ORDERS"                  # the worker's stream when not given
//! prefix = "orders"                  # the worker's subject prefix when not given
//! start = "new"                      # or "all" (when not given), a time, or a sequence: with which event it starts at first
//!
//! [[subscriber]]
//! name = "webhook"
//! types = ["*"]
//! [subscriber.http]                  # instead of `sql`; max_batch is 1 when not given
//! url = "https://shop.example/events"
//! mode = "binary"                    # or "structured"
//! timeout = "30s"                    # from the request to the answer
//! headers = { Authorization = "env:TOKEN" }
//! answers = { 409 = "done" }         # what a status means: done, retry, reject or unavailable
//! ca = "ca.pem"                      # whom to trust instead of the system's
//! cert = "worker.pem"                # what to show to the endpoint
//! key = "worker.key"
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use toml::Spanned;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::ClientCertificate;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::function::FunctionName;
use aftercommit_outbox::subject::SubjectPrefix;

use super::http::{ContentMode, Endpoint, HttpAnswer};
use super::start::Start;
use super::subscriber::{FailurePolicy, Subscriber, check_types};
use aftercommit_core::subscription::check_name;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    subscriber: Vec<Spanned<Entry>>,
    #[serde(default)]
    eraser: Vec<Spanned<toml::Table>>,
    #[serde(default)]
    coordinator: Vec<Spanned<toml::Table>>,
}

/// A part of the file that others read: an `[[eraser]]` or a `[[coordinator]]`.
#[derive(Debug)]
pub struct Section {
    /// Which of them: `eraser` or `coordinator`.
    pub kind: &'static str,
    /// Where it is, such as `worker.toml:7`.
    pub place: String,
    /// What it says.
    pub table: toml::Table,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Spanned<String>,
    types: Spanned<Vec<String>>,
    sql: Option<Sql>,
    http: Option<Spanned<Http>>,
    concurrency: Option<usize>,
    max_attempts: Option<u32>,
    max_crashes: Option<u32>,
    max_batch: Option<usize>,
    ack_wait: Option<DurationText>,
    time_limit: Option<DurationText>,
    inbox_retention: Option<DurationText>,
    backoff: Option<RetryWaits>,
    queue: Option<String>,
    stream: Option<String>,
    prefix: Option<Prefix>,
    failure_policy: Option<Policy>,
    debounce: Option<DurationText>,
    start: Option<StartsWith>,
}

/// See [`Start`].
struct StartsWith(Start);

impl<'de> Deserialize<'de> for StartsWith {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum StartText {
            Sequence(u64),
            Time(toml::value::Datetime),
            Text(String),
        }
        let text = match StartText::deserialize(deserializer)? {
            StartText::Sequence(sequence) => sequence.to_string(),
            StartText::Time(time) => time.to_string(),
            StartText::Text(text) => text,
        };
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// See [`FailurePolicy`].
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Block,
    Skip,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sql {
    function: Spanned<String>,
    #[serde(default)]
    raw: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Http {
    url: Spanned<String>,
    mode: Option<ContentMode>,
    timeout: Option<DurationText>,
    #[serde(default)]
    headers: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    answers: BTreeMap<String, Spanned<HttpAnswer>>,
    ca: Option<Spanned<PathBuf>>,
    cert: Option<Spanned<PathBuf>>,
    key: Option<Spanned<PathBuf>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryWaits {
    first: Option<DurationText>,
    max: Option<DurationText>,
}

/// A duration such as `30s`.
struct DurationText(Duration);

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map(Self).map_err(|error| {
            serde::de::Error::custom(format!("{text:?} is not a duration such as \"30s\" or \"5m\": {error}"))
        })
    }
}

/// The first tokens of subjects.
struct Prefix(SubjectPrefix);

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        SubjectPrefix::new(String::deserialize(deserializer)?).map(Self).map_err(serde::de::Error::custom)
    }
}

/// Reads the subscribers from a `worker.toml`.
///
/// # Errors
/// When the file cannot be read or is wrong; the message names the file, the line and the key.
pub fn read_file(path: &Path) -> Result<(Vec<Subscriber>, Vec<Section>), Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::with_source(ErrorKind::Config, format!("the file {} cannot be read", path.display()), error)
    })?;
    let (mut subscribers, mut sections) =
        read(&text).map_err(|message| Error::new(ErrorKind::Config, format!("{}{message}", path.display())))?;
    for subscriber in &mut subscribers {
        subscriber.place = format!("{}{}", path.display(), subscriber.place);
    }
    for section in &mut sections {
        section.place = format!("{}{}", path.display(), section.place);
    }
    Ok((subscribers, sections))
}

#[cfg(test)]
fn parse(text: &str) -> Result<Vec<Subscriber>, String> {
    read(text).map(|(subscribers, _)| subscribers)
}

/// The error begins with `:line: `, and the place of a subscriber is `:line`, for behind the file's name.
fn read(text: &str) -> Result<(Vec<Subscriber>, Vec<Section>), String> {
    let at = |span: Range<usize>, message: String| format!(":{}: {message}", line(text, span.start));
    let file: File = toml::from_str(text).map_err(|error| match error.span() {
        Some(span) => at(span, error.message().to_string()),
        None => format!(": {}", error.message()),
    })?;
    if file.subscriber.is_empty() && file.eraser.is_empty() && file.coordinator.is_empty() {
        return Err(": it has no [[subscriber]]".into());
    }
    let section = |kind| {
        move |section: Spanned<toml::Table>| {
            let place = format!(":{}", line(text, section.span().start));
            Section { kind, place, table: section.into_inner() }
        }
    };
    let coordinators = file.coordinator.into_iter().map(section("coordinator"));
    let sections = file.eraser.into_iter().map(section("eraser")).chain(coordinators).collect();
    let mut subscribers: Vec<Subscriber> = Vec::new();
    for entry in file.subscriber {
        let span = entry.span();
        let entry = entry.into_inner();
        let name = entry.name.get_ref();
        let wrong = |span: Range<usize>, key: &str, problem: String| Err(at(span, format!("{key}: {problem}")));
        if let Err(problem) = check_name(name) {
            return wrong(entry.name.span(), "name", problem);
        }
        if let Some(other) = subscribers.iter().find(|other| other.name == *name) {
            let problem = format!("there is another subscriber {name} at line {}", other.place.trim_start_matches(':'));
            return wrong(entry.name.span(), "name", problem);
        }
        if let Err(problem) = check_types(entry.types.get_ref()) {
            return wrong(entry.types.span(), "types", problem);
        }
        let work = match (&entry.sql, &entry.http) {
            (Some(sql), None) => match FunctionName::parse(sql.function.get_ref()) {
                Ok(_) => None,
                Err(problem) => return wrong(sql.function.span(), "function", problem),
            },
            (None, Some(http)) => match http.get_ref().endpoint() {
                Ok(endpoint) => Some(endpoint),
                Err((at, key, problem)) => return wrong(at.unwrap_or(http.span()), key, problem),
            },
            _ => return wrong(span, "sql, http", format!("subscriber {name} needs exactly one of them")),
        };
        let mut subscriber = entry.into_subscriber(work).map_err(|error| at(span.clone(), error.to_string()))?;
        subscriber.place = format!(":{}", line(text, span.start));
        subscriber.validate().map_err(|error| at(span, error.to_string()))?;
        subscribers.push(subscriber);
    }
    Ok((subscribers, sections))
}

/// Where something of a section is posted, by its table `http`: its keys are those of a subscriber's but `mode` and `answers`.
///
/// # Errors
/// What is wrong, with its key.
pub fn endpoint(table: toml::Table) -> Result<Endpoint, String> {
    for key in ["mode", "answers"] {
        if table.contains_key(key) {
            return Err(format!("unknown field `{key}`"));
        }
    }
    // As text again: a table has no places.
    let text = toml::to_string(&table).map_err(|error| error.to_string())?;
    let http: Http = toml::from_str(&text).map_err(|error| error.message().to_string())?;
    http.endpoint().map_err(|(_, key, problem)| format!("{key}: {problem}"))
}

impl Entry {
    /// `endpoint` is where to post; none when it calls a function.
    fn into_subscriber(self, endpoint: Option<Endpoint>) -> Result<Subscriber, Error> {
        let (name, types) = (self.name.into_inner(), self.types.into_inner());
        let mut subscriber = match (endpoint, self.sql) {
            (Some(endpoint), _) => Subscriber::http(name, endpoint, types),
            (None, sql) => {
                let (function, raw) = sql.map(|sql| (sql.function.into_inner(), sql.raw)).unwrap_or_default();
                let subscriber = Subscriber::sql(name, &function, types)?;
                if raw { subscriber.raw_payloads() } else { subscriber }
            }
        };
        let settings = &mut subscriber.settings;
        let backoff = self.backoff.unwrap_or(RetryWaits { first: None, max: None });
        settings.backoff = Backoff {
            first: backoff.first.map_or(settings.backoff.first, |wait| wait.0),
            max: backoff.max.map_or(settings.backoff.max, |wait| wait.0),
        };
        settings.failure_policy = match self.failure_policy {
            None => settings.failure_policy,
            Some(Policy::Block) => FailurePolicy::Block,
            Some(Policy::Skip) => FailurePolicy::Skip,
        };
        settings.debounce = self.debounce.map(|window| window.0);
        settings.start = self.start.map_or(settings.start, |start| start.0);
        settings.queue = self.queue.unwrap_or_else(|| settings.queue.clone());
        settings.stream = self.stream;
        settings.prefix = self.prefix.map(|prefix| prefix.0);
        settings.concurrency = self.concurrency.unwrap_or(settings.concurrency);
        settings.max_attempts = self.max_attempts.unwrap_or(settings.max_attempts);
        settings.max_crashes = self.max_crashes.unwrap_or(settings.max_crashes);
        settings.max_batch = self.max_batch.unwrap_or(settings.max_batch);
        settings.ack_wait = self.ack_wait.map_or(settings.ack_wait, |wait| wait.0);
        settings.time_limit = self.time_limit.map_or(settings.time_limit, |wait| wait.0);
        settings.inbox_retention = self.inbox_retention.map_or(settings.inbox_retention, |wait| wait.0);
        Ok(subscriber)
    }
}

impl Http {
    /// The error comes with its place, if there is one, and its key.
    fn endpoint(&self) -> Result<Endpoint, (Option<Range<usize>>, &'static str, String)> {
        let mut endpoint =
            Endpoint::new(self.url.get_ref()).map_err(|problem| (Some(self.url.span()), "url", problem))?;
        for (name, value) in &self.headers {
            let added = endpoint.header(name, value.get_ref());
            added.map_err(|problem| (Some(value.span()), "headers", problem))?;
        }
        for (status, meaning) in &self.answers {
            let added = endpoint.answer(status, *meaning.get_ref());
            added.map_err(|problem| (Some(meaning.span()), "answers", problem))?;
        }
        for (key, file) in [("ca", &self.ca), ("cert", &self.cert), ("key", &self.key)] {
            if let Some(file) = file.as_ref().filter(|_| !endpoint.is_https()) {
                return Err((Some(file.span()), key, "it needs a url that begins with https://".into()));
            }
        }
        let path = |file: &Spanned<PathBuf>| file.get_ref().clone();
        endpoint.ca = self.ca.as_ref().map(path);
        endpoint.certificate = match (&self.cert, &self.key) {
            (Some(certificate), Some(key)) => {
                Some(ClientCertificate { certificate: path(certificate), key: path(key) })
            }
            (None, None) => None,
            (Some(file), None) => return Err((Some(file.span()), "cert", "it needs `key`".into())),
            (None, Some(file)) => return Err((Some(file.span()), "key", "it needs `cert`".into())),
        };
        endpoint.mode = self.mode.unwrap_or_default();
        endpoint.timeout = self.timeout.as_ref().map_or(endpoint.timeout, |wait| wait.0);
        Ok(endpoint)
    }
}

fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::super::subscriber::Work;
    use super::*;
    use proptest::strategy::Strategy;

    const GOOD: &str = r#"
[[subscriber]]
name = "branch-balance"
types = ["pgbench.history"]
concurrency = 16
sql = { function = "demo.apply_history" }
ack_wait = "10s"
backoff = { first = "250ms" }
queue = "heavy"
stream = "ORDERS"
prefix = "orders"
failure_policy = "skip"
debounce = "2s"
start = "new"
"#;

    const WEBHOOK: &str = r#"
[[subscriber]]
name = "webhook"
types = ["*"]
[subscriber.http]
url = "https://shop.example/events"
mode = "structured"
timeout = "5s"
headers = { Authorization = "env:NOWHERE" }
answers = { 409 = "done" }
cert = "c"
key = "k"
"#;

    #[test]
    fn an_http_subscriber_posts_one_event_at_a_time() {
        let subscribers = parse(WEBHOOK).unwrap();
        assert_eq!(subscribers[0].settings.max_batch, 1);
        let Work::Http { endpoint, .. } = &subscribers[0].work else { panic!("{:?}", subscribers[0]) };
        assert_eq!((endpoint.mode, endpoint.timeout), (ContentMode::Structured, Duration::from_secs(5)));
    }

    #[test]
    fn a_file_becomes_subscribers() {
        let subscribers = parse(GOOD).unwrap();
        let settings = &subscribers[0].settings;
        assert_eq!(subscribers[0].name, "branch-balance");
        assert_eq!((settings.concurrency, settings.max_attempts), (16, 10));
        assert_eq!(settings.ack_wait, Duration::from_secs(10));
        assert_eq!((settings.failure_policy, settings.debounce), (FailurePolicy::Skip, Some(Duration::from_secs(2))));
        assert_eq!((settings.queue.as_str(), settings.stream.as_deref()), ("heavy", Some("ORDERS")));
        for (text, start) in [
            ("\"new\"", Start::New),
            ("\"all\"", Start::All),
            ("4711", Start::Sequence(4711)),
            ("\"4711\"", Start::Sequence(4711)),
            ("2026-03-01T12:00:00Z", "2026-03-01T12:00:00Z".parse().unwrap()),
            ("\"2026-03-01T12:00:00Z\"", "2026-03-01T12:00:00Z".parse().unwrap()),
        ] {
            let subscribers = parse(&GOOD.replace("start = \"new\"", &format!("start = {text}"))).unwrap();
            assert_eq!(subscribers[0].settings.start, start, "{text}");
        }
        let spec = subscribers[0].spec(&aftercommit_core::config::Naming::default());
        assert_eq!((spec.stream, spec.subjects), ("ORDERS".into(), vec!["orders.pgbench.history".into()]));
        assert_eq!(settings.backoff, Backoff { first: Duration::from_millis(250), ..Backoff::default() });
    }

    #[test]
    fn mistakes_are_named_with_line_and_key() {
        for (from, to, expected) in [
            ("branch-balance", "branch balance", ":3: name:"),
            ("[\"pgbench.history\"]", "[]", ":4: types:"),
            ("pgbench.history", "pgbench.>", ":4: types:"),
            ("[\"pgbench.history\"]", "[\"*\", \"a\"]", ":4: types:"),
            ("concurrency = 16", "concurency = 16", ":5: unknown field `concurency`"),
            ("concurrency = 16", "concurrency = -1", ":5: "),
            ("demo.apply_history", "demo.apply history", ":6: function:"),
            ("\"10s\"", "\"10 parsecs\"", ":7: \"10 parsecs\" is not a duration"),
            ("\"skip\"", "\"jump\"", ":12: unknown variant `jump`"),
            ("start = \"new\"", "start = \"old\"", ":14: \"old\" is no start: take \"all\""),
            ("start = \"new\"", "start = 2026-03-01", ":14: \"2026-03-01\" is no start"),
            ("start = \"new\"", "start = -1", ":14: "),
            ("concurrency = 16", "concurrency = 0", "concurrency must be at least 1"),
            ("concurrency = 16", "max_crashes = 1", "max_crashes must be at least 2"),
            ("concurrency = 16", "time_limit = \"1000d\"", "time_limit must be at most 365 days"),
            ("\"10s\"", "\"99999999999999999999y\"", ":7: \"99999999999999999999y\" is not a duration"),
            ("concurrency = 16", "inbox_retention = \"10000y\"", "inbox_retention must be at most 36500 days"),
            ("\"heavy\"", "\"too heavy\"", "\"too heavy\" is not the name of a queue"),
            ("\"ORDERS\"", "\"ORDERS.NEW\"", "\"ORDERS.NEW\" cannot be the name of a stream"),
            ("\"orders\"", "\"orders.>\"", ":11: \"orders.>\" is not a subject"),
            ("types = [\"pgbench.history\"]\n", "", "missing field `types`"),
        ] {
            let error = parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        for (from, to, expected) in [
            ("https://shop", "shop", ":6: url:"),
            ("\"structured\"", "\"other\"", ":7: unknown variant `other`"),
            ("\"5s\"", "\"2m\"", "the timeout of http must not be longer than time_limit"),
            ("Authorization", "Content-Length", ":9: headers:"),
            ("cert = \"c\"\n", "", ":11: key:"),
            ("https://shop", "http://shop", ":11: cert:"),
            ("409 =", "4xx =", ":10: answers:"),
            ("\"done\"", "\"fine\"", ":10: unknown variant `fine`"),
            ("mode", "mod", ":7: unknown field `mod`"),
            ("[subscriber.http]", "sql = { function = \"f\" }\n[subscriber.http]", "exactly one"),
        ] {
            let error = parse(&WEBHOOK.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let neither = GOOD.replace("sql = { function = \"demo.apply_history\" }", "");
        assert!(parse(&neither).unwrap_err().contains("exactly one"));
        let twice = format!("{GOOD}{GOOD}");
        assert!(parse(&twice).unwrap_err().contains("another subscriber branch-balance"));
        assert!(parse("").unwrap_err().contains("no [[subscriber]]"));
    }

    /// Whatever stands in a file, it is read, or refused at a place that can be found.
    fn check(text: &str) {
        match parse(text) {
            Ok(subscribers) => assert!(!subscribers.is_empty()),
            Err(problem) => {
                let rest = problem.strip_prefix(':').expect("it begins with the place");
                let (line, what) = rest.split_once(": ").unwrap_or(("", rest.trim_start()));
                let line: usize = if line.is_empty() { 1 } else { line.parse().unwrap_or(1) };
                assert!(!what.trim().is_empty() && (1..=text.lines().count() + 1).contains(&line), "{problem}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_file_or_is_refused(text in ".{0,200}", raw in proptest::prelude::any::<String>()) {
            check(&text);
            check(&raw);
        }

        #[test]
        fn a_file_with_something_else_in_it_is_read_or_refused(
            webhook in proptest::bool::ANY,
            at in proptest::prelude::any::<proptest::sample::Index>(),
            length in 0..40_usize,
            inserted in proptest::prop_oneof![
                proptest::sample::select(vec!["\"", "[", "]]", "{", "\n", "=", "0", "-1", "18446744073709551616", "1e400", "\"\"", "''",
                    "\"\\u0000\"", "\"0s\"", "\"99999999999999999y\"", "\"*\"", "nan", "1979-05-27", "\u{feff}", "\r", "\0"])
                    .prop_map(String::from),
                "\\PC{0,20}",
            ],
        ) {
            let mut file: Vec<char> = if webhook { WEBHOOK } else { GOOD }.chars().collect();
            let start = at.index(file.len());
            let end = (start + length).min(file.len());
            file.splice(start..end, inserted.chars());
            check(&file.into_iter().collect::<String>());
        }
    }
}
