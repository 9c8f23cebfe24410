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

mod batch;
#[cfg(feature = "testing")]
pub(crate) mod drain;
#[cfg(feature = "cli")]
mod file;
mod handler;
#[cfg(feature = "cli")]
mod http;
mod lane;
mod load;
mod monitor;
mod pace;
mod progress;
mod pruner;
mod redrive;
mod registry;
mod route;
mod sample;
mod scheduler;
mod serve;
mod session;
mod span;
mod subscriber;
mod trouble;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::config::{Naming, NatsConfig, PostgresConfig};
use crate::error::{Error, ErrorKind};
use crate::jetstream;
use crate::jetstream::Connection;
use crate::jetstream::consumer;
use crate::postgres::connections::Connections;
use crate::reconciler::{ConsumerLeg, InboxLeg, Mode, Runner};
use monitor::Board;
use progress::Progress;

pub use batch::{BatchError, BatchHandler};
#[cfg(feature = "cli")]
pub use file::read_file;
pub use handler::{Delivery, Handler, HandlerError};
pub use monitor::{Monitor, SubscriberReport, WorkerReport};
pub use registry::{FailedModule, Module, Queues, Registry};
pub(crate) use serve::{ALL, lease_name};
pub use span::set_span_parent;
pub(crate) use subscriber::check_name;
pub use subscriber::{FailurePolicy, Subscriber};
#[cfg(feature = "testing")]
pub(crate) use trouble::describe;

/// The `main` of a service whose handlers are written in Rust: reads the command line and the environment as
/// `aftercommit-worker` does, without `--config`, and runs until a signal ends it. It takes a [`Registry`], or a list of
/// subscribers.
///
/// With `--provision` it creates or corrects the consumers instead, with `--reconcile <NAME>` it runs a reconciler now
/// (`--key <KEY>` for single items, `--full` for everything, `--report` to change nothing) and prints what came of it.
///
/// ```no_run
/// # use aftercommit::Event;
/// # use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// fn main() -> std::process::ExitCode {
///     aftercommit::worker::main(vec![Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt)])
/// }
/// ```
#[cfg(feature = "cli")]
pub fn main(subscribers: impl Into<Registry>) -> std::process::ExitCode {
    crate::cli::worker::serve(subscribers.into(), std::env::args_os())
}

/// The same with another command line than the process's: for tests that run it in a child of theirs.
#[cfg(all(feature = "cli", feature = "testing"))]
#[doc(hidden)]
pub fn main_of(subscribers: impl Into<Registry>, arguments: Vec<std::ffi::OsString>) -> std::process::ExitCode {
    crate::cli::worker::serve(subscribers.into(), arguments)
}

/// Runs subscribers.
#[derive(Debug)]
pub struct Worker {
    postgres: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
    registry: Registry,
    queues: Queues,
    remedy: String,
    board: Board,
}

impl Worker {
    /// A worker without subscribers. `postgres` is the database in which their handlers work, `naming` the stream that
    /// they read unless they name another one.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        let remedy = "provision it, with `Worker::provision` or `aftercommit provision --config worker.toml`".into();
        let board = Board::new(&naming.stream);
        Self { postgres, nats, naming, registry: Registry::new(), queues: Queues::All, remedy, board }
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

    /// How long a subscriber may get on with nothing, while events wait, until it counts as unhealthy. Defaults to 30
    /// seconds.
    #[must_use]
    pub fn unhealthy_after(mut self, patience: Duration) -> Self {
        self.board.patience = patience;
        self
    }

    /// Tells how this worker is doing, while it runs.
    pub fn monitor(&self) -> Monitor {
        self.board.monitor()
    }

    /// The reconcilers of the subscribers that [`Self::run`] serves, to be run beside it: legs B and C, as
    /// docs/reconciliation.md has it; and those of the registry, at their own intervals. Call it when the subscribers are
    /// defined.
    pub fn reconcilers(&self, every: Duration, mode: Mode) -> Runner {
        let mut runner = self.own_reconcilers();
        for subscriber in self.registry.of(&self.queues) {
            let subscription = subscriber.subscription(&self.naming);
            let consumer = ConsumerLeg::new(self.nats.clone(), subscription.clone());
            let inbox = InboxLeg::new(self.nats.clone(), subscription);
            runner = runner.consumer(ConsumerLeg { interval: every, mode, ..consumer }).inbox(InboxLeg {
                interval: every,
                mode,
                ..inbox
            });
        }
        runner
    }

    /// Only those of the registry.
    pub fn own_reconcilers(&self) -> Runner {
        let own = self.registry.reconcilers().iter().cloned();
        own.fold(Runner::new(self.postgres.clone()), Runner::defined)
    }

    /// What the log tells to do when a consumer is missing.
    #[cfg(feature = "cli")]
    pub(crate) fn remedy(mut self, remedy: String) -> Self {
        self.remedy = remedy;
        self
    }

    /// Creates or corrects the JetStream consumers of all subscribers, whatever their queue, and returns what was
    /// changed, in words; nothing when all was right. Their streams must exist.
    ///
    /// # Errors
    /// When the subscribers contradict each other, NATS cannot be reached, a stream does not exist, or a consumer
    /// differs in a way that cannot be changed. The other consumers are created all the same.
    pub async fn provision(&self) -> Result<Vec<String>, Error> {
        provision(&self.nats, &self.naming, &self.registry).await
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
        let connections = Arc::new(Connections::new(&self.postgres, "aftercommit-worker")?);
        let watched: Vec<sample::Watched> = subscribers
            .iter()
            .map(|subscriber| (Arc::new(Progress::new(subscriber)), subscriber.spec(&self.naming)))
            .collect();
        self.board.show(&watched);
        let Some(nats) = self.connect(&shutdown).await? else { return Ok(()) };
        self.board.connected(&nats);
        let looking = sample::run(nats.clone(), Arc::clone(&connections), watched.clone());
        let _looking = AbortOnDropHandle::new(tokio::spawn(looking));
        let _service = AbortOnDropHandle::new(tokio::spawn(self.board.service(nats.clone())));
        let process = Arc::default();
        let mut services = JoinSet::new();
        for (subscriber, (progress, spec)) in subscribers.into_iter().zip(watched) {
            let service = serve::Service {
                spec,
                subscriber: Arc::new(subscriber),
                connections: Arc::clone(&connections),
                client: nats.client.clone(),
                holder: self.board.holder.clone(),
                process: Arc::clone(&process),
                remedy: self.remedy.clone(),
                progress,
            };
            services.spawn(service.run(shutdown.clone()));
        }
        while let Some(ended) = services.join_next().await {
            ended.map_err(|error| Error::with_source(ErrorKind::Integrity, "a subscriber broke down", error))?;
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

/// See [`Worker::provision`].
pub(crate) async fn provision(nats: &NatsConfig, naming: &Naming, registry: &Registry) -> Result<Vec<String>, Error> {
    registry.ready()?;
    let connection = jetstream::connect(nats, "aftercommit-provision", "_INBOX_prov").await?;
    let context = jetstream::context(&connection.client);
    let (mut changes, mut failed) = (Vec::new(), Vec::new());
    for subscriber in registry.subscribers() {
        match consumer::provision(&context, &subscriber.spec(naming)).await {
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
