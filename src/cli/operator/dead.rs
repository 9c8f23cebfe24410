//! `aftercommit dead`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::selection::{LetterArgs, SelectionArgs};
use super::terminal::{cut, payload, payload_member, plain, table, time};
use super::who::WhoArgs;
use super::{as_json, header, standard_input};
use crate::admin::dead::{self, DeadLetter, Edit, Edited, Filter, Group, OpenedLetter};
use crate::cli::PostgresArgs;
use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind};

/// Rows that a dry run shows.
const PREVIEW: i64 = 10;

#[derive(Subcommand)]
pub(super) enum Dead {
    /// Change the payload or the headers of one; the audit trail keeps what was
    Edit(Box<EditArgs>),
    /// Give some up for good; the audit trail keeps the events
    Discard(Box<Bulk>),
    /// List them in the order in which they would run again
    List(Box<List>),
    /// Send some back to their subscribers, to be run from what is stored here
    Retry(Box<Bulk>),
    /// Print everything that is known of one
    Show(Show),
}

#[derive(Args)]
pub(super) struct List {
    #[command(flatten)]
    letters: LetterArgs,
    /// At most so many
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
    #[arg(long)]
    payload: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Bulk {
    #[command(flatten)]
    selection: SelectionArgs,
    /// Only say what would be done
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Do it to all that the filter finds; not needed for letters that are named by id or event
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct EditArgs {
    /// The letter's id
    id: i64,
    /// A file with the new payload, or - for standard input
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,
    /// A header to add or to replace; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// A header to take away; may be given several times
    #[arg(long, value_name = "NAME")]
    remove_header: Vec<String>,
    /// Send it back to its subscriber right away
    #[arg(long)]
    retry: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Dead) -> Result<String, Error> {
    match command {
        Dead::Edit(command) => edit(*command).await,
        Dead::Discard(command) => bulk(*command, Action::Discard).await,
        Dead::List(command) => list(*command).await,
        Dead::Retry(command) => bulk(*command, Action::Retry).await,
        Dead::Show(command) => show(command).await,
    }
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
    let sequence = letter.sequence.map_or_else(String::new, |sequence| format!(", outbox id {sequence}"));
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
    lines.push(("payload", if with_payload { size } else { size + "; --payload prints it" }));
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

impl Action {
    /// The command's name.
    fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Discard => "discard",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Retry => "sent back",
            Self::Discard => "discarded",
        }
    }

    async fn run(self, config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Vec<i64>, Error> {
        match self {
            Self::Retry => dead::retry(config, who, filter).await,
            Self::Discard => dead::discard(config, who, filter).await,
        }
    }
}

/// Retries or discards. Letters that are named go at once; what is only described goes with --yes, because what a
/// filter finds is seldom known beforehand.
async fn bulk(command: Bulk, action: Action) -> Result<String, Error> {
    let (config, filter) = (command.postgres.config()?, command.selection.filter());
    let said = command.selection.said();
    if said.is_empty() {
        return Err(Error::new(
            ErrorKind::Config,
            "no dead letter is meant: name letters (ids, --event), describe them (--subscriber, --type, --key, --error, \
             --older-than, --newer-than), or say --all",
        ));
    }
    if command.dry_run {
        let letters = dead::count(&config, &filter).await?;
        let shown = letter_table(&dead::list(&config, &filter, PREVIEW).await?);
        let first = if letters > PREVIEW { format!(", the first {PREVIEW}") } else { String::new() };
        return Ok(format!("{} would be {}{first}:\n{shown}", letters_of(letters), action.done()));
    }
    if !command.yes && !filter.names_letters() {
        let (letters, name) = (letters_of(dead::count(&config, &filter).await?), action.name());
        return Err(Error::new(
            ErrorKind::Config,
            format!(
                "nothing was done: {letters} would be {}. See which with `aftercommit dead {name}{said} --dry-run`, then \
                 run `aftercommit dead {name}{said} --yes`",
                action.done()
            ),
        ));
    }
    let ids = action.run(&config, &command.who.name(), &filter).await?;
    let missing: Vec<String> = filter.ids.iter().filter(|id| !ids.contains(id)).map(i64::to_string).collect();
    if !missing.is_empty() || (ids.is_empty() && filter.names_letters()) {
        let missing = if missing.is_empty() { "the event".into() } else { missing.join(", ") };
        return Err(Error::new(
            ErrorKind::NotReady,
            format!(
                "{} {}; no dead letter was found for {missing}: see `aftercommit dead list` and `aftercommit audit`",
                letters_of(ids.len()),
                action.done()
            ),
        ));
    }
    Ok(format!("{} {}\n", letters_of(ids.len()), action.done()))
}

fn letters_of(count: impl ToString) -> String {
    match count.to_string().as_str() {
        "1" => "1 dead letter".into(),
        many => format!("{many} dead letters"),
    }
}

async fn edit(command: EditArgs) -> Result<String, Error> {
    let payload = match &command.payload {
        None => None,
        Some(path) if path.as_os_str() == "-" => Some(standard_input()?),
        Some(path) => Some(std::fs::read(path).map_err(|error| {
            Error::with_source(ErrorKind::Config, format!("the file {} cannot be read", path.display()), error)
        })?),
    };
    let edit = Edit {
        payload,
        set_headers: command.headers.into_iter().collect::<BTreeMap<_, _>>(),
        remove_headers: command.remove_header,
        retry: command.retry,
    };
    let edited = dead::edit(&command.postgres.config()?, &command.who.name(), command.id, &edit).await?;
    Ok(edited_text(command.id, &edited))
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
        true => "sent back to its subscriber\n".into(),
        false => format!("`aftercommit dead retry {id}` sends it back to its subscriber\n"),
    }
}
