//! `aftercommit-worker`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;

use super::http::{self, HttpArgs};
use super::{NamingArgs, NatsArgs, PostgresArgs, fail, run_role};
use crate::error::Error;
use crate::worker::{Subscriber, Worker, read_file};

const NAME: &str = "aftercommit-worker";

/// Runs the subscribers of a worker.toml: calls an SQL function for each event, in order per key
#[derive(Parser)]
#[command(name = NAME, version)]
struct Cli {
    /// The file that names the subscribers
    #[arg(long, value_name = "FILE", default_value = "worker.toml")]
    config: PathBuf,
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
    fn worker(&self) -> Result<Worker, Error> {
        let remedy = format!("run `aftercommit provision --config {}`", self.config.display());
        let worker = Worker::new(self.postgres.config()?, self.nats.config()?, self.naming.config()?).remedy(remedy);
        let worker = worker.unhealthy_after(self.http.unhealthy_after);
        Ok(read_file(&self.config)?.into_iter().fold(worker, Worker::subscriber))
    }
}

/// Runs the subscribers of this program
#[derive(Parser)]
#[command(version)]
struct Service {
    /// Create or correct the JetStream consumers, print what was changed, and end
    #[arg(long)]
    provision: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
    #[command(flatten)]
    http: HttpArgs,
}

/// See [`crate::worker::main`].
pub(crate) fn serve(subscribers: Vec<Subscriber>) -> ExitCode {
    let cli = Service::parse();
    let worker = || {
        let worker = Worker::new(cli.postgres.config()?, cli.nats.config()?, cli.naming.config()?);
        let worker = worker.remedy("run this program with --provision".into());
        let worker = worker.unhealthy_after(cli.http.unhealthy_after);
        Ok(subscribers.into_iter().fold(worker, Worker::subscriber))
    };
    match worker() {
        Ok(worker) if cli.provision => run_role(NAME, async |_| {
            for change in worker.provision().await? {
                println!("{change}");
            }
            Ok(())
        }),
        Ok(worker) => run_role(NAME, |shutdown| run(worker, cli.http, shutdown)),
        Err(error) => fail(NAME, &error),
    }
}

async fn run(worker: Worker, http: HttpArgs, shutdown: CancellationToken) -> Result<(), Error> {
    let server = http.open().await?;
    Box::pin(http::beside(server, worker.monitor(), worker.run(shutdown))).await
}

/// Runs the worker of this process until a signal ends it. The exit status is 0 after an orderly stop, 2 when the
/// command line, the file or a setting is at fault, 1 when the stop was a hard one.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.worker() {
        Ok(worker) => run_role(NAME, |shutdown| run(worker, cli.http, shutdown)),
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
        Service::command().debug_assert();
    }
}
