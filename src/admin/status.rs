//! One look at everything: what waits, who leads, where stream and subscribers are.

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use crate::config::{Naming, NatsConfig, PostgresConfig};
use crate::error::Error;
use crate::jetstream::stream::{ConsumerPosition, StreamReader};
use crate::postgres::pause::{self, Pause};
use crate::postgres::status::{self, AtWork, COUNT_LIMIT};
use crate::postgres::{database_error, relay_log};
use crate::{jetstream, postgres, relay};

/// What `aftercommit status` shows. With `--json` it is printed as it is here.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Events that are committed and not yet in the stream.
    pub backlog: Backlog,
    /// The leading relay; none when no relay ever ran.
    pub relay: Option<RelayStatus>,
    /// The stream; none when NATS did not answer or there is no such stream, see `stream_error`.
    pub stream: Option<StreamStatus>,
    /// Why there is no stream to show.
    pub stream_error: Option<String>,
    /// What operators have paused in this database: `relay`, `subscriber:<name>`, `subscriber:*` for all of them.
    pub paused: Vec<Paused>,
    /// The stream's consumers and the subscribers that this database knows, by name.
    pub subscribers: BTreeMap<String, SubscriberStatus>,
}

/// Something that is paused.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paused {
    /// What.
    pub name: String,
    /// Since when.
    pub since: DateTime<Utc>,
    /// The database's role that paused it.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

/// Events waiting for the relay.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Backlog {
    /// How many; counted up to a million.
    pub events: i64,
    /// The age of the oldest in seconds; none without a backlog.
    pub oldest_seconds: Option<f64>,
}

/// The relay that leads, or led last.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RelayStatus {
    /// `host:process:instance`.
    pub leader: String,
    /// Grows with every change of leader.
    pub epoch: i64,
    /// Whether its lease is valid now.
    pub alive: bool,
    /// The outbox id of the last event it stored.
    pub last_outbox_id: Option<i64>,
    /// The stream sequence of that event.
    pub last_sequence: Option<i64>,
    /// What it does or waits for, as of its last heartbeat.
    pub state: Option<String>,
}

/// The stream's extent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamStatus {
    /// Its name.
    pub name: String,
    /// Messages in it.
    pub messages: u64,
    /// The first sequence that is still there.
    pub first_sequence: u64,
    /// The last sequence.
    pub last_sequence: u64,
}

/// A subscriber's position.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SubscriberStatus {
    /// Whether the stream has a consumer of this name.
    pub has_consumer: bool,
    /// Messages that were not delivered yet.
    pub pending: u64,
    /// Messages that were delivered and not acknowledged.
    pub in_flight: u64,
    /// Those of them that were delivered more than once.
    pub redelivered: u64,
    /// Events of which attempts have failed, and which are to be tried again; in this database.
    pub failing: i64,
    /// Events that an operator sent back, and which have not run since; in this database.
    pub redrive: i64,
    /// Dead letters in this database.
    pub dead_letters: i64,
    /// The active worker, as `host:process:instance`; none when no worker serves the subscriber from this database.
    pub active: Option<String>,
    /// Whether an operator has paused it, alone or with all others; in this database.
    pub paused: bool,
}

/// Reads the status. Without NATS it shows what the database knows.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn status(database: &PostgresConfig, nats: &NatsConfig, naming: &Naming) -> Result<Status, Error> {
    let failed = |error| database_error("reading the status failed", error);
    let mut connection = postgres::connect(database, "aftercommit-status").await?;
    let state = relay_log::newest(&mut connection).await.map_err(failed)?;
    let leader = status::leader(&mut connection, relay::LEASE).await.map_err(failed)?;
    let last_id = leader.as_ref().and_then(|leader| leader.last_id).unwrap_or(0);
    let backlog = status::backlog(&mut connection, &state, last_id).await.map_err(failed)?;
    let mut subscribers = BTreeMap::<String, SubscriberStatus>::new();
    for at_work in status::subscribers(&mut connection).await.map_err(failed)? {
        let AtWork { subscriber, active, paused, failing, redrive, dead_letters } = at_work;
        let entry = SubscriberStatus { failing, redrive, dead_letters, active, paused, ..SubscriberStatus::default() };
        subscribers.insert(subscriber, entry);
    }
    let paused = pause::list(&mut connection).await.map_err(failed)?.into_iter();
    let paused = paused.map(|Pause { name, since, by, reason }| Paused { name, since, by, reason }).collect();
    let (stream, stream_error) = match stream(nats, naming).await {
        Ok((stream, consumers)) => {
            for consumer in consumers {
                let entry = subscribers.entry(consumer.name).or_default();
                entry.has_consumer = true;
                (entry.pending, entry.in_flight, entry.redelivered) =
                    (consumer.pending, consumer.in_flight, consumer.redelivered);
            }
            (Some(stream), None)
        }
        Err(error) => (None, Some(error.report())),
    };
    Ok(Status {
        backlog: Backlog { events: backlog.events, oldest_seconds: backlog.oldest_seconds },
        relay: leader.map(|leader| RelayStatus {
            leader: leader.holder,
            epoch: leader.epoch,
            alive: leader.lease_left > 0.0,
            last_outbox_id: leader.last_id,
            last_sequence: leader.last_sequence,
            state: leader.state,
        }),
        stream,
        stream_error,
        paused,
        subscribers,
    })
}

async fn stream(nats: &NatsConfig, naming: &Naming) -> Result<(StreamStatus, Vec<ConsumerPosition>), Error> {
    let connection = jetstream::connect(nats, "aftercommit-status", "_INBOX_operator").await?;
    let reader = StreamReader::new(&connection, &naming.stream);
    let state = reader.info().await?.state;
    let stream = StreamStatus {
        name: naming.stream.clone(),
        messages: state.messages,
        first_sequence: state.first_sequence,
        last_sequence: state.last_sequence,
    };
    Ok((stream, reader.consumers().await?))
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.backlog.events >= COUNT_LIMIT { " or more" } else { "" };
        write!(f, "backlog      {}{more} events", self.backlog.events)?;
        match self.backlog.oldest_seconds {
            Some(seconds) => writeln!(f, ", the oldest written {seconds:.1} s ago")?,
            None => writeln!(f)?,
        }
        match &self.relay {
            Some(relay) => {
                let alive = if relay.alive { "" } else { " (its lease has run out: no relay leads)" };
                writeln!(f, "relay        {}, epoch {}{alive}", relay.leader, relay.epoch)?;
                if let (Some(id), Some(sequence)) = (relay.last_outbox_id, relay.last_sequence) {
                    let state = relay.state.as_deref().unwrap_or("unknown");
                    writeln!(f, "             {state}; last outbox id {id}, stream sequence {sequence}")?;
                }
            }
            None => writeln!(f, "relay        none has ever led this outbox")?,
        }
        match (&self.stream, &self.stream_error) {
            (Some(stream), _) => writeln!(
                f,
                "stream       {}: {} messages, sequences {} to {}",
                stream.name, stream.messages, stream.first_sequence, stream.last_sequence
            )?,
            (None, error) => writeln!(f, "stream       unknown: {}", error.as_deref().unwrap_or("not asked"))?,
        }
        for Paused { name, since, by, reason } in &self.paused {
            let since = since.to_rfc3339_opts(SecondsFormat::Secs, true);
            let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            writeln!(f, "paused       {name} at {since} by {by}{reason}")?;
        }
        if self.subscribers.is_empty() {
            return Ok(());
        }
        let width = self.subscribers.keys().map(String::len).max().unwrap_or(0).max("subscriber".len());
        writeln!(
            f,
            "\n{:width$}  {:>10}  {:>10}  {:>11}  {:>8}  {:>8}  {:>12}  active worker",
            "subscriber", "pending", "in flight", "redelivered", "failing", "redrive", "dead letters"
        )?;
        for (name, subscriber) in &self.subscribers {
            let SubscriberStatus { pending, in_flight, redelivered, failing, redrive, dead_letters, .. } = subscriber;
            let active = subscriber.active.as_deref().unwrap_or("-");
            let paused = if subscriber.paused { "  paused" } else { "" };
            let lost = if subscriber.has_consumer || self.stream.is_none() { "" } else { "  no consumer" };
            writeln!(
                f,
                "{name:width$}  {pending:>10}  {in_flight:>10}  {redelivered:>11}  {failing:>8}  {redrive:>8}  \
                 {dead_letters:>12}  {active}{paused}{lost}"
            )?;
        }
        Ok(())
    }
}
