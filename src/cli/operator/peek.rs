//! `aftercommit peek`.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::Value;

use super::as_json;
use super::terminal::{cut, payload, payload_member, plain, table, time};
use crate::admin::peek::{self, Waiting};
use crate::cli::servers::Servers;
use crate::error::{Error, ErrorKind};

#[derive(Args)]
pub(super) struct Peek {
    /// The subscriber
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    subscriber: String,
    /// At most so many messages
    #[arg(short = 'n', long, default_value_t = 10)]
    limit: usize,
    /// Print the payloads too
    #[arg(long)]
    payload: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    servers: Servers,
}

pub(super) async fn run(command: Peek) -> Result<String, Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let peek = peek::peek(&postgres, &nats, &naming, &command.subscriber, command.limit).await?;
    if command.json {
        return json(&peek, command.payload);
    }
    Ok(text(&peek, command.payload))
}

fn json(peek: &peek::Peek, with_payload: bool) -> Result<String, Error> {
    let mut json = serde_json::to_value(peek)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "the answer cannot be written as JSON", error))?;
    let shown = json["messages"].as_array_mut().into_iter().flatten();
    for (shown, message) in shown.zip(&peek.messages).filter(|_| with_payload) {
        if let Value::Object(members) = shown {
            let (name, value) = payload_member(&message.payload);
            members.insert(name.into(), value.into());
        }
    }
    as_json(&json)
}

fn text(peek: &peek::Peek, with_payload: bool) -> String {
    let mut text =
        format!("{} messages not delivered yet, {} delivered and not acknowledged", peek.pending, peek.in_flight);
    if peek.paused == Some(true) {
        text += ", paused";
    }
    if let Some(events) = peek.redrive.filter(|events| *events > 0) {
        text += &format!(", {events} sent back by operators");
    }
    text += "\n";
    if peek.messages.is_empty() {
        text += "nothing waits in the stream\n";
    } else {
        let rows: Vec<_> = peek.messages.iter().map(row).collect();
        text += &table(&["sequence", "stored", "event", "type", "key", "state", ""], &rows);
    }
    for message in peek.messages.iter().filter(|_| with_payload) {
        text += &format!("\n{}\n{}\n", message.sequence, payload(&message.payload));
    }
    text.extend(peek.unknown.iter().map(|unknown| format!("not known: {}\n", plain(unknown))));
    text
}

fn row(message: &Waiting) -> Vec<String> {
    let attempts = message.attempts.map(|attempts| format!("{attempts} attempts failed: "));
    let error = message.last_error.as_deref().map(|error| cut(error, 100));
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        message.sequence.to_string(),
        time(message.stored_at),
        or_none(message.event_id.map(|id| id.to_string())),
        or_none(message.event_type.as_deref().map(plain)),
        or_none(message.key.as_deref().map(|key| cut(key, 40))),
        message.state.into(),
        attempts.unwrap_or_default() + &error.unwrap_or_default(),
    ]
}
