//! What a leader knows of the end of its stream.

use chrono::{DateTime, Utc};

use crate::in_flight::InFlight;
use aftercommit_core::postgres::relay_log::Base;

/// The end of the stream, and what is in flight behind it.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// None when the stream must be looked at before anything is published.
    in_flight: Option<InFlight>,
    /// When the stream was created; none until it was looked at.
    created: Option<DateTime<Utc>>,
    /// In a shared stream: the outbox id up to which the open window is known to be stored.
    stored_up_to: i64,
    /// Where the stream ended when that was learnt.
    stored_end: u64,
}

impl Tail {
    /// Whether the leader knows where the stream ends. If not, it must look at the stream first.
    pub(super) fn is_known(&self) -> bool {
        self.in_flight.is_some()
    }

    /// The last sequence that is known to be ours.
    pub(super) fn sequence(&self) -> Option<u64> {
        self.in_flight.as_ref().map(InFlight::sequence)
    }

    pub(super) fn in_flight(&mut self) -> Option<&mut InFlight> {
        self.in_flight.as_mut()
    }

    /// In a shared stream: the outbox id up to which the open window is known to be stored; 0 when nothing is known.
    pub(super) fn stored_up_to(&self) -> i64 {
        self.stored_up_to
    }

    /// Whether the stream that was looked at last was created then.
    pub(super) fn was_created(&self, created: DateTime<Utc>) -> bool {
        self.created == Some(created)
    }

    /// Where the next window of `stream` begins; none when the stream must be looked at first.
    pub(super) fn base(&self, stream: &str) -> Option<Base> {
        Some(Base { stream: stream.into(), created: self.created?, sequence: self.sequence()? })
    }

    /// The stream was looked at: it was created then.
    pub(super) fn saw(&mut self, created: DateTime<Utc>) {
        self.created = Some(created);
    }

    /// The stream ends at `last`. If that is earlier than before, what was acknowledged is gone again.
    pub(super) fn ends_at(&mut self, last: u64) {
        if last < self.stored_end {
            self.begin_window();
        }
    }

    /// Nothing of the open window is known to be stored.
    pub(super) fn begin_window(&mut self) {
        (self.stored_up_to, self.stored_end) = (0, 0);
    }

    /// The open window is stored up to this outbox id, with the stream ending at `end`.
    pub(super) fn stored(&mut self, up_to: i64, end: u64) {
        self.stored_up_to = self.stored_up_to.max(up_to);
        self.stored_end = end;
    }

    /// Publishing continues behind the stream's end.
    pub(super) fn go_on(&mut self, in_flight: InFlight) {
        self.in_flight = Some(in_flight);
    }

    /// The stream must be looked at next. Returns the last sequence that was known to be ours; 0 when none was.
    pub(super) fn forget(&mut self) -> u64 {
        self.in_flight.take().map_or(0, |in_flight| in_flight.sequence())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyed::Keyed;

    fn tail() -> Tail {
        let mut tail = Tail::default();
        tail.saw(DateTime::UNIX_EPOCH);
        tail.go_on(InFlight::Keyed(Keyed::new("EVENTS", 7)));
        tail
    }

    #[test]
    fn a_window_begins_where_the_stream_is_known_to_end() {
        let mut tail = tail();
        let base = tail.base("EVENTS").map(|base| (base.stream, base.created, base.sequence));
        assert_eq!(base, Some(("EVENTS".to_string(), DateTime::UNIX_EPOCH, 7)));
        assert_eq!(tail.forget(), 7);
        assert!(!tail.is_known() && tail.base("EVENTS").is_none());
        assert_eq!(tail.forget(), 0);
    }

    #[test]
    fn what_was_stored_counts_until_the_stream_ends_earlier() {
        let mut tail = tail();
        tail.stored(20, 9);
        tail.stored(10, 12);
        assert_eq!(tail.stored_up_to(), 20, "it only grows");
        tail.ends_at(12);
        assert_eq!(tail.stored_up_to(), 20);
        tail.ends_at(11);
        assert_eq!(tail.stored_up_to(), 0);
    }
}
