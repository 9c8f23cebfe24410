//! Runs handlers for the events of a stream: each event once per subscriber, each key in order.
//!
//! A [`Subscriber`] has a durable name and handlers. A [`Worker`] runs subscribers against one database and one NATS
//! server; they read one stream, or each its own. A [`Registry`] collects the subscribers of several crates. Of several
//! workers with the same subscriber one is active and the others stand by; they take over some seconds after it died, and
//! at once when it stops.
//!
//! ```no_run
//! use aftercommit::Event;
//! use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
//! use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber, Worker};
//! use sqlx::PgTransaction;
//! use tokio_util::sync::CancellationToken;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64, customer: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//!
//! struct SendReceipt;
//!
//! impl Handler<OrderPlaced> for SendReceipt {
//!     async fn handle(&self, tx: &mut PgTransaction<'_>, order: &Delivery<OrderPlaced>) -> Result<(), HandlerError> {
//!         sqlx::query("insert into mail (recipient, about) values ($1, $2)")
//!             .bind(order.event.customer)
//!             .bind(order.event.order)
//!             .execute(&mut **tx)
//!             .await?;
//!         Ok(())
//!     }
//! }
//!
//! # async fn example(postgres: PostgresConfig, shutdown: CancellationToken) -> Result<(), aftercommit::Error> {
//! let receipts = Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt).concurrency(16);
//! let worker = Worker::new(postgres, NatsConfig::default(), Naming::default()).subscriber(receipts);
//! worker.provision().await?;
//! worker.run(shutdown).await
//! # }
//! ```
//!
//! A handler is an ordinary value and can be called in a test, with [`Delivery::new`] and a transaction that the test
//! rolls back.
//!
//! # Order
//! Events with one key are handled one after another, in stream order; events of different keys, and events without a
//! key, side by side. A failing event holds back its own key until it is handled or given up, and nothing else.
//!
//! # Once
//! The row in `aftercommit.inbox` and the handler's effects commit in one transaction, and only then the message is
//! acked. A message that comes again finds its row. Several events may share a transaction; when one of them fails, it
//! is undone as a whole and they run again, the failing one alone.

#![warn(clippy::unwrap_used, clippy::expect_used)]

mod batch;
mod dispatcher;
mod doubt;
#[cfg(feature = "testing")]
pub mod drain;
mod elsewhere;
mod executor;
#[cfg(feature = "cli")]
mod file;
mod gate;
mod handler;
#[cfg(feature = "cli")]
mod http;
mod item;
mod loss;
mod monitor;
mod notes;
mod pace;
mod progress;
mod reached;
mod redrive;
mod registry;
mod retention;
mod route;
mod sample;
mod sampler;
mod scheduler;
mod span;
mod start;
mod subscriber;
mod subscriber_run;
mod teller;
mod transaction_error;
mod verdict;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream;
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::consumer::{self, Claim};
use aftercommit_core::jetstream::topology;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::{self, identity};
use aftercommit_core::runner::Runner;
use aftercommit_core::subscription::Subscription;
use aftercommit_core::text::span;
use monitor::Board;
use progress::Progress;

pub use batch::{BatchError, BatchHandler};
#[cfg(feature = "cli")]
pub use file::{Section, endpoint, read_file};
pub use handler::{Delivery, Handler, HandlerError};
#[cfg(feature = "cli")]
pub use http::Endpoint;
pub use monitor::{Monitor, SubscriberReport, WorkerReport};
pub use registry::{FailedModule, Module, Queues, Registry};
pub use span::set_span_parent;
pub use start::{Start, StartError};
pub use subscriber::{FailurePolicy, Subscriber};
#[cfg(feature = "testing")]
pub use transaction_error::describe;

/// Runs subscribers.
#[derive(Debug)]
pub struct Worker {
    postgres: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
    registry: Registry,
    queues: Queues,
    remedy: String,
    adopt: bool,
    max_connections: NonZeroU32,
    board: Board,
}

/// See [`Worker::max_connections`].
pub const MAX_CONNECTIONS: NonZeroU32 = NonZeroU32::new(50).unwrap();
const LEAST_CONNECTIONS: NonZeroU32 = NonZeroU32::new(4).unwrap();

impl Worker {
    /// A worker without subscribers. `postgres` is the database in which their handlers work, `naming` the stream that
    /// they read unless they name another one.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        let remedy = "provision it, with `Worker::provision` or `aftercommit provision --config worker.toml`".into();
        let board = Board::new(&naming.stream);
        let (registry, queues) = (Registry::new(), Queues::All);
        let max_connections = MAX_CONNECTIONS;
        Self { postgres, nats, naming, registry, queues, remedy, adopt: false, max_connections, board }
    }

    /// Adds a subscriber.
    #[must_use]
    pub fn subscriber(mut self, subscriber: Subscriber) -> Self {
        self.registry = self.registry.subscriber(subscriber);
        self
    }

    /// Takes the subscribers of a registry in place of those that it has.
    #[must_use]
    pub fn registry(mut self, registry: impl Into<Registry>) -> Self {
        self.registry = registry.into();
        self
    }

    /// Which of the subscribers [`Self::run`] serves. Defaults to all.
    #[must_use]
    pub fn queues(mut self, queues: Queues) -> Self {
        self.queues = queues;
        self
    }

    /// BatchReport a subscriber unhealthy after this long without progress while events wait. Defaults to 30
    /// seconds.
    #[must_use]
    pub fn unhealthy_after(mut self, patience: Duration) -> Self {
        self.board.patience = patience;
        self
    }

    /// The most connections to PostgreSQL that this worker opens by itself, for all of its subscribers together; at least 4.
    /// A fifth of them, 10 at most, is for the worker's own short statements, the others are for batches of events: when all
    /// are taken, subscribers get them in turn. Reconcilers that run beside the worker have connections of their own.
    /// Defaults to 50.
    #[must_use]
    pub fn max_connections(mut self, most: u32) -> Self {
        self.max_connections = NonZeroU32::new(most).unwrap_or(NonZeroU32::MIN).max(LEAST_CONNECTIONS);
        self
    }

    /// Tells how this worker is doing, while it runs.
    pub fn monitor(&self) -> Monitor {
        self.board.monitor()
    }

    /// The subscribers that [`Self::run`] serves, as their reconcilers see them: for `reconciler::with_comparisons`. Call it when
    /// the subscribers are defined.
    pub fn subscriptions(&self) -> Vec<Subscription> {
        self.registry.of(&self.queues).map(|subscriber| subscriber.subscription(&self.naming)).collect()
    }

    /// The reconcilers of the registry, at their own intervals.
    pub fn own_reconcilers(&self) -> Runner {
        let own = self.registry.reconcilers().iter().cloned();
        own.fold(Runner::new(self.postgres.clone()), Runner::defined)
    }

    /// What the log tells to do when a consumer is missing.
    #[cfg(feature = "cli")]
    pub fn remedy(mut self, remedy: String) -> Self {
        self.remedy = remedy;
        self
    }

    /// Creates or corrects the JetStream consumers of all subscribers, whatever their queue, and returns what was
    /// changed, in words; nothing when all was right. Their streams must exist. Each consumer is stamped with the worker's
    /// database, because no other one may use it.
    ///
    /// # Errors
    /// When the subscribers contradict each other, NATS or the database cannot be reached, a stream does not exist, or a
    /// consumer differs in a way that cannot be changed, is that of another database, or delivers events that its subscriber
    /// does not want (see [`Worker::adopt`]). The other consumers are created all the same.
    pub async fn provision(&self) -> Result<Vec<String>, Error> {
        let provisioning = Provisioning { adopt: self.adopt, start: None };
        provision(Some(&self.postgres), &self.nats, &self.naming, &self.registry, provisioning).await
    }

    /// [`Worker::provision`] takes over consumers that are those of another database, as after a restore into a new one, and
    /// narrows those that deliver more than their subscriber wants. No worker may serve the other database any more.
    #[must_use]
    pub fn adopt(self) -> Self {
        Self { adopt: true, ..self }
    }

    /// Runs the subscribers until `shutdown` is cancelled: then running handlers finish, unfinished events go back and
    /// other instances take over at once. Dropping the future stops hard; what was running is rolled back.
    ///
    /// Servers that are away, and schemas, consumers or functions that are missing, are waited for, with an error in
    /// the log.
    ///
    /// # Errors
    /// When the definition of the subscribers or a setting is wrong, or the queues leave nothing to serve.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        let subscribers = std::mem::take(&mut self.registry).served(&self.queues)?;
        subscribers.iter().try_for_each(Subscriber::prepare)?;
        let connections = Arc::new(Connections::bounded(&self.postgres, "aftercommit-worker", self.max_connections)?);
        for subscriber in subscribers.iter().filter(|one| one.settings.concurrency > connections.handlers()) {
            tracing::warn!(
                subscriber = subscriber.name,
                concurrency = subscriber.settings.concurrency,
                most = connections.handlers(),
                "its concurrency is higher than the number of transactions that this worker runs at a time: raise \
                 --max-connections (AFTERCOMMIT_MAX_CONNECTIONS, Worker::max_connections)"
            );
        }
        let watched: Vec<sampler::Watched> = subscribers
            .iter()
            .map(|subscriber| (Arc::new(Progress::new(subscriber)), subscriber.spec(&self.naming)))
            .collect();
        self.board.show(&watched);
        let Some(nats) = self.connect(&shutdown).await? else { return Ok(()) };
        self.board.connected(&nats);
        let looking = sampler::run(nats.clone(), Arc::clone(&connections), watched.clone());
        let _looking = AbortOnDropHandle::new(tokio::spawn(looking));
        let _service = AbortOnDropHandle::new(tokio::spawn(self.board.service(nats.clone())));
        let process = Arc::default();
        let mut runs = JoinSet::new();
        for (subscriber, (progress, spec)) in subscribers.into_iter().zip(watched) {
            let run = subscriber_run::SubscriberRun {
                spec,
                subscriber: Arc::new(subscriber),
                connections: Arc::new(connections.for_another()),
                nats: nats.clone(),
                holder: self.board.holder.clone(),
                process: Arc::clone(&process),
                remedy: self.remedy.clone(),
                progress,
            };
            runs.spawn(run.run(shutdown.clone()));
        }
        while let Some(ended) = runs.join_next().await {
            ended
                .map_err(|error| Error::with_source(ErrorKind::Integrity, "the task of a subscriber failed", error))?;
        }
        Ok(())
    }

    /// Connects to NATS, as long as that takes.
    async fn connect(&self, shutdown: &CancellationToken) -> Result<Option<Connection>, Error> {
        let mut failures = 0;
        loop {
            let error = tokio::select! {
                () = shutdown.cancelled() => return Ok(None),
                connected = jetstream::connect(&self.nats, "aftercommit-worker", "_INBOX_worker") => match connected {
                    Ok(connection) => return Ok(Some(connection)),
                    Err(error) => error,
                }
            };
            if error.kind() != ErrorKind::Broker {
                return Err(error);
            }
            if failures == 0 {
                tracing::error!(error = error.report(), "waiting for nats");
            }
            self.board.waiting(&error);
            failures += 1;
            tokio::time::sleep(Backoff::RECONNECT.after(failures)).await;
        }
    }
}

/// What whoever provisions says beside the subscribers' definitions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Provisioning {
    /// See [`Worker::adopt`].
    pub adopt: bool,
    /// Where all of them start whose consumers are made for the first time.
    pub start: Option<Start>,
}

/// See [`Worker::provision`].
pub async fn provision(
    postgres: Option<&PostgresConfig>,
    nats: &NatsConfig,
    naming: &Naming,
    registry: &Registry,
    Provisioning { adopt, start }: Provisioning,
) -> Result<Vec<String>, Error> {
    registry.ready()?;
    let (mut session, mut owner) = (None, None);
    if let Some(config) = postgres {
        let mut opened = postgres::connect(config, "aftercommit-provision").await?;
        let found = identity::owner(&mut opened).await;
        owner = Some(found.map_err(|error| postgres::database_error("asking which database this is failed", error))?);
        session = Some(opened);
    }
    let claim = Claim { owner, adopt };
    let connection = jetstream::connect(nats, "aftercommit-provision", "_INBOX_prov").await?;
    let context = connection.jetstream();
    let max_age = topology::max_age(&context, &naming.stream).await?;
    let (mut changes, mut failed) = (Vec::new(), Vec::new());
    for subscriber in registry.subscribers() {
        let made = async {
            check_retention(subscriber, max_age, &naming.stream)?;
            let mut spec = subscriber.spec(naming);
            let start = start.unwrap_or(subscriber.settings.start);
            spec.start = start.place(&connection, session.as_mut(), &spec).await?;
            consumer::provision(&context, &spec, &claim).await
        };
        match made.await {
            Ok(changed) => changes.extend(changed),
            Err(error) => failed.push(error),
        }
    }
    match failed.as_slice() {
        [] => Ok(changes),
        [first, ..] => {
            let reports: Vec<_> = failed.iter().map(Error::report).chain(changes).collect();
            Err(Error::new(first.kind(), reports.join("; ")))
        }
    }
}

/// Refuses an inbox that may forget events as young as those that a lost stream is filled with again. How long the outbox
/// keeps events is not known here.
fn check_retention(subscriber: &Subscriber, max_age: Option<Duration>, stream: &str) -> Result<(), Error> {
    let (name, retention) = (&subscriber.name, subscriber.settings.inbox_retention);
    match max_age.filter(|max_age| retention <= *max_age) {
        None => Ok(()),
        Some(max_age) => Err(Error::new(
            ErrorKind::Config,
            format!(
                "subscriber {name}: inbox_retention is {}, and the stream {stream} keeps events for {}: when a lost stream is \
                 filled again, events that were handled could run once more; set inbox_retention to more than max_age and the \
                 outbox's retention together",
                span(retention),
                span(max_age)
            ),
        )),
    }
}
