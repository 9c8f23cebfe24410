//! `aftercommit reconcile`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::as_json;
use crate::cli::relay::Writers;
use crate::cli::{NamingArgs, NatsArgs, PostgresArgs};
use crate::error::Error;
use crate::reconciler::{Mode, OutboxLeg, Outcome, Runner, Scope, Summary};
use crate::relay;

/// What the relay was given too has the same names here, so that one environment serves both.
#[derive(Args)]
pub(super) struct Reconcile {
    /// What to compare
    #[arg(long, value_enum)]
    leg: Leg,
    /// Repair what is found
    #[arg(long)]
    repair: bool,
    /// Look at everything, not only at what is new
    #[arg(long)]
    full: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Who writes to the stream
    #[arg(long, env = "AFTERCOMMIT_MODE", value_enum, default_value = "exclusive")]
    mode: Writers,
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Leg {
    /// The outbox with its stream, in the publisher's database
    Outbox,
}

/// The report, and the exit status: 0 when nothing is left to do, 1 when something was found that is not repaired, or
/// the run failed.
pub(super) async fn run(command: Reconcile) -> Result<(String, ExitCode), Error> {
    let (scope, mode) =
        (if command.full { Scope::Full } else { Scope::New }, if command.repair { Mode::Repair } else { Mode::Report });
    let summary = match command.leg {
        Leg::Outbox => {
            let leg = OutboxLeg {
                shared: relay::Mode::from(command.mode) == relay::Mode::Shared,
                ..OutboxLeg::new(command.nats.config()?, command.naming.config()?)
            };
            let runner = Runner::new(command.postgres.config()?).outbox(leg);
            runner.run_now("outbox", scope, mode).await?
        }
    };
    let well = summary.outcome == Outcome::Ran && summary.found <= summary.repaired && summary.failed == 0;
    let text = if command.json { as_json(&object(&summary))? } else { format!("{summary}\n") };
    Ok((text, if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

fn object(summary: &Summary) -> serde_json::Value {
    let (result, error) = match &summary.outcome {
        Outcome::Ran => ("ran", None),
        Outcome::Skipped(reason) => ("skipped", Some(reason)),
        Outcome::Failed(reason) => ("failed", Some(reason)),
        Outcome::Stopped => ("stopped", None),
    };
    json!({
        "reconciler": summary.reconciler, "run": summary.run, "result": result, "error": error,
        "scanned": summary.scanned, "found": summary.found, "repaired": summary.repaired, "failed": summary.failed,
        "seconds": summary.took.as_secs_f64(),
    })
}
