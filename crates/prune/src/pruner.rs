//! Who sweeps periodically.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::health::{Check, Health};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::sweep::{self, SweepResult};
use aftercommit_core::postgres::{database_error, lease};
use tokio_util::sync::CancellationToken;

use crate::own::{AuditTrail, Leases};
use crate::policy::{Policy, PolicySweep};
use crate::run::Plan;
use crate::sweep::{BatchError, Pace, Sweeper, Swept};

/// How long leases of the dead are kept.
const DEAD_LEASES: Duration = Duration::from_hours(90 * 24);

/// How soon a sweep is tried again that failed, or that another process kept from it; each time twice as long.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_mins(5);

/// The database deletes no entry of the audit trail that is younger.
const LEAST_AUDIT: Duration = Duration::from_hours(30 * 24);

/// What is swept, how often and how fast.
#[derive(Debug, Clone)]
pub struct PruneConfig {
    /// Between two sweeps. Defaults to an hour.
    pub interval: Duration,
    /// How fast a sweep goes. Defaults to batches of 500, a budget of 1,000,000, and a rest of four times as long as a batch took.
    pub pace: Pace,
    /// The application's own tables. Defaults to none.
    pub policies: Vec<Policy>,
    /// How long the audit trail is kept, at least 30 days. Defaults to none: for ever.
    pub audit: Option<Duration>,
    /// Where conditions, and triggers of the tables without a search path of their own, look names up, such as `app, public`. Whoever may
    /// create functions and operators in one of these schemas runs code with the rights of the pruner. Defaults to none:
    /// PostgreSQL's own names only, and all others with their schema.
    pub search_path: Option<String>,
}

impl Default for PruneConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_hours(1),
            pace: Pace::default(),
            policies: Vec::new(),
            audit: None,
            search_path: None,
        }
    }
}

impl PruneConfig {
    /// What can be said without the database.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |problem: String| Err(Error::new(ErrorKind::Config, problem));
        for (index, policy) in self.policies.iter().enumerate() {
            policy.check()?;
            let name = &policy.spec.name;
            if self.policies[..index].iter().any(|other| other.spec.name == *name) {
                return refuse(format!("two categories are called {name:?}: give each a name of its own"));
            }
        }
        let Pace { batch, budget, rest } = self.pace;
        if batch == 0 || batch > crate::MAX_LIMIT || budget == 0 {
            return refuse("batch must be from 1 to 100000, and budget at least 1".into());
        }
        if !(0.0..=1000.0).contains(&rest) {
            return refuse("rest must be from 0 to 1000".into());
        }
        if self.audit.is_some_and(|period| period < LEAST_AUDIT) {
            return refuse("audit must be at least 30d".into());
        }
        if self.interval < Duration::from_secs(1) {
            return refuse("interval must be at least 1s".into());
        }
        Ok(())
    }
}

/// Sweeps what a [`PruneConfig`] says. Of several processes one sweeps a category at a time.
///
/// ```no_run
/// # async fn prune() -> Result<(), aftercommit::Error> {
/// use std::time::Duration;
///
/// use aftercommit::config::PostgresConfig;
/// use aftercommit::prune::{Policy, PruneConfig, Pruner, Spec};
///
/// let sessions = Spec::new("public.sessions", "status = 'terminated'").before_column("terminated_at").name("sessions");
/// let policies = vec![Policy::new(sessions, Some(Duration::from_secs(30 * 86_400)))];
/// let config = PruneConfig { policies, ..PruneConfig::default() };
/// let pruner = Pruner::new(&PostgresConfig::new("postgres://app@db/shop"), config)?;
/// pruner.run(Default::default()).await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pruner {
    connections: Connections,
    config: PruneConfig,
    holder: String,
    failing: Arc<Mutex<Option<String>>>,
}

/// What health checks ask of a [`Pruner`].
#[derive(Debug, Clone)]
pub struct PrunerMonitor(Arc<Mutex<Option<String>>>);

impl PrunerMonitor {
    /// Why the last sweep failed; none when it did not.
    pub fn failing(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Check for PrunerMonitor {
    fn health(&self) -> Health {
        match self.failing() {
            None => Health { ok: true, text: "pruning".into() },
            Some(text) => Health { ok: false, text },
        }
    }

    fn readiness(&self) -> Health {
        self.health()
    }

    fn refresh_metrics(&self) {}
}

impl Pruner {
    /// Checks the config. Nothing is connected to yet.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when two policies have one name, something cannot be, or this process publishes into another schema
    /// already ([`set_schema`](aftercommit_outbox::set_schema)).
    pub fn new(postgres: &PostgresConfig, config: PruneConfig) -> Result<Self, Error> {
        config.check()?;
        if config.policies.iter().any(|policy| policy.spec.event) {
            aftercommit_outbox::set_schema(postgres.schema.name()).map_err(|error| {
                Error::with_source(ErrorKind::Config, "the events of pruning cannot be written", error)
            })?;
            if postgres.pooled {
                aftercommit_outbox::set_pooled(true);
            }
        }
        let connections = Connections::new(postgres, "aftercommit-prune")?;
        Ok(Self { connections, config, holder: lease::new_holder(), failing: Arc::default() })
    }

    /// What health checks ask.
    pub fn monitor(&self) -> PrunerMonitor {
        PrunerMonitor(Arc::clone(&self.failing))
    }

    /// Sweeps again and again until `shutdown`, which ends a sweep after its batch. A failure is logged, and the next sweep
    /// tries again.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut retry = RETRY;
        loop {
            let failing = match self.sweep(&shutdown).await {
                Ok(swept) => swept.into_iter().find_map(|swept| match (swept.result, swept.error) {
                    (Some(SweepResult::Failed), error) => {
                        Some(format!("the last sweep of {} failed: {}", swept.category, error.unwrap_or_default()))
                    }
                    (Some(SweepResult::Busy), _) | (None, _) => Some(String::new()),
                    _ => None,
                }),
                Err(error) => {
                    let error = error.report();
                    tracing::warn!(error, "sweeping failed, trying again later");
                    Some(error)
                }
            };
            // Others were in the way, or a server was away: the next look need not wait for the interval.
            let wait = match &failing {
                None => self.config.interval,
                Some(_) => retry.min(self.config.interval),
            };
            retry = if failing.is_some() { (retry * 2).min(RETRY_MOST) } else { RETRY };
            let failing = failing.filter(|text| !text.is_empty());
            *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = failing;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Sweeps each category once, now.
    ///
    /// # Errors
    /// When the database cannot be asked. That a category failed is in what is returned.
    pub async fn sweep(&self, stop: &CancellationToken) -> Result<Vec<Swept>, Error> {
        let sweeper = Sweeper { connections: &self.connections, holder: &self.holder, pace: self.config.pace };
        let mut swept = Vec::new();
        for policy in self.config.policies.iter().filter(|policy| policy.enabled) {
            if stop.is_cancelled() {
                return Ok(swept);
            }
            swept.push(sweeper.sweep(&mut PolicySweep::new(policy, &self.config.search_path), stop).await?);
        }
        if let Some(period) = self.config.audit {
            swept.push(sweeper.sweep(&mut AuditTrail { period }, stop).await?);
        }
        swept.push(sweeper.sweep(&mut Leases { period: DEAD_LEASES }, stop).await?);
        Ok(swept)
    }

    /// What the next batch of each policy that is enabled would delete, by name. It changes and locks nothing.
    ///
    /// # Errors
    /// When a spec does not fit the database, or the database cannot be asked.
    pub async fn plan(&self) -> Result<Vec<(String, Plan)>, Error> {
        let mut plans = Vec::new();
        for policy in self.config.policies.iter().filter(|policy| policy.enabled) {
            let plan = policy.plan(&self.connections, &self.config.search_path).await.map_err(|error| match error {
                BatchError::Database(error) => database_error(format!("planning {} failed", policy.spec.name), error),
                BatchError::Prune(error) => error.into(),
            })?;
            plans.push((policy.spec.name.clone(), plan));
        }
        Ok(plans)
    }
}

/// What every category has on record, whichever process swept it.
///
/// # Errors
/// When the database cannot be asked.
pub async fn status(postgres: &PostgresConfig) -> Result<Vec<sweep::SweepStatus>, Error> {
    let mut session = aftercommit_core::postgres::connect(postgres, "aftercommit").await?;
    sweep::list(&mut session).await.map_err(|error| database_error("reading what was pruned failed", error))
}
