//! `aftercommit parked`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::as_json;
use super::bulk::{self, Act, Acted, Bulk, PREVIEW};
use super::selection::SelectedParked;
use super::terminal::{cut, plain, time};
use crate::cli::PostgresArgs;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_operator::Filter;
use aftercommit_operator::parked::{self, ParkedEvent};

#[derive(Subcommand)]
pub(super) enum Parked {
    /// Give some up for good and let go what waits behind them
    #[command(after_help = "Example:\n  aftercommit parked discard 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11")]
    Discard(Box<Bulk<SelectedParked>>),
    /// List them in outbox order
    #[command(after_help = "Example:\n  aftercommit parked list --limit 20")]
    List(List),
    /// Let the relay try some again, and then what waits behind them
    #[command(after_help = "Example:\n  aftercommit parked release --error max_payload --dry-run")]
    Release(Box<Bulk<SelectedParked>>),
}

#[derive(Args)]
pub(super) struct List {
    /// Maximum number to show
    #[arg(long, default_value_t = 100)]
    limit: i64,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Clone, Copy)]
enum Action {
    Release,
    Discard,
}

impl Act for Action {
    fn command(&self) -> &'static str {
        match self {
            Self::Release => "parked release",
            Self::Discard => "parked discard",
        }
    }

    fn noun(&self) -> &'static str {
        "parked event"
    }

    fn done(&self) -> &'static str {
        match self {
            Self::Release => "released",
            Self::Discard => "discarded",
        }
    }

    fn look(&self) -> &'static str {
        "`aftercommit parked list`, where those that only wait behind another one are released with it,"
    }

    async fn count(&self, config: &PostgresConfig, filter: &Filter) -> Result<i64, Error> {
        parked::count(config, filter).await
    }

    async fn preview(&self, config: &PostgresConfig, filter: &Filter) -> Result<String, Error> {
        Ok(lines(&parked::find(config, filter, PREVIEW).await?))
    }

    async fn act(&self, config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Acted, Error> {
        let done = match self {
            Self::Release => parked::release(config, who, filter).await?,
            Self::Discard => parked::discard(config, who, filter).await?,
        };
        let missing = filter.events.iter().filter(|id| !done.events.contains(id)).map(ToString::to_string).collect();
        let going = if done.released == 1 { "event is" } else { "events are" };
        Ok(Acted {
            count: done.events.len(),
            missing,
            more: format!("; {} {going} going out now", done.released),
            members: vec![("events", json!(done.events)), ("released", json!(done.released))],
        })
    }
}

pub(super) async fn run(command: Parked) -> Result<(String, ExitCode), Error> {
    match command {
        Parked::Discard(command) => bulk::run(*command, Action::Discard).await,
        Parked::List(command) => Ok((list(command).await?, ExitCode::SUCCESS)),
        Parked::Release(command) => bulk::run(*command, Action::Release).await,
    }
}

async fn list(command: List) -> Result<String, Error> {
    let events = parked::list(&command.postgres.config()?, command.limit).await?;
    if command.json {
        return as_json(&events);
    }
    if events.is_empty() {
        return Ok("nothing is parked\n".into());
    }
    Ok(lines(&events))
}

fn lines(events: &[ParkedEvent]) -> String {
    let line = |event: &ParkedEvent| {
        let code = event.code.map_or_else(|| "-".into(), |code| code.to_string());
        let key = event.key.as_deref().map_or_else(|| "-".into(), |key| cut(key, 40));
        format!(
            "{}  outbox id {}  {}  key {key}  {}  code {code}  since {}  {}\n",
            event.event_id,
            event.outbox_id,
            plain(&event.event_type),
            event.state,
            time(event.parked_at),
            cut(&event.reason, 300)
        )
    };
    events.iter().map(line).collect()
}
