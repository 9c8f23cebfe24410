//! `aftercommit relay`.

use clap::Subcommand;

use super::who::WhoArgs;
use crate::admin;
use crate::cli::PostgresArgs;
use crate::error::Error;

#[derive(Subcommand)]
pub(super) enum Relay {
    /// Stop publishing until told to resume; the backlog waits in the outbox
    Pause {
        /// Why, for the next one who looks
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Publish again
    Resume {
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
}

pub(super) async fn run(command: Relay) -> Result<String, Error> {
    Ok(match command {
        Relay::Pause { reason, who, postgres } => {
            match admin::relay::pause(&postgres.config()?, &who.name(), reason.as_deref()).await? {
                true => "paused; `aftercommit relay resume` goes on\n".into(),
                false => "it was paused already\n".into(),
            }
        }
        Relay::Resume { who, postgres } => match admin::relay::resume(&postgres.config()?, &who.name()).await? {
            true => "resumed\n".into(),
            false => "it was not paused\n".into(),
        },
    })
}
