//! `aftercommit prune`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::as_json;
use super::terminal::{plain, time};
use crate::cli::http::{self, HttpArgs};
use crate::cli::log::command_span;
use crate::cli::{PostgresArgs, run_role, stop_hard};
use aftercommit_core::error::Error;
use aftercommit_prune::{Plan, PruneConfig, Pruner, SweepResult, SweepStatus, Swept, file, status};

#[derive(Subcommand)]
pub(super) enum Prune {
    /// Show what the next batches would delete, with counts per table and what would make them slow; it changes nothing
    #[command(after_help = "Example:\n  aftercommit prune plan --config prune.toml")]
    Plan(PlanArgs),
    /// Delete finished rows as prune.toml says, again and again, or once with --once
    #[command(after_help = "Examples:\n  aftercommit prune run --config prune.toml --http 0.0.0.0:9465\n  \
                            aftercommit prune run --config prune.toml --once")]
    Run(RunArgs),
    /// Show what was pruned last in each category, those of relay and workers included
    #[command(after_help = "Example:\n  aftercommit prune status")]
    Status(StatusArgs),
}

#[derive(Args)]
pub(super) struct PlanArgs {
    /// What is pruned
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct RunArgs {
    /// What is pruned, and how often. Without it only leases of holders that died long ago
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sweep once and end
    #[arg(long)]
    once: bool,
    /// Print it as JSON, with --once
    #[arg(long, requires = "once")]
    json: bool,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

impl Prune {
    /// Whether it goes on until a signal ends it.
    pub(super) fn goes_on(&self) -> bool {
        matches!(self, Self::Run(RunArgs { once: false, .. }))
    }
}

impl RunArgs {
    fn pruner(&self) -> Result<Pruner, Error> {
        let postgres = self.postgres.config()?;
        let config = self.config.as_deref().map_or_else(|| Ok(PruneConfig::default()), file::load)?;
        Pruner::new(&postgres, config)
    }
}

/// Sweeps until a signal ends it. The exit status is 0 after an orderly stop, 2 when a setting is at fault.
pub(super) fn go_on(command: Prune) -> ExitCode {
    run_role("aftercommit", async |shutdown| {
        let Prune::Run(command) = command else { return Ok(()) };
        let pruner = command.pruner()?;
        let server = command.http.open().await?;
        http::beside(server, Arc::new(pruner.monitor()), pruner.run(shutdown)).await;
        Ok(())
    })
}

/// The text, and the exit status: 1 when a sweep failed or others were in its way.
pub(super) async fn run(command: Prune) -> Result<(String, ExitCode), Error> {
    match command {
        Prune::Plan(command) => {
            let pruner = Pruner::new(&command.postgres.config()?, file::load(&command.config)?)?;
            let plans = pruner.plan().await?;
            let text = match command.json {
                true => {
                    let plan = |(name, plan): &(String, Plan)| json!({ "category": name, "plan": plan });
                    as_json(&plans.iter().map(plan).collect::<Vec<_>>())?
                }
                false if plans.is_empty() => "no category is enabled\n".into(),
                false => plans.iter().map(|(name, plan)| planned(name, plan)).collect(),
            };
            Ok((text, ExitCode::SUCCESS))
        }
        Prune::Run(command) => {
            super::start_logging(super::NAME)?;
            let (pruner, stop) = (command.pruner()?, CancellationToken::new());
            let swept = tokio::select! {
                swept = pruner.sweep(&stop).instrument(command_span("prune")) => swept?,
                error = stop_hard(stop.clone()) => return Err(error),
            };
            let ok = |swept: &Swept| matches!(swept.result, None | Some(SweepResult::Done | SweepResult::Budget));
            let status = if swept.iter().all(ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            let text = match command.json {
                true => as_json(&swept.iter().map(object).collect::<Vec<_>>())?,
                false => swept.iter().map(line).collect(),
            };
            Ok((text, status))
        }
        Prune::Status(command) => {
            let categories = status(&command.postgres.config()?).await?;
            let text = match command.json {
                true => as_json(&categories)?,
                false if categories.is_empty() => "nothing was pruned yet\n".into(),
                false => categories.iter().map(recorded).collect(),
            };
            Ok((text, ExitCode::SUCCESS))
        }
    }
}

fn planned(name: &str, plan: &Plan) -> String {
    let limited = if plan.limited { " or more: the limit of one transaction" } else { "" };
    let mut text = format!("{}: {} rows{limited}\n", plain(name), plan.count);
    for (table, count) in &plan.children {
        text += &format!("  {count} of {}\n", plain(table));
    }
    for (table, count) in &plan.associations {
        text += &format!("  {count} associations of {}\n", plain(table));
    }
    for warning in &plan.warnings {
        text += &format!("  warning: {}\n", plain(warning));
    }
    text
}

fn line(swept: &Swept) -> String {
    let Swept { category, removed, result, error } = swept;
    let error = error.as_deref().map(|error| format!(": {}", plain(error))).unwrap_or_default();
    let result = match result {
        None => "another process sweeps it, or died within the last minute",
        Some(SweepResult::Done) => "done",
        Some(SweepResult::Budget) => "the budget is spent, more may be left",
        Some(SweepResult::Stopped) => "stopped",
        Some(SweepResult::Busy) => "others were in the way",
        Some(SweepResult::Failed) => "failed",
    };
    format!("{}: {removed} rows, {result}{error}\n", plain(category))
}

fn object(swept: &Swept) -> serde_json::Value {
    let Swept { category, removed, result, error } = swept;
    json!({ "category": category, "removed": removed, "result": result, "error": error })
}

fn recorded(category: &SweepStatus) -> String {
    let SweepStatus { category: name, period_seconds, last_swept_at, result, error, removed, removed_total, .. } =
        category;
    let by = &category.swept_by;
    let kept = match period_seconds {
        Some(seconds) => format!("kept {}", period(*seconds)),
        None => "kept until finished".into(),
    };
    let swept = last_swept_at.map_or_else(|| "never to its end".into(), |at| format!("last swept {}", time(at)));
    let result = result.as_deref().unwrap_or("running, or its process died");
    let error = error.as_deref().map(|error| format!(": {}", plain(error))).unwrap_or_default();
    format!(
        "{}  {kept}  {swept} by {}  {removed} rows  {removed_total} in all  {}{error}\n",
        plain(name),
        plain(by),
        plain(result)
    )
}

/// Days, or what is shorter as it is.
fn period(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 86_400.0 => format!("{} d", (seconds / 864.0).round() / 100.0),
        seconds => format!("{seconds} s"),
    }
}
