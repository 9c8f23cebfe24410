//! `aftercommit capture`: tables whose changes become events.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::terminal::{plain, table};
use super::{as_json, header};
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::session::{Session, Tx};
use aftercommit_core::postgres::{self, database_error};
use aftercommit_lifecycle::capture::{self, Installed, Operation, Oversize};

#[derive(Subcommand)]
pub(super) enum Capture {
    /// Publish the changes of a table from now on, or change how; harmless when it is so already
    #[command(after_help = "Examples:\n  aftercommit capture add public.orders --type order\n  \
                            aftercommit capture add public.orders --type order --column id,state --on update --print")]
    Add(Box<Add>),
    /// Compare all captures with their tables; exit with status 1 when one is not as it should be
    #[command(after_help = "Example:\n  aftercommit capture check")]
    Check(Look),
    /// Show which tables are captured, and how
    #[command(after_help = "Example:\n  aftercommit capture list --json")]
    List(Look),
    /// Publish the changes of a table no longer; events that were written stay
    #[command(after_help = "Example:\n  aftercommit capture remove public.orders")]
    Remove(Remove),
}

#[derive(Args)]
pub(super) struct Add {
    /// The table with its schema, as SQL names it: public.orders, or 'public."Orders"'
    #[arg(value_name = "TABLE")]
    table: String,
    /// What the events' types begin with: order makes order.inserted, order.updated, order.deleted
    #[arg(long = "type", value_name = "TYPE")]
    event_type: String,
    /// The ordering key: a column, or several SQL identifiers with commas between them; the primary key by default
    #[arg(long, value_name = "COLUMNS")]
    key: Option<String>,
    /// The columns that events carry, separated by commas or given several times; all but generated ones by default
    #[arg(long = "column", value_name = "NAME", value_delimiter = ',')]
    columns: Vec<String>,
    /// Publish an update only when one of these columns changes; by default those that events carry
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    watch: Vec<String>,
    /// Publish only these operations; all by default
    #[arg(long = "on", value_name = "OPERATION", value_delimiter = ',')]
    operations: Vec<On>,
    /// Let updates carry the old values, too
    #[arg(long)]
    old: bool,
    /// A header that all events have; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// A header with the value of a column; may be given several times
    #[arg(long = "header-column", value_name = "NAME=COLUMN", value_parser = header)]
    header_columns: Vec<(String, String)>,
    /// Columns that look like a secret by their name and are none
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allow: Vec<String>,
    /// What becomes of an event that is too large
    #[arg(long, value_enum, default_value = "truncate-columns")]
    oversize: Policy,
    /// Leave sessions alone that apply what another server sends (session_replication_role = replica); captured by default
    #[arg(long)]
    only_origin: bool,
    /// Print the SQL instead, for a migration of the service
    #[arg(long, conflicts_with = "json")]
    print: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Look {
    /// Print them as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Remove {
    /// The table with its schema, as SQL names it
    #[arg(value_name = "TABLE")]
    table: String,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    Insert,
    Update,
    Delete,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Policy {
    /// Fail the statement that changes the row
    Fail,
    /// Leave out the largest columns
    TruncateColumns,
    /// Leave out all columns but the key
    KeyOnly,
}

impl Add {
    fn capture(&self) -> capture::Capture {
        let mut capture = capture::Capture::new(&self.table, &self.event_type).allow(&self.allow);
        if let Some(key) = &self.key {
            capture = capture.key(key);
        }
        if !self.columns.is_empty() {
            capture = capture.columns(&self.columns);
        }
        if !self.watch.is_empty() {
            capture = capture.watch(&self.watch);
        }
        if !self.operations.is_empty() {
            capture = capture.operations(self.operations.iter().map(|on| match on {
                On::Insert => Operation::Insert,
                On::Update => Operation::Update,
                On::Delete => Operation::Delete,
            }));
        }
        if self.old {
            capture = capture.old_values();
        }
        if self.only_origin {
            capture = capture.only_origin();
        }
        for (name, value) in &self.headers {
            capture = capture.header(name, value);
        }
        for (name, column) in &self.header_columns {
            capture = capture.header_from(name, column);
        }
        capture.oversize(match self.oversize {
            Policy::Fail => Oversize::Fail,
            Policy::TruncateColumns => Oversize::TruncateColumns,
            Policy::KeyOnly => Oversize::KeyOnly,
        })
    }
}

pub(super) async fn run(command: Capture) -> Result<(String, ExitCode), Error> {
    match command {
        Capture::Add(command) => add(*command).await.map(|text| (text, ExitCode::SUCCESS)),
        Capture::Check(command) => check(command).await,
        Capture::List(command) => list(command).await.map(|text| (text, ExitCode::SUCCESS)),
        Capture::Remove(command) => remove(command).await,
    }
}

async fn session(args: &PostgresArgs) -> Result<Session, Error> {
    postgres::connect(&args.config()?, "aftercommit").await
}

/// A transaction that gives up after three seconds, because everybody who writes to a table waits behind who waits for its lock.
async fn begin(session: &mut Session) -> Result<Tx<'_>, Error> {
    let begun = session.begin_and("; set local lock_timeout = '3s'").await;
    begun.map_err(|error| database_error("a transaction cannot begin", error))
}

async fn commit(tx: Tx<'_>) -> Result<(), Error> {
    tx.commit().await.map_err(|error| database_error("the change was not committed", error))
}

async fn add(command: Add) -> Result<String, Error> {
    let (capture, schema) = (command.capture(), command.postgres.config()?.schema);
    if command.print {
        return Ok(capture.sql(&schema));
    }
    let mut session = session(&command.postgres).await?;
    let mut tx = begin(&mut session).await?;
    let done = capture.install_in(&schema, tx.for_others()).await?;
    commit(tx).await?;
    let (word, text) = match done {
        Installed::Installed => ("installed", "is captured from now on"),
        Installed::Replaced => ("replaced", "is captured as asked for from now on; it was in another way before"),
        Installed::Unchanged => ("unchanged", "is captured in this way already"),
    };
    if command.json {
        return as_json(&json!({ "table": command.table, "result": word }));
    }
    Ok(format!("{} {text}\n", plain(&command.table)))
}

async fn list(command: Look) -> Result<String, Error> {
    let schema = command.postgres.config()?.schema;
    let mut session = session(&command.postgres).await?;
    let mut tx = begin(&mut session).await?;
    let captures = capture::list_in(&schema, tx.for_others()).await?;
    if command.json {
        return as_json(&captures);
    }
    if captures.is_empty() {
        return Ok("no table is captured\n".into());
    }
    let row = |captured: &capture::Captured| {
        let texts = [
            captured.table.clone(),
            captured.event_type.clone(),
            captured.key.join(", "),
            captured.operations.join(", "),
            captured.columns.join(", "),
        ];
        texts.iter().map(|text| plain(text).to_string()).collect()
    };
    Ok(table(&["table", "type", "key", "on", "columns"], &captures.iter().map(row).collect::<Vec<_>>()))
}

async fn check(command: Look) -> Result<(String, ExitCode), Error> {
    let schema = command.postgres.config()?.schema;
    let mut session = session(&command.postgres).await?;
    let mut tx = begin(&mut session).await?;
    let captures = capture::check_in(&schema, tx.for_others()).await?;
    let exit = if captures.iter().all(|checked| checked.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if command.json {
        return Ok((as_json(&captures)?, exit));
    }
    let mut text = String::new();
    for checked in &captures {
        let verdict = if checked.ok { "as it should be" } else { "not as it should be" };
        text += &format!("{}: {verdict}\n", plain(&checked.table));
        text.extend(checked.problems.iter().map(|problem| format!("  {}\n", plain(problem))));
        text.extend(checked.remedy.iter().map(|remedy| format!("  to put it right: {}\n", plain(remedy))));
        text.extend(checked.notes.iter().map(|note| format!("  note: {}\n", plain(note))));
    }
    if captures.is_empty() {
        text += "no table is captured\n";
    }
    Ok((text, exit))
}

async fn remove(command: Remove) -> Result<(String, ExitCode), Error> {
    let schema = command.postgres.config()?.schema;
    let mut session = session(&command.postgres).await?;
    let mut tx = begin(&mut session).await?;
    let removed = capture::remove_in(&schema, tx.for_others(), &command.table).await?;
    commit(tx).await?;
    let exit = if removed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if command.json {
        return Ok((as_json(&json!({ "table": command.table, "removed": removed }))?, exit));
    }
    let text = if removed { "is captured no longer" } else { "was not captured" };
    Ok((format!("{} {text}\n", plain(&command.table)), exit))
}
