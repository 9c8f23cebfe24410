//! `aftercommit reconcile`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::as_json;
use super::subscribers::SubscriberArgs;
use crate::cli::relay::Writers;
use crate::cli::{NamingArgs, NatsArgs, PostgresArgs};
use crate::error::Error;
use crate::reconciler::{ConsumerLeg, InboxLeg, Mode, OutboxLeg, Outcome, Runner, Scope, Summary};
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
    #[command(flatten)]
    subscribers: SubscriberArgs,
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
    /// The stream, a subscriber's consumer and its inbox, in the subscriber's database
    Consumer,
    /// The publisher's outbox, as its relay tells of it, and a subscriber's inbox, in the subscriber's database
    Inbox,
}

/// The report, and the exit status: 0 when nothing is left to do, 1 when something was found that is not repaired, or
/// the run failed.
pub(super) async fn run(command: Reconcile) -> Result<(String, ExitCode), Error> {
    let (scope, mode) =
        (if command.full { Scope::Full } else { Scope::New }, if command.repair { Mode::Repair } else { Mode::Report });
    let (postgres, nats, naming) = (command.postgres.config()?, command.nats.config()?, command.naming.config()?);
    let mut summaries = Vec::new();
    if let Leg::Outbox = command.leg {
        let shared = relay::Mode::from(command.mode) == relay::Mode::Shared;
        let runner = Runner::new(postgres).outbox(OutboxLeg { shared, ..OutboxLeg::new(nats, naming) });
        summaries.push(runner.run_now("outbox", scope, mode).await?);
    } else {
        for subscription in command.subscribers.subscriptions(&nats, &naming).await? {
            let (subscriber, runner) = (subscription.name().to_string(), Runner::new(postgres.clone()));
            let (runner, name) = match command.leg {
                Leg::Inbox => (runner.inbox(InboxLeg::new(nats.clone(), subscription)), format!("inbox:{subscriber}")),
                // Whoever has the rights to that shall make the consumer, too.
                _ => {
                    let leg = ConsumerLeg { provision: true, ..ConsumerLeg::new(nats.clone(), subscription) };
                    (runner.consumer(leg), format!("consumer:{subscriber}"))
                }
            };
            summaries.push(runner.run_now(&name, scope.clone(), mode).await?);
        }
    }
    let well = summaries
        .iter()
        .all(|summary| summary.outcome == Outcome::Ran && summary.found <= summary.repaired && summary.failed == 0);
    let text = match (command.json, command.leg) {
        (false, _) => summaries.iter().map(|summary| format!("{summary}\n")).collect(),
        (true, Leg::Outbox) => as_json(&summaries.first().map(object))?,
        (true, _) => as_json(&summaries.iter().map(object).collect::<Vec<_>>())?,
    };
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
