//! How long the leader waits between two looks at the outbox: the shorter, the quicker events come one after another.

use std::time::{Duration, Instant};

/// The shortest pause. A look takes about as long.
const SHORTEST: Duration = Duration::from_micros(250);
/// The longest pause while events come.
const BUSY: Duration = Duration::from_millis(2);
/// How many looks fall between two events that come at the usual distance.
const LOOKS: u32 = 8;
/// The clock of the runtime is as coarse as this.
const TICK: Duration = Duration::from_millis(1);

/// Decides about the pauses.
#[derive(Debug)]
pub(super) struct Polling {
    /// The longest pause.
    idle: Duration,
    /// The usual distance of two looks that found something, a moving average.
    gap: Duration,
    last_news: Instant,
    pause: Duration,
}

impl Polling {
    pub(super) fn new(idle: Duration, now: Instant) -> Self {
        Self { idle, gap: BUSY * LOOKS, last_news: now, pause: BUSY.min(idle) }
    }

    /// A look has found something.
    pub(super) fn news(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last_news).min(self.idle * LOOKS);
        self.gap = (self.gap * 3 + gap) / 4;
        self.last_news = now;
        self.pause = (self.gap / LOOKS).clamp(SHORTEST, BUSY).min(self.idle);
    }

    /// A look has found nothing: how long to wait before the next one. The pauses grow when more time than usual has
    /// passed.
    pub(super) fn pause(&mut self, now: Instant) -> Duration {
        let pause = self.pause;
        if now.saturating_duration_since(self.last_news) > self.gap * 2 {
            self.pause = (pause * 2).min(self.idle);
        }
        pause
    }
}

/// Sleeps for so long, also when that is less than the runtime's clock can tell.
pub(super) async fn sleep(pause: Duration) {
    if pause > TICK {
        return tokio::time::sleep(pause).await;
    }
    // It cannot fail but by a panic, and the system's sleep has none.
    _ = tokio::task::spawn_blocking(move || std::thread::sleep(pause)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_millis(25);

    /// The pauses of a relay that finds something every `gap` for a second.
    fn pauses(gap: Duration) -> Vec<Duration> {
        let mut now = Instant::now();
        let mut polling = Polling::new(IDLE, now);
        let mut pauses = Vec::new();
        let mut left = gap;
        for _ in 0..10_000 {
            let pause = polling.pause(now).min(left);
            pauses.push(pause);
            now += pause;
            left -= pause;
            if left.is_zero() {
                polling.news(now);
                left = gap;
            }
        }
        pauses
    }

    #[test]
    fn the_denser_events_come_the_shorter_are_the_pauses() {
        for (gap, expected) in [(500, 250), (5_000, 625), (50_000, 2_000)] {
            let mut pauses = pauses(Duration::from_micros(gap));
            pauses.sort();
            assert_eq!(pauses[pauses.len() / 2], Duration::from_micros(expected), "{gap}");
        }
    }

    #[test]
    fn pauses_grow_to_the_longest_when_nothing_comes() {
        let mut now = Instant::now();
        let mut polling = Polling::new(IDLE, now);
        for _ in 0..100 {
            now += Duration::from_micros(500);
            polling.news(now);
        }
        let mut looks = 0;
        while now < polling.last_news + Duration::from_secs(1) {
            now += polling.pause(now);
            looks += 1;
        }
        assert_eq!(polling.pause, IDLE);
        assert!(looks < 60, "{looks}");
    }
}
