//! What a leading relay removes: events that are settled and old, and what was known of them.

use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::prune;
use aftercommit_core::postgres::relay_log;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::walk::Walk;

use crate::sweep::{Batch, BatchError, Category};

/// States of the relay's log that are kept in any case.
const LOG_STATES: i64 = 10_000;

/// Events that were written before the retention, and are settled. It remembers how far it got, so that it reads neither
/// what is retained nor what it has removed and the server cannot clean up yet.
#[derive(Debug)]
pub struct Outbox {
    retention: Duration,
    /// The last sweep got here, with what was settled then.
    last: Option<(Mark, i64)>,
    /// This one: what is settled, and where it goes on.
    now: Option<(Mark, i64)>,
}

impl Outbox {
    /// Keeps events for `retention`.
    pub fn new(retention: Duration) -> Self {
        Self { retention, last: None, now: None }
    }

    /// Where to begin: where the last sweep ended, or before the first row that was not settled then and lies there.
    async fn start(&self, session: &mut Session) -> Result<(Mark, i64), sqlx::Error> {
        let settled = relay_log::newest(session).await?.settled;
        let Some((mark, after)) = &self.last else { return Ok((settled, 0)) };
        let came = Walk::<i64>::new(mark.clone(), settled.clone(), 0).next(session, 1).await?;
        let after = came.first().map_or(*after, |id| (*after).min(id - 1));
        Ok((settled, after))
    }
}

impl Category for Outbox {
    fn name(&self) -> &str {
        "outbox"
    }

    fn period(&self) -> Option<Duration> {
        Some(self.retention)
    }

    fn begin(&mut self, _: Option<String>) {
        self.now = None;
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let (settled, after) = match self.now.take() {
            Some(now) => now,
            None => connections.run(async |session| self.start(session).await).await?,
        };
        let retention = self.retention;
        let batch = connections
            .run(async |session| prune::outbox(session, &settled, retention, after, limit.into()).await)
            .await?;
        fault::point("relay-pruned");
        self.last = Some((settled.clone(), batch.next));
        self.now = Some((settled, batch.next));
        Ok(Batch::of(batch.removed, batch.more))
    }
}

/// What was done with events, and is done: parked events that were published or discarded, and repairs of the stream that were
/// published, before the retention.
#[derive(Debug)]
pub struct DealtWith {
    retention: Duration,
    repairs: bool,
}

impl DealtWith {
    /// Parked events.
    pub fn parked(retention: Duration) -> Self {
        Self { retention, repairs: false }
    }

    /// Repairs.
    pub fn repairs(retention: Duration) -> Self {
        Self { retention, repairs: true }
    }
}

impl Category for DealtWith {
    fn name(&self) -> &str {
        if self.repairs { "repairs" } else { "parked" }
    }

    fn period(&self) -> Option<Duration> {
        Some(self.retention)
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let (retention, most) = (self.retention, i64::from(limit));
        let removed = connections
            .run(async |session| {
                let settled = relay_log::newest(session).await?.settled;
                match self.repairs {
                    true => prune::repairs(session, &settled, retention, most).await,
                    false => prune::parked(session, &settled, retention, most).await,
                }
            })
            .await?;
        Ok(Batch::up_to(limit, removed))
    }
}

/// States of the relay's log, to which the relay can go back when the stream has lost its end: the last 10,000 stay, of those before
/// them one for each minute, and none that is older than the retention.
#[derive(Debug)]
pub struct RelayLog {
    retention: Duration,
    /// Up to this state the log is thinned out.
    thinned: i64,
}

impl RelayLog {
    /// Keeps states for `retention`.
    pub fn new(retention: Duration) -> Self {
        Self { retention, thinned: 0 }
    }
}

impl Category for RelayLog {
    fn name(&self) -> &str {
        "relay-log"
    }

    fn period(&self) -> Option<Duration> {
        Some(self.retention)
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let (thinned, retention) = (self.thinned, self.retention);
        let (up_to, thin, short) = connections
            .run(async |session| {
                let up_to = relay_log::newest(session).await?.seq - LOG_STATES;
                let thin = match up_to > thinned {
                    true => prune::thin_log(session, thinned, up_to).await?,
                    false => 0,
                };
                let short = prune::shorten_log(session, up_to, retention, limit.into()).await?;
                Ok((up_to, thin, short))
            })
            .await?;
        self.thinned = thinned.max(up_to);
        Ok(Batch::of(thin + short, short == u64::from(limit)))
    }
}
