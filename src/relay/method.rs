//! How messages are published to an exclusive stream: chained one by one, or in atomic batches.

use std::time::Duration;

/// How the relay publishes to an exclusive stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishMethod {
    /// Chained, until it shows that the server waits for its disk with each message and can take batches.
    Auto,
    /// Always chained: many messages under way, each naming its predecessor.
    Chained,
    /// Always in atomic batches of up to 1,000. Needs nats-server 2.12.1 and `allow_atomic` on the stream.
    Batched,
}

/// So many chained messages tell how fast the server takes them.
const SAMPLE: u64 = 4096;
/// Slower than this, each message waits for the disk: pipelined messages that do not wait come at ten times the rate.
const SLOW_PER_SECOND: f64 = 10_000.0;

/// The method in use.
#[derive(Debug)]
pub(super) struct Method {
    wanted: PublishMethod,
    /// Batches pay off on this server: it writes a whole batch to disk at once.
    can_batch: bool,
    slow: bool,
    /// The open window goes out one by one, because a batch of it was refused.
    singled_out: bool,
}

impl Method {
    pub(super) fn new(wanted: PublishMethod, can_batch: bool) -> Self {
        Self { wanted, can_batch, slow: false, singled_out: false }
    }

    /// Whether the next run is in batches.
    pub(super) fn batches(&self) -> bool {
        let wanted = match self.wanted {
            PublishMethod::Auto => self.can_batch && self.slow,
            PublishMethod::Chained => false,
            PublishMethod::Batched => true,
        };
        wanted && !self.singled_out
    }

    /// So many messages were stored one by one in this time.
    pub(super) fn measured(&mut self, messages: u64, took: Duration) {
        if self.wanted != PublishMethod::Auto || !self.can_batch || self.slow || messages < SAMPLE {
            return;
        }
        let rate = messages as f64 / took.as_secs_f64();
        if rate < SLOW_PER_SECOND {
            self.slow = true;
            tracing::info!(rate, "the server waits for its disk with each message: publishing in atomic batches");
        }
    }

    /// A batch was refused: the window goes on one by one.
    pub(super) fn single_out(&mut self) {
        self.singled_out = true;
    }

    pub(super) fn window_opened(&mut self) {
        self.singled_out = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_server_that_can_gets_batches() {
        let mut method = Method::new(PublishMethod::Auto, true);
        method.measured(100, Duration::from_secs(10));
        assert!(!method.batches(), "too few to tell");
        method.measured(10_000, Duration::from_millis(100));
        assert!(!method.batches(), "it is fast");
        method.measured(10_000, Duration::from_secs(5));
        assert!(method.batches());
        method.single_out();
        assert!(!method.batches());
        method.window_opened();
        assert!(method.batches());
    }

    #[test]
    fn what_is_forced_is_done_and_what_cannot_be_is_not() {
        assert!(Method::new(PublishMethod::Batched, false).batches());
        for (wanted, can_batch) in [(PublishMethod::Auto, false), (PublishMethod::Chained, true)] {
            let mut method = Method::new(wanted, can_batch);
            method.measured(10_000, Duration::from_secs(5));
            assert!(!method.batches());
        }
    }
}
