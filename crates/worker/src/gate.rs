//! Keeps a subscriber from working while its database, or the place to which it sends all events, is not available.

use std::time::Instant;

use aftercommit_core::backoff::Backoff;

/// Closed while the database, or the place to which all events are sent, is not available.
#[derive(Default)]
pub(super) struct Gate {
    pub(super) failures: u32,
    pub(super) closed_until: Option<Instant>,
}

impl Gate {
    /// When an executor tries whether the outage is over. None when no event waits for that: a dispatcher that waits for a
    /// time in the past does nothing else.
    pub(super) fn next_look(&self, waits: bool) -> Option<Instant> {
        self.closed_until.filter(|_| waits && self.failures > 0)
    }

    pub(super) fn close(&mut self, subscriber: &str, reason: &str) {
        if self.failures == 0 {
            tracing::warn!(subscriber, error = reason, "the subscriber cannot work, waiting");
        }
        self.failures += 1;
        self.closed_until = Some(Instant::now() + Backoff::RECONNECT.after(self.failures));
    }

    pub(super) fn open(&mut self, subscriber: &str) {
        if self.failures > 0 {
            tracing::info!(subscriber, "the subscriber works again");
        }
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_outage_is_looked_after_only_for_events_that_wait() {
        let mut gate = Gate::default();
        assert_eq!(gate.next_look(true), None, "there is none");
        gate.close("subscriber", "the database is not available");
        assert!(gate.next_look(true).is_some_and(|look| look > Instant::now() - Duration::from_secs(5)));
        // What waited is gone from the stream, say. What comes next finds the gate's time past.
        assert_eq!(gate.next_look(false), None);
        gate.open("subscriber");
        assert_eq!(gate.next_look(true), None);
    }
}
