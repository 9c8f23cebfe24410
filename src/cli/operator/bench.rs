//! `aftercommit bench`.

use std::process::ExitCode;

use clap::{ArgAction, Args};
use tokio_util::sync::CancellationToken;

use super::as_json;
use crate::bench::{self, Arm, BenchConfig, FIGURES};
use crate::cli::servers::{NatsArgs, PostgresArgs, Servers};
use crate::cli::signal;
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::Error;

#[derive(Args)]
pub(super) struct Bench {
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
    #[cfg(all(unix, feature = "testing"))]
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
pub(super) struct BenchArm {
    /// What to do
    arm: Arm,
    /// Events
    #[arg(long)]
    events: u64,
    #[command(flatten)]
    servers: Servers,
}

/// The report, and a failure when an event went wrong in any run.
pub(super) async fn run(command: Bench) -> Result<(String, ExitCode), Error> {
    let (config, servers) = command.config().await?;
    let interrupted = CancellationToken::new();
    let token = interrupted.clone();
    tokio::spawn(async move {
        if signal().await.is_ok() {
            token.cancel();
        }
    });
    let report = Box::pin(bench::run(config, interrupted)).await?;
    drop(servers);
    let text = match (command.json, command.markdown) {
        (true, _) => as_json(&report)?,
        (_, true) => report.to_markdown(),
        _ => report.to_string(),
    };
    Ok((text, if report.all_is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// What the process found, for the bench that started it.
pub(super) async fn arm(command: BenchArm) -> Result<String, Error> {
    let BenchArm { arm, events, servers } = command;
    let (postgres, nats, naming) = servers.config()?;
    Box::pin(bench::run_arm(arm, events, postgres, nats, naming)).await
}

impl Bench {
    /// What is to be measured, and the servers that were started for it.
    async fn config(&self) -> Result<(BenchConfig, OwnServers), Error> {
        let (mut config, servers) = self.servers().await?;
        config.only.clone_from(&self.only);
        (config.quick, config.rounds, config.events) = (self.quick, self.rounds, self.events);
        Ok((config, servers))
    }

    async fn servers(&self) -> Result<(BenchConfig, OwnServers), Error> {
        #[cfg(all(unix, feature = "testing"))]
        if self.own_servers {
            return OwnServers::start().await;
        }
        let mut config = BenchConfig::new(self.postgres.config()?, self.nats.config()?);
        let sync = self.nats_sync_url.clone().filter(|url| !url.is_empty());
        config.nats_sync = sync.map(|url| NatsConfig { url, ..config.nats.clone() });
        Ok((config, OwnServers::default()))
    }
}

/// OwnServers that end with this value.
#[derive(Default)]
struct OwnServers {
    #[cfg(all(unix, feature = "testing"))]
    _own: Option<(
        aftercommit_testing::servers::Postgres,
        aftercommit_testing::servers::Nats,
        aftercommit_testing::servers::Nats,
    )>,
}

#[cfg(all(unix, feature = "testing"))]
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
