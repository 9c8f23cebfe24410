//! `aftercommit`, the operator's tool.

mod audit;
mod backlog;
mod bulk;
mod capture;
#[cfg(feature = "console")]
mod console;
mod coverage;
mod dead;
mod doctor;
mod erase;
mod explain;
mod findings;
mod forget;
mod health;
mod job;
mod parked;
mod peek;
mod prune;
mod reconcile;
mod relay;
mod replay;
mod selection;
mod setup;
mod shell;
mod status;
mod subscriber;
mod subscribers;
mod terminal;
mod time;
mod who;
mod worker;

use std::env;
use std::io::{Read, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use tracing::Instrument;

use super::log::{LogArgs, command_span, start_logging, stop_logging};
use super::{fail, parse, signal};
use aftercommit_core::error::{Error, ErrorKind};

const NAME: &str = "aftercommit";

/// The operator's tool of aftercommit
#[derive(Parser)]
#[command(name = "aftercommit", version, help_template = grouped_help())]
#[command(
    after_help = "Exit status: 0 when it is done, 1 when something was not found or failed, 2 when the command line or a \
                        setting is wrong."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Show what operators did, and who and when
    #[command(after_help = "Example:\n  aftercommit audit --since 1d")]
    Audit(audit::Audit),
    /// Show what waits where: in the outbox, parked, and for each subscriber
    #[command(after_help = "Example:\n  aftercommit backlog --json")]
    Backlog(Box<backlog::Backlog>),
    /// Publish the changes of tables, whoever makes them
    #[command(subcommand)]
    Capture(capture::Capture),
    /// Print the completions of a shell
    #[command(after_help = "Example:\n  aftercommit completions bash > /etc/bash_completion.d/aftercommit")]
    Completions(shell::Completions),
    /// Serve pages for a browser: what is stuck, where an event is, who did what
    #[cfg(feature = "console")]
    #[command(
        after_help = "Examples:\n  aftercommit console\n  aftercommit console --http 0.0.0.0:9466 --public-url https://ops.example.com --users users.toml"
    )]
    Console(Box<console::Console>),
    /// Show which event types have no subscriber, and which subscribers no publisher
    #[command(after_help = "Example:\n  aftercommit coverage --config worker.toml --check")]
    Coverage(Box<coverage::Coverage>),
    /// See, run again, edit or give up events that a subscriber gave up on
    #[command(subcommand)]
    Dead(dead::Dead),
    /// Look for what is wrong, or will be, and say what to do about it; it changes nothing
    #[command(after_help = "Example:\n  aftercommit doctor --nats-monitor http://127.0.0.1:8222")]
    Doctor(Box<doctor::Doctor>),
    /// Erase a tenant or a person in all services: look before, ask, and see what came of it
    #[command(subcommand)]
    Erase(erase::Erase),
    /// Tell one event's whole story, from the outbox to its effects
    #[command(after_help = "Example:\n  aftercommit explain 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11")]
    Explain(Box<explain::Explain>),
    /// Show what reconcilers found
    #[command(after_help = "Example:\n  aftercommit findings --reconciler outbox")]
    Findings(findings::Findings),
    /// Erase what events hold, everywhere and for good: in the outbox, in dead letters, in the stream
    #[command(after_help = "Examples:\n  aftercommit forget --key customer-7 --why 'request 2026-114' --dry-run\n  \
                            aftercommit forget --event 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11 --why 'request 2026-114'\n  \
                            aftercommit forget --resume --every 10s")]
    Forget(Box<forget::Forget>),
    /// Ask a relay or a worker over HTTP whether it is well, as a container's health check does
    #[command(after_help = "Example:\n  aftercommit health --url http://127.0.0.1:9464/readyz")]
    Health(health::Health),
    /// See jobs that several services answer, ask failed ones anew, or cancel
    #[command(subcommand)]
    Job(job::Job),
    /// Write the manual pages of all programs into a directory
    #[command(after_help = "Example:\n  aftercommit man target/man")]
    Man(shell::ManPages),
    /// Create or update the schema aftercommit; harmless when it is up to date
    #[command(after_help = "Example:\n  aftercommit migrate --database-url postgres://owner@db/shop")]
    Migrate(setup::Migrate),
    /// See and decide about events that the stream would not take
    #[command(subcommand)]
    Parked(parked::Parked),
    /// Look at what waits for a subscriber, without taking anything
    #[command(after_help = "Example:\n  aftercommit peek --subscriber mails -n 20")]
    Peek(Box<peek::Peek>),
    /// Create the stream and consumers, or correct settings of it that would lose events; prints what it changed
    #[command(after_help = "Example:\n  aftercommit provision --config worker.toml")]
    Provision(Box<setup::Provision>),
    /// Delete finished rows of tables, with what refers to them, in bounded transactions
    #[command(subcommand)]
    Prune(prune::Prune),
    /// Write one event in a transaction of its own and print its id
    #[command(after_help = "Example:\n  aftercommit publish order.placed --key order-7 --payload '{\"cents\": 995}'")]
    Publish(setup::Publish),
    /// Compare what should be the same, report what is not, and repair it
    #[command(after_help = "Example:\n  aftercommit reconcile --full")]
    Reconcile(Box<reconcile::Reconcile>),
    /// Pause or resume publishing, whichever relay leads
    #[command(subcommand)]
    Relay(relay::Relay),
    /// Send events to one subscriber that it has missed, or once more
    #[command(after_help = "Example:\n  aftercommit replay --subscriber mails --since 2h --dry-run")]
    Replay(Box<replay::Replay>),
    /// Show what reconcilers did
    #[command(after_help = "Example:\n  aftercommit runs --limit 5")]
    Runs(findings::Runs),
    /// Show whether everything works, what is stuck and what to do, then backlog, relay, stream and subscribers
    #[command(after_help = "Examples:\n  aftercommit status --watch\n  aftercommit status --check || page-somebody")]
    Status(Box<status::Status>),
    /// Forget subscribers that are no more
    #[command(subcommand)]
    Subscriber(subscriber::Subscriber),
    /// Pause or resume subscribers, whichever instance is active
    #[command(subcommand)]
    Worker(worker::Worker),
}

/// What shows how things are.
#[cfg(feature = "console")]
const SEE: &[&str] =
    &["status", "backlog", "doctor", "coverage", "explain", "peek", "audit", "findings", "runs", "health", "console"];
#[cfg(not(feature = "console"))]
const SEE: &[&str] =
    &["status", "backlog", "doctor", "coverage", "explain", "peek", "audit", "findings", "runs", "health"];

/// The commands as the help groups them.
const GROUPS: [(&str, &[&str]); 5] = [
    ("See what is", SEE),
    ("Decide about events", &["dead", "parked", "replay", "forget"]),
    ("Stop and go on", &["relay", "worker"]),
    ("Set up", &["migrate", "provision", "publish", "capture", "subscriber"]),
    ("Other", &["reconcile", "prune", "job", "erase", "completions", "man", "help"]),
];

/// The help with the commands under headings: clap itself knows only one heading for all of them.
fn grouped_help() -> String {
    let commands = Command::augment_subcommands(clap::Command::new("aftercommit"));
    let about = |name: &str| {
        let found = commands.get_subcommands().find(|command| command.get_name() == name);
        let about = found.and_then(|command| command.get_about()).map(ToString::to_string);
        about.unwrap_or_else(|| "Print this message or the help of the given command".into())
    };
    let mut help = String::from("{about-with-newline}\n{usage-heading} {usage}\n");
    for (heading, names) in GROUPS {
        help += &format!("\n{heading}:\n");
        help.extend(names.iter().map(|name| format!("  {name:<12} {}\n", about(name))));
    }
    help + "\nOptions:\n{options}{after-help}"
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.into(), value.into())),
        None => Err("it is not of the form NAME=VALUE".into()),
    }
}

/// The exit status of a command that a signal ended, as a shell has it for SIGTERM.
const SIGNALLED: u8 = 143;

/// Runs the command line of this process. The exit status is 0 when all went well, 1 when it did not or the doctor found
/// something that fails, and 2 when the command line or a setting is at fault.
pub fn main() -> ExitCode {
    let cli: Cli = parse(env::args_os());
    cli.log.choose();
    let result = match cli {
        Cli { command: Command::Reconcile(command), .. } if command.goes_on() => return reconcile::go_on(*command),
        Cli { command: Command::Forget(command), .. } if command.goes_on() => return forget::go_on(*command),
        Cli { command: Command::Prune(command), .. } if command.goes_on() => return prune::go_on(command),
        #[cfg(feature = "console")]
        Cli { command: Command::Console(command), .. } => return console::go_on(*command),
        cli => run(cli),
    };
    stop_logging();
    match result {
        Ok(status) => status,
        Err(error) => fail("aftercommit", &error),
    }
}

fn run(cli: Cli) -> Result<ExitCode, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Config, "the runtime cannot start", error))?;
    // The first process of a container is not ended by a signal that it does not receive.
    if std::process::id() == 1 {
        runtime.spawn(async {
            if signal().await.is_ok() {
                std::process::exit(SIGNALLED.into());
            }
        });
    }
    let mut exit = ExitCode::SUCCESS;
    let text = match cli.command {
        Command::Audit(command) => runtime.block_on(audit::run(command))?,
        Command::Backlog(command) => runtime.block_on(backlog::run(*command))?,
        Command::Capture(command) => {
            let (text, status) = runtime.block_on(capture::run(command))?;
            exit = status;
            text
        }
        Command::Completions(command) => shell::completions(&command, Cli::command()),
        // It goes on by itself.
        #[cfg(feature = "console")]
        Command::Console(_) => String::new(),
        Command::Coverage(command) => {
            let (text, status) = runtime.block_on(coverage::run(*command))?;
            exit = status;
            text
        }
        Command::Dead(command) => {
            let (text, status) = runtime.block_on(dead::run(command))?;
            exit = status;
            text
        }
        Command::Doctor(command) => {
            let (text, well) = runtime.block_on(doctor::run(*command))?;
            if !well {
                exit = ExitCode::FAILURE;
            }
            text
        }
        Command::Erase(command) => {
            let (text, status) = runtime.block_on(erase::run(command))?;
            exit = status;
            text
        }
        Command::Explain(command) => runtime.block_on(explain::run(*command))?,
        Command::Findings(command) => runtime.block_on(findings::findings(command))?,
        Command::Health(command) => {
            let (text, status) = runtime.block_on(health::run(command))?;
            exit = status;
            text
        }
        Command::Forget(command) => {
            start_logging(NAME)?;
            let (text, status) = runtime.block_on(forget::run(*command).instrument(command_span("forget")))?;
            exit = status;
            text
        }
        Command::Job(command) => runtime.block_on(job::run(command))?,
        Command::Man(command) => shell::man(&command, Cli::command())?,
        Command::Migrate(command) => runtime.block_on(setup::migrate(command))?,
        Command::Parked(command) => {
            let (text, status) = runtime.block_on(parked::run(command))?;
            exit = status;
            text
        }
        Command::Peek(command) => runtime.block_on(peek::run(*command))?,
        Command::Provision(command) => runtime.block_on(setup::provision(*command))?,
        Command::Prune(command) => {
            let (text, status) = runtime.block_on(prune::run(command))?;
            exit = status;
            text
        }
        Command::Publish(command) => {
            start_logging(NAME)?;
            runtime.block_on(setup::publish(command).instrument(command_span("publish")))?
        }
        Command::Reconcile(command) => {
            start_logging(NAME)?;
            let (text, status) = runtime.block_on(reconcile::run(*command).instrument(command_span("reconcile")))?;
            exit = status;
            text
        }
        Command::Relay(command) => runtime.block_on(relay::run(command))?,
        Command::Replay(command) => {
            let (text, status) = runtime.block_on(replay::run(*command))?;
            exit = status;
            text
        }
        Command::Runs(command) => runtime.block_on(findings::runs(command))?,
        Command::Status(command) => {
            let (text, status) = runtime.block_on(status::run(*command))?;
            exit = status;
            text
        }
        Command::Subscriber(command) => runtime.block_on(subscriber::run(command))?,
        Command::Worker(command) => runtime.block_on(worker::run(command))?,
    };
    // A reader that went away early, such as `head`, has what it wanted.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(exit)
}

fn as_json(value: &impl serde::Serialize) -> Result<String, Error> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "the answer cannot be written as JSON", error))?;
    Ok(json + "\n")
}

/// A payload as it is given: text, `@FILE` for what a file has, or `-` for standard input.
fn given_payload(text: &str) -> Result<Vec<u8>, Error> {
    match (text, text.strip_prefix('@')) {
        ("-", _) => standard_input(),
        (_, Some(file)) => std::fs::read(file)
            .map_err(|error| Error::with_source(ErrorKind::Config, format!("the file {file} cannot be read"), error)),
        (text, None) => Ok(text.as_bytes().to_vec()),
    }
}

fn standard_input() -> Result<Vec<u8>, Error> {
    let mut payload = Vec::new();
    std::io::stdin()
        .read_to_end(&mut payload)
        .map_err(|error| Error::with_source(ErrorKind::Config, "standard input cannot be read", error))?;
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::assert_empty_variables_do_not_count;

    #[test]
    fn verify_cli() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_variable_that_is_set_to_nothing_does_not_count() {
        assert_empty_variables_do_not_count(Cli::command());
    }

    /// Also those that come later: each is in a group, and each has an example.
    #[test]
    fn the_help_groups_every_command_and_each_has_an_example() {
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        grouped.retain(|name| *name != "help");
        grouped.sort_unstable();
        let command = Cli::command();
        let shown: Vec<&clap::Command> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();
        let mut names: Vec<&str> = shown.iter().map(|command| command.get_name()).collect();
        names.sort_unstable();
        assert_eq!(grouped, names);
        let last = |command: &&clap::Command| !command.has_subcommands();
        let all = shown.iter().flat_map(|command| std::iter::once(*command).chain(command.get_subcommands()));
        for command in all.filter(last) {
            let example = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(example.contains("aftercommit "), "{} has no example", command.get_name());
        }
    }

    #[test]
    fn a_payload_is_given_in_one_way() {
        assert_eq!(given_payload("{}").unwrap(), b"{}");
        assert_eq!(given_payload("@/nowhere").unwrap_err().kind(), ErrorKind::Config);
    }

    #[test]
    fn a_header_is_split_at_its_first_equals_sign() {
        assert_eq!(header("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(header("a").is_err());
    }
}
