//! `aftercommit audit`.

use clap::Args;
use uuid::Uuid;

use super::as_json;
use super::terminal::{plain, time};
use super::time::when;
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_operator::When;
use aftercommit_operator::audit::{self, AuditEntry, AuditFilter};

#[derive(Args)]
pub(super) struct Audit {
    /// Only what concerns this event
    #[arg(long, value_name = "EVENT_ID")]
    event: Option<Uuid>,
    /// Only what concerns this subscriber
    #[arg(long, value_name = "NAME")]
    subscriber: Option<String>,
    /// Only entries since this time or within this duration, such as 2026-03-01T12:00:00Z or 1d
    #[arg(long, value_name = "TIME", value_parser = when)]
    since: Option<When>,
    /// Maximum number to show, the latest
    #[arg(long, default_value_t = 100)]
    limit: i64,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Audit) -> Result<String, Error> {
    let filter =
        AuditFilter { event: command.event.map(Into::into), subscriber: command.subscriber, since: command.since };
    let entries = audit::list(&command.postgres.config()?, &filter, command.limit).await?;
    if command.json {
        return as_json(&entries);
    }
    if entries.is_empty() {
        return Ok("nothing is on record\n".into());
    }
    Ok(entries.iter().map(line).collect())
}

fn line(entry: &AuditEntry) -> String {
    let AuditEntry { at, who, role, action, subscriber, event_id, detail } = entry;
    let subscriber = subscriber.as_deref().map(|name| format!("  subscriber {}", plain(name))).unwrap_or_default();
    let event = event_id.map(|id| format!("  event {id}")).unwrap_or_default();
    format!(
        "{}  {} ({})  {}{subscriber}{event}  {}\n",
        time(*at),
        plain(who),
        plain(role),
        plain(action),
        plain(&detail.to_string())
    )
}
