//! How messages are published to an exclusive stream: chained one by one, or in atomic batches.

use std::time::Duration;

use tokio::time::Instant;

/// How the relay publishes to an exclusive stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishMethod {
    /// In atomic batches where the stream has replicas or the server waits for its disk with each message, as far as
    /// the stream takes them; chained elsewhere.
    Auto,
    /// Always chained: many messages in flight, each naming its predecessor. In a stream with replicas one message at a
    /// time.
    Chained,
    /// Always in atomic batches of up to 1,000. Needs nats-server 2.12.1 and `allow_atomic` on the stream, and the relay
    /// refuses to start without them: an older server would store each message by itself.
    Batched,
}

/// So many answers in a row tell how fast the server takes messages. No more are in flight until it is known.
const BURST: u64 = 256;
/// A burst that takes longer is slow: each message waits for the disk, if only 0.1 ms. A server that does not wait takes a
/// burst in 2 ms. A long way to the server looks slow, too, and batches suit it as well.
const SLOW: Duration = Duration::from_millis(15);
/// One slow burst can be a pause of the machine.
const SLOW_BURSTS: u32 = 3;

/// The method in use.
#[derive(Debug)]
pub(super) struct ActivePublishMethod {
    wanted: PublishMethod,
    stream: StreamTakes,
    watch: PaceWatch,
    /// Messages go out one by one, because a batch of them was refused.
    singled_out: bool,
    /// A server took a batch for single messages.
    unable: bool,
}

/// What the stream takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StreamTakes {
    /// Atomic batches.
    pub(super) batches: bool,
    /// A batch is written to disk at once, which pays off where the disk is waited for.
    pub(super) at_once: bool,
    /// The stream is kept by several servers. From nats-server 2.14 on, a message that names the id of another
    /// predecessor than it finds stops such a stream for good, so no message to it names one.
    pub(super) replicated: bool,
}

/// Watches the pace of the answers to chained messages. A burst counts only while more messages are in flight, so neither
/// the distance to the server nor a lack of events makes it slow.
#[derive(Debug, Default)]
pub(super) struct PaceWatch {
    began: Option<Instant>,
    answers: u64,
    slow_bursts: u32,
    slow: Option<bool>,
}

impl PaceWatch {
    /// How many messages may be in flight until the pace is known.
    pub(super) fn limit(&self) -> usize {
        if self.slow.is_none() { BURST as usize } else { usize::MAX }
    }

    /// So many answers have come in, and so many messages are still in flight. True when the server is slow.
    pub(super) fn answered(&mut self, answers: usize, in_flight: usize, now: Instant) -> bool {
        if self.slow.is_some() {
            return false;
        }
        let Some(began) = self.began.filter(|_| in_flight > 0) else {
            (self.began, self.answers) = ((in_flight > 0).then_some(now), 0);
            return false;
        };
        self.answers += answers as u64;
        if self.answers < BURST {
            return false;
        }
        let slow = (now - began).as_secs_f64() > SLOW.as_secs_f64() * self.answers as f64 / BURST as f64;
        (self.began, self.answers) = (Some(now), 0);
        if !slow {
            self.slow = Some(false);
        } else {
            self.slow_bursts += 1;
            if self.slow_bursts == SLOW_BURSTS {
                self.slow = Some(true);
                tracing::info!("the server waits for its disk with each message: publishing in atomic batches");
            }
        }
        self.slow == Some(true)
    }
}

impl ActivePublishMethod {
    pub(super) fn new(wanted: PublishMethod) -> Self {
        Self { wanted, stream: StreamTakes::default(), watch: PaceWatch::default(), singled_out: false, unable: false }
    }

    /// What the stream takes, which an operator can change at any time.
    pub(super) fn suit(&mut self, stream: StreamTakes) {
        if stream != self.stream && stream.replicated && !stream.batches {
            tracing::warn!(
                "the stream has replicas and takes no atomic batches, so messages go out one at a time: run \
                 `aftercommit provision` with nats-server 2.12 or newer"
            );
        }
        self.stream = stream;
    }

    /// Whether the stream is still as the method suits it.
    pub(super) fn suits(&self, stream: StreamTakes) -> bool {
        self.stream == stream
    }

    /// Whether the next run is in batches.
    pub(super) fn batches(&self) -> bool {
        let StreamTakes { batches, at_once, replicated } = self.stream;
        let wanted = match self.wanted {
            PublishMethod::Auto if replicated => batches,
            PublishMethod::Auto => batches && at_once && self.watch.slow == Some(true),
            PublishMethod::Chained => false,
            // Checked when the relay starts; a server that has become older since gets single messages.
            PublishMethod::Batched => batches,
        };
        wanted && !self.singled_out && !self.unable
    }

    /// Whether a chained run has one message in flight at most: the sequence says enough behind one that is stored.
    pub(super) fn is_one_at_a_time(&self) -> bool {
        self.stream.replicated
    }

    /// Who is to be told of the answers of a chained run; nobody when it changes nothing.
    pub(super) fn watch(&mut self) -> Option<&mut PaceWatch> {
        let StreamTakes { batches, at_once, replicated } = self.stream;
        let matters = batches && at_once && !replicated && self.wanted == PublishMethod::Auto;
        (matters && self.watch.slow.is_none()).then_some(&mut self.watch)
    }

    /// A batch was refused: its messages go out one by one, which shows the one that is meant.
    pub(super) fn single_out(&mut self) {
        self.singled_out = true;
    }

    /// A server took a batch for single messages: no more batches.
    pub(super) fn is_unable(&mut self) {
        self.unable = true;
    }

    /// The message that was meant is found, or another window begins: batches are allowed again.
    pub(super) fn go_on(&mut self) {
        self.singled_out = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers that come one by one at this pace, with more in flight behind them; whether the server is slow.
    fn watched(method: &mut ActivePublishMethod, now: &mut Instant, answers: u64, each: Duration) -> bool {
        (0..answers).any(|_| {
            *now += each;
            method.watch().is_some_and(|watch| watch.answered(1, 100, *now))
        })
    }

    /// A stream of one server.
    const SINGLE: StreamTakes = StreamTakes { batches: true, at_once: true, replicated: false };

    fn method(wanted: PublishMethod, stream: StreamTakes) -> ActivePublishMethod {
        let mut method = ActivePublishMethod::new(wanted);
        method.suit(stream);
        method
    }

    #[test]
    fn a_slow_server_that_can_gets_batches() {
        let mut method = method(PublishMethod::Auto, SINGLE);
        let mut now = Instant::now();
        assert!(!watched(&mut method, &mut now, 2 * BURST, Duration::from_millis(1)), "two bursts may be a pause");
        assert!(watched(&mut method, &mut now, 2 * BURST, Duration::from_millis(1)));
        assert!(method.batches() && method.watch().is_none());
        method.single_out();
        assert!(!method.batches());
        method.go_on();
        assert!(method.batches());
    }

    #[test]
    fn a_fast_server_is_watched_for_one_burst() {
        let mut method = method(PublishMethod::Auto, SINGLE);
        assert_eq!(method.watch().map(|watch| watch.limit()), Some(BURST as usize));
        assert!(!watched(&mut method, &mut Instant::now(), 10 * BURST, Duration::from_micros(20)));
        assert!(!method.batches() && method.watch().is_none());
    }

    #[test]
    fn events_that_come_seldom_make_no_server_slow() {
        let mut method = method(PublishMethod::Auto, SINGLE);
        let mut now = Instant::now();
        for _ in 0..10 * BURST {
            now += Duration::from_millis(5);
            assert!(!method.watch().is_some_and(|watch| watch.answered(1, 0, now)));
        }
        assert!(!method.batches());
    }

    #[test]
    fn what_is_forced_is_done_and_what_cannot_be_is_not() {
        assert!(method(PublishMethod::Batched, SINGLE).batches());
        assert!(
            !method(PublishMethod::Batched, StreamTakes::default()).batches(),
            "a server that would ignore the batch"
        );
        let cannot = StreamTakes { at_once: false, ..SINGLE };
        for (wanted, stream) in [(PublishMethod::Auto, cannot), (PublishMethod::Chained, SINGLE)] {
            let mut method = method(wanted, stream);
            assert!(method.watch().is_none() && !method.batches() && !method.is_one_at_a_time());
        }
    }

    #[test]
    fn with_replicas_there_is_a_batch_or_a_single_message_in_flight() {
        for batches in [false, true] {
            let replicated = StreamTakes { batches, at_once: false, replicated: true };
            for wanted in [PublishMethod::Auto, PublishMethod::Chained, PublishMethod::Batched] {
                let mut method = method(wanted, replicated);
                let expected = wanted != PublishMethod::Chained && batches;
                assert_eq!((method.batches(), method.watch().is_none()), (expected, true), "{wanted:?}");
                method.single_out();
                assert!(!method.batches() && method.is_one_at_a_time(), "{wanted:?}");
            }
        }
    }

    #[test]
    fn no_batches_after_a_server_took_one_for_single_messages() {
        let mut method = method(PublishMethod::Batched, SINGLE);
        method.is_unable();
        method.go_on();
        assert!(!method.batches());
    }

    #[test]
    fn a_stream_that_changes_is_noticed() {
        let mut method = method(PublishMethod::Auto, SINGLE);
        let replicated = StreamTakes { replicated: true, ..SINGLE };
        assert!(method.suits(SINGLE) && !method.suits(replicated));
        method.suit(replicated);
        assert!(method.suits(replicated) && method.batches());
    }
}
