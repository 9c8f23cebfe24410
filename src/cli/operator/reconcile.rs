//! `aftercommit reconcile`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::as_json;
use super::subscribers::SubscriberArgs;
use super::who::WhoArgs;
use crate::cli::http::{self, HttpArgs};
use crate::cli::reconciling::is_well;
use crate::cli::relay::Writers;
use crate::cli::run_role;
use crate::cli::servers::Servers;
use aftercommit_core::error::Error;
use aftercommit_core::runner::{Mode, Outcome, Runner, Scope, Summary};
use aftercommit_core::text::plain;
use aftercommit_operator::audit;
use aftercommit_reconciler::{ConsumerComparison, InboxComparison, OutboxComparison};

/// What the relay was given too has the same names here, so that one environment serves both.
#[derive(Args)]
pub(super) struct Reconcile {
    /// What to compare. Without it the outbox with its stream; with --subscriber or --config what belongs to subscribers
    #[arg(long, alias = "leg", value_enum)]
    comparison: Option<Comparison>,
    /// Repair what is found
    #[arg(long)]
    repair: bool,
    /// Look at everything, not only at what is new
    #[arg(long)]
    full: bool,
    /// Go on until a signal and compare at this interval, unless another process has done it; everything once a day
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["full", "json"], value_parser = humantime::parse_duration)]
    every: Option<Duration>,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    subscribers: SubscriberArgs,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Who writes to the stream
    #[arg(long, env = "AFTERCOMMIT_MODE", value_enum, default_value = "exclusive")]
    mode: Writers,
    #[command(flatten)]
    servers: Servers,
    /// With --every only
    #[command(flatten)]
    http: HttpArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Comparison {
    /// The outbox with its stream, in the publisher's database
    Outbox,
    /// The stream, a subscriber's consumer and its inbox, in the subscriber's database
    Consumer,
    /// The publisher's outbox, as its relay tells of it, and a subscriber's inbox, in the subscriber's database
    Inbox,
}

impl Reconcile {
    /// Whether it goes on until a signal.
    pub(super) fn goes_on(&self) -> bool {
        self.every.is_some()
    }

    fn comparisons(&self) -> &[Comparison] {
        match self.comparison {
            Some(Comparison::Outbox) => &[Comparison::Outbox],
            Some(Comparison::Consumer) => &[Comparison::Consumer],
            Some(Comparison::Inbox) => &[Comparison::Inbox],
            None if self.subscribers.any() => &[Comparison::Consumer, Comparison::Inbox],
            None => &[Comparison::Outbox],
        }
    }

    fn mode(&self) -> Mode {
        if self.repair { Mode::Repair } else { Mode::Report }
    }

    /// A runner of everything that is meant, and the names.
    async fn runner(&self) -> Result<(Runner, Vec<String>), Error> {
        let (postgres, nats, naming) = self.servers.config()?;
        let (mut runner, mut names) = (Runner::new(postgres), Vec::new());
        let mode = self.mode();
        let subscriptions = match self.comparisons() {
            [Comparison::Outbox] => Vec::new(),
            _ => self.subscribers.subscriptions(&nats, &naming).await?,
        };
        for comparison in self.comparisons() {
            if *comparison == Comparison::Outbox {
                let shared = aftercommit_core::relay::Mode::from(self.mode) == aftercommit_core::relay::Mode::Shared;
                let leg = OutboxComparison { shared, mode, ..OutboxComparison::new(nats.clone(), naming.clone()) };
                runner = runner.comparison(OutboxComparison { interval: self.every.unwrap_or(leg.interval), ..leg });
                names.push("outbox".into());
            }
        }
        for subscription in subscriptions {
            let subscriber = subscription.name().to_string();
            if self.comparisons().contains(&Comparison::Consumer) {
                // Whoever has the rights to that shall make the consumer, too.
                let leg = ConsumerComparison::new(nats.clone(), subscription.clone());
                let interval = self.every.unwrap_or(leg.interval);
                runner = runner.comparison(ConsumerComparison { provision: true, mode, interval, ..leg });
                names.push(format!("consumer:{subscriber}"));
            }
            if self.comparisons().contains(&Comparison::Inbox) {
                let leg = InboxComparison::new(nats.clone(), subscription);
                let interval = self.every.unwrap_or(leg.interval);
                runner = runner.comparison(InboxComparison { mode, interval, ..leg });
                names.push(format!("inbox:{subscriber}"));
            }
        }
        Ok((runner, names))
    }
}

/// Compares again and again until a signal ends it. The exit status is 0 after an orderly stop, 2 when a setting is at
/// fault.
pub(super) fn go_on(command: Reconcile) -> ExitCode {
    run_role("aftercommit", async |shutdown| {
        let (runner, _) = command.runner().await?;
        let server = command.http.open().await?;
        let checks = runner.monitor();
        Box::pin(http::beside(server, Arc::new(checks), runner.run(shutdown))).await
    })
}

/// The report, and the exit status: 0 when nothing is left to do, 1 when something was found that is not repaired, or
/// the run failed.
pub(super) async fn run(command: Reconcile) -> Result<(String, ExitCode), Error> {
    let scope = if command.full { Scope::Full } else { Scope::New };
    let (runner, names) = command.runner().await?;
    let mut summaries = Vec::new();
    for name in names {
        let summary = runner.run_now(&name, scope.clone(), command.mode()).await?;
        if summary.repaired > 0 {
            record(&command, &summary).await?;
        }
        summaries.push(summary);
    }
    let well = summaries.iter().all(is_well);
    let text = match command.json {
        false => summaries.iter().map(|summary| format!("{summary}\n")).collect(),
        true => as_json(&summaries.iter().map(object).collect::<Vec<_>>())?,
    };
    Ok((text, if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// What was repaired stays repaired, so an audit trail that cannot be written is said and is no failure.
async fn record(command: &Reconcile, summary: &Summary) -> Result<(), Error> {
    let (postgres, _, _) = command.servers.config()?;
    let written = audit::reconciled(&postgres, &command.who.name(), &summary.reconciler, summary.repaired).await;
    if let Err(error) = written {
        eprintln!("aftercommit: the audit trail has no entry of this: {}", plain(&error.report()));
    }
    Ok(())
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
