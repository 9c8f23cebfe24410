//! `aftercommit-relay`.

use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;

use super::http::{self, HttpArgs};
use super::{NamingArgs, NatsArgs, PostgresArgs, fail, run_role};
use crate::error::Error;
use crate::relay::{Relay, RelayConfig};

const NAME: &str = "aftercommit-relay";

/// Publishes what transactions committed to the outbox, in order, to a JetStream stream
#[derive(Parser)]
#[command(name = NAME, version)]
struct Cli {
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
    #[command(flatten)]
    http: HttpArgs,
}

impl Cli {
    fn config(&self) -> Result<RelayConfig, Error> {
        let config = RelayConfig::new(self.postgres.config()?, self.nats.config()?, self.naming.config()?);
        Ok(RelayConfig { unhealthy_after: self.http.unhealthy_after, ..config })
    }
}

/// Runs the relay of this process until a signal ends it. The exit status is 0 after an orderly stop, 2 when the
/// command line or a setting is at fault, 1 when schema or stream are missing at the start or the stop was a hard one.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.config() {
        Ok(config) => run_role(NAME, |shutdown| run(config, cli.http, shutdown)),
        Err(error) => fail(NAME, &error),
    }
}

async fn run(config: RelayConfig, http: HttpArgs, shutdown: CancellationToken) -> Result<(), Error> {
    let server = http.open().await?;
    let relay = Relay::new(config);
    Box::pin(http::beside(server, relay.monitor(), relay.run(shutdown))).await
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
