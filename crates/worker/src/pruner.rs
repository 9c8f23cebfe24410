//! Removes inbox rows that no message can need any more, while the worker works.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aftercommit_core::error::Error;
use aftercommit_core::jetstream::stored::Source;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::{self, failure, prune};

use super::subscriber::Subscriber;

/// How often to look, unless the retention is shorter.
const INTERVAL: Duration = Duration::from_mins(1);
/// Rows that are removed at a time.
const BATCH: u32 = 1000;
/// How long errors of failed attempts are kept at most.
const KEPT_FAILURES: Duration = Duration::from_hours(7 * 24);
/// Batches of which nothing is old enough until the pruner stops: rows lie in the order of the stream, and those behind are
/// younger still, but for some that ran late.
const FRUITLESS: u32 = 10;
/// How many times as long as a batch took the pruner rests after it.
const REST: u32 = 10;

/// Prunes the inbox of a subscriber.
pub(super) struct Pruner {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) source: Source,
}

impl Pruner {
    /// Prunes until it is dropped.
    pub(super) async fn run(self) {
        let name = &self.subscriber.name;
        let mut ticks =
            tokio::time::interval(self.subscriber.settings.inbox_retention.clamp(Duration::from_secs(1), INTERVAL));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.prune_failures().await {
                tracing::debug!(subscriber = name, error = error.report(), "pruning the failed attempts failed");
            }
            match self.prune().await {
                Ok(0) => {}
                Ok(rows) => tracing::info!(subscriber = name, rows, "pruned the inbox"),
                // When a server is away, others say so.
                Err(error) => tracing::debug!(subscriber = name, error = error.report(), "pruning failed"),
            }
        }
    }

    /// A batch at a time: errors come much more rarely than events.
    async fn prune_failures(&self) -> Result<u64, Error> {
        let age = self.subscriber.settings.inbox_retention.min(KEPT_FAILURES);
        let name = &self.subscriber.name;
        let pruned =
            self.connections.run(async |connection| failure::prune(connection, name, age, BATCH.into()).await).await;
        pruned.map_err(|error| postgres::database_error("pruning the failed attempts failed", error))
    }

    async fn prune(&self) -> Result<u64, Error> {
        // What the stream drops from now on is for the next time.
        let oldest = self.source.oldest().await?;
        let Subscriber { name, settings, .. } = &*self.subscriber;
        let (mut rows, mut after, mut fruitless) = (0, -1, 0);
        loop {
            let started = Instant::now();
            let batch = self
                .connections
                .run(async |connection| {
                    prune::inbox(connection, name, settings.inbox_retention, oldest, after, BATCH.into()).await
                })
                .await
                .map_err(|error| postgres::database_error("pruning the inbox failed", error))?;
            rows += batch.removed;
            after = batch.next;
            fruitless = if batch.removed == 0 { fruitless + 1 } else { 0 };
            if !batch.more || fruitless == FRUITLESS {
                return Ok(rows);
            }
            tokio::time::sleep(started.elapsed() * REST).await;
        }
    }
}
