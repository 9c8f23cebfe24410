//! Reconcilers beside a role, in its process.

use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::health::{Check, Health};
use crate::reconciler::{Mode, Monitor, Runner};

/// Whether and how often a role compares what it should.
#[derive(Args)]
pub(super) struct ReconcileArgs {
    /// Compare so often, in the processes that have this, one at a time: the relay outbox and stream, the worker stream,
    /// consumers, inbox and outbox
    #[arg(long, env = "AFTERCOMMIT_RECONCILE_EVERY", value_name = "DURATION", value_parser = humantime::parse_duration)]
    reconcile_every: Option<Duration>,
    /// Put right what is found: the relay publishes again what is missing in the stream, the worker runs what is missing in
    /// the inbox
    #[arg(long, env = "AFTERCOMMIT_RECONCILE_REPAIR", requires = "reconcile_every")]
    reconcile_repair: bool,
}

impl ReconcileArgs {
    /// How often, and what to do; none when nothing is compared.
    pub(super) fn schedule(&self) -> Option<(Duration, Mode)> {
        let mode = if self.reconcile_repair { Mode::Repair } else { Mode::Report };
        self.reconcile_every.map(|every| (every, mode))
    }
}

/// A role's health. A comparison that fails is told, but to start the role again would not help.
pub(super) struct Checks<R> {
    role: R,
    reconciler: Option<Monitor>,
}

/// Starts the runner, if there is one, and lets it be seen beside the role.
pub(super) fn start<R>(
    role: R,
    runner: Option<Runner>,
    shutdown: &CancellationToken,
) -> (Checks<R>, Option<AbortOnDropHandle<()>>) {
    let reconciler = runner.as_ref().map(Runner::monitor);
    let running = runner.map(|runner| {
        let running = runner.run(shutdown.clone());
        AbortOnDropHandle::new(tokio::spawn(async {
            if let Err(error) = running.await {
                tracing::error!(error = error.report(), "nothing is compared");
            }
        }))
    });
    (Checks { role, reconciler }, running)
}

impl<R: Check> Check for Checks<R> {
    fn health(&self) -> Health {
        let mut health = self.role.health();
        let trouble = self.reconciler.as_ref().map(Check::health).filter(|reconciler| !reconciler.ok);
        if let Some(trouble) = trouble {
            health.text = format!("{}; {}", health.text, trouble.text);
        }
        health
    }

    fn readiness(&self) -> Health {
        self.role.readiness()
    }

    fn refresh_metrics(&self) {
        self.role.refresh_metrics();
        if let Some(reconciler) = &self.reconciler {
            reconciler.refresh_metrics();
        }
    }
}
