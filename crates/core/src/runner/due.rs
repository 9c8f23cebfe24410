//! Runs reconcilers when they are due.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::execute::{Executor, Order};
use super::item::{ItemJob, Reconciler};
use super::job::Job;
use super::monitor::{Monitor, Sample, Watched, sample};
use super::{Mode, Scope, Summary};
use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind};
use crate::postgres;
use crate::postgres::connections::Connections;
use crate::postgres::{lease, reconcile};

/// The longest rest between two looks whether a run is due. Another process may have run it, or an operator may have
/// changed something.
const LOOK: Duration = Duration::from_secs(5);
/// The shortest.
const SHORT_LOOK: Duration = Duration::from_millis(50);
/// Reconcilers of one process that run at the same time: each has up to three connections.
const TURNS: usize = 16;

/// Runs reconcilers, each once per interval however many processes do the same.
///
/// ```no_run
/// use std::time::Duration;
/// use aftercommit::config::PostgresConfig;
/// use aftercommit::reconciler::{Drift, ItemError, Mode, Reconciler, Runner, Scope};
/// use sqlx::PgTransaction;
/// use tokio_util::sync::CancellationToken;
///
/// /// Keeps `account.balance` equal to the sum of the account's bookings.
/// struct Balances;
///
/// impl Reconciler for Balances {
///     fn name(&self) -> &str {
///         "balances"
///     }
///
///     fn interval(&self) -> Duration {
///         Duration::from_secs(900)
///     }
///
///     async fn page(
///         &self,
///         tx: &mut PgTransaction<'_>,
///         after: Option<&str>,
///         limit: i64,
///     ) -> Result<Vec<String>, ItemError> {
///         let sql = "select name from account where $1 is null or name > $1 order by name limit $2";
///         Ok(sqlx::query_scalar(sql).bind(after).bind(limit).fetch_all(&mut **tx).await?)
///     }
///
///     async fn reconcile(&self, tx: &mut PgTransaction<'_>, name: &str) -> Result<Drift, ItemError> {
///         let changed = sqlx::query(
///             "update account set balance = b.sum
///                from (select coalesce(sum(amount), 0) as sum from booking where account = $1) b
///               where name = $1 and balance is distinct from b.sum",
///         );
///         let changed = changed.bind(name).execute(&mut **tx).await?.rows_affected();
///         Ok(Drift::of(changed))
///     }
/// }
///
/// # async fn example(postgres: PostgresConfig, shutdown: CancellationToken) -> Result<(), aftercommit::Error> {
/// let runner = Runner::new(postgres).reconciler(Balances);
/// // One account, now:
/// let summary = runner.run_now("balances", Scope::Keys(vec!["alice".into()]), Mode::Repair).await?;
/// println!("{summary}");
/// // All of them, every 15 minutes, in one process at a time:
/// runner.run(shutdown).await
/// # }
/// ```
pub struct Runner {
    postgres: PostgresConfig,
    jobs: Vec<Definition>,
    samples: watch::Sender<Option<Sample>>,
}

impl Runner {
    /// A runner without reconcilers. `postgres` is the database in which they work, and in which their runs and findings
    /// are recorded.
    pub fn new(postgres: PostgresConfig) -> Self {
        Self { postgres, jobs: Vec::new(), samples: watch::Sender::new(None) }
    }

    /// Adds a reconciler.
    #[must_use]
    pub fn reconciler(self, reconciler: impl Reconciler) -> Self {
        self.defined(Definition::of(reconciler))
    }

    /// Adds a comparison: of an outbox with its stream, or of a subscriber's inbox with its stream or with the outbox.
    #[must_use]
    pub fn comparison(self, comparison: impl Into<Definition>) -> Self {
        self.defined(comparison.into())
    }

    /// Adds what is defined already.
    #[must_use]
    pub fn defined(mut self, definition: Definition) -> Self {
        self.jobs.push(definition);
        self
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Tells how the reconcilers are doing while the runner runs.
    pub fn monitor(&self) -> Monitor {
        Monitor::new(self.watched(), self.samples.subscribe())
    }

    fn watched(&self) -> Vec<Watched> {
        let watched = |job: &Definition| Watched { name: job.name().into(), interval: job.job.schedule().interval };
        self.jobs.iter().map(watched).collect()
    }

    /// Runs the reconcilers until `shutdown` is cancelled. A run that is under way is then broken off: the item it is at
    /// is undone, and the next run, here or elsewhere, goes on where it was.
    ///
    /// While the database is away or the schema is missing it waits, with an error in the log.
    ///
    /// # Errors
    /// When a name or a setting is wrong.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let executor = self.executor()?;
        let mut tasks = JoinSet::new();
        let watched = self.watched();
        tasks.spawn(sample(Arc::clone(&executor.connections), watched, self.samples, shutdown.clone()));
        for Definition { job, .. } in self.jobs {
            tasks.spawn(serve(executor.clone(), job, shutdown.clone()));
        }
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| Error::with_source(ErrorKind::Integrity, "a reconciler broke down", error))?;
        }
        Ok(())
    }

    /// Runs a reconciler now, whenever it last ran, and waits for its end. When another process runs it at this moment,
    /// this waits for that run first; a run for single keys goes beside it.
    ///
    /// It counts as the run of the interval, except when it is for single keys or only reports. Dropping the future
    /// breaks the run off.
    ///
    /// # Errors
    /// When no reconciler has this name, a setting is wrong, or the run cannot even begin because the database is away.
    /// What fails later is in the summary.
    pub async fn run_now(&self, name: &str, scope: Scope, mode: Mode) -> Result<Summary, Error> {
        let (executor, job) = (self.executor()?, self.find(name)?);
        let order = Order { scheduled: false, mode, scope };
        executor.demanded(job, order, &CancellationToken::new()).await
    }

    /// Runs a reconciler if it is due and waits for its end, as [`Runner::run`] does again and again. The summary says why
    /// when it is not.
    ///
    /// # Errors
    /// As [`Runner::run_now`].
    pub async fn run_if_due(&self, name: &str) -> Result<Summary, Error> {
        self.executor()?.scheduled(self.find(name)?, &CancellationToken::new()).await
    }

    fn find(&self, name: &str) -> Result<&dyn Job, Error> {
        self.jobs.iter().map(|job| &*job.job).find(|job| job.name() == name).ok_or_else(|| {
            let names: Vec<&str> = self.jobs.iter().map(Definition::name).collect();
            Error::new(ErrorKind::Config, format!("there is no reconciler {name}, only {}", names.join(", ")))
        })
    }

    fn executor(&self) -> Result<Executor, Error> {
        check(&self.jobs)?;
        let connections = Arc::new(Connections::new(&self.postgres, "aftercommit-reconciler")?);
        Ok(Executor { connections, process: lease::new_holder(), turns: Arc::new(Semaphore::new(TURNS)) })
    }
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.jobs.iter().map(Definition::name).collect();
        f.debug_struct("Runner").field("reconcilers", &names).finish_non_exhaustive()
    }
}

/// A reconciler that is to be run.
#[derive(Clone)]
pub struct Definition {
    job: Arc<dyn Job>,
    /// What is wrong with it, reported when something is run.
    problem: Option<String>,
}

impl Definition {
    /// Of anything that can be run.
    pub fn job(job: impl Job) -> Self {
        Self { job: Arc::new(job), problem: None }
    }

    /// Of a reconciler that goes from item to item.
    pub fn of(reconciler: impl Reconciler) -> Self {
        Self { problem: super::item::problem(&reconciler), job: Arc::new(ItemJob::new(reconciler)) }
    }

    fn name(&self) -> &str {
        self.job.name()
    }
}

impl fmt::Debug for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Finds what cannot work.
pub fn check(definitions: &[Definition]) -> Result<(), Error> {
    let config = |text| Err(Error::new(ErrorKind::Config, text));
    if let Some(problem) = definitions.iter().find_map(|definition| definition.problem.clone()) {
        return config(problem);
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = definitions.iter().find(|definition| !names.insert(definition.name())) {
        return config(format!("two reconcilers are called {}: each needs a name of its own", twice.name()));
    }
    Ok(())
}

/// Runs one job whenever it is due.
async fn serve(executor: Executor, job: Arc<dyn Job>, stop: CancellationToken) {
    let mut trouble = String::new();
    while !stop.is_cancelled() {
        let wait = match turn(&executor, job.as_ref(), &stop).await {
            Ok(wait) => {
                if !trouble.is_empty() {
                    tracing::info!(reconciler = job.name(), "the database answers again");
                    trouble.clear();
                }
                wait
            }
            Err(error) => {
                let error = error.report();
                if error != trouble {
                    tracing::error!(reconciler = job.name(), error, "cannot run, waiting");
                    trouble = error;
                }
                LOOK / 5
            }
        };
        let _ = tokio::time::timeout(wait, stop.cancelled()).await;
    }
}

/// Runs the job if it is due, and returns when to look again.
async fn turn(executor: &Executor, job: &dyn Job, stop: &CancellationToken) -> Result<Duration, Error> {
    // It is never closed.
    let _turn = executor.turns.acquire().await;
    let interval = job.schedule().interval;
    let due_in = executor.connections.run(async |session| reconcile::due_in(session, job.name(), interval).await);
    let due_in = due_in
        .await
        .map_err(|error| postgres::database_error(format!("the schedule of {} cannot be read", job.name()), error))?;
    if due_in > 0.0 {
        return Ok(Duration::from_secs_f64(due_in.min(LOOK.as_secs_f64())).max(SHORT_LOOK));
    }
    let summary = executor.scheduled(job, stop).await?;
    // Somebody else runs it: there is time.
    Ok(if summary.run.is_none() { LOOK.min(interval / 2).max(SHORT_LOOK) } else { SHORT_LOOK })
}
