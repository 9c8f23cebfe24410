//! `aftercommit peek`.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::Value;

use super::as_json;
use super::terminal::{counted, cut, payload, payload_member, plain, table, time};
use crate::cli::servers::Servers;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_operator::peek::{self, Waiting};

#[derive(Args)]
pub(super) struct Peek {
    /// The subscriber
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    subscriber: String,
    /// Maximum number of messages to show
    #[arg(short = 'n', long, default_value_t = 10)]
    limit: usize,
    /// Print the payloads too
    #[arg(long = "show-payload", alias = "payload")]
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
    let (pending, in_flight) = (counted(i128::from(peek.pending), "message"), peek.in_flight);
    let mut text = format!("{pending} not delivered yet, {in_flight} delivered and not acknowledged");
    if peek.paused == Some(true) {
        text += ", paused";
    }
    if let Some(events) = peek.redrive.filter(|events| *events > 0) {
        text += &format!(", {events} redriven by operators");
    }
    text += "\n";
    text.extend(peek.obstacle.iter().map(|obstacle| format!("no progress: {}\n", cut(obstacle, 300))));
    if peek.messages.is_empty() {
        text += "nothing waits in the stream\n";
    } else {
        let rows: Vec<_> = peek.messages.iter().map(row).collect();
        text += &table(&["stream sequence", "stored", "event", "type", "key", "state", "why"], &rows);
    }
    for message in peek.messages.iter().filter(|_| with_payload) {
        text += &format!("\n{}\n{}\n", message.stream_sequence, payload(&message.payload));
    }
    text.extend(peek.unknown.iter().map(|unknown| format!("not known: {}\n", plain(unknown))));
    text
}

fn row(message: &Waiting) -> Vec<String> {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        message.stream_sequence.to_string(),
        time(message.stored_at),
        or_none(message.event_id.map(|id| id.to_string())),
        or_none(message.event_type.as_deref().map(plain)),
        or_none(message.key.as_deref().map(|key| cut(key, 40))),
        message.state.into(),
        message.why.as_deref().map(|why| cut(why, 300)).unwrap_or_default(),
    ]
}
