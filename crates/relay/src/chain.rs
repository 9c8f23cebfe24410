//! The chain of messages in flight to an exclusive stream, without any I/O.
//!
//! Each message names its predecessor, so the server stores a prefix of what is sent and refuses the rest. Any answer
//! but "stored, in its place" ends the chain: what became of the messages behind it is read from the stream.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use aftercommit_core::digest::Digest;
use aftercommit_core::envelope::Envelope;
use aftercommit_core::jetstream::publisher::{Answer, Predecessor};
use aftercommit_core::jetstream::stream::Stored;
use aftercommit_core::trace::{self, Published, TraceContext};

/// A message that was sent and has not been answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) outbox_id: i64,
    pub(super) event_id: Uuid,
    /// The ordering key.
    pub(super) key: Option<String>,
    /// Its `Nats-Msg-Id` when that is not the event's id: the server would take it for a repeat of one that is gone.
    pub(super) renamed: Option<String>,
    pub(super) bytes: usize,
    /// When it was written, by the database's clock.
    pub(super) created_at: DateTime<Utc>,
    /// When it was handed to the connection; for the metrics.
    pub(super) sent_at: Option<Instant>,
    /// Where it is stored; 0 until that is known.
    pub(super) sequence: u64,
    /// Of what the event is made of. Only for a stream with other writers, where the server's word for a repeat is checked
    /// while others are in flight.
    pub(super) digest: Option<Digest>,
    /// Whence it comes, when spans are exported and its publisher's trace is recorded.
    pub(super) origin: Option<Box<Origin>>,
}

/// Where the trace of an event began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    context: TraceContext,
    event_type: String,
}

impl Origin {
    /// Of an event; none when there is no span to be made.
    pub(super) fn of(event: &Envelope) -> Option<Box<Self>> {
        trace::tracing()?;
        let context = event.trace_context().filter(TraceContext::is_sampled)?;
        Some(Box::new(Self { context, event_type: event.event_type.clone() }))
    }
}

impl Sent {
    /// Whether a message is this event, and does not only say so.
    pub(super) fn is(&self, message: &Stored) -> bool {
        message.identity.as_ref().is_some_and(|identity| {
            let ids = (identity.event_id, identity.outbox_id, Some(identity.digest));
            ids == (self.event_id, self.outbox_id, self.digest)
        })
    }

    /// Its `Nats-Msg-Id`.
    pub(super) fn message_id(&self) -> String {
        self.renamed.clone().unwrap_or_else(|| self.event_id.to_string())
    }

    /// Has a span made of the way to the stream, if the event's trace is recorded.
    pub(super) fn trace_published(&self, stream: &str, now: Instant) {
        let (Some(origin), Some(tracing)) = (&self.origin, trace::tracing()) else { return };
        tracing.published(&Published {
            context: &origin.context,
            event_id: self.event_id,
            event_type: &origin.event_type,
            outbox_id: self.outbox_id,
            stream,
            took: self.sent_at.map_or(Duration::ZERO, |sent_at| now.saturating_duration_since(sent_at)),
            bytes: self.bytes,
        });
    }

    /// One line per event, to be joined with the publisher's and the worker's by its id.
    pub(super) fn tell_published(&self, stream: &str, sequence: u64) {
        tracing::debug!(event_id = %self.event_id, outbox_id = self.outbox_id, stream, sequence, "event published");
    }
}

/// Where the chain stands: the last message that is known to be stored, and those in flight behind it.
#[derive(Debug)]
pub(super) struct Chain {
    stream: String,
    sequence: u64,
    /// Whether messages may name their predecessor by its id.
    named: bool,
    /// The id of the last message that is known to be stored; kept while nothing is in flight.
    message_id: Option<String>,
    in_flight: VecDeque<(Sent, bool)>,
    bytes: usize,
    /// The number of the first message in flight.
    first_number: u64,
}

/// Why the relay stops sending: the stream must be looked at first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The server refused an event.
    Refused { event: Box<Sent>, code: u64, description: String },
    /// Nobody answers on the subject: no stream, or one without a leader.
    NoResponders,
    /// The event was dropped as a repeat of an earlier message.
    Duplicate { event: Box<Sent>, sequence: u64 },
    /// An event is not where it must be: another stream answered, or another writer came between.
    Misplaced { event: Box<Sent>, stream: String, sequence: u64 },
    /// Something that is no JetStream answer came back.
    Unreadable,
    /// No answer in time, and what the server complained of meanwhile.
    Timeout { complaint: Option<String> },
    /// No answer to an event, while those behind it are refused because it is not stored; and what the server complained
    /// of meanwhile.
    Unanswered { event: Box<Sent>, complaint: Option<String> },
    /// The connection broke while messages were in flight.
    ConnectionLost,
    /// The server stores the messages of an atomic batch one by one, because it does not know batches.
    Unbatched,
    /// An event is larger than the server takes; it was not sent.
    TooLarge { event: Box<Sent>, limit: usize },
}

impl Doubt {
    /// The event that it is about, when it is about one.
    pub(super) fn event(&self) -> Option<&Sent> {
        match self {
            Self::Refused { event, .. }
            | Self::Duplicate { event, .. }
            | Self::Misplaced { event, .. }
            | Self::Unanswered { event, .. }
            | Self::TooLarge { event, .. } => Some(event),
            Self::NoResponders | Self::Unreadable | Self::Timeout { .. } | Self::ConnectionLost | Self::Unbatched => {
                None
            }
        }
    }

    /// JetStream's error number, when it gave one.
    pub(super) fn code(&self) -> Option<u64> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code, description, .. } => write!(f, "refused with error {code}: {description}"),
            Self::NoResponders => f.write_str("no stream answers on the subject, or it has no leader"),
            Self::Duplicate { sequence, .. } => write!(f, "dropped as a repeat of message {sequence}"),
            Self::Misplaced { stream, sequence, .. } => write!(f, "stored as message {sequence} of {stream}"),
            Self::Unreadable => f.write_str("the answer is no acknowledgement of a JetStream server"),
            Self::Timeout { complaint: None } => f.write_str("no acknowledgement in time"),
            Self::Timeout { complaint: Some(text) } => write!(f, "no acknowledgement in time; the server says: {text}"),
            Self::Unanswered { complaint: None, .. } => {
                f.write_str("no acknowledgement, and what was sent behind it is refused because it is not stored")
            }
            Self::Unanswered { complaint: Some(text), .. } => {
                write!(f, "no acknowledgement, and it is not stored; the server says: {text}")
            }
            Self::ConnectionLost => f.write_str("the connection to nats broke"),
            Self::Unbatched => f.write_str("the server stores the messages of an atomic batch one by one"),
            Self::TooLarge { limit, .. } => write!(f, "larger than the server's max_payload of {limit} bytes"),
        }
    }
}

impl Chain {
    /// A chain behind the last message of `stream`. Its id may be unknown; the sequence suffices for the first one. In
    /// a stream with replicas messages are not `named`: see [`Predecessor`].
    pub(super) fn behind(stream: &str, sequence: u64, named: bool) -> Self {
        Self {
            stream: stream.into(),
            sequence,
            named,
            message_id: None,
            in_flight: VecDeque::new(),
            bytes: 0,
            first_number: 0,
        }
    }

    /// The sequence of the last message that is known to be stored.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Messages and payload bytes in flight.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.in_flight.len(), self.bytes)
    }

    /// The number for the next message.
    pub(super) fn next_number(&self) -> u64 {
        self.first_number + self.in_flight.len() as u64
    }

    /// Takes the next message up as in flight.
    pub(super) fn sent(&mut self, event: Sent) {
        self.bytes += event.bytes;
        self.in_flight.push_back((event, false));
    }

    /// Takes an answer in. Returns the events that are now stored with everything before them.
    pub(super) fn answered(&mut self, number: u64, answer: Answer) -> Result<Vec<Sent>, Doubt> {
        let Some(offset) = number.checked_sub(self.first_number) else { return Ok(Vec::new()) };
        let expected = self.sequence + offset + 1;
        let Some((event, stored)) = usize::try_from(offset).ok().and_then(|offset| self.in_flight.get_mut(offset))
        else {
            return Ok(Vec::new());
        };
        if let Answer::Stored { stream, sequence, duplicate: false } = &answer
            && *stream == self.stream
            && *sequence == expected
        {
            *stored = true;
            return Ok(self.advance());
        }
        let event = Box::new(event.clone());
        match answer {
            Answer::Stored { sequence, duplicate: true, .. } => Err(Doubt::Duplicate { event, sequence }),
            Answer::Stored { stream, sequence, .. } => Err(Doubt::Misplaced { event, stream, sequence }),
            Answer::Refused { code, description } => Err(Doubt::Refused { event, code, description }),
            Answer::NoResponders => Err(Doubt::NoResponders),
            Answer::Unreadable => Err(Doubt::Unreadable),
        }
    }

    /// The cause of a doubt. The server takes messages in the order in which they were sent. So when it refuses one that is
    /// not behind its predecessor, and an earlier one has no answer, the cause is that the earlier one is not stored.
    pub(super) fn trace(&self, doubt: Doubt, complaint: Option<String>) -> Doubt {
        match (&doubt, self.in_flight.front()) {
            (Doubt::Refused { event, code: 10070 | 10071, .. }, Some((first, _))) if first != &**event => {
                Doubt::Unanswered { event: Box::new(first.clone()), complaint }
            }
            _ => doubt,
        }
    }

    /// Takes in that the first `size` messages in flight were stored together, the last of them under `sequence`.
    pub(super) fn committed(&mut self, size: usize, stream: String, sequence: u64) -> Result<Vec<Sent>, Doubt> {
        let expected = self.sequence + size as u64;
        match size.checked_sub(1).and_then(|last| self.in_flight.get(last)) {
            Some((event, _)) if stream != self.stream || sequence != expected => {
                Err(Doubt::Misplaced { event: Box::new(event.clone()), stream, sequence })
            }
            _ => {
                self.in_flight.iter_mut().take(size).for_each(|(_, stored)| *stored = true);
                Ok(self.advance())
            }
        }
    }

    fn advance(&mut self) -> Vec<Sent> {
        let mut done = Vec::new();
        while let Some((mut event, _)) = self.in_flight.pop_front_if(|(_, stored)| *stored) {
            self.sequence += 1;
            event.sequence = self.sequence;
            self.first_number += 1;
            self.bytes -= event.bytes;
            event.tell_published(&self.stream, self.sequence);
            done.push(event);
        }
        if let (Some(last), true) = (done.last(), self.in_flight.is_empty()) {
            self.message_id = Some(last.message_id());
        }
        done
    }

    /// What the next message must be behind.
    pub(super) fn predecessor(&self) -> Predecessor {
        let message_id = match self.in_flight.back() {
            _ if !self.named => None,
            Some((event, _)) => Some(event.message_id()),
            None => self.message_id.clone(),
        };
        Predecessor { sequence: self.sequence + self.in_flight.len() as u64, message_id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(outbox_id: i64) -> Sent {
        Sent {
            outbox_id,
            event_id: Uuid::nil(),
            key: None,
            renamed: Some(format!("m{outbox_id}")),
            bytes: 10,
            created_at: DateTime::UNIX_EPOCH,
            sent_at: None,
            sequence: 0,
            digest: None,
            origin: None,
        }
    }

    fn at(outbox_id: i64, sequence: u64) -> Sent {
        Sent { sequence, ..event(outbox_id) }
    }

    fn chain(events: i64) -> Chain {
        let mut chain = Chain::behind("E", 40, true);
        for id in 1..=events {
            assert_eq!(chain.next_number(), id as u64 - 1);
            chain.sent(event(id));
        }
        chain
    }

    fn stored(sequence: u64) -> Answer {
        Answer::Stored { stream: "E".into(), sequence, duplicate: false }
    }

    #[test]
    fn a_refusal_for_want_of_an_earlier_message_is_traced_to_that() {
        let refused = |number, code| {
            let answer = Answer::Refused { code, description: "wrong last sequence: 40".into() };
            let mut chain = chain(3);
            let doubt = chain.answered(number, answer).unwrap_err();
            (chain.trace(doubt.clone(), Some("complaint".into())), doubt)
        };
        for (number, code) in [(1, 10071), (2, 10071), (2, 10070)] {
            let traced = refused(number, code).0;
            assert_eq!(traced, Doubt::Unanswered { event: Box::new(event(1)), complaint: Some("complaint".into()) });
        }
        for (number, code) in [(0, 10071), (0, 10077), (1, 10077), (2, 10054)] {
            let (traced, doubt) = refused(number, code);
            assert_eq!(traced, doubt, "it is the cause itself");
        }
    }

    #[test]
    fn each_message_names_its_predecessor() {
        let mut chain = Chain::behind("E", 40, true);
        assert_eq!(chain.predecessor(), Predecessor { sequence: 40, message_id: None });
        chain.sent(event(1));
        let behind_first = Predecessor { sequence: 41, message_id: Some("m1".into()) };
        assert_eq!(chain.predecessor(), behind_first);
        assert_eq!(chain.answered(0, stored(41)), Ok(vec![at(1, 41)]));
        assert_eq!(chain.predecessor(), behind_first);
    }

    #[test]
    fn in_a_stream_with_replicas_none_is_named() {
        let mut chain = Chain::behind("E", 40, false);
        chain.sent(event(1));
        assert_eq!(chain.predecessor(), Predecessor { sequence: 41, message_id: None });
        assert_eq!(chain.answered(0, stored(41)), Ok(vec![at(1, 41)]));
        assert_eq!(chain.predecessor(), Predecessor { sequence: 41, message_id: None });
    }

    #[test]
    fn only_a_prefix_counts_as_stored() {
        let mut chain = chain(3);
        assert_eq!(chain.answered(1, stored(42)), Ok(vec![]));
        assert_eq!(chain.sequence(), 40);
        assert_eq!(chain.answered(0, stored(41)), Ok(vec![at(1, 41), at(2, 42)]));
        assert_eq!((chain.sequence(), chain.load()), (42, (1, 10)));
        assert_eq!(chain.answered(0, stored(41)), Ok(vec![]), "an old answer again");
        assert_eq!(chain.answered(2, stored(43)), Ok(vec![at(3, 43)]));
        assert_eq!(chain.load(), (0, 0));
    }

    #[test]
    fn a_batch_is_stored_as_a_whole() {
        let mut chain = chain(3);
        assert!(chain.committed(3, "E".into(), 42).is_err(), "one is missing");
        assert!(chain.committed(3, "F".into(), 43).is_err(), "another stream");
        chain.sent(event(4));
        assert_eq!(chain.committed(3, "E".into(), 43), Ok(vec![at(1, 41), at(2, 42), at(3, 43)]));
        assert_eq!((chain.sequence(), chain.load()), (43, (1, 10)), "the next one is in flight");
    }

    #[test]
    fn every_other_answer_ends_the_chain() {
        let another = Answer::Stored { stream: "F".into(), sequence: 41, duplicate: false };
        let repeat = Answer::Stored { stream: "E".into(), sequence: 7, duplicate: true };
        let refused = Answer::Refused { code: 10071, description: "wrong last sequence".into() };
        for answer in [another, repeat, stored(42), refused, Answer::NoResponders, Answer::Unreadable] {
            let mut chain = chain(2);
            assert!(chain.answered(0, answer.clone()).is_err(), "{answer:?}");
            assert_eq!(chain.sequence(), 40, "{answer:?}");
        }
    }
}
