//! `aftercommit-relay`.

use std::process::ExitCode;

use clap::Parser;

use super::{NamingArgs, NatsArgs, PostgresArgs, fail, run_role};
use crate::error::Error;
use crate::relay::{Relay, RelayConfig};

const NAME: &str = "aftercommit-relay";

/// Publishes what transactions committed to the outbox, in order, to a JetStream stream
#[derive(Debug, Parser)]
#[command(name = NAME, version)]
struct Cli {
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

impl Cli {
    fn config(&self) -> Result<RelayConfig, Error> {
        Ok(RelayConfig::new(self.postgres.config(), self.nats.config(), self.naming.config()?))
    }
}

/// Runs the relay of this process until a signal ends it. The exit status is 0 after an orderly stop, 2 when the
/// command line or a setting is at fault, 1 when schema or stream are missing at the start or the stop was a hard one.
pub fn main() -> ExitCode {
    match Cli::parse().config() {
        Ok(config) => run_role(NAME, |shutdown| Relay::new(config).run(shutdown)),
        Err(error) => fail(NAME, &error),
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
