//! Everything that an integration test needs, in one value.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{eventually, unique_name};
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::{database_error, testing};
use aftercommit_outbox::event::EventId;
use aftercommit_outbox::subject::SubjectPrefix;
use aftercommit_relay::{Relay, RelayConfig};
use aftercommit_worker::{Registry, Worker};

/// How long [`Environment::handled`] waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// A database with the schema `aftercommit` and a stream, for one test alone; relay and workers run in the test's
/// process.
///
/// ```no_run
/// # use aftercommit::{Event, outbox, testing::Environment, worker::{Delivery, Handler, HandlerError, Subscriber}};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let environment = Environment::start().await?;
/// let _relay = environment.relay();
/// let _worker = environment.worker([Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt)]).await?;
///
/// let mut tx = environment.pool().begin().await?;
/// let id = outbox::publish(&mut tx, &OrderPlaced { order: 7 }).await?;
/// tx.commit().await?;
/// environment.handled("receipts", id).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Environment {
    postgres: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
    pool: PgPool,
}

impl Environment {
    /// On servers that all tests of this process share, see [`servers`](super::servers).
    ///
    /// # Errors
    /// When a server is not installed or does not start.
    #[cfg(unix)]
    pub async fn start() -> Result<Self, Error> {
        use super::servers::{Nats, Postgres};
        let (postgres, nats) = tokio::try_join!(Postgres::shared(), Nats::shared())?;
        let nats = NatsConfig { url: nats.url(), ..NatsConfig::default() };
        Self::on(PostgresConfig::new(postgres.create_database().await?), nats).await
    }

    /// In this database and on this server, such as those of a CI service. The stream has a name that no other test
    /// uses; it is not removed.
    ///
    /// # Errors
    /// When a server cannot be reached, or refuses the schema or the stream.
    pub async fn on(postgres: PostgresConfig, nats: NatsConfig) -> Result<Self, Error> {
        let name = unique_name("test");
        let prefix = SubjectPrefix::new(name.clone());
        let prefix =
            prefix.map_err(|error| Error::with_source(ErrorKind::Config, "the test's name is unusable", error))?;
        let naming = Naming { stream: name.to_uppercase(), prefix, source: "/test".into() };
        aftercommit_operator::migrate(&postgres).await?;
        aftercommit_operator::provision(&nats, &naming).await?;
        let pool = PgPoolOptions::new().connect(&postgres.url).await;
        let pool = pool.map_err(|error| database_error("cannot connect to the test's database", error))?;
        Ok(Self { postgres, nats, naming, pool })
    }

    /// Connections to the database, for the test and the service under test.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How to reach the database.
    pub fn postgres_config(&self) -> &PostgresConfig {
        &self.postgres
    }

    /// How to reach NATS.
    pub fn nats_config(&self) -> &NatsConfig {
        &self.nats
    }

    /// The names of stream and subjects.
    pub fn naming(&self) -> &Naming {
        &self.naming
    }

    /// Runs a relay.
    pub fn relay(&self) -> Running {
        let config = RelayConfig::new(self.postgres.clone(), self.nats.clone(), self.naming.clone());
        Running::start(|stop| Relay::new(config).run(stop))
    }

    /// Provisions the subscribers' consumers and runs a worker with them.
    ///
    /// # Errors
    /// When the subscribers contradict each other or a server cannot be reached.
    pub async fn worker(&self, subscribers: impl Into<Registry>) -> Result<Running, Error> {
        let worker = Worker::new(self.postgres.clone(), self.nats.clone(), self.naming.clone()).registry(subscribers);
        worker.provision().await?;
        Ok(Running::start(|stop| worker.run(stop)))
    }

    /// Waits until the subscriber has handled the event, for at most 30 seconds.
    ///
    /// # Errors
    /// When it becomes a dead letter, with the reason, and when it takes too long, with the last error of the handler.
    pub async fn handled(&self, subscriber: &str, id: EventId) -> Result<(), Error> {
        let what = format!("subscriber {subscriber} handles event {id}");
        let mut found = Ok(testing::Story::default());
        let waited = eventually(PATIENCE, &what, async || {
            found = self.story(subscriber, id).await;
            found.as_ref().is_ok_and(|story| story.outcome.is_some())
        })
        .await;
        let testing::Story { outcome, error } =
            found.map_err(|error| database_error(format!("looking whether {what} failed"), error))?;
        let error = error.unwrap_or_else(|| "no attempt has failed; do relay and worker run?".into());
        match outcome.as_deref() {
            Some("handled") => Ok(()),
            Some(outcome) => Err(Error::new(ErrorKind::Integrity, format!("{what}: it is {outcome}: {error}"))),
            None => waited.map_err(|late| Error::with_source(late.kind(), late.to_string(), error)),
        }
    }

    async fn story(&self, subscriber: &str, id: EventId) -> Result<testing::Story, sqlx::Error> {
        testing::story(&mut *self.pool.acquire().await?, subscriber, id.as_uuid()).await
    }
}

/// A relay or a worker that runs in this process. Dropping it is like a crash: transactions are rolled back, and nothing
/// is given back.
#[derive(Debug)]
#[must_use = "dropped, it stops at once"]
pub struct Running {
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), Error>>,
}

impl Running {
    fn start<F>(run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(run(stop.clone())));
        Self { stop, task }
    }

    /// Stops in an orderly way: what runs is finished, the rest is given back.
    ///
    /// # Errors
    /// What the relay or worker ended with.
    pub async fn stop(self) -> Result<(), Error> {
        self.stop.cancel();
        self.task.await.map_err(|error| Error::with_source(ErrorKind::Integrity, "it broke down", error))?
    }
}
