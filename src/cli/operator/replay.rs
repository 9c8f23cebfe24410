//! `aftercommit replay`.

use chrono::{DateTime, Utc};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use uuid::Uuid;

use super::as_json;
use super::subscribers::SubscriberArgs;
use super::terminal::{cut, plain, table, time};
use super::who::WhoArgs;
use crate::admin::replay::{Filter, Found, Replayed, replay};
use crate::cli::servers::{OutboxArgs, Servers};
use crate::error::{Error, ErrorKind};

#[derive(Args)]
pub(super) struct Replay {
    #[command(flatten)]
    subscribers: SubscriberArgs,
    /// Events by id; separated by commas
    #[arg(long, value_name = "EVENT_ID", value_delimiter = ',')]
    ids: Vec<Uuid>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    event_type: Option<String>,
    /// Only events with this key
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Only events written at this time or later, such as 2026-03-01T00:00:00Z
    #[arg(long, value_name = "TIME")]
    since: Option<DateTime<Utc>>,
    /// Only events written before this time
    #[arg(long, value_name = "TIME")]
    until: Option<DateTime<Utc>>,
    /// Run also those once more that the subscriber has handled
    #[arg(long)]
    again: bool,
    /// Only what the stream holds, without asking the outbox
    #[arg(long)]
    stream_only: bool,
    #[command(flatten)]
    outbox: OutboxArgs,
    /// Only show what would be sent
    #[arg(long)]
    dry_run: bool,
    /// Do it without having named each event
    #[arg(long)]
    yes: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    servers: Servers,
}

pub(super) async fn run(command: Replay) -> Result<String, Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let subscriptions = command.subscribers.subscriptions(&nats, &naming).await?;
    let [subscription] = subscriptions.as_slice() else {
        return Err(Error::new(ErrorKind::Config, "which subscriber shall get the events? Name it with --subscriber"));
    };
    let wanted = crate::admin::replay::Replay {
        filter: Filter {
            ids: command.ids.iter().map(|id| (*id).into()).collect(),
            event_type: command.event_type.clone(),
            key: command.key.clone(),
            since: command.since,
            until: command.until,
        },
        again: command.again,
        outbox: command.outbox.config(postgres.pooled)?.map(|outbox| (outbox, naming.clone())),
        stream_only: command.stream_only,
        dry_run: command.dry_run,
    };
    let who = command.who.name();
    if !command.dry_run && !command.yes && command.ids.is_empty() {
        let look = crate::admin::replay::Replay { dry_run: true, ..wanted.clone() };
        let events = events_of(replay(&postgres, &nats, subscription, &who, &look).await?.events);
        let problem = format!(
            "nothing was done: {events} would be sent to {}. See which with --dry-run, then say --yes",
            subscription.name()
        );
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let replayed = replay(&postgres, &nats, subscription, &who, &wanted).await?;
    match command.json {
        true => as_json(&replayed),
        false => Ok(text(&replayed, subscription.name(), command.dry_run)),
    }
}

fn text(replayed: &Replayed, subscriber: &str, dry_run: bool) -> String {
    let events = events_of(replayed.events);
    if !dry_run {
        return format!("{events} sent to {}\n", plain(subscriber));
    }
    let row = |found: &Found| {
        vec![
            found.event_id.to_string(),
            time(found.time),
            plain(&found.event_type),
            found.key.as_deref().map_or_else(|| "-".into(), |key| cut(key, 40)),
            found.stream_sequence.map_or_else(|| "outbox".into(), |sequence| sequence.to_string()),
        ]
    };
    let rows: Vec<_> = replayed.first.iter().map(row).collect();
    let first = if replayed.events > rows.len() as u64 { format!(", the first {}", rows.len()) } else { String::new() };
    let shown =
        if rows.is_empty() { String::new() } else { table(&["event", "written", "type", "key", "from"], &rows) };
    format!("{events} would be sent to {}{first}:\n{shown}", plain(subscriber))
}

fn events_of(count: u64) -> String {
    if count == 1 { "1 event".into() } else { format!("{count} events") }
}
