//! Connections that are used again only when they were left in order.
//!
//! A pool would take a connection back whose user was cancelled in the middle of BEGIN, with a transaction open on it
//! that the next user knows nothing of. Here a connection that is not given back is closed, and the server ends what was
//! open on it.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::Way;
use super::pins::Whose;
use super::servers::Servers;
use super::session::{InUse, Session};
use crate::config::PostgresConfig;
use crate::error::Error;
use aftercommit_outbox::schema::Schema;

/// How long a connection that nobody uses is kept.
const KEPT: Duration = Duration::from_mins(1);
/// The share of a bound that is for our own statements, and how many at least and at most. They are short.
const OURS: (usize, usize, usize) = (5, 2, 10);

/// Connections to one database, opened when they are needed and closed when nobody has used them for a minute. Those in
/// which handlers run are kept apart, for each subscriber: they have the role's own settings, and what a handler makes of
/// these.
///
/// There are as many as are used at the same time, or as many as [`Connections::bounded`] says: then whoever runs handlers
/// asks for [`Connections::admit`] before.
#[derive(Debug)]
pub struct Connections {
    ours: Arc<Pool>,
    others: Arc<Pool>,
    /// Tells the handlers' sessions of one subscriber from those of the others.
    owner: u64,
    /// How many of our statements run at a time, and beside them those for leases, which cannot wait for slow ones.
    statements: Arc<Semaphore>,
    leases: Arc<Semaphore>,
    /// How many transactions with handlers run at a time.
    handlers: Arc<Semaphore>,
}

/// Sessions of one kind, and the way to more.
#[derive(Debug)]
struct Pool {
    way: Arc<Way>,
    /// Those that nobody uses at present, the one that was used last at the end.
    idle: Mutex<Vec<Idle>>,
    in_use: Arc<AtomicUsize>,
    most: usize,
    owners: AtomicU64,
}

#[derive(Debug)]
struct Idle {
    owner: u64,
    since: Instant,
    session: Kept,
}

/// A session that nobody uses.
#[derive(Debug)]
enum Kept {
    Ready(Session),
    /// What its last user has made of it is being taken back. None when that fails.
    Cleaning(AbortOnDropHandle<Option<Session>>),
}

impl Kept {
    async fn ready(self) -> Option<Session> {
        match self {
            Self::Ready(session) => Some(session),
            Self::Cleaning(cleaned) => cleaned.await.ok().flatten(),
        }
    }
}

impl Pool {
    fn new(way: Way, most: usize) -> Arc<Self> {
        let (idle, in_use, owners) = (Mutex::default(), Arc::default(), AtomicU64::new(1));
        Arc::new(Self { way: Arc::new(way), idle, in_use, most, owners })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, owner: u64) -> Result<Session, sqlx::Error> {
        let in_use = InUse::new(&self.in_use);
        let found = {
            let mut idle = self.idle();
            // One that is ready, or the one that soonest will be.
            let ready = idle.iter().rposition(|idle| idle.owner == owner && matches!(idle.session, Kept::Ready(_)));
            let at = ready.or_else(|| idle.iter().position(|idle| idle.owner == owner));
            let found = at.map(|at| idle.remove(at).session);
            if found.is_none() {
                // Those that were used longest ago make room for the new one.
                let room = self.most.saturating_sub(self.in_use.load(Ordering::Relaxed));
                let surplus = idle.len().saturating_sub(room);
                idle.drain(..surplus);
            }
            found
        };
        let found = match found {
            Some(kept) => kept.ready().await,
            None => None,
        };
        let session = match found {
            Some(session) => session,
            None => Session::open(Arc::clone(&self.way)).await?.watched(),
        };
        Ok(session.in_use(Some(in_use)))
    }

    fn give_back(&self, owner: u64, session: Kept) {
        let since = Instant::now();
        let mut idle = self.idle();
        idle.push(Idle { owner, since, session });
        let rested = idle.partition_point(|idle| since.duration_since(idle.since) > KEPT);
        idle.drain(..rested);
    }
}

impl Connections {
    /// As many connections as are asked for. `application` is the name that PostgreSQL shows for them.
    pub fn new(config: &PostgresConfig, application: &str) -> Result<Self, Error> {
        Ok(Self::with(super::options(config, application)?, (config.pooled, config.schema.clone()), None))
    }

    /// `most` at a time, but for a few moments' more.
    pub fn bounded(config: &PostgresConfig, application: &str, most: NonZeroU32) -> Result<Self, Error> {
        Ok(Self::with(super::options(config, application)?, (config.pooled, config.schema.clone()), Some(most)))
    }

    fn with(servers: Servers, (pooled, schema): (bool, Schema), most: Option<NonZeroU32>) -> Self {
        let most = most.and_then(|most| usize::try_from(most.get()).ok()).unwrap_or(Semaphore::MAX_PERMITS);
        let (share, least, greatest) = OURS;
        let ours = (most / share).clamp(least, if most == Semaphore::MAX_PERMITS { most } else { greatest });
        let (leases, handlers) = ((ours / 3).max(1), most.saturating_sub(ours).max(1));
        let pool = |whose, most| Pool::new(Way::new(servers.clone(), (pooled, schema.clone()), whose), most);
        Self {
            ours: pool(Whose::Ours, ours),
            others: pool(Whose::Others, handlers),
            owner: 0,
            statements: Arc::new(Semaphore::new(ours - leases)),
            leases: Arc::new(Semaphore::new(leases)),
            handlers: Arc::new(Semaphore::new(handlers)),
        }
    }

    /// The same, with sessions of its own for handlers: what one subscriber's handlers leave behind reaches no other's.
    pub fn for_another(&self) -> Self {
        Self {
            ours: Arc::clone(&self.ours),
            others: Arc::clone(&self.others),
            owner: self.others.owners.fetch_add(1, Ordering::Relaxed),
            statements: Arc::clone(&self.statements),
            leases: Arc::clone(&self.leases),
            handlers: Arc::clone(&self.handlers),
        }
    }

    /// Whether a pooler in transaction mode may stand in between.
    pub fn is_pooled(&self) -> bool {
        self.others.way.pooled
    }

    /// Connections of one's own to the database of a pool, which is not asked for any, and to the schema `aftercommit`.
    #[cfg(feature = "testing")]
    pub fn beside(pool: &sqlx::PgPool, application: &str) -> Self {
        Self::with(
            pool.connect_options().as_ref().clone().application_name(application).into(),
            (false, Schema::default()),
            None,
        )
    }

    /// How many transactions with handlers may run at a time.
    pub fn handlers(&self) -> usize {
        self.others.most
    }

    /// Waits until one more transaction with handlers may run, and lets it until the permit is dropped. Those who wait are
    /// served in turn.
    pub async fn admit(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.handlers).acquire_owned().await.ok()
    }

    /// The same when nobody has to wait for it.
    pub fn admit_now(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.handlers).try_acquire_owned().ok()
    }

    /// An idle connection for our own statements, or a new one.
    pub async fn take(&self) -> Result<Session, sqlx::Error> {
        self.ours.take(0).await
    }

    /// The same for transactions in which handlers run.
    pub async fn take_for_others(&self) -> Result<Session, sqlx::Error> {
        self.others.take(self.owner).await
    }

    /// Keeps a connection for the next one who needs it. Nothing may be open on it.
    pub fn give_back(&self, connection: Session) {
        let kept = |session: Session| Kept::Ready(session.in_use(None));
        match connection.whose() {
            Whose::Ours => self.ours.give_back(0, kept(connection)),
            Whose::Others => self.others.give_back(self.owner, kept(connection)),
        }
    }

    /// Keeps one in which handlers ran, once `clean` has taken back what they have made of it: nobody has to wait for that
    /// but who gets it next. It is closed when `clean` fails.
    pub fn give_back_to_clean<C>(&self, connection: Session, clean: impl FnOnce(Session) -> C)
    where
        C: Future<Output = Option<Session>> + Send + 'static,
    {
        let cleaned = tokio::spawn(clean(connection.in_use(None)));
        self.others.give_back(self.owner, Kept::Cleaning(AbortOnDropHandle::new(cleaned)));
    }

    /// Closes the idle connections, which went away together with one that was in use.
    pub fn forget_idle(&self) {
        self.ours.idle().clear();
        self.others.idle().retain(|idle| idle.owner != self.owner);
    }

    /// Runs one statement, or some without a transaction around them.
    pub async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        // It is never closed.
        let _turn = self.statements.acquire().await;
        self.run_on(self.take().await?, work).await
    }

    /// The same for what keeps a lease.
    pub async fn run_for_lease<T>(
        &self,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let _turn = self.leases.acquire().await;
        self.run_on(self.take().await?, work).await
    }

    /// The same where names are looked up as a handler would.
    pub async fn run_for_others<T>(
        &self,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let _turn = self.statements.acquire().await;
        self.run_on(self.take_for_others().await?, work).await
    }

    async fn run_on<T>(
        &self,
        mut connection: Session,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let result = work(&mut connection).await;
        match &result {
            Err(error) if super::is_outage(error) => self.forget_idle(),
            _ => self.give_back(connection),
        }
        result
    }
}
