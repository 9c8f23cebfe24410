//! `[[eraser]]` and `[[coordinator]]` in `worker.toml`: participants of erasures, and who takes their answers, without Rust code.
//!
//! ```toml
//! [[eraser]]
//! name = "orders"                    # among the participants of erasures
//! subscriber = "orders-erasures"     # durable name; the name and `-erasures` when left out
//! chunk = 1000                       # rows that one transaction deletes
//! rest = 100                         # rests a hundred times as long as it works; not at all when left out
//! time_limit = "1m"                  # of a preview, and of one transaction
//! queue = "heavy"                    # as of a subscriber; so are stream and prefix
//!
//! [[eraser.subject]]
//! kind = "tenant"
//! forget = { keys = ["tenant-{id}"], key_prefixes = ["tenant-{id}/"] }   # events with these keys; needs the role eraser
//!
//! [[eraser.subject.table]]           # children first
//! table = "public.items"
//! parent = { table = "public.orders", column = "order_id" }   # `references`: the parent's column
//!
//! [[eraser.subject.table]]
//! table = "public.orders"
//! column = "tenant_id"
//! keep = "is_template"               # rows that stay
//!
//! [[eraser.subject.table]]
//! table = "public.old_orders"
//! where = "tenant_id = $1::bigint"   # SQL; $1 is the subject's id as text
//! optional = true                    # it need not be there
//!
//! [[eraser]]                         # of a service behind HTTP
//! name = "models"
//! http = { url = "https://models.example/erase", timeout = "30s", headers = { Authorization = "env:TOKEN" } }
//!
//! [[coordinator]]                    # in the requester's database: takes the answers of one stream
//! subscriber = "erasures"            # durable name; `erasures` when left out
//! verify_after = "60s"               # how long after the last answer all look once more
//! ask_again = "10m"                  # who has not answered for so long is asked again, and overdue erasures are counted; not at all when left out
//! stream = "ORDERS"                  # as of a subscriber; so are prefix and queue
//! ```
//!
//! Behind HTTP each preview and each step is a POST of `{"subject": {"kind", "id"}, "act", "position"}`; `act` is `preview`, `erase` or
//! `verify`, and `position` is what the answer before had as `next`. The answer is `{"counts": {…}, "notes": […], "next": …}`.

use std::path::Path;
use std::time::Duration;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::job::Counts;
use aftercommit_core::subscription::check_name;
use aftercommit_lifecycle::erase::{
    self, Coordinator, Eraser, Erasing, Erasure, Events, Outcome, Preview, Requested, Rows, Subject, Tables,
};
use aftercommit_lifecycle::fanout::{Participant, Step};
use aftercommit_outbox::subject::SubjectPrefix;
use aftercommit_worker::{Endpoint, HandlerError, Registry, Section, Subscriber, endpoint};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::PgTransaction;

/// As the file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    subscriber: Option<String>,
    chunk: Option<u32>,
    #[serde(default)]
    rest: f64,
    time_limit: Option<String>,
    queue: Option<String>,
    stream: Option<String>,
    prefix: Option<String>,
    #[serde(default)]
    subject: Vec<Kind>,
    http: Option<toml::Table>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kind {
    kind: String,
    #[serde(default)]
    table: Vec<TableEntry>,
    #[serde(default)]
    forget: Forget,
}

/// Keys of events, with `{id}` for the subject's id.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Forget {
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    key_prefixes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableEntry {
    table: String,
    column: Option<String>,
    r#where: Option<String>,
    parent: Option<Parent>,
    keep: Option<String>,
    #[serde(default)]
    optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parent {
    table: String,
    column: String,
    references: Option<String>,
}

impl From<TableEntry> for Rows {
    fn from(entry: TableEntry) -> Self {
        let mut rows = Self::of(entry.table);
        if let Some(column) = entry.column {
            rows = rows.column(column);
        }
        if let Some(sql) = entry.r#where {
            rows = rows.condition(sql);
        }
        if let Some(Parent { table, column, references }) = entry.parent {
            rows = match references {
                Some(references) => rows.parent_by(column, table, references),
                None => rows.parent(column, table),
            };
        }
        if let Some(keep) = entry.keep {
            rows = rows.keep(keep);
        }
        if entry.optional { rows.optional() } else { rows }
    }
}

/// Reads the subscribers of a `worker.toml`, erasers among them. `postgres` is the database in which each step of an eraser commits;
/// without it all steps of an erasure are one transaction.
///
/// # Errors
/// When the file cannot be read or is wrong; the message names the file, the line and the key.
pub(crate) fn read_file(path: &Path, postgres: Option<&PostgresConfig>) -> Result<Vec<Subscriber>, Error> {
    Ok(read(path, postgres)?.0)
}

/// The same, with the reconciler that a coordinator asks for.
///
/// # Errors
/// As of [`read_file`].
pub(crate) fn read_registry(path: &Path, postgres: &PostgresConfig) -> Result<Registry, Error> {
    let (subscribers, ask_again) = read(path, Some(postgres))?;
    let registry = Registry::from(subscribers);
    Ok(match ask_again {
        Some(patience) => registry.reconciler(erase::Overdue::new(patience)),
        None => registry,
    })
}

/// Subscribers, and after how long participants that have not answered are asked again: one reconciler does that for all streams.
fn read(path: &Path, postgres: Option<&PostgresConfig>) -> Result<(Vec<Subscriber>, Option<Duration>), Error> {
    let (mut subscribers, sections) = aftercommit_worker::read_file(path)?;
    let mut ask_again: Option<Duration> = None;
    for section in sections {
        let Section { kind, place, table } = section;
        let refuse = |problem: String| Error::new(ErrorKind::Config, format!("{place}: [[{kind}]]: {problem}"));
        let unreadable = |error: toml::de::Error| refuse(error.message().to_string());
        let subscriber = match kind {
            "coordinator" => {
                let entry: CoordinatorEntry = table.try_into().map_err(unreadable)?;
                let patience = entry.patience().map_err(refuse)?;
                ask_again = ask_again.into_iter().chain(patience).min();
                coordinator(entry)
            }
            _ => subscriber(table.try_into().map_err(unreadable)?, postgres),
        };
        let subscriber = subscriber.map_err(refuse)?;
        if subscribers.iter().any(|other| other.name() == subscriber.name()) {
            return Err(refuse(format!("there is another subscriber {}", subscriber.name())));
        }
        subscribers.push(subscriber);
    }
    Ok((subscribers, ask_again))
}

fn subscriber(entry: Entry, postgres: Option<&PostgresConfig>) -> Result<Subscriber, String> {
    let Entry { name, subscriber, chunk, rest, time_limit, queue, stream, prefix, subject, http } = entry;
    check_name(&name).map_err(|problem| format!("name: {problem}"))?;
    if !rest.is_finite() || rest < 0.0 {
        return Err(format!("rest: {rest} is not 0 or more"));
    }
    let durable = subscriber.unwrap_or_else(|| format!("{name}-erasures"));
    check_name(&durable).map_err(|problem| format!("subscriber: {problem}"))?;
    // Each crash leaves it further on.
    let mut made = Subscriber::new(durable).max_attempts(ATTEMPTS).max_crashes(CRASHES);
    made = match (subject.is_empty(), http) {
        (false, None) => {
            let (mut tables, mut keys) = (Tables::new(&name), Vec::new());
            for Kind { kind, table, forget: Forget { keys: whole, key_prefixes } } in subject {
                keys.extend(whole.into_iter().map(|key| (kind.clone(), key, false)));
                keys.extend(key_prefixes.into_iter().map(|key| (kind.clone(), key, true)));
                tables = tables.of(kind, table.into_iter().map(Rows::from));
            }
            if let Some(chunk) = chunk {
                tables = tables.chunk(chunk);
            }
            tables.check()?;
            if keys.is_empty() {
                made.on::<Requested>(in_steps(erase::participant(tables).rest(rest), postgres)?)
            } else {
                let with = |events: Events<Tables>, (kind, key, prefix): (String, String, bool)| match prefix {
                    true => events.key_prefix(kind, key),
                    false => events.key(kind, key),
                };
                let events = keys.into_iter().fold(Events::of(tables), with);
                events.check().map_err(|problem| format!("forget: {problem}"))?;
                made.on::<Requested>(in_steps(erase::participant(events).rest(rest), postgres)?)
            }
        }
        (true, Some(http)) if chunk.is_none() => {
            let endpoint = endpoint(http).map_err(|problem| format!("http: {problem}"))?;
            made.on::<Requested>(in_steps(erase::participant(HttpEraser { name, endpoint }).rest(rest), postgres)?)
        }
        (true, Some(_)) => return Err("chunk: a service behind HTTP has no tables".into()),
        _ => return Err(format!("subject, http: the eraser {name} needs exactly one of them")),
    };
    if let Some(limit) = time_limit {
        let limit = humantime::parse_duration(&limit)
            .map_err(|error| format!("time_limit: {limit:?} is no duration: {error}"))?;
        made = made.time_limit(limit);
    }
    placed(made, queue, stream, prefix)
}

/// In a queue, and at a stream with a prefix, where those are given.
fn placed(
    mut made: Subscriber,
    queue: Option<String>,
    stream: Option<String>,
    prefix: Option<String>,
) -> Result<Subscriber, String> {
    if let Some(queue) = queue {
        made = made.queue(queue);
    }
    if let Some(stream) = stream {
        made = made.stream(stream);
    }
    if let Some(prefix) = prefix {
        made = made.prefix(SubjectPrefix::new(prefix).map_err(|error| format!("prefix: {error}"))?);
    }
    Ok(made)
}

/// Who takes the answers of one stream, as the file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CoordinatorEntry {
    subscriber: Option<String>,
    verify_after: Option<String>,
    ask_again: Option<String>,
    queue: Option<String>,
    stream: Option<String>,
    prefix: Option<String>,
}

impl CoordinatorEntry {
    fn patience(&self) -> Result<Option<Duration>, String> {
        let Some(text) = &self.ask_again else { return Ok(None) };
        match humantime::parse_duration(text) {
            Ok(patience) if patience >= Duration::from_secs(1) => Ok(Some(patience)),
            Ok(_) => Err(format!("ask_again: {text:?} is less than a second")),
            Err(error) => Err(format!("ask_again: {text:?} is no duration: {error}")),
        }
    }
}

fn coordinator(entry: CoordinatorEntry) -> Result<Subscriber, String> {
    let CoordinatorEntry { subscriber, verify_after, queue, stream, prefix, ask_again: _ } = entry;
    let durable = subscriber.unwrap_or_else(|| "erasures".into());
    check_name(&durable).map_err(|problem| format!("subscriber: {problem}"))?;
    let mut coordinator = Coordinator::new();
    if let Some(text) = verify_after {
        let wait = humantime::parse_duration(&text).map_err(|error| format!("verify_after: {text:?}: {error}"))?;
        coordinator = coordinator.verify_after(wait);
    }
    placed(Subscriber::new(durable).on::<Outcome>(coordinator), queue, stream, prefix)
}

/// More than a participant makes before it answers that it failed.
const ATTEMPTS: u32 = 10;
/// How often a process may die at one erasure: what it has deleted stays, so the next one has less to do.
const CRASHES: u32 = 50;

fn in_steps<E: Eraser>(
    participant: Participant<Erasure, Erasing<E>>,
    postgres: Option<&PostgresConfig>,
) -> Result<Participant<Erasure, Erasing<E>>, String> {
    match postgres {
        Some(postgres) => participant.each_step_commits_in(postgres).map_err(|error| error.report()),
        None => Ok(participant),
    }
}

/// An eraser behind HTTP.
struct HttpEraser {
    name: String,
    endpoint: Endpoint,
}

/// What it answers.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    counts: Counts,
    #[serde(default)]
    notes: Vec<String>,
    #[serde(default)]
    next: Option<Value>,
}

impl HttpEraser {
    async fn ask(&self, subject: &Subject, act: &str, position: Option<Value>) -> Result<Answer, HandlerError> {
        let question = json!({ "subject": subject, "act": act, "position": position });
        let answer = self.endpoint.exchange(question.to_string().into_bytes()).await?;
        // The answer may hold what is nobody's business, so it is not repeated.
        serde_json::from_slice(&answer).map_err(|_| {
            HandlerError::retry(format!(
                "{} did not answer with counts, and notes and next if need be, as JSON",
                self.endpoint
            ))
        })
    }

    async fn count(&self, subject: &Subject, act: &str) -> Result<Preview, HandlerError> {
        let Answer { counts, notes, next } = self.ask(subject, act, None).await?;
        match next {
            None => Ok(Preview { counts, notes }),
            Some(_) => {
                Err(HandlerError::reject(format!("{} answered a {act} with `next`: it must count all", self.endpoint)))
            }
        }
    }
}

impl Eraser for HttpEraser {
    fn name(&self) -> &str {
        &self.name
    }

    async fn preview(&self, _: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        self.count(subject, "preview").await
    }

    async fn step(
        &self,
        _: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let Answer { counts, notes, next } = self.ask(subject, "erase", position).await?;
        Ok(Step { counts, notes, next })
    }

    async fn verify(&self, _: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        self.count(subject, "verify").await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that the documentation of this module shows.
    fn shown() -> String {
        let source = include_str!("erasers.rs");
        let lines =
            source.lines().skip_while(|line| *line != "//! ```toml").skip(1).take_while(|line| *line != "//! ```");
        lines.map(|line| line.strip_prefix("//!").unwrap_or_default().trim_start().to_string() + "\n").collect()
    }

    fn read(text: &str) -> Result<Vec<Subscriber>, String> {
        let file = std::env::temp_dir().join(format!("erasers-{}.toml", uuid::Uuid::now_v7()));
        std::fs::write(&file, text).map_err(|error| error.to_string())?;
        let read = read_file(&file, None).map_err(|error| error.report());
        _ = std::fs::remove_file(file);
        read
    }

    #[test]
    fn the_file_of_the_documentation_says_what_it_shows() {
        let subscribers = read(&shown()).unwrap_or_else(|error| panic!("{error}"));
        let names: Vec<&str> = subscribers.iter().map(Subscriber::name).collect();
        assert_eq!(names, ["orders-erasures", "models-erasures", "erasures"]);
        assert_eq!(subscribers[2].types(), ["erasure.outcome"]);
        assert_eq!(subscribers[0].types(), ["erasure.requested"]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name_and_line() {
        let table = |more: &str| {
            format!(
                "[[eraser]]\nname = 'a'\n[[eraser.subject]]\nkind = 'tenant'\n[[eraser.subject.table]]\ntable = 'a'\n{more}"
            )
        };
        for (text, told) in [
            ("[[eraser]]\nname = 'a'\nnmae = 'b'".to_string(), ":1: [[eraser]]: unknown field `nmae`"),
            ("\n[[eraser]]\nname = 'a'".into(), ":2: [[eraser]]: subject, http: the eraser a needs exactly one"),
            ("[[eraser]]\nname = 'a b'".into(), "name: "),
            ("[[coordinator]]\nverify_afer = '1s'".into(), ":1: [[coordinator]]: unknown field `verify_afer`"),
            ("[[coordinator]]\nverify_after = 'soon'".into(), "verify_after: "),
            ("[[coordinator]]\nask_again = 'never'".into(), "ask_again: \"never\" is no duration"),
            ("[[coordinator]]\nask_again = '10ms'".into(), "ask_again: \"10ms\" is less than a second"),
            (table(""), "the table a needs exactly one of column, condition and parent"),
            (table("where = 'true'"), "does not ask for the subject's id"),
            (table("column = 'x'\nkepe = 'y'"), "unknown field `kepe`"),
            (
                "[[eraser]]\nname = 'a'\nsubject = [{ kind = 'tenant', table = [{ table = 'a', column = 'b' }], forget = { keys = ['x'] } }]"
                    .into(),
                "forget: the key \"x\" lacks {id}",
            ),
            (table("parent = { table = 'b', column = 'c' }"), "its parent b must be named below it"),
            ("[[eraser]]\nname = 'a'\nhttp = { url = 'ftp://x' }".into(), "http: url: it must begin with http"),
            ("[[eraser]]\nname = 'a'\nhttp = { url = 'http://u:p@x/' }".into(), "http: url: it must name a host, and no user"),
            ("[[eraser]]\nname = 'a'\nhttp = { url = 'http://x', mode = 'binary' }".into(), "unknown field `mode`"),
            ("[[eraser]]\nname = 'a'\nchunk = 5\nhttp = { url = 'http://x' }".into(), "chunk: "),
            ("[[eraser]]\nname = 'a'\ntime_limit = '1x'\nhttp = { url = 'http://x' }".into(), "time_limit: "),
            ("[[eraser]]\nname = 'a'\nprefix = ' '\nhttp = { url = 'http://x' }".into(), "prefix: "),
            (
                "[[subscriber]]\nname = 'a-erasures'\ntypes = ['*']\nsql.function = 'f'\n[[eraser]]\nname = 'a'\nhttp.url = 'http://x'"
                    .into(),
                "there is another subscriber a-erasures",
            ),
        ] {
            let Err(error) = read(&text) else { panic!("{text}") };
            assert!(error.contains(told), "{told}: {error}");
        }
    }
}
