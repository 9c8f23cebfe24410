//! What is in flight to the stream, in either way of keeping order.

use std::collections::VecDeque;

use super::chain::{Chain, Doubt, Sent};
use super::keyed::Keyed;
use super::reader::Prepared;
use aftercommit_core::jetstream::publisher::{Answer, Predecessor};

/// The messages in flight and the rule that keeps their order.
#[derive(Debug)]
pub(super) enum InFlight {
    /// To a stream that only this relay writes.
    Chained(Chain),
    /// To a stream with other writers.
    Keyed(Keyed),
}

impl InFlight {
    /// The last sequence that is known to be ours.
    pub(super) fn sequence(&self) -> u64 {
        match self {
            Self::Chained(chain) => chain.sequence(),
            Self::Keyed(keyed) => keyed.sequence(),
        }
    }

    /// Messages and payload bytes in flight.
    pub(super) fn load(&self) -> (usize, usize) {
        match self {
            Self::Chained(chain) => chain.load(),
            Self::Keyed(keyed) => keyed.load(),
        }
    }

    /// The outbox id up to which everything is stored, when the events of `next` were not sent. 0 when only the stream
    /// can tell, because what is in flight may be stored or lost.
    pub(super) fn stored_up_to(&self, next: impl Iterator<Item = i64>) -> i64 {
        match self {
            Self::Chained(_) => 0,
            Self::Keyed(keyed) => keyed.first_outbox_id().into_iter().chain(next).min().map_or(0, |first| first - 1),
        }
    }

    pub(super) fn next_number(&self) -> u64 {
        match self {
            Self::Chained(chain) => chain.next_number(),
            Self::Keyed(keyed) => keyed.next_number(),
        }
    }

    /// Takes the next event that may be sent now.
    pub(super) fn take_next(&self, waiting: &mut VecDeque<Prepared>) -> Option<Prepared> {
        match self {
            Self::Chained(_) => waiting.pop_front(),
            Self::Keyed(keyed) => keyed.take_next(waiting, |prepared| &prepared.event),
        }
    }

    /// What the next message must be behind; nothing in particular where others write too.
    pub(super) fn predecessor(&self) -> Option<Predecessor> {
        match self {
            Self::Chained(chain) => Some(chain.predecessor()),
            Self::Keyed(_) => None,
        }
    }

    pub(super) fn sent(&mut self, event: Sent) {
        match self {
            Self::Chained(chain) => chain.sent(event),
            Self::Keyed(keyed) => keyed.sent(event),
        }
    }

    /// The event that the server took for a repeat, when that is to be checked while others are in flight.
    pub(super) fn repeat(&self, number: u64, answer: &Answer) -> Option<(Sent, u64)> {
        match (self, answer) {
            (Self::Keyed(keyed), Answer::Stored { sequence, duplicate: true, .. }) => {
                Some((keyed.event(number)?.clone(), *sequence))
            }
            _ => None,
        }
    }

    /// The cause of a doubt, with what the server complained of lately.
    pub(super) fn trace(&self, doubt: Doubt, complaint: Option<String>) -> Doubt {
        match self {
            Self::Chained(chain) => chain.trace(doubt, complaint),
            Self::Keyed(_) => doubt,
        }
    }

    pub(super) fn answered(&mut self, number: u64, answer: Answer) -> Result<Vec<Sent>, Doubt> {
        match self {
            Self::Chained(chain) => chain.answered(number, answer),
            Self::Keyed(keyed) => keyed.answered(number, answer),
        }
    }
}
