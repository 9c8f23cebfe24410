//! `aftercommit`, the operator's tool.

mod audit;
mod bench;
mod dead;
mod doctor;
mod explain;
mod findings;
mod parked;
mod peek;
mod reconcile;
mod relay;
mod replay;
mod selection;
mod subscribers;
mod terminal;
mod who;
mod worker;

use std::env;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::de::IgnoredAny;

use super::servers::{NatsArgs, PostgresArgs, Servers};
use super::{NamingArgs, fail, parse, start_logging};
use crate::admin;
use crate::envelope::is_json;
use crate::error::{Error, ErrorKind};
use crate::outbox::RawEvent;

/// The operator's tool of aftercommit
#[derive(Parser)]
#[command(name = "aftercommit", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what operators did, and who and when
    Audit(audit::Audit),
    /// Measure how fast everything is here, beside its floor in the same run; makes databases and streams of its own and
    /// removes them
    Bench(Box<bench::Bench>),
    /// What `bench` starts
    #[command(hide = true)]
    BenchArm(Box<bench::BenchArm>),
    /// See, run again, edit or give up events that a subscriber gave up on
    #[command(subcommand)]
    Dead(dead::Dead),
    /// Look for what is wrong, or will be, and say what to do about it; it changes nothing
    Doctor(Box<doctor::Doctor>),
    /// Tell one event's whole story, from the outbox to its effects
    Explain(Box<explain::Explain>),
    /// Show what reconcilers found
    Findings(findings::Findings),
    /// Create or update the schema aftercommit; harmless when it is up to date
    Migrate(Migrate),
    /// See and decide about events that the stream would not take
    #[command(subcommand)]
    Parked(parked::Parked),
    /// Look at what waits for a subscriber, without taking anything
    Peek(Box<peek::Peek>),
    /// Create the stream and consumers, or correct settings of it that would lose events; prints what it changed
    Provision(Provision),
    /// Write one event in a transaction of its own and print its id
    Publish(Publish),
    /// Compare what should be the same, report what is not, and repair it
    Reconcile(Box<reconcile::Reconcile>),
    /// Pause or resume publishing, whichever relay leads
    #[command(subcommand)]
    Relay(relay::Relay),
    /// Send events to one subscriber that it has missed, or once more
    Replay(Box<replay::Replay>),
    /// Show what reconcilers did
    Runs(findings::Runs),
    /// Show the backlog, the leading relay, the stream and the subscribers
    Status(Status),
    /// Pause or resume subscribers, whichever instance is active
    #[command(subcommand)]
    Worker(worker::Worker),
}

#[derive(Args)]
struct Migrate {
    /// Print the SQL instead, for another migration tool
    #[arg(long)]
    print: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
struct Provision {
    /// A worker.toml: provisions the consumers of its subscribers too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

#[derive(Args)]
struct Status {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    servers: Servers,
}

#[derive(Args)]
struct Publish {
    /// The event's type, such as order.placed
    #[arg(value_name = "TYPE")]
    event_type: String,
    /// The ordering key
    #[arg(long)]
    key: Option<String>,
    /// A header; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// The payload, or - to read it from standard input
    #[arg(long)]
    payload: String,
    /// The payload's media type
    #[arg(long, default_value = "application/json")]
    content_type: String,
    #[command(flatten)]
    postgres: PostgresArgs,
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.into(), value.into())),
        None => Err("it is not of the form NAME=VALUE".into()),
    }
}

/// Runs the command line of this process. The exit status is 0 when all went well, 1 when it did not or the doctor found
/// something that fails, and 2 when the command line or a setting is at fault.
pub fn main() -> ExitCode {
    let result = match parse(env::args_os()) {
        Cli { command: Command::Reconcile(command) } if command.goes_on() => return reconcile::go_on(*command),
        cli => run(cli),
    };
    match result {
        Ok(status) => status,
        Err(error) => fail("aftercommit", &error),
    }
}

fn run(cli: Cli) -> Result<ExitCode, Error> {
    let mut runtime = match cli.command {
        // As relay and worker have it.
        Command::Bench(_) | Command::BenchArm(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime
        .enable_all()
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Config, "the runtime cannot start", error))?;
    let mut exit = ExitCode::SUCCESS;
    let text = match cli.command {
        Command::Audit(command) => runtime.block_on(audit::run(command))?,
        Command::Bench(command) => {
            let (text, status) = runtime.block_on(bench::run(*command))?;
            exit = status;
            text
        }
        Command::BenchArm(command) => runtime.block_on(bench::arm(*command))?,
        Command::Dead(command) => runtime.block_on(dead::run(command))?,
        Command::Doctor(command) => {
            let (text, well) = runtime.block_on(doctor::run(*command))?;
            if !well {
                exit = ExitCode::FAILURE;
            }
            text
        }
        Command::Explain(command) => runtime.block_on(explain::run(*command))?,
        Command::Findings(command) => runtime.block_on(findings::findings(command))?,
        Command::Migrate(Migrate { print: true, .. }) => admin::migrations_sql(),
        Command::Migrate(command) => runtime.block_on(migrate(command))?,
        Command::Parked(command) => runtime.block_on(parked::run(command))?,
        Command::Peek(command) => runtime.block_on(peek::run(*command))?,
        Command::Provision(command) => runtime.block_on(provision(command))?,
        Command::Publish(command) => runtime.block_on(publish(command))?,
        Command::Reconcile(command) => {
            start_logging();
            let (text, status) = runtime.block_on(reconcile::run(*command))?;
            exit = status;
            text
        }
        Command::Relay(command) => runtime.block_on(relay::run(command))?,
        Command::Replay(command) => runtime.block_on(replay::run(*command))?,
        Command::Runs(command) => runtime.block_on(findings::runs(command))?,
        Command::Status(command) => runtime.block_on(status(command))?,
        Command::Worker(command) => runtime.block_on(worker::run(command))?,
    };
    // A reader that went away early, such as `head`, has what it wanted.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(exit)
}

async fn migrate(command: Migrate) -> Result<String, Error> {
    let applied = admin::migrate(&command.postgres.config()?).await?;
    if applied.is_empty() {
        return Ok("the schema aftercommit is up to date\n".into());
    }
    Ok(applied.iter().map(|name| format!("applied {name}\n")).collect())
}

fn as_json(value: &impl serde::Serialize) -> Result<String, Error> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "the answer cannot be written as JSON", error))?;
    Ok(json + "\n")
}

async fn provision(command: Provision) -> Result<String, Error> {
    let subscribers = command.config.as_deref().map(crate::worker::read_file).transpose()?;
    let (nats, naming) = (command.nats.config()?, command.naming.config()?);
    let mut changes = admin::provision(&nats, &naming).await?;
    if let Some(subscribers) = subscribers {
        changes.extend(crate::worker::provision(&nats, &naming, &subscribers.into()).await?);
    }
    if changes.is_empty() {
        return Ok("everything is as it should be\n".into());
    }
    Ok(changes.iter().map(|change| format!("{change}\n")).collect())
}

async fn status(command: Status) -> Result<String, Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let status = admin::status::status(&postgres, &nats, &naming).await?;
    if !command.json {
        return Ok(status.to_string());
    }
    as_json(&status)
}

async fn publish(command: Publish) -> Result<String, Error> {
    let payload = match command.payload.as_str() {
        "-" => standard_input()?,
        text => text.as_bytes().to_vec(),
    };
    if is_json(&command.content_type) {
        serde_json::from_slice::<IgnoredAny>(&payload).map_err(|error| {
            Error::with_source(ErrorKind::Config, "the payload is not JSON; --content-type names something else", error)
        })?;
    }
    let mut event = RawEvent::new(command.event_type, command.content_type, payload);
    if let Some(key) = command.key {
        event = event.key(key);
    }
    for (name, value) in command.headers {
        event = event.header(name, value);
    }
    let id = admin::publish(&command.postgres.config()?, event).await?;
    Ok(format!("{id}\n"))
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
    use clap::CommandFactory;

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

    #[test]
    fn a_header_is_split_at_its_first_equals_sign() {
        assert_eq!(header("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(header("a").is_err());
    }
}
