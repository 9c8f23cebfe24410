//! Reconcilers beside a role, in its process.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::run_role;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::health::{Check, Health};
use aftercommit_core::runner::{Mode, Monitor, Outcome, Runner, Scope, Summary};

/// Whether and how often a role compares what it should.
#[derive(Args)]
#[command(next_help_heading = "Reconciliation")]
pub(super) struct ReconcileArgs {
    /// Interval between comparisons, by one process at a time: a relay compares outbox and stream, a worker stream,
    /// consumers, inbox and outbox; no comparisons when not given
    #[arg(long, env = "AFTERCOMMIT_RECONCILE_EVERY", value_name = "DURATION", value_parser = humantime::parse_duration)]
    reconcile_every: Option<Duration>,
    /// Repair what is found: a relay publishes again what is missing in the stream, a worker runs what is missing in the
    /// inbox
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

/// A runner that runs.
pub(super) struct Running {
    task: Option<AbortOnDropHandle<()>>,
    shutdown: CancellationToken,
}

impl Running {
    /// Breaks off what is under way, and waits until that is written down.
    pub(super) async fn end(self) {
        self.shutdown.cancel();
        if let Some(task) = self.task {
            let _ = task.await;
        }
    }
}

/// Starts the runner, if there is one, and lets it be seen beside the role.
pub(super) fn start<R>(role: R, runner: Option<Runner>, shutdown: &CancellationToken) -> (Checks<R>, Running) {
    let shutdown = shutdown.child_token();
    let reconciler = runner.as_ref().map(Runner::monitor);
    let task = runner.map(|runner| {
        let running = runner.run(shutdown.clone());
        AbortOnDropHandle::new(tokio::spawn(async {
            if let Err(error) = running.await {
                tracing::error!(error = error.report(), "nothing is compared");
            }
        }))
    });
    (Checks { role, reconciler }, Running { task, shutdown })
}

/// Runs one reconciler at once. The exit status is 0 when nothing is left to do, 1 when something was found that is not
/// repaired, or the run failed, and 2 when a setting is at fault.
pub(super) fn run_now(program: &str, runner: &Runner, name: &str, scope: Scope, mode: Mode) -> ExitCode {
    let well = AtomicBool::new(true);
    let status = run_role(program, async |shutdown| {
        let summary = tokio::select! {
            summary = runner.run_now(name, scope, mode) => summary?,
            () = shutdown.cancelled() => return Err(Error::new(ErrorKind::Fenced, "stopped; the next run goes on")),
        };
        println!("{summary}");
        well.store(is_well(&summary), Ordering::Relaxed);
        Ok(())
    });
    if well.into_inner() { status } else { ExitCode::FAILURE }
}

/// Whether nothing is left to do after a run.
pub(super) fn is_well(summary: &Summary) -> bool {
    summary.outcome == Outcome::Ran && summary.found <= summary.repaired && summary.failed == 0
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

    fn hangs(&self) -> bool {
        self.role.hangs()
    }

    fn refresh_metrics(&self) {
        self.role.refresh_metrics();
        if let Some(reconciler) = &self.reconciler {
            reconciler.refresh_metrics();
        }
    }
}
