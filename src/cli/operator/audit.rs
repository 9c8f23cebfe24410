//! `aftercommit audit`.

use clap::Args;
use humantime::Duration;
use uuid::Uuid;

use super::as_json;
use super::terminal::{plain, time};
use crate::admin::audit::{self, AuditEntry, AuditFilter};
use crate::cli::PostgresArgs;
use crate::error::Error;

#[derive(Args)]
pub(super) struct Audit {
    /// Only what concerns this event
    #[arg(long, value_name = "EVENT_ID")]
    event: Option<Uuid>,
    /// Only what concerns this subscriber
    #[arg(long, value_name = "NAME")]
    subscriber: Option<String>,
    /// Only the last so long, such as 1d
    #[arg(long, value_name = "DURATION")]
    since: Option<Duration>,
    /// At most so many, the latest
    #[arg(long, default_value_t = 100)]
    limit: i64,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Audit) -> Result<String, Error> {
    let filter = AuditFilter {
        event: command.event.map(Into::into),
        subscriber: command.subscriber,
        since: command.since.map(Into::into),
    };
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
        "{}  {} ({role})  {}{subscriber}{event}  {}\n",
        time(*at),
        plain(who),
        plain(action),
        plain(&detail.to_string())
    )
}
