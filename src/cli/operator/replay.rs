//! `aftercommit replay`.

use std::process::ExitCode;

use chrono::Utc;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use uuid::Uuid;

use super::as_json;
use super::subscribers::SubscriberArgs;
use super::terminal::{counted, cut, plain, table, time};
use super::time::when;
use super::who::WhoArgs;
use crate::EventId;
use crate::cli::servers::{OutboxArgs, Servers};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::When;
use aftercommit_operator::replay::{Filter, Found, Replayed, replay};

#[derive(Args)]
pub(super) struct Replay {
    #[command(flatten)]
    subscribers: SubscriberArgs,
    /// Events by their ids
    #[arg(value_name = "EVENT_ID")]
    events: Vec<Uuid>,
    /// The same, separated by commas
    #[arg(long, value_name = "EVENT_ID", value_delimiter = ',', hide = true)]
    ids: Vec<Uuid>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    event_type: Option<String>,
    /// Only events with this key
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Only events written since this time or within this duration, such as 2026-03-01T00:00:00Z or 2h
    #[arg(long, value_name = "TIME", value_parser = when)]
    since: Option<When>,
    /// Only events written before this time or longer ago than this duration
    #[arg(long, value_name = "TIME", value_parser = when)]
    until: Option<When>,
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

pub(super) async fn run(command: Replay) -> Result<(String, ExitCode), Error> {
    let now = Utc::now();
    let ids: Vec<EventId> = command.events.iter().chain(&command.ids).map(|id| (*id).into()).collect();
    let named = !ids.is_empty();
    let (postgres, nats, naming) = command.servers.config()?;
    let subscriptions = command.subscribers.subscriptions(&nats, &naming).await?;
    let [subscription] = subscriptions.as_slice() else {
        return Err(Error::new(ErrorKind::Config, "which subscriber shall get the events? Name it with --subscriber"));
    };
    let wanted = aftercommit_operator::replay::Replay {
        filter: Filter {
            ids,
            event_type: command.event_type.clone(),
            key: command.key.clone(),
            since: command.since.map(|when| when.resolve(now)),
            until: command.until.map(|when| when.resolve(now)),
        },
        again: command.again,
        outbox: command.outbox.config(&postgres)?.map(|outbox| (outbox, naming.clone())),
        stream_only: command.stream_only,
        dry_run: command.dry_run,
    };
    let who = command.who.name();
    if !command.dry_run && !command.yes && !named {
        let look = aftercommit_operator::replay::Replay { dry_run: true, ..wanted.clone() };
        let events = counted(replay(&postgres, &nats, subscription, &who, &look).await?.events, "event");
        let problem = format!(
            "nothing was done: {events} would be sent to {}. See which with --dry-run, then say --yes",
            plain(subscription.name())
        );
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let replayed = replay(&postgres, &nats, subscription, &who, &wanted).await?;
    let exit = if replayed.unknown.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if command.json {
        return Ok((as_json(&replayed)?, exit));
    }
    let text = text(&replayed, subscription.name(), command.dry_run);
    if replayed.unknown.is_empty() {
        return Ok((text, exit));
    }
    let unknown: Vec<String> = replayed.unknown.iter().map(ToString::to_string).collect();
    let problem = format!(
        "{}; not found: {}. Neither stream nor outbox has them, or the consumer has not come to them yet: see \
         `aftercommit explain`",
        text.trim_end(),
        unknown.join(", ")
    );
    Err(Error::new(ErrorKind::NotReady, problem))
}

fn text(replayed: &Replayed, subscriber: &str, dry_run: bool) -> String {
    let events = counted(replayed.events, "event");
    let left_out = match replayed.left_out.len() {
        0 => String::new(),
        left_out => {
            format!("; {left_out} left out, because the subscriber is done with them or has them already (--again)")
        }
    };
    let erased = match replayed.erased {
        0 => String::new(),
        erased => format!("; {erased} left out, because what they held was erased: see `aftercommit explain`"),
    };
    let left_out = left_out + &erased;
    if !dry_run {
        return format!("{events} sent to {}{left_out}\n", plain(subscriber));
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
    format!("{events} would be sent to {}{first}{left_out}:\n{shown}", plain(subscriber))
}
