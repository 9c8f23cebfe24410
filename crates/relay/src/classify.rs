//! What each answer to a publish means for the relay, in one table.
//!
//! The numbers are those of nats-server's `errors.json`. Only an error that lies in the event itself parks it;
//! everything that may heal is waited out, however long it takes.

use super::chain::Doubt;

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Class {
    /// The server cannot store it at the moment: try again.
    Retry,
    /// The stream is full or busy: try again slowly.
    BackPressure,
    /// It may be stored or not: look at the stream.
    Unknown,
    /// Somebody else wrote to the stream, or it is stored already: look at the stream.
    Fenced,
    /// This event can never be stored: park it.
    Park,
    /// A setting is wrong: say so loudly, try again slowly.
    Alarm,
}

impl Class {
    /// All of them.
    pub(super) const ALL: [Self; 6] =
        [Self::Retry, Self::BackPressure, Self::Unknown, Self::Fenced, Self::Park, Self::Alarm];

    /// The label in metrics and logs.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::BackPressure => "back_pressure",
            Self::Unknown => "unknown",
            Self::Fenced => "fenced",
            Self::Park => "park",
            Self::Alarm => "alarm",
        }
    }

    /// The class of a JetStream error number. One that is not known here is tried again.
    pub(super) fn of_code(code: u64) -> Self {
        match code {
            // JetStream unavailable, subject check not ready, stream offline, message id in process, duplicate inside an
            // atomic batch, incomplete atomic batch.
            10008 | 10118 | 10158 | 10163 | 10176 | 10194 | 10201 => Self::Retry,
            // Insufficient resources and storage, maximum messages or bytes (also a full disk), queue full, too many atomic or
            // fast batches.
            10023 | 10047 | 10077 | 10167 | 10210 | 10211 => Self::BackPressure,
            // Unknown fast batch.
            10208 => Self::Unknown,
            // Wrong last sequence, wrong last message id, subject in process.
            10070 | 10071 | 10164 => Self::Fenced,
            // Message too large, headers too large, TTL invalid or disabled, rollup refused.
            10054 | 10097 | 10111 | 10165 | 10166 => Self::Park,
            // Expected stream mismatch, sealed, batch flags off, malformed batches.
            10060 | 10109 | 10174 | 10175 | 10177 | 10179 | 10199 | 10200 | 10205 | 10206 | 10207 => Self::Alarm,
            _ => Self::Retry,
        }
    }

    /// The class of what ended a chain.
    pub(super) fn of(doubt: &Doubt) -> Self {
        match doubt {
            Doubt::Refused { code, .. } => Self::of_code(*code),
            Doubt::NoResponders => Self::Retry,
            Doubt::Duplicate { .. } => Self::Fenced,
            Doubt::Misplaced { .. } | Doubt::Unbatched => Self::Alarm,
            Doubt::Timeout { complaint: Some(text) } | Doubt::Unanswered { complaint: Some(text), .. }
                if text.contains("Permissions Violation") =>
            {
                Self::Alarm
            }
            Doubt::Unreadable | Doubt::Timeout { .. } | Doubt::Unanswered { .. } | Doubt::ConnectionLost => {
                Self::Unknown
            }
            Doubt::TooLarge { .. } => Self::Park,
        }
    }

    /// What an operator can do, said in the log beside the error.
    pub(super) fn remedy(self, code: Option<u64>) -> &'static str {
        match (self, code) {
            (Self::Park, _) => "the event is parked: see `aftercommit parked list`",
            (Self::BackPressure, Some(10077)) => "the stream or its disk is full: raise its limits or free space",
            (Self::BackPressure, Some(10023 | 10047)) => {
                "the server's JetStream storage or memory is used up: raise max_file_store or max_memory_store and restart \
                 nats-server, or remove streams"
            }
            (Self::BackPressure, _) => "the stream is busy, the relay slows down",
            (Self::Alarm, Some(10109)) => "the stream is sealed: name another one with --stream",
            (Self::Alarm, Some(10174 | 10205)) => "run `aftercommit provision`",
            (Self::Alarm, None) => {
                "give the relay's NATS user the right, or check the stream with `aftercommit doctor`"
            }
            (Self::Alarm, _) => "check the stream with `aftercommit doctor`",
            (Self::Fenced, _) => "another writer wrote first; the relay reads the end of the stream and continues",
            (Self::Retry | Self::Unknown, _) => "the relay continues when the servers answer again",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_code_has_its_class() {
        let table: [(Class, &[u64]); 6] = [
            (Class::Retry, &[10008, 10163, 10118, 10194, 10158, 10201, 10176]),
            (Class::BackPressure, &[10023, 10047, 10077, 10167, 10210, 10211]),
            (Class::Unknown, &[10208]),
            (Class::Fenced, &[10071, 10164, 10070]),
            (Class::Park, &[10054, 10097, 10165, 10166, 10111]),
            (Class::Alarm, &[10060, 10109, 10174, 10205, 10175, 10177, 10179, 10199, 10200, 10206, 10207]),
        ];
        for (class, codes) in table {
            for code in codes {
                assert_eq!(Class::of_code(*code), class, "{code}");
                assert!(!class.remedy(Some(*code)).is_empty());
            }
        }
    }

    #[test]
    fn an_unknown_code_is_tried_again_and_parks_nothing() {
        for code in [0, 1, 10000, 19999, u64::MAX] {
            assert_eq!(Class::of_code(code), Class::Retry);
        }
    }
}
