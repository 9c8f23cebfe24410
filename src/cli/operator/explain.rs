//! `aftercommit explain`.

use clap::Args;
use serde_json::Value;
use uuid::Uuid;

use super::as_json;
use super::terminal::{payload, payload_member, plain, time};
use crate::cli::servers::Servers;
use aftercommit_core::config::{PostgresConfig, Schema};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::explain::{self, ExplainConfig, Explanation, Standing};

#[derive(Args)]
pub(super) struct Explain {
    /// The event's id
    event_id: Uuid,
    /// A subscriber's database, when it is not the publisher's; may be given several times, in the environment with
    /// spaces in between
    #[arg(long, env = "SUBSCRIBER_DATABASE_URL", hide_env_values = true, value_name = "URL", value_delimiter = ' ')]
    subscriber_database: Vec<String>,
    /// The schema of aftercommit there. Defaults to --schema
    #[arg(long, env = "SUBSCRIBER_SCHEMA", value_name = "NAME")]
    subscriber_schema: Option<Schema>,
    /// Print the payload too
    #[arg(long = "show-payload", alias = "payload")]
    payload: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    servers: Servers,
}

pub(super) async fn run(command: Explain) -> Result<String, Error> {
    let (publisher, nats, naming) = command.servers.config()?;
    let schema = command.subscriber_schema.unwrap_or_else(|| publisher.schema.clone());
    let urls = command.subscriber_database.into_iter().filter(|url| !url.is_empty());
    let config = ExplainConfig {
        subscribers: urls.map(|url| PostgresConfig { url, schema: schema.clone(), ..publisher.clone() }).collect(),
        payload: command.payload,
        ..ExplainConfig::new(publisher, nats, naming)
    };
    let explanation = explain::explain(&config, command.event_id.into()).await?;
    if !command.json {
        return Ok(text(&explanation));
    }
    let mut json = serde_json::to_value(&explanation)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "the answer cannot be written as JSON", error))?;
    if let (Some(bytes), Value::Object(members)) = (&explanation.payload, &mut json) {
        let (name, value) = payload_member(bytes);
        members.insert(name.into(), value.into());
    }
    for (subscriber, bytes) in &explanation.edited {
        if let Some(Value::Object(members)) = json.pointer_mut(&format!("/subscribers/{subscriber}")) {
            let (name, value) = payload_member(bytes);
            members.insert(name.into(), value.into());
        }
    }
    as_json(&json)
}

fn text(explanation: &Explanation) -> String {
    let Explanation { event_id, event, outbox, message, subscribers, moments, unknown, payload: bytes, edited } =
        explanation;
    let mut text = format!("event      {event_id}\n");
    if let Some(event) = event {
        let key = event.key.as_deref().map_or_else(|| "without key".into(), |key| format!("key {}", plain(key)));
        let id = event.outbox_id.map(|id| format!(", outbox id {id}")).unwrap_or_default();
        text += &format!("           {} version {}, {key}\n", plain(&event.event_type), event.version);
        text += &format!(
            "           from {}{id}; {} bytes of {}\n",
            plain(&event.source),
            event.payload_bytes,
            plain(&event.content_type)
        );
    }
    text += "\nwhat happened\n";
    let width = moments.iter().map(|moment| moment.place.chars().count()).max().unwrap_or(0);
    for moment in moments {
        text += &format!("  {}  {:width$}  {}\n", time(moment.at), plain(&moment.place), plain(&moment.text));
    }
    text += "\nhow it stands\n";
    let mut standings: Vec<(&str, String)> = Vec::new();
    standings.extend(outbox.as_ref().map(|standing| ("outbox", standing.text.clone())));
    standings.extend(message.as_ref().map(|message| {
        let there = if message.present { "still there" } else { "no longer there" };
        let id = message.message_id.as_ref().map(|id| format!(", message id {id}")).unwrap_or_default();
        ("stream", format!("message {} of {}, {there}{id}", message.stream_sequence, plain(&message.stream)))
    }));
    let subscriber = |(name, Standing { state, text, .. }): (&'_ String, &Standing)| match state == text {
        true => (name.clone(), text.clone()),
        false => (name.clone(), format!("{state}: {text}")),
    };
    let subscribers: Vec<(String, String)> = subscribers.iter().map(subscriber).collect();
    standings.extend(subscribers.iter().map(|(name, text)| (name.as_str(), text.clone())));
    let width = standings.iter().map(|(place, _)| place.chars().count()).max().unwrap_or(0);
    for (place, standing) in standings {
        text += &format!("  {:width$}  {}\n", plain(place), plain(&standing));
    }
    if !unknown.is_empty() {
        text += "\nnot known\n";
        text.extend(unknown.iter().map(|unknown| format!("  {}\n", plain(unknown))));
    }
    if let Some(bytes) = bytes {
        text += &format!("\npayload\n{}\n", payload(bytes));
    }
    for (subscriber, bytes) in edited {
        text += &format!("\npayload at {}, as an operator edited it\n{}\n", plain(subscriber), payload(bytes));
    }
    text
}
