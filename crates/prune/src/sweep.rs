//! A sweep: batch after batch of one category, until nothing old is left or the budget is spent.

use std::time::{Duration, Instant};

use aftercommit_core::error::Error;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::sweep::{self, SweepResult};
use aftercommit_core::postgres::{database_error, lease};
use tokio_util::sync::CancellationToken;

use crate::error::{PruneError, PruneErrorKind, is_outage};

/// How long a lease of a category lasts; it is renewed between batches.
const LEASE: Duration = Duration::from_secs(60);
/// Batches in a row that remove nothing until a sweep ends: what lies behind is younger still.
const FRUITLESS: u32 = 10;

/// How fast a sweep goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Rows of the table in one transaction. Defaults to 500.
    pub batch: u32,
    /// Rows that one sweep removes until it leaves the rest to the next. Defaults to 1,000,000.
    pub budget: u64,
    /// How many times as long as a batch took the sweep rests after it, so that others get their turn. Defaults to 4.
    pub rest: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { batch: 500, budget: 1_000_000, rest: 4.0 }
    }
}

/// What a batch came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// How many rows of the category it removed.
    pub removed: u64,
    /// Whether there may be more that is old.
    pub more: bool,
    /// Whether it removed nothing on the way to something, so that it does not count as fruitless.
    pub went_on: bool,
}

impl Batch {
    /// It removed so many rows.
    pub fn of(removed: u64, more: bool) -> Self {
        Self { removed, more, went_on: false }
    }

    /// The same of a statement that removes up to `limit`: there may be more when it removed as many.
    pub fn up_to(limit: u32, removed: u64) -> Self {
        Self::of(removed, removed == u64::from(limit))
    }

    /// It removed nothing, on the way to something.
    pub fn on_the_way() -> Self {
        Self { removed: 0, more: true, went_on: true }
    }
}

/// Why a batch failed.
#[derive(Debug)]
pub enum BatchError {
    /// A statement of ours failed.
    Database(sqlx::Error),
    /// A pruning failed.
    Prune(PruneError),
}

impl From<sqlx::Error> for BatchError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<PruneError> for BatchError {
    fn from(error: PruneError) -> Self {
        Self::Prune(error)
    }
}

/// What is swept by itself, with a row of its own in `aftercommit prune status`.
pub trait Category: Send {
    /// Its name, such as `outbox`.
    fn name(&self) -> &str;

    /// How long its rows are kept; none when it is not by age.
    fn period(&self) -> Option<Duration>;

    /// Whether several processes may sweep it, of which one does at a time. Defaults to false: who sweeps it is alone already.
    fn shared(&self) -> bool {
        false
    }

    /// Whether its batches count what they removed in their own transactions. Defaults to false: the end of the sweep counts.
    fn counts(&self) -> bool {
        false
    }

    /// Goes on at this place, which the last sweep left; none begins at the start.
    fn begin(&mut self, _place: Option<String>) {}

    /// Removes up to `limit` rows.
    fn batch(
        &mut self,
        connections: &Connections,
        limit: u32,
    ) -> impl Future<Output = Result<Batch, BatchError>> + Send;
}

/// What a sweep came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// The category.
    pub category: String,
    /// Rows that it removed.
    pub removed: u64,
    /// How it ended; none when another process sweeps the category.
    pub result: Option<SweepResult>,
    /// Why it failed.
    pub error: Option<String>,
}

/// One process that sweeps.
#[derive(Debug)]
pub struct Sweeper<'a> {
    /// Where its sessions come from.
    pub connections: &'a Connections,
    /// Its name in leases and on record, such as [`lease::new_holder`] makes it.
    pub holder: &'a str,
    /// How fast it goes.
    pub pace: Pace,
}

impl Sweeper<'_> {
    /// Sweeps a category until nothing old is left, the budget is spent, or `stop` ends it after its batch.
    ///
    /// # Errors
    /// When the database cannot be asked. That a batch failed is in the result and on record.
    pub async fn sweep<C: Category>(&self, category: &mut C, stop: &CancellationToken) -> Result<Swept, Error> {
        let name = category.name().to_string();
        let failed = |error| database_error(format!("sweeping {name} failed"), error);
        let mut tenure = None;
        if category.shared() {
            tenure = self.lease(&name).await.map_err(failed)?;
            if tenure.is_none() {
                return Ok(Swept { category: name, removed: 0, result: None, error: None });
            }
        }
        let (by, period) = (self.holder, category.period());
        let place = self.connections.run(async |session| sweep::begin(session, &name, by, period).await);
        category.begin(place.await.map_err(failed)?);
        let mut removed = 0;
        let (result, error) = self.batches(category, tenure.as_ref(), stop, &mut removed).await;
        let uncounted = if category.counts() { 0 } else { removed };
        let told = error.as_deref();
        let ended = self.connections.run(async |session: &mut Session| {
            sweep::end(session, &name, uncounted, result, told).await?;
            match &tenure {
                Some(tenure) => tenure.release(session).await,
                None => Ok(()),
            }
        });
        ended.await.map_err(failed)?;
        record(&name, removed, result, told);
        Ok(Swept { category: name, removed, result: Some(result), error })
    }

    async fn lease(&self, category: &str) -> Result<Option<lease::Tenure>, sqlx::Error> {
        let name = format!("prune:{category}");
        self.connections.run(async |session| lease::acquire(session, &name, self.holder, LEASE).await).await
    }

    async fn batches<C: Category>(
        &self,
        category: &mut C,
        tenure: Option<&lease::Tenure>,
        stop: &CancellationToken,
        removed: &mut u64,
    ) -> (SweepResult, Option<String>) {
        let mut fruitless = 0;
        loop {
            let left = self.pace.budget.saturating_sub(*removed);
            if left == 0 {
                return (SweepResult::Budget, None);
            }
            let (started, limit) = (Instant::now(), self.pace.batch.min(left.try_into().unwrap_or(u32::MAX)));
            let batch = match category.batch(self.connections, limit).await {
                Ok(batch) => batch,
                Err(error) => return ended_by(error),
            };
            *removed += batch.removed;
            fruitless = if batch.removed == 0 && !batch.went_on { fruitless + 1 } else { 0 };
            if !batch.more || fruitless == FRUITLESS {
                return (SweepResult::Done, None);
            }
            tokio::select! {
                () = stop.cancelled() => return (SweepResult::Stopped, None),
                () = tokio::time::sleep(started.elapsed().mul_f64(self.pace.rest)) => {}
            }
            if let Some(tenure) = tenure {
                let kept = self.connections.run(async |session| tenure.renew(session, LEASE).await);
                match kept.await {
                    Ok(true) => {}
                    Ok(false) => return (SweepResult::Busy, Some("another process took over".into())),
                    Err(error) => return ended_by(error.into()),
                }
            }
        }
    }
}

fn ended_by(error: BatchError) -> (SweepResult, Option<String>) {
    match error {
        BatchError::Prune(error) => {
            let busy = error.kind() == PruneErrorKind::Busy;
            let result = if busy { SweepResult::Busy } else { SweepResult::Failed };
            (result, Some(Error::from(error).report()))
        }
        BatchError::Database(error) => (SweepResult::Failed, Some(database_error("a batch failed", error).report())),
    }
}

/// Tells of a sweep that removed something or failed.
fn record(category: &str, removed: u64, result: SweepResult, error: Option<&str>) {
    aftercommit_core::telemetry::swept(category, removed, result.name());
    match error {
        Some(error) => tracing::warn!(category, removed, result = result.name(), error, "the sweep ended early"),
        None if removed > 0 => tracing::info!(category, removed, result = result.name(), "pruned"),
        None => {}
    }
}

/// Runs one batch in a transaction of a session whose names are looked up as the role's own.
pub(crate) async fn in_users_session<T>(
    connections: &Connections,
    work: impl AsyncFnOnce(&mut Session) -> Result<T, BatchError>,
) -> Result<T, BatchError> {
    let mut failed = None;
    let done = connections.run_for_others(async |session| match work(session).await {
        Ok(done) => Ok(Some(done)),
        Err(BatchError::Database(error)) => Err(error),
        // The session of an outage is not given back.
        Err(BatchError::Prune(error)) if is_outage(&error) => {
            failed = Some(error);
            Err(sqlx::Error::PoolClosed)
        }
        Err(BatchError::Prune(error)) => {
            failed = Some(error);
            Ok(None)
        }
    });
    match (done.await, failed) {
        (_, Some(error)) => Err(error.into()),
        (Ok(Some(done)), None) => Ok(done),
        (Ok(None), None) => Err(sqlx::Error::PoolClosed.into()),
        (Err(error), None) => Err(error.into()),
    }
}
