//! The command line.

use std::env;
use std::io::Write;
use std::process::ExitCode;

use clap::{ArgAction, Args, Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::arm::{self, Arm};
use crate::bench::BenchConfig;
use crate::run::{self, FIGURES};
use aftercommit::cli::servers::{NatsArgs, PostgresArgs, Servers};
use aftercommit::cli::{fail, parse, signal};
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::{Error, ErrorKind};

const NAME: &str = "aftercommit-bench";

/// Measure how fast everything is here, beside its floor in the same run; makes databases and streams of its own and
/// removes them
#[derive(Parser)]
#[command(name = NAME, version, args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
#[command(
    after_help = "Exit status: 0 when every figure was taken and no event went wrong, 1 when not, 2 when the command line \
                        or a setting is wrong.\n\nExample:\n  aftercommit-bench --own-servers --quick"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    measure: Measure,
}

#[derive(Subcommand)]
enum Command {
    /// What the bench starts
    #[command(hide = true)]
    Arm(Box<ArmArgs>),
}

#[derive(Args)]
struct Measure {
    /// Only see whether everything works: one round of few events, whose figures mean nothing
    #[arg(long)]
    quick: bool,
    /// How often each arm is measured, beside a first time that does not count
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Which figures, by their numbers, such as 1,3; all when not given
    #[arg(long, value_name = "FIGURES", value_delimiter = ',', action = ArgAction::Append)]
    #[arg(value_parser = clap::value_parser!(u8).range(i64::from(*FIGURES.start())..=i64::from(*FIGURES.end())))]
    only: Vec<u8>,
    /// Events that an arm moves in a round, where the figure does not prescribe another number
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    events: u64,
    /// Print it as JSON
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print it as a table in Markdown
    #[arg(long)]
    markdown: bool,
    /// Start PostgreSQL and nats-server for the run, with the settings that they have by default
    #[cfg(unix)]
    #[arg(long, conflicts_with_all = ["database_url", "database_url_file", "nats_sync_url"])]
    own_servers: bool,
    /// A server with `sync_interval: always`, for the figures that need it; whoever connects is the same
    #[arg(long, env = "NATS_SYNC_URL", hide_env_values = true, value_name = "URL")]
    nats_sync_url: Option<String>,
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
}

/// A process that a bench starts.
#[derive(Args)]
struct ArmArgs {
    /// What to do
    arm: Arm,
    /// Events
    #[arg(long)]
    events: u64,
    #[command(flatten)]
    servers: Servers,
}

/// Runs the command line of this process. The exit status is 0 when every figure was taken and no event went wrong, 2
/// when the command line or a setting is at fault, else 1.
pub(crate) fn main() -> ExitCode {
    start(parse(env::args_os())).unwrap_or_else(|error| fail(NAME, &error))
}

fn start(cli: Cli) -> Result<ExitCode, Error> {
    // As relay and worker have it.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Config, "the runtime cannot start", error))?;
    let (text, exit) = match cli.command {
        Some(Command::Arm(command)) => (runtime.block_on(run_arm(*command))?, ExitCode::SUCCESS),
        None => runtime.block_on(measure(cli.measure))?,
    };
    // A reader that went away early, such as `head`, has what it wanted.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(exit)
}

/// The report, and a failure when an event went wrong in any run.
async fn measure(command: Measure) -> Result<(String, ExitCode), Error> {
    let (config, servers) = command.config().await?;
    let interrupted = CancellationToken::new();
    let token = interrupted.clone();
    tokio::spawn(async move {
        if signal().await.is_ok() {
            token.cancel();
        }
    });
    let report = Box::pin(run::run(config, interrupted)).await?;
    drop(servers);
    let text = match (command.json, command.markdown) {
        (true, _) => {
            let json = serde_json::to_string_pretty(&report).map_err(|error| {
                Error::with_source(ErrorKind::Integrity, "the report cannot be written as JSON", error)
            })?;
            json + "\n"
        }
        (_, true) => report.to_markdown(),
        _ => report.to_string(),
    };
    Ok((text, if report.all_is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// What the process found, for the bench that started it.
async fn run_arm(command: ArmArgs) -> Result<String, Error> {
    let ArmArgs { arm, events, servers } = command;
    let (postgres, nats, naming) = servers.config()?;
    Box::pin(arm::run_arm(arm, events, postgres, nats, naming)).await
}

impl Measure {
    /// What is to be measured, and the servers that were started for it.
    async fn config(&self) -> Result<(BenchConfig, OwnServers), Error> {
        let (mut config, servers) = self.servers().await?;
        config.only.clone_from(&self.only);
        (config.quick, config.rounds, config.events) = (self.quick, self.rounds, self.events);
        Ok((config, servers))
    }

    async fn servers(&self) -> Result<(BenchConfig, OwnServers), Error> {
        #[cfg(unix)]
        if self.own_servers {
            return OwnServers::start().await;
        }
        let mut config = BenchConfig::new(self.postgres.config()?, self.nats.config()?);
        let sync = self.nats_sync_url.clone().filter(|url| !url.is_empty());
        config.nats_sync = sync.map(|url| NatsConfig { url, ..config.nats.clone() });
        Ok((config, OwnServers::default()))
    }
}

/// Servers that end with this value.
#[derive(Default)]
struct OwnServers {
    #[cfg(unix)]
    _own: Option<(
        aftercommit_testing::servers::Postgres,
        aftercommit_testing::servers::Nats,
        aftercommit_testing::servers::Nats,
    )>,
}

#[cfg(unix)]
impl OwnServers {
    async fn start() -> Result<(BenchConfig, Self), Error> {
        use aftercommit_core::config::PostgresConfig;
        use aftercommit_testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};

        let postgres = Postgres::start(PostgresOptions::default()).await?;
        let nats = Nats::start(NatsOptions::default()).await?;
        let sync = NatsOptions { jetstream: "sync_interval: always".into(), ..NatsOptions::default() };
        let sync = Nats::start(sync).await?;
        let at = |nats: &Nats| NatsConfig { url: nats.url(), ..NatsConfig::default() };
        let mut config = BenchConfig::new(PostgresConfig::new(postgres.url("postgres")), at(&nats));
        config.nats_sync = Some(at(&sync));
        Ok((config, Self { _own: Some((postgres, nats, sync)) }))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn verify_cli() {
        Cli::command().debug_assert();
    }
}
