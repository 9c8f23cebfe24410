//! `aftercommit backlog`.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::as_json;
use super::terminal::{plain, table};
use crate::cli::servers::Servers;
use aftercommit_core::error::Error;
use aftercommit_operator::status::{Status, status};

#[derive(Args)]
pub(super) struct Backlog {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    servers: Servers,
}

pub(super) async fn run(command: Backlog) -> Result<String, Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let status = status(&postgres, &nats, &naming).await?;
    if command.json {
        return json(&status);
    }
    Ok(text(&status))
}

fn json(status: &Status) -> Result<String, Error> {
    let subscribers = status.subscribers.iter().map(|(name, one)| {
        let numbers = json!({
            "pending": one.pending, "in_flight": one.in_flight, "failing": one.failing, "redrive": one.redrive,
            "dead_letters": one.dead_letters, "oldest_seconds": one.oldest_seconds,
        });
        (name.clone(), numbers)
    });
    let subscribers: serde_json::Map<_, _> = subscribers.collect();
    as_json(&json!({ "backlog": status.backlog, "parked": status.parked, "subscribers": subscribers }))
}

fn text(status: &Status) -> String {
    let count = |number: Option<i128>| number.map_or_else(|| "?".into(), |number| number.to_string());
    let age = |seconds: Option<f64>| match seconds {
        Some(seconds) => humantime::format_duration(Duration::from_secs(seconds.max(0.0) as u64)).to_string(),
        None => "-".into(),
    };
    let dash = || "-".to_string();
    let (backlog, parked) = (&status.backlog, &status.parked);
    let mut rows = vec![
        vec!["outbox".into(), backlog.events.to_string(), dash(), dash(), dash(), dash(), age(backlog.oldest_seconds)],
        vec![
            "parked".into(),
            (parked.events + parked.behind).to_string(),
            dash(),
            dash(),
            dash(),
            dash(),
            age(parked.oldest_seconds),
        ],
    ];
    for (name, one) in &status.subscribers {
        rows.push(vec![
            plain(name),
            count(one.pending.map(i128::from)),
            count(one.in_flight.map(i128::from)),
            count(one.failing.map(i128::from)),
            count(one.redrive.map(i128::from)),
            count(one.dead_letters.map(i128::from)),
            // Unknown, too, where NATS did not answer.
            if one.pending.is_none() { "?".into() } else { age(one.oldest_seconds) },
        ]);
    }
    let mut text = table(&["", "waiting", "in flight", "failing", "redriven", "dead", "oldest"], &rows);
    text.extend(status.stream_error.iter().map(|error| format!("not known: {}\n", plain(error))));
    text
}
