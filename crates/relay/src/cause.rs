//! Why the relay makes no progress.
//!
//! One cause leads to many doubts, and only some of them name it. A server whose disk is full says so (before 2.14), or
//! stops answering (from 2.14 on). Then it refuses the messages behind the one that it did not answer.

use super::chain::Doubt;
use super::classify::Class;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::api::has_no_leader;

/// What an operator can do when the server answers, but not to messages.
const NOTHING_IS_STORED: &str = "the server answers, but stores nothing and does not say why: see its log and /healthz; \
     a disk that was full or failed stops a stream for good since nats-server 2.14: make room, then restart nats-server; \
     a stream with replicas may have lost most of them";

/// What an operator can do when the server is there and its JetStream is not.
const NO_JETSTREAM: &str = "nats-server is there, but JetStream does not answer: see its log and /healthz; \
     a member of a cluster turns JetStream off when its disk is full: make room, then restart it";

/// What an operator can do when a server takes batches for single messages.
const NO_BATCHES: &str = "a server of the cluster is older than nats-server 2.12.1: messages go out one by one until the relay \
     takes the lead again; upgrade all servers";

/// What an operator can do when the stream cannot be read for the `failures`-th time. Once may be a change of its leader, and
/// a missing stream, leader or connection says so itself.
pub(super) fn unreadable(error: &Error, failures: u32, connected: bool) -> Option<&'static str> {
    let silent = error.kind() == ErrorKind::Broker && !has_no_leader(error);
    (silent && failures > 1 && connected).then_some(NO_JETSTREAM)
}

/// What an operator is told about a doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ToldCause {
    pub(super) class: Class,
    /// JetStream's error number, when it gave one.
    pub(super) code: Option<u64>,
    pub(super) error: String,
    /// What an operator can do about it.
    pub(super) remedy: &'static str,
}

/// What the doubts since the last stored event say about their cause.
#[derive(Debug, Default)]
pub(super) struct Cause {
    /// Where the stream ended meanwhile.
    end: u64,
    /// The lack of room that the server named.
    named: Option<ToldCause>,
    /// Doubts in a row that name no cause, although the stream could be read in between.
    silent: u32,
}

impl Cause {
    /// What an operator is told about a doubt that arose behind message `end` of the stream.
    pub(super) fn of(&mut self, doubt: &Doubt, end: u64) -> ToldCause {
        if self.end != end {
            *self = Self { end, ..Self::default() };
        }
        let class = Class::of(doubt);
        let remedy = if *doubt == Doubt::Unbatched { NO_BATCHES } else { class.remedy(doubt.code()) };
        let told = ToldCause { class, code: doubt.code(), error: doubt.to_string(), remedy };
        match (class, doubt) {
            (Class::BackPressure, _) => {
                self.named = Some(told.clone());
                self.silent = 0;
                told
            }
            (Class::Unknown, Doubt::Unanswered { .. } | Doubt::Timeout { .. }) => {
                self.silent += 1;
                self.explain(told)
            }
            (Class::Fenced, Doubt::Refused { .. }) => self.explain(told),
            _ => {
                *self = Self { end, ..Self::default() };
                told
            }
        }
    }

    /// A doubt that names no cause has the one that was named before, if any.
    fn explain(&self, told: ToldCause) -> ToldCause {
        let remedy = (self.silent > 1).then_some(NOTHING_IS_STORED);
        match (&self.named, remedy) {
            (Some(named), remedy) => ToldCause {
                error: format!("{}; since then: {}", named.error, told.error),
                remedy: remedy.unwrap_or(named.remedy),
                ..named.clone()
            },
            (None, Some(remedy)) => ToldCause { class: Class::BackPressure, remedy, ..told },
            (None, None) => told,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::Sent;
    use super::*;

    fn event() -> Box<Sent> {
        Box::new(Sent {
            outbox_id: 1,
            event_id: uuid::Uuid::nil(),
            key: None,
            renamed: None,
            bytes: 1,
            created_at: chrono::DateTime::UNIX_EPOCH,
            sent_at: None,
            sequence: 0,
            digest: None,
            origin: None,
        })
    }

    fn refused(code: u64, description: &str) -> Doubt {
        Doubt::Refused { event: event(), code, description: description.into() }
    }

    fn full() -> Doubt {
        refused(10077, "write 1.blk: no space left on device")
    }

    fn overtaken() -> Doubt {
        refused(10071, "wrong last sequence: 7")
    }

    fn unanswered() -> Doubt {
        Doubt::Unanswered { event: event(), complaint: None }
    }

    const TIMEOUT: Doubt = Doubt::Timeout { complaint: None };

    #[test]
    fn what_follows_a_full_disk_does_not_cover_it_up() {
        let mut cause = Cause::default();
        assert_eq!(cause.of(&full(), 7).class, Class::BackPressure);
        for doubt in [overtaken(), unanswered(), TIMEOUT, overtaken()] {
            let told = cause.of(&doubt, 7);
            assert_eq!((told.class, told.code), (Class::BackPressure, Some(10077)), "{doubt}");
            assert!(told.error.contains("no space left") && told.error.ends_with(&doubt.to_string()), "{}", told.error);
            assert!(!told.remedy.contains("another writer"), "{}", told.remedy);
        }
    }

    #[test]
    fn what_was_full_once_explains_nothing_after_something_was_stored() {
        let mut cause = Cause::default();
        cause.of(&full(), 7);
        assert_eq!(cause.of(&overtaken(), 8).class, Class::Fenced);
        assert_eq!(cause.of(&TIMEOUT, 9).class, Class::Unknown);
        assert_eq!(cause.of(&TIMEOUT, 10).class, Class::Unknown, "the stream grows");
    }

    #[test]
    fn a_silent_server_is_told_apart_from_a_slow_answer() {
        for doubt in [unanswered(), TIMEOUT] {
            let mut cause = Cause::default();
            assert_eq!(cause.of(&doubt, 7).class, Class::Unknown);
            let told = cause.of(&doubt, 7);
            assert_eq!(told.class, Class::BackPressure);
            for word in ["disk", "make room", "restart nats-server"] {
                assert!(told.remedy.contains(word), "{}", told.remedy);
            }
        }
    }

    #[test]
    fn a_server_without_jetstream_is_named_as_such() {
        assert!(
            unreadable(&Error::new(ErrorKind::Broker, "timed out"), 2, true)
                .is_some_and(|remedy| remedy.contains("disk is full"))
        );
        for (error, failures, connected) in
            [(ErrorKind::Broker, 1, true), (ErrorKind::Broker, 9, false), (ErrorKind::NotReady, 9, true)]
        {
            assert_eq!(unreadable(&Error::new(error, "why"), failures, connected), None);
        }
    }

    #[test]
    fn a_connection_that_breaks_is_a_cause_of_its_own() {
        let mut cause = Cause::default();
        cause.of(&TIMEOUT, 7);
        for _ in 0..3 {
            assert_eq!(cause.of(&Doubt::ConnectionLost, 7).class, Class::Unknown);
            assert_eq!(cause.of(&TIMEOUT, 7).class, Class::Unknown);
        }
    }

    #[test]
    fn another_writer_and_a_missing_permission_are_still_named() {
        let mut cause = Cause::default();
        let complaint = || Some("Permissions Violation for Publish".to_string());
        for _ in 0..3 {
            assert_eq!(cause.of(&overtaken(), 7).class, Class::Fenced);
            for doubt in [
                Doubt::Timeout { complaint: complaint() },
                Doubt::Unanswered { event: event(), complaint: complaint() },
            ] {
                let told = cause.of(&doubt, 7);
                assert_eq!(told.class, Class::Alarm);
                assert!(told.remedy.contains("right") && told.error.contains("Permissions"), "{told:?}");
            }
        }
    }
}
