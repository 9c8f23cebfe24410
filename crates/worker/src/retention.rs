//! Removes inbox rows that no message can need any more, while the worker works.

use std::sync::Arc;
use std::time::Duration;

use aftercommit_core::error::Error;
use aftercommit_core::jetstream::stored::Source;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_prune::own::{FailedAttempts, Inbox};
use aftercommit_prune::sweep::{Pace, Sweeper};
use tokio_util::sync::CancellationToken;

use super::subscriber::Subscriber;

/// How often to look, unless the retention is shorter.
const INTERVAL: Duration = Duration::from_mins(1);
/// Rows that are removed at a time, and a rest of ten times as long as that took, for the handlers.
const PACE: Pace = Pace { batch: 1000, budget: u64::MAX, rest: 10.0 };

/// Sweeps what a subscriber no longer needs.
pub(super) struct Retention {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) source: Source,
    /// Who holds the subscriber's lease.
    pub(super) holder: String,
}

impl Retention {
    /// Sweeps until it is dropped.
    pub(super) async fn run(self) {
        let (name, retention) = (&self.subscriber.name, self.subscriber.settings.inbox_retention);
        let mut inbox = Inbox::new(name, retention);
        let mut failures = FailedAttempts::new(name, retention);
        let mut ticks = tokio::time::interval(retention.clamp(Duration::from_secs(1), INTERVAL));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.sweep(&mut inbox, &mut failures).await {
                // When a server is away, others say so.
                tracing::debug!(subscriber = name, error = error.report(), "pruning failed");
            }
        }
    }

    async fn sweep(&self, inbox: &mut Inbox, failures: &mut FailedAttempts) -> Result<(), Error> {
        let sweeper = Sweeper { connections: &self.connections, holder: &self.holder, pace: PACE };
        let stop = CancellationToken::new();
        sweeper.sweep(failures, &stop).await?;
        // What the stream drops from now on is for the next time.
        inbox.oldest = self.source.oldest().await?;
        sweeper.sweep(inbox, &stop).await.map(drop)
    }
}
