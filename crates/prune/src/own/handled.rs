//! What the active worker of a subscriber removes.

use std::time::Duration;

use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::{failure, prune};
use chrono::{DateTime, Utc};

use crate::sweep::{Batch, BatchError, Category};

/// How long errors of failed attempts are kept at most.
const KEPT_FAILURES: Duration = Duration::from_hours(7 * 24);

/// Inbox rows of a subscriber that are older than the retention and that no message can meet any more.
#[derive(Debug)]
pub struct Inbox {
    name: String,
    subscriber: String,
    retention: Duration,
    /// The sequence and the time of the first message that the stream still has; none when it is empty.
    pub oldest: Option<(i64, DateTime<Utc>)>,
    after: i64,
}

impl Inbox {
    /// Keeps rows for `retention`.
    pub fn new(subscriber: &str, retention: Duration) -> Self {
        let name = format!("inbox:{subscriber}");
        Self { name, subscriber: subscriber.into(), retention, oldest: None, after: -1 }
    }
}

impl Category for Inbox {
    fn name(&self) -> &str {
        &self.name
    }

    fn period(&self) -> Option<Duration> {
        Some(self.retention)
    }

    fn begin(&mut self, _: Option<String>) {
        self.after = -1;
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let Self { subscriber, retention, oldest, after, .. } = &*self;
        let batch = connections
            .run(async |session| prune::inbox(session, subscriber, *retention, *oldest, *after, limit.into()).await)
            .await?;
        self.after = batch.next;
        Ok(Batch::of(batch.removed, batch.more))
    }
}

/// Errors of failed attempts of a subscriber: kept as long as its inbox, a week at most.
#[derive(Debug)]
pub struct FailedAttempts {
    name: String,
    subscriber: String,
    age: Duration,
}

impl FailedAttempts {
    /// Of a subscriber whose inbox keeps rows for `retention`.
    pub fn new(subscriber: &str, retention: Duration) -> Self {
        let name = format!("failures:{subscriber}");
        Self { name, subscriber: subscriber.into(), age: retention.min(KEPT_FAILURES) }
    }
}

impl Category for FailedAttempts {
    fn name(&self) -> &str {
        &self.name
    }

    fn period(&self) -> Option<Duration> {
        Some(self.age)
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let Self { subscriber, age, .. } = &*self;
        let removed =
            connections.run(async |session| failure::prune(session, subscriber, *age, limit.into()).await).await?;
        Ok(Batch::up_to(limit, removed))
    }
}
