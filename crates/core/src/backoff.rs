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
        // Past 2^100 the wait has long reached `max`.
        let step = failures.saturating_sub(1).min(100) as usize;
        ExponentialBuilder::new()
            .with_min_delay(self.first.min(self.max))
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

    proptest::proptest! {
        #[test]
        fn the_wait_doubles_to_the_maximum_and_jitter_adds_as_much(
            first in 0..10_000_000_u64, max in 0..40_000_000_000_u64, failures in 0..80_u32
        ) {
            let wait = Backoff { first: Duration::from_millis(first), max: Duration::from_millis(max) }.after(failures);
            let doublings = failures.saturating_sub(1).min(63);
            let base = u128::from(first) * (1_u128 << doublings);
            let base = Duration::from_millis(u64::try_from(base.min(u128::from(max))).unwrap());
            // Doubling is done with 24 bits, and each step may round.
            let slack = base.mul_f64(1e-5) + Duration::from_nanos(1);
            proptest::prop_assert!(wait + slack >= base && wait <= base * 2 + slack * 2, "{:?} {:?}", wait, base);
        }
    }

    #[test]
    fn the_longest_times_do_not_panic() {
        let backoff = Backoff { first: Duration::MAX, max: Duration::MAX };
        assert_eq!([0, 1, u32::MAX].map(|failures| backoff.after(failures)), [Duration::MAX; 3]);
    }
}
