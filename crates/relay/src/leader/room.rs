//! An event that is larger than the server, or the stream, takes at present.
//!
//! Every event of an outbox fits what nats-server takes by default. So when one does not fit, a setting was changed, and
//! somebody may be about to change it back: the relay waits for that for some time before it parks the event.

use tokio::time::Instant;

use super::{Leader, SLOW};
use crate::chain::Doubt;
use crate::guard::SIZE;
use aftercommit_core::jetstream::topology::{self, LARGEST_MESSAGE};
use aftercommit_core::relay::Mode;

/// What nats-server takes by default.
pub(crate) const DEFAULT_MAX_PAYLOAD: usize = 1 << 20;
/// JetStream's answer to a message that is larger than the stream takes.
const TOO_LARGE: u64 = 10054;

impl Leader<'_> {
    /// Deals with an event that is too large now and would not be by default: waits, and returns whether it is to be tried
    /// again. False for other doubts, and when the limit has been as low for long enough.
    pub(crate) async fn waits_for_room(&mut self, doubt: &Doubt, failures: u32) -> bool {
        let setting = match doubt {
            Doubt::TooLarge { limit, .. } if *limit < DEFAULT_MAX_PAYLOAD => "max_payload of nats-server",
            Doubt::Refused { code: TOO_LARGE, .. } if !self.method.batches() => "max_msg_size of the stream",
            _ => return false,
        };
        self.tail.forget();
        self.publisher.restart();
        if let Doubt::Refused { .. } = doubt
            && !self.is_stream_s_limit_low().await
        {
            self.limit_since = None;
            // It fits now; should it be refused all the same, it is not the limit.
            return failures <= 2;
        }
        let since = *self.limit_since.get_or_insert_with(Instant::now);
        let park_after = self.config.park_after;
        if since.elapsed() >= park_after {
            return false;
        }
        let (event_id, outbox_id) = doubt.event().map(|event| (event.event_id, event.outbox_id)).unzip();
        let remedy = format!("raise {setting} to {LARGEST_MESSAGE} bytes or more");
        self.progress.state(format!("waiting: an event is {doubt}; {remedy}; it is parked after {park_after:?}"));
        if failures == 1 {
            let event_id = event_id.map(tracing::field::display);
            tracing::error!(event_id, outbox_id, error = %doubt, remedy, ?park_after, "an event is too large at present");
        }
        self.signals.rest(SLOW.after(failures).min(park_after)).await;
        true
    }

    /// Whether the stream takes less than the largest event of an outbox, as far as that can be read.
    async fn is_stream_s_limit_low(&self) -> bool {
        let Ok(described) = self.stream.described().await else { return true };
        let findings = topology::findings(&described.config, &self.naming, self.config.mode == Mode::Shared);
        findings.problems.iter().any(|problem| problem.setting == SIZE)
    }
}
