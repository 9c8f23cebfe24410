//! Users' reconcilers: derived state, item by item.

use std::error::Error as StdError;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgTransaction;
use tokio::time::timeout;

use super::job::{Done, FAILED, Job, Pace, Run, Schedule};
use super::{Failure, Mode, Scope};
use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, causes, panic_text};
use crate::fault;
use crate::postgres::finding::{NewFinding, State};
use crate::postgres::session::{Session, Tx};
use crate::postgres::{self, handling, inbox};

/// Why a page or an item failed. Takes any error by `?`.
pub type ItemError = Box<dyn StdError + Send + Sync>;

/// The kind of the finding about an item that a run in report mode would have repaired.
const DRIFT: &str = "drift";
/// How often an item is tried again that PostgreSQL undid because of others beside it.
const CONFLICTS: u32 = 5;
const CONFLICT: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(100) };
/// How much longer than its limit an item may take until the connection is given up.
const GRACE: Duration = Duration::from_secs(5);

/// Brings derived state into line with what it is derived from, one item after the other, each in a transaction of its
/// own.
///
/// It should share the function that does that with the event handler which keeps the state up to date: events make it
/// fast, the reconciler makes it sure. An item may be reconciled at the same time as an event is handled, so that
/// function should lock the item's row first. See [`super::Runner`] for an example.
pub trait Reconciler: Send + Sync + 'static {
    /// Its name: 1 to 64 letters, digits, `_` and `-`; not `outbox`. The schedule and the position hang on it.
    fn name(&self) -> &str;

    /// From the end of a run that succeeded to the next.
    fn interval(&self) -> Duration;

    /// The keys of the next items in an order that does not change, at most `limit`: those behind the item `after`, or
    /// the first ones. None end the sweep. Include items that should not have derived state any more, but have it.
    ///
    /// # Errors
    /// Any error makes the run fail. The next one goes on with the same page.
    fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> impl Future<Output = Result<Vec<String>, ItemError>> + Send;

    /// Reconciles one item. An item that is gone is no error: [`Drift::None`].
    ///
    /// What it writes through the transaction is committed when it returns, and undone when it fails or when the run
    /// only reports; so all effects belong into the transaction.
    ///
    /// # Errors
    /// Any error makes this item fail, and the run goes on with the next. A lost connection has it run once more; while the
    /// database does not answer the run fails instead.
    fn reconcile(&self, tx: &mut PgTransaction<'_>, key: &str)
    -> impl Future<Output = Result<Drift, ItemError>> + Send;

    /// How many items make a page, after which the position is saved. Defaults to 100.
    fn page_size(&self) -> i64 {
        100
    }

    /// How long one item or page may take. Defaults to 60 seconds.
    fn time_limit(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// How many items are reconciled per second at most. Defaults to no limit.
    fn per_second(&self) -> Option<f64> {
        None
    }
}

/// What was wrong with an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    /// Nothing.
    None,
    /// So many differences, such as rows; they are put right now.
    Repaired(u64),
}

impl Drift {
    /// So many differences, or none.
    pub fn of(differences: u64) -> Self {
        if differences == 0 { Self::None } else { Self::Repaired(differences) }
    }

    fn differences(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Repaired(differences) => differences,
        }
    }
}

/// What is wrong with a reconciler's definition.
pub(super) fn problem(reconciler: &impl Reconciler) -> Option<String> {
    let name = reconciler.name();
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if !(1..=64).contains(&name.len()) || !name.chars().all(legal) {
        return Some(format!(
            "{name:?} cannot be the name of a reconciler: 1 to 64 letters, digits, _ and - are needed"
        ));
    }
    if name == "outbox" {
        return Some("the reconciler of the outbox is called outbox already: choose another name".into());
    }
    if reconciler.interval().is_zero() || reconciler.time_limit().is_zero() || reconciler.page_size() < 1 {
        return Some(format!("reconciler {name}: interval, time limit and page size must be more than zero"));
    }
    if reconciler.per_second().is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
        return Some(format!("reconciler {name}: the number of items per second must be more than zero"));
    }
    None
}

/// How far a sweep over all items has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Sweep {
    /// The run with which it began.
    since: i64,
    /// The last item that is done.
    after: Option<String>,
}

/// Why an item was not done.
#[derive(Debug)]
enum Trouble {
    /// The item's fault.
    Failed(String),
    /// PostgreSQL undid it because of others; the same again may well succeed.
    Conflict(String),
    /// Its session ended, or an outage would look like that.
    Lost(String),
    /// The database is away: no item's fault.
    Outage(String),
}

/// A [`Reconciler`] as the runner sees it.
pub(super) struct ItemJob<R> {
    reconciler: R,
}

impl<R: Reconciler> ItemJob<R> {
    pub(super) fn new(reconciler: R) -> Self {
        Self { reconciler }
    }

    async fn all(&self, run: &mut Run) -> Result<Done, Error> {
        let mut sweep = match run.position() {
            Some(sweep) if run.scope == Scope::New => sweep,
            _ => Sweep { since: run.id, after: None },
        };
        let mut pace = self.reconciler.per_second().map(Pace::new);
        loop {
            let keys = self.next_page(run, sweep.after.as_deref()).await?;
            let Some(last) = keys.last().cloned() else { break };
            if sweep.after.as_ref() == Some(&last) {
                let problem = format!("the page behind item {last} ends with that item again");
                return Err(Error::new(ErrorKind::Integrity, problem));
            }
            self.items(run, &keys, pace.as_mut()).await?;
            sweep.after = Some(last);
            fault::point("reconciler-page");
            if run.mode == Mode::Repair {
                run.save_position(&sweep).await?;
                fault::point("reconciler-saved");
            }
        }
        // The next sweep begins at the beginning.
        let position = (run.mode == Mode::Repair).then(|| Value::Object(serde_json::Map::new()));
        Ok(Done { swept_since: Some(sweep.since), position, ..Done::default() })
    }

    /// Reconciles these items, and writes down what the run found.
    async fn items(&self, run: &mut Run, keys: &[String], mut pace: Option<&mut Pace>) -> Result<(), Error> {
        let (mut fine, mut findings, mut failures) = (Vec::new(), Vec::new(), Vec::new());
        for key in keys {
            if let Some(pace) = pace.as_mut() {
                pace.take(1).await;
            }
            run.scanned(1);
            match self.item(run, key).await {
                Ok(0) => fine.push(key.clone()),
                Ok(drift) if run.mode == Mode::Report => {
                    let detail = format!("{drift} differences");
                    findings.push(NewFinding { kind: DRIFT, item: key.clone(), detail, ..NewFinding::default() });
                }
                Ok(drift) => {
                    run.differences(drift);
                    run.repaired(drift);
                    fine.push(key.clone());
                }
                Err(Trouble::Outage(reason) | Trouble::Lost(reason)) => {
                    return Err(Error::new(ErrorKind::Database, reason));
                }
                Err(Trouble::Failed(reason) | Trouble::Conflict(reason)) => {
                    failures.push(Failure { item: key.clone(), reason });
                }
            }
        }
        run.failed(failures).await?;
        run.found(&findings).await?;
        run.settle(FAILED, &fine, State::Gone).await?;
        let settled = if run.mode == Mode::Repair { State::Repaired } else { State::Gone };
        run.settle(DRIFT, &fine, settled).await.map(drop)
    }

    async fn next_page(&self, run: &Run, after: Option<&str>) -> Result<Vec<String>, Error> {
        let limit = self.reconciler.page_size();
        let page = self.transact(run, true, async |tx| self.reconciler.page(tx, after, limit).await).await;
        let mut keys = page.map_err(|trouble| match trouble {
            Trouble::Failed(reason) | Trouble::Conflict(reason) | Trouble::Lost(reason) | Trouble::Outage(reason) => {
                Error::new(ErrorKind::Database, format!("the next page of items cannot be read: {reason}"))
            }
        })?;
        keys.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(keys)
    }

    async fn item(&self, run: &Run, key: &str) -> Result<u64, Trouble> {
        let (mut tries, mut lost) = (0, false);
        loop {
            let undo = run.mode == Mode::Report;
            let result = self.transact(run, undo, async |tx| self.reconciler.reconcile(tx, key).await).await;
            match result {
                Err(Trouble::Conflict(_)) if tries < CONFLICTS => {
                    tries += 1;
                    tokio::time::sleep(CONFLICT.after(tries)).await;
                }
                // While the database answers it is no outage; when the item does it again, it is its doing.
                Err(Trouble::Lost(reason)) if self.answers(run).await => {
                    if lost {
                        return Err(Trouble::Failed(format!("its database session was lost twice: {reason}")));
                    }
                    lost = true;
                }
                result => return result.map(Drift::differences),
            }
        }
    }

    /// Runs the user's code in a transaction that is undone when it fails, or when it shall be.
    async fn transact<T>(
        &self,
        run: &Run,
        undo: bool,
        work: impl AsyncFnOnce(&mut PgTransaction<'_>) -> Result<T, ItemError>,
    ) -> Result<T, Trouble> {
        let mut session = self.own(run.connections.take_for_others()).await?;
        let result = self.transact_on(&mut session, undo, work).await;
        if result.is_ok() && self.own(handling::reset(&mut session)).await.is_err() {
            drop(session);
            return result;
        }
        match &result {
            Err(Trouble::Outage(_) | Trouble::Lost(_)) => run.connections.forget_idle(),
            // Whether its session is in order is known only of an item that was done.
            Err(_) => {}
            Ok(_) => run.connections.give_back(session),
        }
        result
    }

    /// Whether the database takes a statement over a new connection.
    async fn answers(&self, run: &Run) -> bool {
        run.connections.forget_idle();
        self.own(run.connections.run(async |session| inbox::answers(session).await)).await.is_ok()
    }

    async fn transact_on<T>(
        &self,
        session: &mut Session,
        undo: bool,
        work: impl AsyncFnOnce(&mut PgTransaction<'_>) -> Result<T, ItemError>,
    ) -> Result<T, Trouble> {
        let limit = self.reconciler.time_limit();
        let mut tx = self.own(inbox::begin(session, limit)).await?;
        let run = AssertUnwindSafe(work(tx.for_others())).catch_unwind();
        let (result, gave_up) = match timeout(limit, run).await {
            Ok(Ok(result)) => (result.map_err(|error| sort(&*error)), false),
            Ok(Err(panic)) => (Err(Trouble::Failed(format!("it panicked: {}", panic_text(&*panic)))), false),
            Err(_) => (Err(Trouble::Failed(format!("it ran longer than its time limit of {limit:?}"))), true),
        };
        match result {
            Ok(value) if undo => self.own(tx.rollback()).await.map(|()| value),
            Ok(value) => {
                fault::point("reconciler-item");
                self.commit(tx).await?;
                fault::point("reconciler-committed");
                Ok(value)
            }
            // Waits for a statement that still runs. When even that fails the session is gone, whatever the user's code made
            // of it; behind an item that was given up that is no wonder.
            Err(trouble) => match self.own(tx.rollback()).await {
                Err(lost) if !gave_up => Err(lost),
                _ => Err(trouble),
            },
        }
    }

    async fn commit(&self, mut tx: Tx<'_>) -> Result<(), Trouble> {
        // Code that drops the error of a statement would otherwise turn COMMIT into a ROLLBACK that says nothing.
        self.own(inbox::check_alive(&mut tx)).await?;
        self.own(tx.commit()).await
    }

    /// A statement of our own.
    async fn own<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Trouble> {
        match timeout(self.reconciler.time_limit() + GRACE, statement).await {
            Ok(result) => result.map_err(|error| sort(&error)),
            Err(_) => Err(Trouble::Lost("PostgreSQL does not answer".into())),
        }
    }
}

impl<R: Reconciler> Job for ItemJob<R> {
    fn name(&self) -> &str {
        self.reconciler.name()
    }

    fn schedule(&self) -> Schedule {
        let interval = self.reconciler.interval();
        Schedule { interval, full_every: None, mode: Mode::Repair, retry: Backoff::default() }
    }

    fn run<'a>(&'a self, run: &'a mut Run) -> BoxFuture<'a, Result<Done, Error>> {
        Box::pin(async move {
            match run.scope.clone() {
                Scope::Keys(keys) => self.items(run, &keys, None).await.map(|()| Done::default()),
                Scope::New | Scope::Full => self.all(run).await,
            }
        })
    }
}

/// Is it the item's fault, or the world's around it?
fn sort(error: &(dyn StdError + 'static)) -> Trouble {
    match causes(error).find_map(|cause| cause.downcast_ref()) {
        Some(cause) if postgres::ends_session(cause) || postgres::is_doubtful(cause) => {
            Trouble::Lost(postgres::describe(error))
        }
        Some(cause) if postgres::is_outage(cause) => Trouble::Outage(postgres::describe(error)),
        Some(cause) if postgres::is_conflict(cause) => Trouble::Conflict(postgres::describe(error)),
        _ => Trouble::Failed(postgres::describe(error)),
    }
}
