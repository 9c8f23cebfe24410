//! `aftercommit migrate`, `provision` and `publish`.

use std::path::PathBuf;

use clap::Args;
use serde::de::IgnoredAny;
use serde_json::json;
use tracing::Instrument;

use super::who::WhoArgs;
use super::{as_json, given_payload, header};
use crate::cli::NamingArgs;
use crate::cli::log::{command_span, start_logging};
use crate::cli::servers::{NatsArgs, OutboxArgs, PostgresArgs};
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::envelope::is_json;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::text::plain;
use aftercommit_outbox::RawEvent;
use aftercommit_worker::{Provisioning, Start, provision as provision_all};

#[derive(Args)]
pub(super) struct Migrate {
    /// Print the SQL instead, for another migration tool
    #[arg(long, conflicts_with = "json")]
    print: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Provision {
    /// A worker.toml: provisions the consumers of its subscribers too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Create a stream that keeps what JetStream announces: events that subscribers gave up
    #[arg(long)]
    advisories: bool,
    /// Take over from another database, as after a restore: with --outbox-database the stream, with --config the consumers;
    /// those that deliver more than is wanted are narrowed
    #[arg(long)]
    adopt: bool,
    /// Where subscribers start whose consumers are made for the first time, in place of their own `start`: all, new, a time
    /// such as 2026-03-01T12:00:00Z, or a sequence of the stream
    #[arg(long, requires = "config")]
    start: Option<Start>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    /// The database of the subscribers, which the consumers are stamped with and whose audit trail gets an entry
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    outbox: OutboxArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

#[derive(Args)]
pub(super) struct Publish {
    /// The event's type, such as order.placed
    #[arg(value_name = "TYPE")]
    event_type: String,
    /// The ordering key
    #[arg(long)]
    key: Option<String>,
    /// A header; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// The payload; @FILE reads it from a file, - from standard input
    #[arg(long, value_name = "TEXT")]
    payload: String,
    /// The payload's media type
    #[arg(long, default_value = "application/json")]
    content_type: String,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn migrate(command: Migrate) -> Result<String, Error> {
    if command.print {
        return Ok(aftercommit_operator::migrations_sql(&command.postgres.config()?.schema));
    }
    start_logging(super::NAME)?;
    let config = command.postgres.config()?;
    let migrate = async {
        let applied = aftercommit_operator::migrate(&config).await?;
        Ok::<_, Error>((applied, aftercommit_operator::correct_ids(&config).await?))
    };
    let (applied, corrected) = migrate.instrument(command_span("migrate")).await?;
    if command.json {
        return as_json(&json!({ "applied": applied, "corrected": corrected }));
    }
    if applied.is_empty() && corrected.is_empty() {
        return Ok(format!("the schema {} is up to date\n", config.schema));
    }
    let applied = applied.iter().map(|name| format!("applied {name}\n"));
    Ok(applied.chain(corrected.iter().map(|what| format!("{what}\n"))).collect())
}

pub(super) async fn provision(command: Provision) -> Result<String, Error> {
    let subscribers = command.config.as_deref().map(crate::worker::read_file).transpose()?;
    let (nats, naming, postgres) = (command.nats.config()?, command.naming.config()?, command.postgres.config()?);
    let outbox = command.outbox.config(&postgres)?;
    if command.adopt && subscribers.is_none() && outbox.is_none() {
        let problem = "--adopt needs to know of what: give --config, or OUTBOX_DATABASE_URL (--outbox-database)";
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let mut changes = match outbox {
        Some(outbox) => aftercommit_operator::provision_claimed(&outbox, &nats, &naming, command.adopt).await?,
        None => aftercommit_operator::provision(&nats, &naming).await?,
    };
    if command.advisories {
        changes.extend(aftercommit_operator::provision_advisories(&nats, &naming).await?);
    }
    if let Some(subscribers) = subscribers {
        let database = Some(&postgres).filter(|postgres| !postgres.url.is_empty());
        let provisioning = Provisioning { adopt: command.adopt, start: command.start };
        changes.extend(provision_all(database, &nats, &naming, &subscribers.into(), provisioning).await?);
    }
    if !changes.is_empty() {
        record(&postgres, &command.who.name(), &naming.stream, &changes).await;
    }
    if command.json {
        return as_json(&json!({ "changes": changes }));
    }
    if changes.is_empty() {
        return Ok("everything is as it should be\n".into());
    }
    Ok(changes.iter().map(|change| format!("{}\n", plain(change))).collect())
}

/// What was changed in NATS stays changed, so an audit trail that cannot be written is said and is no failure: at the first
/// time there is no schema yet.
async fn record(postgres: &PostgresConfig, who: &str, stream: &str, changes: &[String]) {
    if postgres.url.is_empty() {
        return;
    }
    if let Err(error) = aftercommit_operator::audit::provisioned(postgres, who, stream, changes).await {
        eprintln!("aftercommit: the audit trail has no entry of this: {}", plain(&error.report()));
    }
}

pub(super) async fn publish(command: Publish) -> Result<String, Error> {
    let payload = given_payload(&command.payload)?;
    if is_json(&command.content_type) {
        serde_json::from_slice::<IgnoredAny>(&payload).map_err(|error| {
            let problem = "the payload is not JSON; @FILE reads it from a file, --content-type names something else";
            Error::with_source(ErrorKind::Config, problem, error)
        })?;
    }
    let mut event = RawEvent::new(command.event_type, command.content_type, payload);
    if let Some(key) = command.key {
        event = event.key(key);
    }
    for (name, value) in command.headers {
        event = event.header(name, value);
    }
    let id = aftercommit_operator::publish(&command.postgres.config()?, event).await?;
    if command.json { as_json(&json!({ "event_id": id })) } else { Ok(format!("{id}\n")) }
}
