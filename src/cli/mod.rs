//! What the binaries share: arguments, logging, signals. Not part of the library's stable interface.

pub mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::{Naming, NatsConfig, PostgresConfig};
use crate::error::{Error, ErrorKind};
use crate::subject::SubjectPrefix;

/// How long a soft stop may take before it becomes a hard one.
const DRAIN: Duration = Duration::from_secs(25);

/// How to reach PostgreSQL.
#[derive(Debug, clap::Args)]
pub(crate) struct PostgresArgs {
    /// PostgreSQL: postgres://user:password@host:5432/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: String,
}

impl PostgresArgs {
    pub(crate) fn config(&self) -> PostgresConfig {
        PostgresConfig { url: self.database_url.clone() }
    }
}

/// How to reach NATS.
#[derive(Debug, clap::Args)]
pub(crate) struct NatsArgs {
    /// NATS servers, separated by commas
    #[arg(long, env = "NATS_URL", hide_env_values = true, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// A NATS credentials file
    #[arg(long, env = "NATS_CREDS", value_name = "FILE")]
    nats_creds: Option<PathBuf>,
}

impl NatsArgs {
    pub(crate) fn config(&self) -> NatsConfig {
        NatsConfig { url: self.nats_url.clone(), creds: self.nats_creds.clone() }
    }
}

/// The names under which the outbox is published.
#[derive(Debug, clap::Args)]
pub(crate) struct NamingArgs {
    /// The JetStream stream
    #[arg(long, env = "AFTERCOMMIT_STREAM", value_name = "NAME", default_value = "EVENTS")]
    stream: String,
    /// The first tokens of every subject
    #[arg(long, env = "AFTERCOMMIT_SUBJECT_PREFIX", value_name = "PREFIX", default_value = "events")]
    subject_prefix: String,
}

impl NamingArgs {
    pub(crate) fn config(&self) -> Result<Naming, Error> {
        let prefix = SubjectPrefix::new(&self.subject_prefix).map_err(|error| {
            Error::with_source(ErrorKind::Config, "the subject prefix (--subject-prefix) is wrong", error)
        })?;
        Ok(Naming { stream: self.stream.clone(), prefix, ..Naming::default() })
    }
}

/// Runs a service until it ends or is told to: SIGTERM or SIGINT let it drain, a second signal or 25 seconds end it.
/// Exit status 0 when it ended well, 1 when it failed or did not drain, 2 when the usage was wrong.
pub(crate) fn run_service<F>(service: impl FnOnce(CancellationToken) -> F) -> ExitCode
where
    F: Future<Output = Result<(), Error>>,
{
    init_tracing();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(error = %error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        let stop = CancellationToken::new();
        tokio::select! {
            result = service(stop.clone()) => report(result),
            () = hard_stop(&stop) => {
                tracing::error!("stopped hard, what was running is rolled back and comes again");
                ExitCode::FAILURE
            }
        }
    });
    runtime.shutdown_background();
    code
}

fn report(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = error.report(), "failed");
            ExitCode::from(if error.kind() == ErrorKind::Config { 2 } else { 1 })
        }
    }
}

/// Passes on the first signal as a soft stop, and returns when a hard one is due.
async fn hard_stop(stop: &CancellationToken) {
    signal().await;
    tracing::info!("stopping, a second signal stops hard");
    stop.cancel();
    let _ = tokio::time::timeout(DRAIN, signal()).await;
}

#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(error = %error, "signals cannot be received");
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(not(unix))]
async fn signal() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Logs go to standard error; RUST_LOG chooses, `info` by default.
pub(crate) fn init_tracing() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,async_nats=warn,sqlx=warn"));
    // Fails when a service has set its own up, which is then the one to use.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
