//! What waits for a subscriber, looked at without taking anything: the stream is read, never the consumer.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::waits::{Instance, at, max_attempts, of_attempts, since};
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream;
use aftercommit_core::jetstream::search::{Found, found};
use aftercommit_core::jetstream::stored;
use aftercommit_core::jetstream::stream::{ConsumerPosition, StreamReader};
use aftercommit_core::postgres::explain::{self as facts, Known, KnownFailing};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::status::{self, AtWork};
use aftercommit_core::postgres::worker_status;
use aftercommit_core::postgres::{self, database_error};
use aftercommit_outbox::event::EventId;

/// Sequences of the stream that are gone through at most.
const REACH: u64 = 100_000;

/// What waits for a subscriber.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peek {
    /// The subscriber.
    pub subscriber: String,
    /// Messages that were not delivered yet.
    pub pending: u64,
    /// Messages that were delivered and not acknowledged.
    pub in_flight: u64,
    /// Whether an operator has paused the subscriber, or its consumer is paused; none when its database was not asked and
    /// the consumer is not paused.
    pub paused: Option<bool>,
    /// Events that an operator redrove, and which have not run since; none when the database was not asked.
    pub redrive: Option<i64>,
    /// What keeps the whole subscriber from working; none when nothing does, or the database was not asked.
    pub obstacle: Option<String>,
    /// The first messages that the subscriber is not done with, in the order of the stream.
    pub messages: Vec<Waiting>,
    /// What is not known, and why.
    pub unknown: Vec<String>,
}

/// A message that a subscriber is not done with.
#[derive(Clone, PartialEq, Serialize)]
pub struct Waiting {
    /// Its sequence in the stream.
    pub stream_sequence: u64,
    /// When the stream stored it.
    pub stored_at: DateTime<Utc>,
    /// The event's id; none for a message that is no event.
    pub event_id: Option<EventId>,
    /// The event's type.
    #[serde(rename = "type")]
    pub event_type: Option<String>,
    /// The event's ordering key.
    pub key: Option<String>,
    /// `waiting`: not delivered yet. `outstanding`: delivered, runs or waits, `why` says for what if that is known. `running`:
    /// runs for long. `behind`: waits behind another event of its key. `unavailable`: waits for a service that is not available.
    /// `snoozed`: its handler asked to be run later. `failing`: attempts have failed. `stopped`: delivered, and the
    /// whole subscriber cannot work. `delivered`: delivered, and perhaps done; the database was not asked.
    pub state: &'static str,
    /// Why it waits, in words.
    pub why: Option<String>,
    /// Failed attempts.
    pub attempts: Option<i32>,
    /// How many attempts it has; none when there is no end, or it is not known.
    pub max_attempts: Option<i64>,
    /// The last error.
    pub last_error: Option<String>,
    /// When it is tried again.
    pub next_try_at: Option<DateTime<Utc>>,
    /// The payload, byte for byte.
    #[serde(skip)]
    pub payload: Vec<u8>,
}

/// Shows no payload.
impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Waiting");
        shown
            .field("stream_sequence", &self.stream_sequence)
            .field("event_id", &self.event_id)
            .field("state", &self.state);
        shown.finish_non_exhaustive()
    }
}

/// Looks at the first `limit` messages that wait for a subscriber. With an empty URL the database is not asked, and what
/// was delivered cannot be told from what is done. Up to 100,000 sequences of the stream are gone through.
///
/// # Errors
/// [`ErrorKind::NotReady`] when the stream has no such consumer; when NATS cannot be reached. A database that does not
/// answer is noted in [`Peek::unknown`].
pub async fn peek(
    database: &PostgresConfig,
    nats: &NatsConfig,
    naming: &Naming,
    subscriber: &str,
    limit: usize,
) -> Result<Peek, Error> {
    let connection = jetstream::connect(nats, "aftercommit-peek", "_INBOX_operator").await?;
    let reader = StreamReader::new(&connection, &naming.stream);
    let consumer = reader.consumer(subscriber).await?.ok_or_else(|| no_consumer(naming, subscriber))?;
    let mut peek = Peek {
        subscriber: subscriber.into(),
        pending: consumer.pending,
        in_flight: consumer.in_flight,
        paused: consumer.paused.then_some(true),
        redrive: None,
        obstacle: None,
        messages: Vec::new(),
        unknown: Vec::new(),
    };
    let (mut instance, mut max_attempts) = (None, None);
    let mut home = match open(database, subscriber).await {
        Ok((session, at_work, found, most)) => {
            max_attempts = most;
            peek.obstacle = obstacle(at_work.as_ref(), found.as_ref());
            instance = found;
            peek.paused = Some(consumer.paused || at_work.as_ref().is_some_and(|at_work| at_work.paused));
            peek.redrive = Some(at_work.map_or(0, |at_work| at_work.redrive));
            Some(session)
        }
        Err(error) => {
            peek.unknown.push(format!("what is done, fails or was redriven: {}", error.report()));
            None
        }
    };
    let first = consumer.ack_floor + 1;
    let last = reader.extent().await?.last;
    let reach = last.min(first + REACH - 1);
    let mut next = Some(first).filter(|first| *first <= reach);
    let context = connection.jetstream();
    let subjects = match consumer.subjects.is_empty() {
        true => vec![">".to_string()],
        false => consumer.subjects.clone(),
    };
    while let Some(from) = next.filter(|_| peek.messages.len() < limit) {
        let stretch = stored::load(&context, &naming.stream, &subjects, from, reach).await?;
        next = stretch.next;
        let messages: Vec<Found> = stretch.messages.into_values().map(found).collect();
        let known = match &mut home {
            Some(session) => Some(known(session, subscriber, &messages).await?),
            None => None,
        };
        let instance = instance.as_ref();
        let found = messages
            .into_iter()
            .filter_map(|message| waiting(message, &consumer, known.as_ref(), instance, max_attempts));
        peek.messages.extend(found.take(limit - peek.messages.len()));
    }
    if reach < last && peek.messages.len() < limit {
        peek.unknown.push(format!("what waits behind sequence {reach} of the stream: it was not read that far"));
    }
    Ok(peek)
}

fn no_consumer(naming: &Naming, subscriber: &str) -> Error {
    Error::new(
        ErrorKind::NotReady,
        format!(
            "stream {} has no consumer {subscriber}: is that the subscriber's stream (--stream)? `aftercommit status` lists \
             them, `aftercommit provision --config worker.toml` creates them",
            naming.stream
        ),
    )
}

/// Why there is no progress, whatever the event.
fn obstacle(at_work: Option<&AtWork>, instance: Option<&Instance>) -> Option<String> {
    match (at_work, instance) {
        (None, _) => Some("no worker has served it from this database".into()),
        (Some(at_work), _) if at_work.paused => None,
        (Some(at_work), _) if at_work.active.is_none() => Some("no worker is active for it".into()),
        (_, Some(instance)) if !instance.ready => Some(format!("its worker cannot work: {}", instance.state)),
        _ => None,
    }
}

async fn open(
    database: &PostgresConfig,
    subscriber: &str,
) -> Result<(Session, Option<AtWork>, Option<Instance>, Option<i64>), Error> {
    let failed = |error| database_error("the subscriber's database cannot be read", error);
    if database.url.is_empty() {
        return Err(Error::new(ErrorKind::Config, "not asked, because DATABASE_URL is not set"));
    }
    let mut session = postgres::connect(database, "aftercommit-peek").await?;
    let at_work = status::subscribers(&mut session).await.map_err(failed)?;
    let at_work = at_work.into_iter().find(|at_work| at_work.subscriber == subscriber);
    let heard = worker_status::list(&mut session, Some(subscriber)).await.map_err(failed)?;
    let active = at_work.as_ref().and_then(|at_work| at_work.active.as_deref());
    let instance = Instance::of(&heard, subscriber, active);
    Ok((session, at_work, instance, max_attempts(&heard, subscriber)))
}

async fn known(session: &mut Session, subscriber: &str, messages: &[Found]) -> Result<Known, Error> {
    let ids: Vec<Uuid> = messages.iter().filter_map(|message| Some(message.event.as_ref()?.id.as_uuid())).collect();
    facts::known(session, subscriber, &ids)
        .await
        .map_err(|error| database_error("the subscriber's database cannot be read", error))
}

/// The message as it waits; none when the subscriber is done with it.
fn waiting(
    message: Found,
    consumer: &ConsumerPosition,
    known: Option<&Known>,
    instance: Option<&Instance>,
    max_attempts: Option<i64>,
) -> Option<Waiting> {
    let id = message.event.as_ref().map(|event| event.id);
    let of = |id: EventId| id.as_uuid();
    if let (Some(known), Some(id)) = (known, id)
        && known.done.contains(&of(id))
    {
        return None;
    }
    let delivered = message.sequence <= consumer.delivered;
    let failing = id.and_then(|id| known?.failing.get(&of(id)));
    let key = message.event.as_ref().and_then(|event| event.key.as_deref());
    let why = instance.zip(id).filter(|_| delivered).and_then(|(instance, id)| instance.why(id, key));
    let running = instance.zip(id).and_then(|(instance, id)| instance.runs_since(id));
    let state = match (failing, running, &why) {
        (Some(_), ..) => "failing",
        (None, Some(_), _) => "running",
        (None, None, Some(why)) => why.state,
        _ if !delivered => "waiting",
        _ if known.is_some() => "outstanding",
        _ => "delivered",
    };
    let max_attempts = max_attempts.filter(|_| failing.is_some());
    let said = id.and_then(|id| instance?.next_try(id));
    let next_try_at = said.or(failing.and_then(|failing| failing.retry_at));
    let why = match (failing, running) {
        (Some(failing), _) => Some(told(failing, max_attempts, next_try_at)),
        (None, Some(running)) => Some(format!("runs {}", since(running))),
        _ => why.map(|why| why.text),
    };
    let (event_type, key, payload) = match message.event {
        Some(event) => (Some(event.event_type), event.key, event.payload.to_vec()),
        None => (None, None, Vec::new()),
    };
    Some(Waiting {
        stream_sequence: message.sequence,
        stored_at: message.stored_at,
        event_id: id,
        event_type,
        key,
        state,
        why,
        attempts: failing.map(|failing| failing.attempts),
        max_attempts,
        last_error: failing.map(|failing| failing.last_error.clone()),
        next_try_at,
        payload,
    })
}

fn told(failing: &KnownFailing, max_attempts: Option<i64>, next_try_at: Option<DateTime<Utc>>) -> String {
    let next = next_try_at.map(|next| format!("; next try at {}", at(next))).unwrap_or_default();
    format!("{} failed: {}{next}", of_attempts(failing.attempts, max_attempts), failing.last_error)
}
