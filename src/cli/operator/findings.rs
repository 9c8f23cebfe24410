//! `aftercommit findings` and `aftercommit runs`.

use clap::Args;

use super::as_json;
use super::terminal::{plain, time};
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_operator::reconciler::{self, Finding, FindingFilter, ReconcileRun};

#[derive(Args)]
pub(super) struct Findings {
    /// Only those of this reconciler
    #[arg(long, value_name = "NAME")]
    reconciler: Option<String>,
    /// Only those of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Those that are settled, too
    #[arg(long)]
    all: bool,
    /// Maximum number to show, the latest
    #[arg(long, default_value_t = 100)]
    limit: i64,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Runs {
    /// Only those of this reconciler
    #[arg(long, value_name = "NAME")]
    reconciler: Option<String>,
    /// Maximum number to show, the latest
    #[arg(long, default_value_t = 20)]
    limit: i64,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn findings(command: Findings) -> Result<String, Error> {
    let filter = FindingFilter { reconciler: command.reconciler, kind: command.kind, settled: command.all };
    let findings = reconciler::findings(&command.postgres.config()?, &filter, command.limit).await?;
    if command.json {
        return as_json(&findings);
    }
    if findings.is_empty() {
        return Ok(if command.all { "nothing was found\n" } else { "nothing is open\n" }.into());
    }
    Ok(findings.iter().map(finding).collect())
}

fn finding(finding: &Finding) -> String {
    let Finding { found_at, reconciler, kind, item, state, detail, .. } = finding;
    let detail = if detail.is_empty() { String::new() } else { format!("  {}", plain(detail)) };
    format!("{}  {}  {}  {}  {state}{detail}\n", time(*found_at), plain(reconciler), plain(kind), plain(item))
}

pub(super) async fn runs(command: Runs) -> Result<String, Error> {
    let runs = reconciler::runs(&command.postgres.config()?, command.reconciler.as_deref(), command.limit).await?;
    if command.json {
        return as_json(&runs);
    }
    if runs.is_empty() {
        return Ok("no reconciler has run\n".into());
    }
    Ok(runs.iter().map(run).collect())
}

fn run(run: &ReconcileRun) -> String {
    let ReconcileRun { id, reconciler, cause, mode, scope, scanned, found, repaired, failed, .. } = run;
    let result = run.result.as_deref().unwrap_or("running");
    let took = run.ended_at.map(|end| format!(" in {} s", (end - run.started_at).num_seconds())).unwrap_or_default();
    let error = run.error.as_deref().map(|error| format!(": {}", plain(error))).unwrap_or_default();
    format!(
        "{}  run {id}  {}  {cause} {scope} {mode}  {result}{took}  scanned {scanned}, found {found}, \
         repaired {repaired}, failed {failed}{error}\n",
        time(run.started_at),
        plain(reconciler),
    )
}
