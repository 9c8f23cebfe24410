//! When the payloads of events that cannot run make room for others. A pure state machine: no IO, no clock of its own.

use std::time::{Duration, Instant};

/// How long a free executor waits for those that run before payloads are let go: each costs a request to read again.
const FIRST: Duration = Duration::from_millis(250);
/// The longest wait, when letting go has brought nothing that could run.
const LONGEST: Duration = Duration::from_secs(2);

/// Decides when to let payloads go.
#[derive(Debug)]
pub(super) struct Room {
    /// Since when executors have nothing to do.
    idle_since: Option<Instant>,
    patience: Duration,
}

impl Default for Room {
    fn default() -> Self {
        Self { idle_since: None, patience: FIRST }
    }
}

impl Room {
    /// Takes note whether an executor is free for which there is no event.
    pub(super) fn idle(&mut self, idle: bool, now: Instant) {
        self.idle_since = if idle { self.idle_since.or(Some(now)) } else { None };
    }

    /// When to let payloads go, with the memory full.
    pub(super) fn due(&self) -> Option<Instant> {
        Some(self.idle_since? + self.patience)
    }

    /// Payloads were let go. Of few keys more and more events would come in that cannot run either.
    pub(super) fn made(&mut self, now: Instant) {
        self.idle_since = Some(now);
        self.patience = (self.patience * 2).min(LONGEST);
    }

    /// An event has come in that can run.
    pub(super) fn paid(&mut self) {
        self.patience = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_when_a_lane_has_been_idle_for_a_while() {
        let (mut room, start) = (Room::default(), Instant::now());
        assert_eq!(room.due(), None);
        room.idle(true, start);
        room.idle(true, start + FIRST / 2);
        assert_eq!(room.due(), Some(start + FIRST), "from when it began");
        room.idle(false, start + FIRST / 2);
        assert_eq!(room.due(), None, "there was something to do");
        room.idle(true, start + FIRST);
        assert_eq!(room.due(), Some(start + FIRST * 2));
    }

    #[test]
    fn what_brings_nothing_is_done_ever_more_rarely() {
        let (mut room, start) = (Room::default(), Instant::now());
        room.idle(true, start);
        room.made(start + FIRST);
        assert_eq!(room.due(), Some(start + FIRST * 3));
        (0..20).for_each(|_| room.made(start));
        assert_eq!(room.due(), Some(start + LONGEST));
        room.paid();
        assert_eq!(room.due(), Some(start + FIRST));
    }
}
