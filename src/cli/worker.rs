//! `aftercommit-worker`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::worker::{Worker, read_file};

use super::{NamingArgs, NatsArgs, PostgresArgs, run_service};

/// Runs the subscribers of a worker.toml
#[derive(Debug, Parser)]
#[command(name = "aftercommit-worker", version)]
struct Args {
    /// The file that names the subscribers
    #[arg(long, value_name = "FILE", default_value = "worker.toml")]
    config: PathBuf,
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// Parses the command line and runs.
pub fn main() -> ExitCode {
    let args = Args::parse();
    run_service(|stop| run(args, stop))
}

async fn run(args: Args, stop: CancellationToken) -> Result<(), Error> {
    let remedy = format!("run `aftercommit provision --config {}`", args.config.display());
    let worker = Worker::new(args.postgres.config(), args.nats.config(), args.naming.config()?).remedy(remedy);
    read_file(&args.config)?.into_iter().fold(worker, Worker::subscriber).run(stop).await
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        super::Args::command().debug_assert();
    }
}
