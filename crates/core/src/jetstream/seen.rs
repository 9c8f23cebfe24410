//! Which deliveries of a consumer have come, and where some are missing.

/// How far the stream is known.
#[derive(Debug)]
pub(super) struct Seen {
    /// All messages up to this stream sequence were handed on, or were acked before this feed began.
    pub(super) sequence: u64,
    /// The consumer sequence of the last delivery.
    pub(super) deliveries: u64,
    /// Whether deliveries were missed since the last new message.
    pub(super) missed: bool,
}

impl Seen {
    /// A message of the stream has come as this delivery of the consumer, for the first time or again: the first and the
    /// last sequence of those in front of it that may have been missed.
    pub(super) fn arrived(&mut self, sequence: u64, delivery: u64, again: bool) -> Option<(u64, u64)> {
        // What was missed may have been new, also when the next to come is one that comes again.
        self.missed |= delivery != self.deliveries + 1;
        self.deliveries = delivery;
        if sequence <= self.sequence {
            return None;
        }
        let (first, last) = (self.sequence + 1, sequence - 1);
        self.sequence = sequence;
        let missed = self.missed && first <= last;
        // All that was missed lies in front of a message that comes for the first time. Those that come again have no
        // order: the next one may leap over others that were missed.
        self.missed &= again;
        missed.then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_front_of_what_comes_again_more_may_have_been_missed() {
        let mut seen = Seen { sequence: 10, deliveries: 20, missed: false };
        // The consumer's subjects are not all of the stream's: a leap is no hole as long as no delivery is missing.
        assert_eq!(seen.arrived(12, 21, false), None);
        // 13 to 40 were delivered and lost on the way; then they come again, in whatever order.
        assert_eq!(seen.arrived(14, 51, true), Some((13, 13)));
        assert_eq!(seen.arrived(30, 52, true), Some((15, 29)));
        assert_eq!(seen.arrived(13, 53, true), None);
        assert_eq!(seen.arrived(31, 54, true), None);
        // A new one settles it: there is nothing in front of it that was not delivered.
        assert_eq!(seen.arrived(41, 55, false), Some((32, 40)));
        assert_eq!(seen.arrived(50, 56, false), None);
        // Missed without a leap, and found out later.
        assert_eq!(seen.arrived(20, 58, true), None);
        assert_eq!(seen.arrived(60, 59, false), Some((51, 59)));
    }
}
