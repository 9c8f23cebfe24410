//! Acts on many dead letters or parked events at once, all by the same rules: what is named goes at once, what is only
//! described goes with `--yes`, because what a filter finds is seldom known beforehand.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value, json};

use super::as_json;
use super::selection::Selected;
use super::terminal::counted;
use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::Filter;

/// Rows that a dry run shows.
pub(super) const PREVIEW: i64 = 10;

#[derive(Args)]
pub(super) struct Bulk<S: Args> {
    #[command(flatten)]
    pub(super) selection: S,
    /// Only say what would be done
    #[arg(long, conflicts_with = "yes")]
    pub(super) dry_run: bool,
    /// Do it to all that the filter finds; not needed for those that are named by id
    #[arg(long)]
    pub(super) yes: bool,
    /// Print it as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) who: WhoArgs,
    #[command(flatten)]
    pub(super) postgres: PostgresArgs,
}

/// What is done to what.
pub(super) trait Act {
    /// Such as `dead retry`.
    fn command(&self) -> &'static str;
    /// One of what it is done to, such as `dead letter`.
    fn noun(&self) -> &'static str;
    /// Such as `redriven`.
    fn done(&self) -> &'static str;
    /// Where those that are not found can be looked for.
    fn look(&self) -> &'static str;
    async fn count(&self, config: &PostgresConfig, filter: &Filter) -> Result<i64, Error>;
    /// The first of them, as lines.
    async fn preview(&self, config: &PostgresConfig, filter: &Filter) -> Result<String, Error>;
    async fn act(&self, config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Acted, Error>;
}

/// What was done.
pub(super) struct Acted {
    /// Those to which it was done.
    pub(super) count: usize,
    /// Those that are named and were not there.
    pub(super) missing: Vec<String>,
    /// More, behind the count.
    pub(super) more: String,
    /// More, as members of the JSON object.
    pub(super) members: Vec<(&'static str, Value)>,
}

/// What to print, and the exit status.
pub(super) async fn run<S: Args + Selected>(command: Bulk<S>, act: impl Act) -> Result<(String, ExitCode), Error> {
    let (config, filter, said) = (command.postgres.config()?, command.selection.filter(), command.selection.said());
    let (name, noun, done) = (act.command(), act.noun(), act.done());
    if said.is_empty() {
        let problem = format!(
            "no {noun}s selected: name them by id, describe them (--type, --key, --error, --older-than, --newer-than; see \
             `aftercommit {name} --help`), or say --all"
        );
        return Err(Error::new(ErrorKind::Config, problem));
    }
    if command.dry_run {
        let count = act.count(&config, &filter).await?;
        if command.json {
            return Ok((as_json(&json!({ "dry_run": true, "count": count }))?, ExitCode::SUCCESS));
        }
        let shown = act.preview(&config, &filter).await?;
        let first = if count > PREVIEW { format!(", the first {PREVIEW}") } else { String::new() };
        return Ok((format!("{} would be {done}{first}:\n{shown}", counted(count, noun)), ExitCode::SUCCESS));
    }
    if !command.yes && !filter.names_each() {
        let found = counted(act.count(&config, &filter).await?, noun);
        let problem = format!(
            "nothing was done: {found} would be {done}. See which with `aftercommit {name}{said} --dry-run`, then run \
             `aftercommit {name}{said} --yes`"
        );
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let acted = act.act(&config, &command.who.name(), &filter).await?;
    let exit = if acted.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if command.json {
        let members = [("count", json!(acted.count)), ("missing", json!(acted.missing))];
        let members = members.into_iter().chain(acted.members).map(|(name, value)| (name.to_string(), value));
        return Ok((as_json(&members.collect::<Map<_, _>>())?, exit));
    }
    let told = format!("{} {done}", counted(acted.count as u64, noun));
    if !acted.missing.is_empty() {
        let missing = acted.missing.join(", ");
        let problem = format!("{told}; no {noun} was found for {missing}: see {} and `aftercommit audit`", act.look());
        return Err(Error::new(ErrorKind::NotReady, problem));
    }
    Ok((format!("{told}{}\n", acted.more), exit))
}
