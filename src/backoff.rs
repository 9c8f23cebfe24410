//! How long to wait before the next try.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// Exponential backoff with jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The wait after the first failure. Defaults to 1 second.
    pub first: Duration,
    /// The longest wait, before jitter. Defaults to 5 minutes.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), max: Duration::from_secs(300) }
    }
}

impl Backoff {
    /// For connections and other things that heal by themselves: from 50 milliseconds to 2 seconds.
    pub const RECONNECT: Self = Self { first: Duration::from_millis(50), max: Duration::from_secs(2) };

    /// The wait after `failures` failures in a row (1 for the first): it doubles each time up to `max`, plus a random
    /// part of up to as much again, so that many waiters do not come back together.
    pub fn after(self, failures: u32) -> Duration {
        // Past 2^32 the wait has long reached `max`.
        let step = failures.saturating_sub(1).min(32) as usize;
        ExponentialBuilder::new()
            .with_min_delay(self.first)
            .with_max_delay(self.max)
            .with_jitter()
            .without_max_times()
            .build()
            .nth(step)
            .unwrap_or(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_maximum_and_keeps_within_the_jitter() {
        let backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };
        for (failures, base) in [(1, 10), (2, 20), (3, 40), (4, 80), (5, 100), (50, 100), (u32::MAX, 100)] {
            let wait = backoff.after(failures);
            let base = Duration::from_millis(base);
            assert!(wait >= base && wait <= base * 2, "{failures}: {wait:?}");
        }
    }
}
