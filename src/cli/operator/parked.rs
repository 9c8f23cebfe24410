//! `aftercommit parked`.

use clap::Subcommand;
use uuid::Uuid;

use super::as_json;
use super::who::WhoArgs;
use crate::admin;
use crate::admin::relay::ParkedEvent;
use crate::cli::PostgresArgs;
use crate::error::Error;

#[derive(Subcommand)]
pub(super) enum Parked {
    /// List them in outbox order
    List {
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: i64,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Let the relay try an event again, and then what waits behind it
    Release {
        /// The event's id
        event_id: Uuid,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
    /// Give an event up and let go what waits behind it
    Discard {
        /// The event's id
        event_id: Uuid,
        #[command(flatten)]
        who: WhoArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    },
}

pub(super) async fn run(command: Parked) -> Result<String, Error> {
    match command {
        Parked::List { limit, json, postgres } => {
            let events = admin::relay::parked(&postgres.config()?, limit).await?;
            if json {
                return as_json(&events);
            }
            if events.is_empty() {
                return Ok("nothing is parked\n".into());
            }
            let line = |event: &ParkedEvent| {
                let code = event.code.map_or_else(|| "-".into(), |code| code.to_string());
                let key = event.key.as_deref().unwrap_or("-");
                format!(
                    "{}  outbox id {}  {}  key {key}  {}  code {code}  {}\n",
                    event.event_id, event.outbox_id, event.event_type, event.state, event.reason
                )
            };
            Ok(events.iter().map(line).collect())
        }
        Parked::Release { event_id, who, postgres } => {
            let events = admin::relay::release(&postgres.config()?, &who.name(), event_id.into()).await?;
            Ok(format!("released {events} events\n"))
        }
        Parked::Discard { event_id, who, postgres } => {
            let events = admin::relay::discard(&postgres.config()?, &who.name(), event_id.into()).await?;
            Ok(format!("discarded the event, released {events} events behind it\n"))
        }
    }
}
