//! Publishing without waiting for each acknowledgement: messages go out under numbers, answers come back with them.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::{Duration, Instant};

use async_nats::client::PublishErrorKind;
use async_nats::client::traits::Publisher as _;
use async_nats::header::{HeaderMap, NATS_EXPECTED_LAST_MESSAGE_ID, NATS_EXPECTED_LAST_SEQUENCE, NATS_MESSAGE_ID};
use async_nats::message::OutboundMessage;
use async_nats::{HeaderName, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Deserialize;

use super::Connection;
use crate::envelope::{Envelope, REPAIR, REPLACES};
use crate::error::{Error, ErrorKind};
use crate::fault;
use aftercommit_outbox::subject::SubjectPrefix;

/// A message that is ready to be sent.
#[derive(Debug)]
pub struct Outgoing {
    subject: Subject,
    headers: HeaderMap,
    payload: Bytes,
}

/// Makes messages of events. What messages of one kind have in common is made once and copied.
#[derive(Debug)]
pub struct Messages {
    prefix: SubjectPrefix,
    kinds: Vec<Kind>,
}

/// The kinds of events whose common part is kept. There are rarely more in an outbox.
const KINDS: usize = 64;

#[derive(Debug)]
struct Kind {
    source: String,
    event_type: String,
    version: u32,
    content_type: String,
    subject: Subject,
    headers: HeaderMap,
}

impl Kind {
    fn new(prefix: &SubjectPrefix, event: &Envelope) -> Self {
        let mut headers = HeaderMap::new();
        // Those of the event take their places at once, so that the copies do not grow.
        let places = event.attributes_of_event().map(|(name, _)| (name, Cow::Borrowed("")));
        for (name, value) in event.attributes_of_kind().into_iter().chain(places.take(3)) {
            headers.insert(HeaderName::from_static(name), value.into_owned());
        }
        Self {
            source: event.source.clone(),
            event_type: event.event_type.clone(),
            version: event.version,
            content_type: event.content_type.clone(),
            subject: prefix.subject(&event.event_type).into(),
            headers,
        }
    }

    fn is_of(&self, event: &Envelope) -> bool {
        self.event_type == event.event_type
            && self.version == event.version
            && self.content_type == event.content_type
            && self.source == event.source
    }
}

impl Messages {
    /// Makes messages for subjects that begin with this prefix.
    pub fn new(prefix: SubjectPrefix) -> Self {
        Self { prefix, kinds: Vec::new() }
    }

    /// The message of an event.
    pub fn message(&mut self, event: &Envelope) -> Outgoing {
        let kind = match self.kinds.iter().position(|kind| kind.is_of(event)) {
            Some(known) => known,
            None => {
                if self.kinds.len() == KINDS {
                    self.kinds.clear();
                }
                self.kinds.push(Kind::new(&self.prefix, event));
                self.kinds.len() - 1
            }
        };
        let Kind { subject, headers, .. } = &self.kinds[kind];
        let mut headers = headers.clone();
        for (name, value) in event.attributes_of_event() {
            headers.insert(HeaderName::from_static(name), value.into_owned());
        }
        for (name, value) in &event.headers {
            headers.append(name.as_str(), value.as_str());
        }
        Outgoing { subject: subject.clone(), headers, payload: event.payload.clone() }
    }
}

impl Outgoing {
    /// Gives the message another id than the event's, for a server that would take it for a repeat.
    pub fn set_message_id(&mut self, id: &str) {
        self.headers.insert(NATS_MESSAGE_ID, id);
    }

    /// Subject, headers and payload.
    pub fn into_parts(self) -> (Subject, HeaderMap, Bytes) {
        (self.subject, self.headers, self.payload)
    }

    /// Names the messages that have the event's id and are not the event, so that subscribers handle this one.
    pub fn mark_replaces(&mut self, sequences: &[u64]) {
        if !sequences.is_empty() {
            let sequences: Vec<String> = sequences.iter().map(u64::to_string).collect();
            self.headers.insert(REPLACES, sequences.join(","));
        }
    }

    /// Marks the message as published out of the outbox's order, and says why.
    pub fn mark_repair(&mut self, why: &str) {
        self.headers.insert(REPAIR, why);
    }
}

/// What must be true of the stream for a message to be stored: it is behind this sequence, and behind this message
/// when its id is known. The sequence alone would let a message pass whose own predecessor lost its place to a
/// stranger's.
///
/// Never give an id for a stream with replicas: nats-server 2.14.0 to 2.15.1 (at least) check it when a message is
/// already agreed upon, and stop the stream on all its servers for good when it is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Predecessor {
    /// The stream's last sequence must be this one.
    pub sequence: u64,
    /// The `Nats-Msg-Id` of the stream's last message must be this one; none when it does not matter.
    pub message_id: Option<String>,
}

/// Where a message stands in an atomic batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchPlace<'a> {
    /// The batch's own id, the same in each of its messages.
    pub id: &'a str,
    /// From 1.
    pub position: usize,
    /// Whether this is the last message: with it the server commits the batch.
    pub last: bool,
    /// The stream's last sequence before the batch.
    pub behind: u64,
}

/// The server's answer to one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is in this stream under this sequence; `duplicate` when an earlier one had the same `Nats-Msg-Id`.
    Stored {
        /// Name of the stream.
        stream: String,
        /// The message's sequence in the stream.
        sequence: u64,
        /// Whether the server had a message with the same `Nats-Msg-Id` and stored nothing.
        duplicate: bool,
    },
    /// It is not stored, for JetStream's reason number `code`.
    Refused {
        /// JetStream's number for the reason, `err_code`.
        code: u64,
        /// The server's text.
        description: String,
    },
    /// No stream listens on the subject, or it has no leader at present.
    NoResponders,
    /// Something that is no JetStream answer.
    Unreadable,
}

/// Why a message was not even sent.
#[derive(Debug)]
pub enum SendError {
    /// It is larger than the server takes.
    TooLarge {
        /// How many bytes the server takes, headers and payload together.
        limit: usize,
    },
    /// It was larger than the server took when this connection was made. The server takes more now, and the connection is
    /// made anew for that: what was in flight is unknown.
    Renewed,
    /// The client is closed.
    Closed,
}

/// Sends messages and receives their answers.
pub struct Publisher {
    connection: Connection,
    inbox: String,
    answers: Subscriber,
    /// Answers to messages from before the last [`Publisher::restart`] are ignored.
    generation: u64,
    /// How the subjects of answers begin.
    replies: String,
    /// When the server was last asked how large a message may be.
    asked_size: Option<Instant>,
}

/// For so long the last answer to how large a message may be is believed.
const FRESH: Duration = Duration::from_secs(1);

impl Publisher {
    /// Subscribes to an inbox of its own, to which the answers come.
    pub async fn new(connection: Connection) -> Result<Self, Error> {
        let inbox = connection.client.new_inbox();
        let answers = connection.client.subscribe(format!("{inbox}.*.*")).await.map_err(|error| {
            Error::with_source(ErrorKind::Broker, "cannot subscribe to the publisher's own inbox", error)
        })?;
        let replies = format!("{inbox}.0.");
        Ok(Self { connection, inbox, answers, generation: 0, replies, asked_size: None })
    }

    /// Forgets what is in flight.
    pub fn restart(&mut self) {
        self.generation += 1;
        self.replies = format!("{}.{}.", self.inbox, self.generation);
    }

    /// Hands message `number` to the connection.
    pub async fn send(
        &mut self,
        number: u64,
        mut message: Outgoing,
        behind: Option<Predecessor>,
    ) -> Result<(), SendError> {
        if let Some(behind) = behind.filter(|_| !fault::broken("chain")) {
            message.headers.insert(NATS_EXPECTED_LAST_SEQUENCE, behind.sequence.to_string());
            if let Some(id) = behind.message_id {
                message.headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID, id);
            }
        }
        self.hand_over(Some(number), message).await
    }

    /// Hands one message of an atomic batch to the connection, as ADR-50 of the NATS architecture wants them. The first
    /// is answered when it opens the batch, the last when all of them are stored.
    pub async fn send_in_batch(
        &mut self,
        number: u64,
        mut message: Outgoing,
        place: BatchPlace<'_>,
    ) -> Result<(), SendError> {
        let BatchPlace { id, position, last, behind } = place;
        message.headers.insert("Nats-Batch-Id", id);
        message.headers.insert("Nats-Batch-Sequence", position.to_string());
        if position == 1 {
            message.headers.insert(NATS_EXPECTED_LAST_SEQUENCE, behind.to_string());
        }
        if last {
            message.headers.insert("Nats-Batch-Commit", "1");
        }
        self.hand_over((position == 1 || last).then_some(number), message).await
    }

    async fn hand_over(&mut self, answer_to: Option<u64>, message: Outgoing) -> Result<(), SendError> {
        let Outgoing { subject, headers, payload } = message;
        let reply = answer_to.map(|number| self.reply_to(number));
        let client = &self.connection.client;
        let sent = client.publish_message(OutboundMessage { subject, reply, payload, headers: Some(headers) }).await;
        match sent.map_err(|error| error.kind()) {
            Ok(()) => Ok(()),
            Err(PublishErrorKind::MaxPayloadExceeded) => Err(self.too_large().await),
            Err(_) => Err(SendError::Closed),
        }
    }

    /// Asks the server itself before an event counts as too large.
    async fn too_large(&mut self) -> SendError {
        let limit = self.connection.client.max_payload();
        if self.asked_size.is_none_or(|asked| asked.elapsed() > FRESH) {
            self.asked_size = Some(Instant::now());
            match self.connection.max_payload().await {
                Ok(now) if now > limit => {
                    tracing::info!(before = limit, now, "nats-server takes larger messages than before");
                    self.connection.renew().await;
                    return SendError::Renewed;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(error = error.report(), "cannot ask nats-server how large a message may be")
                }
            }
        }
        SendError::TooLarge { limit }
    }

    /// Where the answer to a message comes. It is as large as it must be, because spare room would cost the client
    /// another allocation.
    fn reply_to(&self, number: u64) -> Subject {
        let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
        let mut reply = String::with_capacity(self.replies.len() + digits);
        reply.push_str(&self.replies);
        _ = write!(reply, "{number}");
        reply.into()
    }

    /// Waits for the next answer: the number of the message and what became of it. None when the client is closed.
    /// Dropping the future loses nothing.
    pub async fn answer(&mut self) -> Option<(u64, Answer)> {
        loop {
            let message = self.answers.next().await?;
            let mut tokens = message.subject.rsplit('.');
            let (number, generation) = (tokens.next(), tokens.next());
            let (Some(number), Some(generation)) =
                (number.and_then(|n| n.parse().ok()), generation.and_then(|g| g.parse::<u64>().ok()))
            else {
                continue;
            };
            if generation == self.generation {
                let no_responders = message.status == Some(StatusCode::NO_RESPONDERS);
                return Some((number, if no_responders { Answer::NoResponders } else { read(&message.payload) }));
            }
        }
    }

    /// An answer that has already arrived, for settling many without a pause.
    pub fn ready_answer(&mut self) -> Option<(u64, Answer)> {
        use futures_util::FutureExt;
        self.answer().now_or_never().flatten()
    }
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    stream: String,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<ReplyError>,
}

#[derive(Deserialize)]
struct ReplyError {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// Reads a publish acknowledgement as the JetStream wire API (ADR-1) defines it.
pub fn read(payload: &[u8]) -> Answer {
    match serde_json::from_slice::<Reply>(payload) {
        Ok(Reply { error: Some(error), .. }) => {
            Answer::Refused { code: error.err_code, description: error.description }
        }
        Ok(Reply { stream, seq, duplicate, .. }) if seq > 0 => Answer::Stored { stream, sequence: seq, duplicate },
        _ => Answer::Unreadable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_one_kind_share_nothing_but_what_they_have_in_common() {
        let event = |n: u128, event_type: &str, key: Option<&str>| Envelope {
            id: uuid::Uuid::from_u128(n).into(),
            event_type: event_type.into(),
            version: 1,
            key: key.map(str::to_string),
            source: "/s".into(),
            time: chrono::DateTime::UNIX_EPOCH,
            sequence: n as i64,
            headers: [("X-N".to_string(), n.to_string())].into(),
            content_type: "application/json".into(),
            payload: Bytes::from(n.to_string()),
            replaces: Vec::new(),
        };
        let mut messages = Messages::new(SubjectPrefix::default());
        let events = [event(1, "a", Some("k")), event(2, "a", None), event(3, "b", None), event(4, "a", Some("l"))];
        for event in events {
            let message = messages.message(&event);
            assert_eq!(message.subject.as_str(), format!("events.{}", event.event_type));
            let mut expected = HeaderMap::new();
            for (name, value) in event.to_headers() {
                expected.append(name.as_ref(), value.as_ref());
            }
            assert_eq!((message.headers, message.payload), (expected, event.payload));
        }
    }

    #[test]
    fn answers_are_read_as_the_server_writes_them() {
        assert_eq!(
            read(br#"{"stream":"E","seq":7}"#),
            Answer::Stored { stream: "E".into(), sequence: 7, duplicate: false }
        );
        assert_eq!(
            read(br#"{"stream":"E","domain":"hub","seq":7,"duplicate":true}"#),
            Answer::Stored { stream: "E".into(), sequence: 7, duplicate: true }
        );
        assert_eq!(
            read(br#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 2"},"stream":"E","seq":0}"#),
            Answer::Refused { code: 10071, description: "wrong last sequence: 2".into() }
        );
        for other in ["", "{}", "[]", "+OK", r#"{"seq":0}"#] {
            assert_eq!(read(other.as_bytes()), Answer::Unreadable, "{other}");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_answer_without_sequence_or_with_error_is_not_stored(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..100),
            sequence in proptest::prop_oneof!["-?[0-9]{1,25}", "null", "\"7\"", "7\\.5", "[7]"],
            stream in proptest::prop_oneof!["\"[A-Z]{0,5}\"", "null", "7", "\"\\\\u0000\""],
            error in proptest::prop_oneof!["null", "\\{\\}", "\"text\"", "\\{\"err_code\":-?[0-9]{1,25}\\}", "\\{\"description\":7\\}"],
        ) {
            proptest::prop_assert_eq!(read(&bytes), Answer::Unreadable);
            let text = format!("{{\"stream\":{stream},\"seq\":{sequence},\"error\":{error}}}");
            if let Answer::Stored { sequence: read, .. } = read(text.as_bytes()) {
                proptest::prop_assert_eq!((read.to_string(), &*error), (sequence.clone(), "null"));
                proptest::prop_assert!(read > 0);
            }
        }
    }
}
