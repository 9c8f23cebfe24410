//! How many events go into one transaction.

use std::time::{Duration, Instant};

/// For so long handlers may run in one transaction, so that those of other events wait for no longer.
const TARGET: Duration = Duration::from_millis(100);
/// For so long at most where the transaction itself takes long: it may just have waited for a lock.
const LONGEST: Duration = Duration::from_secs(1);
/// How much one batch moves the averages.
const WEIGHT: u32 = 8;

/// What a batch took.
#[derive(Debug)]
pub(super) struct Took {
    started: Instant,
    events: u32,
    handlers: Duration,
}

impl Took {
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), events: 0, handlers: Duration::ZERO }
    }

    /// Handlers of so many events ran for so long.
    pub(super) fn handled(&mut self, events: usize, time: Duration) {
        self.events += u32::try_from(events).unwrap_or(u32::MAX);
        self.handlers += time;
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The batch is over.
    pub(super) fn end(self) -> Ran {
        Ran { events: self.events, handlers: self.handlers, rest: self.elapsed().saturating_sub(self.handlers) }
    }
}

/// A batch that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ran {
    /// Those that were not done before.
    events: u32,
    handlers: Duration,
    /// Begin, inbox and commit.
    rest: Duration,
}

/// Moving averages.
#[derive(Debug)]
pub(super) struct Pace {
    /// How long the handler of one event takes.
    event: Duration,
    /// What a transaction takes besides, however many events it has.
    rest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { event: TARGET / 10, rest: Duration::ZERO }
    }
}

impl Pace {
    pub(super) fn ran(&mut self, ran: Ran) {
        let average = |old: Duration, new: Duration| (old * (WEIGHT - 1) + new) / WEIGHT;
        self.rest = average(self.rest, ran.rest);
        if let Some(event) = ran.handlers.checked_div(ran.events) {
            self.event = average(self.event, event);
        }
    }

    /// As many events as handlers get done in the time that is meant for them. That is no less than what the transaction
    /// takes besides: where the database is far away or busy, a smaller batch would mostly wait for its own statements.
    pub(super) fn fit(&self) -> usize {
        let fit = self.rest.clamp(TARGET, LONGEST).as_nanos() / self.event.as_nanos().max(1);
        usize::try_from(fit).unwrap_or(usize::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of batches, at most 100, when `handlers` run for that long for so many events.
    fn settles_at(rest: Duration, handlers: impl Fn(u32) -> Duration) -> usize {
        let mut pace = Pace::default();
        for _ in 0..200 {
            let events = u32::try_from(pace.fit().min(100)).unwrap();
            pace.ran(Ran { events, handlers: handlers(events), rest });
        }
        pace.fit().min(100)
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn quick_handlers_get_all_there_is_and_slow_ones_a_few() {
        assert_eq!(settles_at(ms(2), |events| ms(1) * events / 10), 100);
        assert_eq!(settles_at(ms(2), |events| ms(20) * events), 5);
        assert_eq!(settles_at(ms(2), |events| ms(500) * events), 1);
    }

    #[test]
    fn a_database_that_is_far_away_is_not_asked_for_each_event() {
        // One call for all of them.
        assert_eq!(settles_at(ms(200), |_| ms(50)), 100);
        assert_eq!(settles_at(ms(800), |_| ms(200)), 100);
        // A statement for each.
        assert_eq!(settles_at(ms(800), |events| ms(200) * events), 4);
        // It waits for a lock.
        assert_eq!(settles_at(ms(60_000), |events| ms(200) * events), 5);
    }

    #[test]
    fn what_was_done_before_says_nothing_about_handlers() {
        let mut pace = Pace::default();
        let before = pace.event;
        pace.ran(Ran { events: 0, handlers: Duration::ZERO, rest: ms(1) });
        assert_eq!(pace.event, before);
    }
}
