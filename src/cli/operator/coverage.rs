//! `aftercommit coverage`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::as_json;
use super::terminal::plain;
use crate::cli::NamingArgs;
use crate::cli::servers::NatsArgs;
use crate::worker::read_file;
use aftercommit_core::error::Error;
use aftercommit_operator::coverage::{self, Unserved};
use aftercommit_worker::Registry;

#[derive(Args)]
pub(super) struct Coverage {
    /// A worker.toml whose subscribers count, too, provisioned or not; may be given several times
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Exit with status 1 when a type has no subscriber or a subscriber no publisher
    #[arg(long)]
    check: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

pub(super) async fn run(command: Coverage) -> Result<(String, ExitCode), Error> {
    let (nats, naming) = (command.nats.config()?, command.naming.config()?);
    let mut declared = Vec::new();
    for file in &command.config {
        declared.extend(read_file(file)?);
    }
    let found = coverage::coverage(&nats, &naming, &Registry::from(declared).subscriptions(&naming)?).await?;
    let exit = if command.check && !found.is_complete() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if command.json {
        return Ok((as_json(&found)?, exit));
    }
    let mut text = format!("types in the stream: {}\n", found.types.len());
    text += &format!("types without subscriber: {}\n", found.types_without_subscriber.len());
    text.extend(found.types_without_subscriber.iter().map(|event_type| format!("  {}\n", plain(event_type))));
    text += &format!("subscribers without publisher: {}\n", found.subscribers_without_publisher.len());
    let unserved = found.subscribers_without_publisher.iter();
    text.extend(unserved.map(|Unserved { subscriber, event_type }| format!("  {subscriber}: {}\n", plain(event_type))));
    Ok((text, exit))
}
