//! The command lines of the binaries.

mod http;
mod log;
pub mod operator;
mod reconciling;
pub mod relay;
// Public for the bench, a program of the workspace that is given the same servers. So are `parse`, `signal` and `fail`.
#[doc(hidden)]
pub mod servers;
mod systemd;
#[cfg(feature = "otlp")]
mod telemetry;
pub mod worker;

use std::env;
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Command, Parser};
use tokio_util::sync::CancellationToken;

use aftercommit_core::config::{Naming, check_stream};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_outbox::subject::SubjectPrefix;
use log::{start_logging, stop_logging};
use servers::PostgresArgs;

/// How long a soft stop may take before the process ends anyway.
const STOP_DEADLINE: Duration = Duration::from_secs(25);

/// The names under which an outbox is published.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Stream")]
struct NamingArgs {
    /// The JetStream stream
    #[arg(long, env = "AFTERCOMMIT_STREAM", default_value = "EVENTS")]
    stream: String,
    /// The first tokens of every subject
    #[arg(long, env = "AFTERCOMMIT_SUBJECT_PREFIX", default_value = "events")]
    subject_prefix: String,
    /// The CloudEvents source of the events
    #[arg(long, env = "AFTERCOMMIT_SOURCE", default_value = "/aftercommit")]
    source: String,
}

impl NamingArgs {
    fn config(&self) -> Result<Naming, Error> {
        check_stream(&self.stream)
            .map_err(|problem| Error::new(ErrorKind::Config, format!("{problem} (AFTERCOMMIT_STREAM or --stream)")))?;
        let prefix = SubjectPrefix::new(self.subject_prefix.clone()).map_err(|error| {
            Error::with_source(ErrorKind::Config, "the subject prefix cannot be used (--subject-prefix)", error)
        })?;
        Ok(Naming { stream: self.stream.clone(), prefix, source: self.source.clone() })
    }
}

/// Reads a command line; ends the process when it cannot be read, or asks for help.
#[doc(hidden)]
pub fn parse<C: Parser>(arguments: impl IntoIterator<Item = OsString>) -> C {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let read = without_empty_variables(C::command(), &|name| env::var_os(name)).try_get_matches_from(&arguments);
    read.and_then(|matches| C::from_arg_matches(&matches)).unwrap_or_else(|error| {
        if error.use_stderr() {
            eprint!("{}", without_secrets(&error.render().to_string(), &arguments));
            std::process::exit(error.exit_code());
        }
        error.exit()
    })
}

/// What is wrong with a command line, without what URLs in it hold: one that stands where none belongs would be repeated.
fn without_secrets(complaint: &str, arguments: &[OsString]) -> String {
    let mut told = complaint.to_string();
    for argument in arguments {
        let argument = argument.to_string_lossy();
        let secret = argument.split_once("://").or_else(|| argument.split_once("password=")).map(|(_, secret)| secret);
        if let Some(secret) = secret.filter(|secret| !secret.is_empty()) {
            told = told.replace(secret, "…");
        }
    }
    told
}

/// A variable that is set to nothing is as good as one that is not set: that is how deployments leave settings out.
fn without_empty_variables(command: Command, variable: &impl Fn(&OsStr) -> Option<OsString>) -> Command {
    let is_empty = |name: &OsStr| variable(name).is_some_and(|value| value.is_empty());
    let command = command.mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
        true => arg.env(None),
        false => arg,
    });
    command.mut_subcommands(|command| without_empty_variables(command, variable))
}

/// Runs a role until it ends or is told to stop. The first SIGTERM, SIGINT or SIGHUP cancels the token that `start` gets; a
/// second one, or a stop that takes longer than 25 seconds, ends the process at once.
fn run_role<F>(name: &str, start: impl FnOnce(CancellationToken) -> F) -> ExitCode
where
    F: Future<Output = Result<(), Error>>,
{
    if let Err(error) = start_logging(name) {
        return fail(name, &error);
    }
    #[cfg(feature = "otlp")]
    telemetry::tell();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(name, &Error::with_source(ErrorKind::Config, "the runtime cannot start", error)),
    };
    let (result, at_once) = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let role = start(shutdown.clone());
        tokio::select! {
            result = role => (result, false),
            error = stop_hard(shutdown) => (Err(error), true),
        }
    });
    // Nothing that still runs may hold the process.
    runtime.shutdown_background();
    if !at_once {
        stop_logging();
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(name, &error),
    }
}

/// Cancels `shutdown` with the first signal; returns with the second, or when stopping takes too long.
async fn stop_hard(shutdown: CancellationToken) -> Error {
    if let Err(error) = signal().await {
        return error;
    }
    tracing::info!("stopping; a second signal stops at once");
    shutdown.cancel();
    tokio::select! {
        _ = signal() => Error::new(ErrorKind::Fenced, "stopped at once by a second signal; nothing is lost"),
        () = tokio::time::sleep(STOP_DEADLINE) => {
            Error::new(ErrorKind::Fenced, format!("stopped hard after {STOP_DEADLINE:?}; nothing is lost"))
        }
    }
}

/// Returns when the process is told to stop.
///
/// # Errors
/// When signals cannot be received.
#[cfg(unix)]
#[doc(hidden)]
pub async fn signal() -> Result<(), Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error| Error::with_source(ErrorKind::Config, "signals cannot be received", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    // The terminal is gone, as when an ssh session ends; without this the process would end at once.
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

/// Returns when the process is told to stop.
///
/// # Errors
/// When signals cannot be received.
#[cfg(not(unix))]
#[doc(hidden)]
pub async fn signal() -> Result<(), Error> {
    tokio::signal::ctrl_c()
        .await
        .map_err(|error| Error::with_source(ErrorKind::Config, "signals cannot be received", error))
}

/// Prints the error and gives its exit status: 2 when the command line or a setting is at fault, else 1.
#[doc(hidden)]
pub fn fail(name: &str, error: &Error) -> ExitCode {
    // Each line by itself: some reports have several.
    let report: Vec<String> = error.report().lines().map(aftercommit_core::text::plain).collect();
    eprintln!("{name}: {}", report.join("\n"));
    ExitCode::from(if error.kind() == ErrorKind::Config { 2 } else { 1 })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_url_is_not_repeated_in_a_complaint() {
        #[derive(Parser)]
        struct Line {
            #[arg(long)]
            _database_url: Option<String>,
        }
        let complain = |argument: &str| {
            let line = ["aftercommit", argument].map(OsString::from);
            let error = Line::command().try_get_matches_from(&line).unwrap_err();
            without_secrets(&error.render().to_string(), &line)
        };
        for argument in ["postgres://me:hunter2@db/shop", "--database-ur=nats://hunter2@db", "host=db password=hunter2"]
        {
            let told = complain(argument);
            assert!(told.contains("error:") && !told.contains("hunter2"), "{told}");
        }
    }

    /// None of the command's options, nor of those below it, takes a variable that is set to nothing for a value.
    pub(super) fn assert_empty_variables_do_not_count(command: Command) {
        fn variables(command: &Command) -> usize {
            let own = command.get_arguments().filter(|arg| arg.get_env().is_some()).count();
            own + command.get_subcommands().map(variables).sum::<usize>()
        }
        let all = variables(&command);
        let set = without_empty_variables(command.clone(), &|_| Some("x".into()));
        assert_eq!((variables(&set), all > 0), (all, true));
        assert_eq!(variables(&without_empty_variables(command.clone(), &|_| None)), all);
        assert_eq!(variables(&without_empty_variables(command, &|_| Some("".into()))), 0);
    }
}
