//! One event's whole story, from the outbox to its effects.

mod gather;
mod story;

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_outbox::event::EventId;

/// Whom to ask about an event.
#[derive(Debug, Clone)]
pub struct ExplainConfig {
    /// The publisher's database, which may be a subscriber's too. With an empty URL it is not asked.
    pub publisher: PostgresConfig,
    /// Other databases of subscribers. Defaults to none.
    pub subscribers: Vec<PostgresConfig>,
    /// NATS.
    pub nats: NatsConfig,
    /// The names under which the outbox is published.
    pub naming: Naming,
    /// Whether to fetch the payload. Defaults to false.
    pub payload: bool,
}

impl ExplainConfig {
    /// Asks the publisher's database and NATS.
    pub fn new(publisher: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        Self { publisher, subscribers: Vec::new(), nats, naming, payload: false }
    }
}

/// What is known of an event. What `aftercommit explain --json` prints.
#[derive(Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The event.
    pub event_id: EventId,
    /// What it is; none when neither outbox nor stream have it any more.
    pub event: Option<About>,
    /// How it stands at the outbox; none when the outbox does not have it.
    pub outbox: Option<Standing>,
    /// Its message in the stream; none when that was not found.
    pub message: Option<StreamMessage>,
    /// How it stands at each subscriber that wants it, or has dealt with it.
    pub subscribers: BTreeMap<String, Standing>,
    /// What happened, in the order of time.
    pub moments: Vec<Moment>,
    /// What is not known, and why.
    pub unknown: Vec<String>,
    /// The payload as it was published, when it was asked for and found.
    #[serde(skip)]
    pub payload: Option<Vec<u8>>,
    /// The payloads that subscribers hold, or will run, where an operator has changed them; when they were asked for.
    #[serde(skip)]
    pub edited: BTreeMap<String, Vec<u8>>,
}

/// Shows no payload.
impl fmt::Debug for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Explanation")
            .field("event_id", &self.event_id)
            .field("outbox", &self.outbox)
            .field("message", &self.message)
            .field("subscribers", &self.subscribers)
            .field("moments", &self.moments)
            .field("unknown", &self.unknown)
            .finish_non_exhaustive()
    }
}

/// What an event is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct About {
    /// Its type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// The version of the payload's shape.
    pub version: i64,
    /// Its ordering key.
    pub key: Option<String>,
    /// The outbox that it came from.
    pub source: String,
    /// Its id in that outbox; none when it did not come from one.
    pub outbox_id: Option<i64>,
    /// The payload's media type.
    pub content_type: String,
    /// The payload's length.
    pub payload_bytes: usize,
    /// When it was written.
    pub written_at: DateTime<Utc>,
}

/// How it stands somewhere.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    /// One word. At the outbox: `waiting`, `in_flight`, `published`, `parked`, `released`, `discarded`,
    /// `erased`. At a subscriber:
    /// `waiting`, `delivered`, `running`, `behind`, `snoozed`, `unavailable`, `stopped`, `failing`, `handled`, `dead`,
    /// `redrive`, `discarded`, `erased`, `acked`, `unknown`.
    pub state: &'static str,
    /// The same in a sentence, with what to do next.
    pub text: String,
    /// Attempts that have failed; none when none is on record. At the outbox always none, as the next two.
    pub attempts: Option<i32>,
    /// How many attempts it has; none when there is no end, or it is not known.
    pub max_attempts: Option<i64>,
    /// When it is tried again.
    pub next_try_at: Option<DateTime<Utc>>,
}

/// A message in the stream.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamMessage {
    /// The stream.
    pub stream: String,
    /// Its sequence.
    pub stream_sequence: u64,
    /// Whether it is still there.
    pub present: bool,
    /// When the server stored it; none when it is gone.
    pub stored_at: Option<DateTime<Utc>>,
    /// Its id for the server's duplicate window.
    pub message_id: Option<String>,
    /// Whether it was published out of the outbox's order: after it had been parked, or was found missing.
    pub repair: bool,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Moment {
    /// When, by the clock of the place.
    pub at: DateTime<Utc>,
    /// Where: `outbox`, `stream`, a subscriber's name, or `operator`.
    pub place: String,
    /// What.
    pub text: String,
}

/// Tells everything that the databases and the stream know of one event. What cannot be asked is said in
/// [`Explanation::unknown`]; the rest is told all the same.
///
/// # Errors
/// [`ErrorKind::NotReady`] when nothing at all is known of the event, with what was asked and what was not.
pub async fn explain(config: &ExplainConfig, event: EventId) -> Result<Explanation, Error> {
    let evidence = gather::gather(config, event.as_uuid()).await;
    let explanation = story::tell(event, &config.naming, evidence);
    let nothing = explanation.event.is_none() && explanation.message.is_none() && explanation.moments.is_empty();
    if !nothing {
        return Ok(explanation);
    }
    let mut message = format!(
        "nothing is known of event {event}; an event whose transaction has not committed cannot be seen, and one that was \
         removed by retention everywhere has left nothing"
    );
    for unknown in &explanation.unknown {
        message += &format!("\n  {unknown}");
    }
    Err(Error::new(ErrorKind::NotReady, message))
}
