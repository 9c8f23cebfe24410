//! `aftercommit-relay`.

use std::env;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio_util::sync::CancellationToken;

use super::http::{self, HttpArgs};
use super::log::LogArgs;
use super::reconciling::{self, ReconcileArgs};
use super::servers::Servers;
use super::{fail, parse, run_role, systemd};
use aftercommit_core::error::Error;
use aftercommit_core::relay::Mode;
use aftercommit_core::runner::Runner;
use aftercommit_reconciler::OutboxComparison;
use aftercommit_relay::{ParkPolicy, PublishMethod, Relay, RelayConfig};

const NAME: &str = "aftercommit-relay";

/// Publishes what transactions committed to the outbox, in order, to a JetStream stream
#[derive(Parser)]
#[command(name = NAME, version, after_help = "Example:\n  aftercommit-relay --http 127.0.0.1:9100")]
struct Cli {
    #[command(flatten)]
    servers: Servers,
    /// Who writes to the stream
    #[arg(long, env = "AFTERCOMMIT_MODE", value_enum, default_value = "exclusive")]
    mode: Writers,
    /// How messages go to an exclusive stream
    #[arg(long, env = "AFTERCOMMIT_PUBLISH", value_enum, default_value = "auto")]
    publish: Publish,
    /// Publish what is there, then end with status 0
    #[arg(long)]
    once: bool,
    /// What becomes of later events of a key when one of it can never be stored
    #[arg(long, env = "AFTERCOMMIT_PARK_POLICY", value_enum, default_value = "block")]
    park_policy: Policy,
    /// How long to wait for a limit such as nats-server's max_payload to be raised before events that exceed it are parked
    #[arg(long, env = "AFTERCOMMIT_PARK_AFTER", value_name = "DURATION", default_value = "1m", value_parser = humantime::parse_duration)]
    park_after: Duration,
    /// How long events stay in the outbox after they were published: a number of days, or a duration such as 12h
    #[arg(long, env = "AFTERCOMMIT_RETENTION_DAYS", value_name = "DAYS", default_value = "7", value_parser = days)]
    retention_days: f64,
    /// How many events that were found missing in the stream are published again in a second at most
    #[arg(long, env = "AFTERCOMMIT_REPAIR_RATE", value_name = "EVENTS", default_value_t = 5000)]
    repair_rate: u32,
    #[command(flatten)]
    reconcile: ReconcileArgs,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum Writers {
    /// Only the relays of this outbox
    Exclusive,
    /// Others, too
    Shared,
}

impl From<Writers> for Mode {
    fn from(writers: Writers) -> Self {
        match writers {
            Writers::Exclusive => Self::Exclusive,
            Writers::Shared => Self::Shared,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Publish {
    /// In batches when the stream has replicas or the server waits for its disk with each message; else chained
    Auto,
    /// Many messages in flight, each naming its predecessor; one at a time when the stream has replicas
    Chained,
    /// In atomic batches of up to 1,000
    Batched,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Policy {
    /// They wait behind it until an operator decides
    Block,
    /// They go on without it
    Skip,
}

pub(super) fn days(text: &str) -> Result<f64, String> {
    let duration = || humantime::parse_duration(text).ok().map(|duration| duration.as_secs_f64() / 86_400.0);
    match text.parse::<f64>().ok().or_else(duration) {
        Some(days) if (0.0..=36_500.0).contains(&days) => Ok(days),
        _ => Err("a number of days from 0 to 36500 is needed, or a duration such as 12h".into()),
    }
}

impl Cli {
    fn config(&self) -> Result<RelayConfig, Error> {
        let (postgres, nats, naming) = self.servers.config()?;
        Ok(RelayConfig {
            mode: self.mode.into(),
            once: self.once,
            park_after: self.park_after,
            park_policy: match self.park_policy {
                Policy::Block => ParkPolicy::Block,
                Policy::Skip => ParkPolicy::Skip,
            },
            publish: match self.publish {
                Publish::Auto => PublishMethod::Auto,
                Publish::Chained => PublishMethod::Chained,
                Publish::Batched => PublishMethod::Batched,
            },
            repair_rate: self.repair_rate,
            retention: Duration::from_secs_f64(self.retention_days * 86_400.0),
            unhealthy_after: self.http.unhealthy_after,
            ..RelayConfig::new(postgres, nats, naming)
        })
    }
}

/// What a relay with these arguments would be.
#[cfg(feature = "testing")]
pub(crate) fn config_of(arguments: &[&str]) -> Option<RelayConfig> {
    Cli::try_parse_from([NAME].iter().chain(arguments)).ok()?.config().ok()
}

impl Cli {
    fn reconciler(&self, config: &RelayConfig) -> Option<Runner> {
        let (interval, mode) = self.reconcile.schedule()?;
        let leg = OutboxComparison {
            interval,
            mode,
            shared: config.mode == Mode::Shared,
            ..OutboxComparison::new(config.nats.clone(), config.naming.clone())
        };
        Some(Runner::new(config.postgres.clone()).comparison(leg))
    }
}

/// The command line, for its manual page and completions.
pub(super) fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs the relay of this process until a signal ends it. The exit status is 0 after an orderly stop, 2 when the
/// command line or a setting is at fault, 1 when schema or stream are missing at the start or the stop was a hard one.
pub fn main() -> ExitCode {
    let cli: Cli = parse(env::args_os());
    cli.log.choose();
    match cli.config() {
        Ok(config) => {
            let runner = cli.reconciler(&config);
            run_role(NAME, |shutdown| run(config, runner, cli.http, shutdown))
        }
        Err(error) => fail(NAME, &error),
    }
}

async fn run(
    config: RelayConfig,
    runner: Option<Runner>,
    http: HttpArgs,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let server = http.open().await?;
    let relay = Relay::new(config);
    let (checks, running) = reconciling::start(relay.monitor(), runner, &shutdown);
    let (checks, run) = (Arc::new(checks), relay.run(shutdown.clone()));
    let run = systemd::beside(Arc::clone(&checks), shutdown, run);
    let result = Box::pin(http::beside(server, checks, run)).await;
    running.end().await;
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::tests::assert_empty_variables_do_not_count;

    #[test]
    fn a_retention_is_a_number_of_days_or_a_duration() {
        assert_eq!(days("7"), Ok(7.0));
        assert_eq!(days("12h"), Ok(0.5));
        assert!(days("-1").is_err() && days("soon").is_err() && days("1000y").is_err());
    }

    #[test]
    fn verify_cli() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_variable_that_is_set_to_nothing_does_not_count() {
        assert_empty_variables_do_not_count(Cli::command());
    }
}
