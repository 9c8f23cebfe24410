//! `aftercommit dead`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::bulk::{self, Act, Acted, Bulk, PREVIEW};
use super::selection::{LetterArgs, SelectedLetters};
use super::terminal::{cut, payload, payload_member, plain, table, time};
use super::who::WhoArgs;
use super::{as_json, given_payload, header};
use crate::cli::PostgresArgs;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::dead::{self, DeadLetter, Edit, Edited, Filter, Group, OpenedLetter};

#[derive(Subcommand)]
pub(super) enum Dead {
    /// Change the payload or the headers of one; the audit trail keeps what was
    #[command(after_help = "Example:\n  aftercommit dead edit 17 --payload @corrected.json --retry")]
    Edit(Box<EditArgs>),
    /// Give some up for good; the audit trail keeps the events
    #[command(after_help = "Example:\n  aftercommit dead discard 17 18")]
    Discard(Box<Bulk<SelectedLetters>>),
    /// List them in the order in which they would run again
    #[command(after_help = "Example:\n  aftercommit dead list --subscriber mails --group")]
    List(Box<List>),
    /// Send some back to their subscribers, to be run from what is stored here
    #[command(after_help = "Example:\n  aftercommit dead retry --subscriber mails --error printer --dry-run")]
    Retry(Box<Bulk<SelectedLetters>>),
    /// Print everything that is known of one
    #[command(after_help = "Example:\n  aftercommit dead show 17")]
    Show(Show),
}

#[derive(Args)]
pub(super) struct List {
    #[command(flatten)]
    letters: LetterArgs,
    /// Maximum number to show
    #[arg(long, default_value_t = 100)]
    limit: i64,
    /// Count those with the same subscriber, type and reason
    #[arg(long)]
    group: bool,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Show {
    /// The letter's id
    id: i64,
    /// Print the payload too
    #[arg(long = "show-payload", alias = "payload")]
    payload: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct EditArgs {
    /// The letter's id
    id: i64,
    /// The new payload; @FILE reads it from a file, - from standard input
    #[arg(long, value_name = "TEXT")]
    payload: Option<String>,
    /// A header to add or to replace; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// A header to take away; may be given several times
    #[arg(long, value_name = "NAME")]
    remove_header: Vec<String>,
    /// Send it back to its subscriber right away
    #[arg(long)]
    retry: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Dead) -> Result<(String, ExitCode), Error> {
    let text = match command {
        Dead::Edit(command) => edit(*command).await?,
        Dead::Discard(command) => return bulk::run(*command, Action::Discard).await,
        Dead::List(command) => list(*command).await?,
        Dead::Retry(command) => return bulk::run(*command, Action::Retry).await,
        Dead::Show(command) => show(command).await?,
    };
    Ok((text, ExitCode::SUCCESS))
}

async fn list(command: List) -> Result<String, Error> {
    let (config, filter) = (command.postgres.config()?, command.letters.filter());
    if command.group {
        let groups = dead::groups(&config, &filter, command.limit).await?;
        return if command.json { as_json(&groups) } else { Ok(group_table(&groups)) };
    }
    let letters = dead::list(&config, &filter, command.limit).await?;
    if command.json {
        return as_json(&letters);
    }
    let more = match i64::try_from(letters.len()).is_ok_and(|shown| shown == command.limit) {
        true => format!("the first {}; --limit shows more, --group counts\n", command.limit),
        false => String::new(),
    };
    Ok(letter_table(&letters) + &more)
}

fn letter_table(letters: &[DeadLetter]) -> String {
    if letters.is_empty() {
        return "no dead letters\n".into();
    }
    let row = |letter: &DeadLetter| {
        vec![
            letter.id.to_string(),
            time(letter.dead_at),
            plain(&letter.subscriber),
            letter.event_id.to_string(),
            plain(&letter.event_type),
            letter.key.as_deref().map_or_else(|| "-".into(), |key| cut(key, 40)),
            letter.attempts.to_string(),
            cut(&letter.reason, 120),
        ]
    };
    let rows: Vec<_> = letters.iter().map(row).collect();
    table(&["id", "dead since", "subscriber", "event", "type", "key", "attempts", "reason"], &rows)
}

fn group_table(groups: &[Group]) -> String {
    if groups.is_empty() {
        return "no dead letters\n".into();
    }
    let row = |group: &Group| {
        let Group { subscriber, event_type, reason, letters, oldest, newest } = group;
        vec![letters.to_string(), time(*oldest), time(*newest), plain(subscriber), plain(event_type), cut(reason, 120)]
    };
    let rows: Vec<_> = groups.iter().map(row).collect();
    table(&["letters", "oldest", "newest", "subscriber", "type", "reason"], &rows)
}

async fn show(command: Show) -> Result<String, Error> {
    let opened = dead::show(&command.postgres.config()?, command.id).await?;
    if !command.json {
        return Ok(letter_text(&opened, command.payload));
    }
    let mut json = serde_json::to_value(&opened)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "the answer cannot be written as JSON", error))?;
    if let (true, Value::Object(members)) = (command.payload, &mut json) {
        let (name, value) = payload_member(&opened.payload);
        members.insert(name.into(), value.into());
    }
    as_json(&json)
}

fn letter_text(opened: &OpenedLetter, with_payload: bool) -> String {
    let OpenedLetter { letter, headers, payload: bytes, audit } = opened;
    let sequence = letter.outbox_id.map_or_else(String::new, |id| format!(", outbox id {id}"));
    let mut lines = vec![
        ("letter", letter.id.to_string()),
        ("subscriber", plain(&letter.subscriber)),
        ("event", letter.event_id.to_string()),
        ("type", format!("{}, version {}", plain(&letter.event_type), letter.version)),
        ("key", letter.key.as_deref().map_or_else(|| "none".into(), plain)),
        ("source", plain(&letter.source) + &sequence),
        ("written", time(letter.time)),
        ("message", format!("{} of stream {}", letter.stream_sequence, plain(&letter.stream))),
        ("attempts", format!("{}, the first failed {}", letter.attempts, time(letter.first_failed_at))),
        ("dead since", time(letter.dead_at)),
        ("reason", plain(&letter.reason)),
    ];
    lines.extend(headers.iter().map(|(name, value)| ("header", format!("{}: {}", plain(name), plain(value)))));
    for entry in audit {
        lines.push(("audit", format!("{}  {}  {}", time(entry.at), plain(&entry.who), plain(&entry.action))));
    }
    let size = format!("{} bytes, {}", letter.payload_bytes, plain(&letter.content_type));
    lines.push(("payload", if with_payload { size } else { size + "; --show-payload prints it" }));
    let mut text: String = lines.into_iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect();
    if with_payload {
        text += &format!("\n{}\n", payload(bytes));
    }
    text
}

#[derive(Clone, Copy)]
enum Action {
    Retry,
    Discard,
}

impl Act for Action {
    fn command(&self) -> &'static str {
        match self {
            Self::Retry => "dead retry",
            Self::Discard => "dead discard",
        }
    }

    fn noun(&self) -> &'static str {
        "dead letter"
    }

    fn done(&self) -> &'static str {
        match self {
            Self::Retry => "redriven",
            Self::Discard => "discarded",
        }
    }

    fn look(&self) -> &'static str {
        "`aftercommit dead list`"
    }

    async fn count(&self, config: &PostgresConfig, filter: &Filter) -> Result<i64, Error> {
        dead::count(config, filter).await
    }

    async fn preview(&self, config: &PostgresConfig, filter: &Filter) -> Result<String, Error> {
        Ok(letter_table(&dead::list(config, filter, PREVIEW).await?))
    }

    async fn act(&self, config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Acted, Error> {
        let ids = match self {
            Self::Retry => dead::retry(config, who, filter).await?,
            Self::Discard => dead::discard(config, who, filter).await?,
        };
        let mut missing: Vec<String> = filter.ids.iter().filter(|id| !ids.contains(id)).map(i64::to_string).collect();
        // An event may have a letter at each of several subscribers, so only none at all is certain.
        if ids.is_empty() {
            missing.extend(filter.events.iter().map(ToString::to_string));
        }
        Ok(Acted { count: ids.len(), missing, more: String::new(), members: vec![("letters", json!(ids))] })
    }
}

async fn edit(command: EditArgs) -> Result<String, Error> {
    let payload = command.payload.as_deref().map(given_payload).transpose()?;
    let edit = Edit {
        payload,
        set_headers: command.headers.into_iter().collect::<BTreeMap<_, _>>(),
        remove_headers: command.remove_header,
        retry: command.retry,
    };
    let edited = dead::edit(&command.postgres.config()?, &command.who.name(), command.id, &edit).await?;
    if command.json { as_json(&edited) } else { Ok(edited_text(command.id, &edited)) }
}

fn edited_text(id: i64, edited: &Edited) -> String {
    let Edited { payload_bytes, payload_sha256, headers_set, headers_removed, retried } = edited;
    let mut text = match payload_sha256.0 == payload_sha256.1 {
        true => "payload     unchanged\n".into(),
        false => format!(
            "payload     {} bytes, SHA-256 {}\nwas         {} bytes, SHA-256 {}\n",
            payload_bytes.1, payload_sha256.1, payload_bytes.0, payload_sha256.0
        ),
    };
    for (what, names) in [("header set ", headers_set), ("header gone", headers_removed)] {
        text.extend(names.iter().map(|name| format!("{what} {}\n", plain(name))));
    }
    text + &match retried {
        true => "redriven to its subscriber\n".into(),
        false => format!("`aftercommit dead retry {id}` sends it back to its subscriber\n"),
    }
}
