//! `aftercommit subscriber`: what is known of subscribers.

use clap::{Args, Subcommand};

use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::subscriber;

#[derive(Subcommand)]
pub(super) enum Subscriber {
    /// Remove everything that this database has of a removed subscriber: inbox, attempts, lease, pause, findings
    #[command(after_help = "Example:\n  aftercommit subscriber forget receipts --yes")]
    Forget(Forget),
}

#[derive(Args)]
pub(super) struct Forget {
    /// The subscriber
    #[arg(value_name = "NAME")]
    subscriber: String,
    /// Do it; without, it only looks whether it may
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Subscriber) -> Result<String, Error> {
    let Subscriber::Forget(Forget { subscriber: name, yes, who, postgres }) = command;
    let config = postgres.config()?;
    if !yes {
        subscriber::may_be_forgotten(&config, &name).await?;
        return Err(Error::new(
            ErrorKind::Config,
            format!(
                "nothing was done: the inbox of {name} would be gone, and a subscriber of that name would handle again what \
                 its consumer delivers. Run `aftercommit subscriber forget {name} --yes`"
            ),
        ));
    }
    let forgotten = subscriber::forget(&config, &name, &who.name()).await?;
    Ok(format!(
        "forgotten: {name}, {} inbox rows; its consumer in JetStream, if it is still there, goes with `nats consumer rm`\n",
        forgotten.inbox
    ))
}
