//! `aftercommit relay`: pause and resume.

use clap::Subcommand;
use serde_json::json;

use super::as_json;
use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_operator::{self, Pausing};

#[derive(Subcommand)]
pub(super) enum Relay {
    /// Stop publishing until told to resume; the backlog waits in the outbox
    #[command(after_help = "Example:\n  aftercommit relay pause --reason \"the stream is moved\"")]
    Pause {
        /// Why, for the next one who looks; of a relay that is paused already, the new reason
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Publish again
    #[command(after_help = "Example:\n  aftercommit relay resume")]
    Resume {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
}

pub(super) async fn run(command: Relay) -> Result<String, Error> {
    match command {
        Relay::Pause { reason, json, who, postgres } => {
            let pausing =
                aftercommit_operator::relay::pause(&postgres.config()?, &who.name(), reason.as_deref()).await?;
            tell_paused(pausing, "aftercommit relay resume", json)
        }
        Relay::Resume { json, who, postgres } => {
            let resumed = aftercommit_operator::relay::resume(&postgres.config()?, &who.name()).await?;
            if json {
                return as_json(&json!({ "changed": resumed }));
            }
            Ok(if resumed { "resumed\n" } else { "it was not paused\n" }.into())
        }
    }
}

/// What a pause did, and how to end it.
pub(super) fn tell_paused(pausing: Pausing, resume: &str, json: bool) -> Result<String, Error> {
    let (result, text) = match pausing {
        Pausing::Paused => ("paused", format!("paused; `{resume}` goes on\n")),
        Pausing::ReasonChanged => ("reason_changed", "it was paused already; the reason was changed\n".into()),
        Pausing::Unchanged => ("unchanged", "it was paused already\n".into()),
    };
    if json {
        return as_json(&json!({ "result": result, "changed": pausing != Pausing::Unchanged }));
    }
    Ok(text)
}
