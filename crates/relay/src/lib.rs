//! The relay: publishes what transactions have committed to the outbox, in order, to a JetStream stream.
//!
//! Any number of relays may run on one outbox; one leads, the others stand by. The way of an event:
//! `leader` opens a window in the relay's log, `reader` reads its rows, `pump` publishes them, `chain` keeps their order.

#![warn(clippy::unwrap_used, clippy::expect_used)]

mod batch;
mod blocked_keys;
mod cause;
mod chain;
mod classify;
mod config;
mod fence;
mod guard;
mod in_flight;
mod keyed;
mod leader;
mod method;
mod monitor;
mod polling;
mod progress;
mod pump;
mod reader;
mod retention;
mod sample;
mod signals;

use std::fmt;
use std::sync::Arc;

use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::Naming;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::health::Phase;
use aftercommit_core::jetstream::publisher::Publisher;
use aftercommit_core::jetstream::service::{self, Service};
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::jetstream::{self, Connection, topology};
use aftercommit_core::outbox_query;
use aftercommit_core::postgres::lease::{self, Tenure};
use aftercommit_core::postgres::relay_log::{self, Appended};
use aftercommit_core::postgres::relay_status::{self, Report};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, identity, pause, sequence};
use aftercommit_core::relay::{LEASE, Mode};
use cause::Cause;
pub use config::{ParkPolicy, RelayConfig};
use guard::Guard;
use leader::Leader;
use leader::repairs::Repairs;
use leader::resume::Found;
use leader::tail::Tail;
use method::ActivePublishMethod;
pub use method::PublishMethod;
pub use monitor::{Monitor, RelayReport};
use progress::{Progress, RelayPosition};
use reader::Exceptions;
use sample::{Sample, Sampler};
use signals::Signals;

/// One relay: stands by until it leads, then publishes until it is stopped.
pub struct Relay {
    config: RelayConfig,
    holder: String,
    naming: Arc<Naming>,
    progress: Progress,
    samples: watch::Sender<Option<Sample>>,
    nats: watch::Sender<Option<Connection>>,
}

impl Relay {
    /// A relay of its own identity. Its metrics go to the recorder that is installed now.
    pub fn new(config: RelayConfig) -> Self {
        let holder = lease::new_holder();
        let naming = Arc::new(config.naming.clone());
        let progress = Progress::new(&naming.stream, config.max_in_flight);
        Self { config, holder, naming, progress, samples: watch::Sender::new(None), nats: watch::Sender::new(None) }
    }

    /// Tells how this relay is doing, while it runs.
    pub fn monitor(&self) -> Monitor {
        Monitor {
            naming: self.naming.clone(),
            holder: self.holder.clone(),
            patience: self.config.unhealthy_after,
            position: self.progress.subscribe(),
            samples: self.samples.subscribe(),
            nats: self.nats.subscribe(),
        }
    }

    /// Runs until `shutdown` is cancelled. Lost servers are waited for, for ever.
    ///
    /// # Errors
    /// Only at the start, for what time does not heal: [`ErrorKind::Config`] for settings that cannot be used,
    /// [`ErrorKind::NotReady`] for a schema or stream that does not exist.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        // What cannot be used is told before NATS is waited for.
        postgres::options(&self.config.postgres, "aftercommit-relay")?;
        let _sampler = AbortOnDropHandle::new(tokio::spawn(self.sampler().run()));
        let mut failures = 0;
        let mut started = false;
        while !shutdown.is_cancelled() {
            let run = Box::pin(self.serve(&shutdown, &mut started, &mut failures)).await;
            self.nats.send_replace(None);
            match run {
                Ok(()) => break,
                Err(error) if !started && matches!(error.kind(), ErrorKind::Config | ErrorKind::NotReady) => {
                    return Err(error);
                }
                Err(error) => {
                    failures += 1;
                    self.progress.enter(Phase::Connecting, error.report());
                    tracing::warn!(error = error.report(), "the relay was interrupted, connecting again");
                    tokio::select! {
                        () = tokio::time::sleep(Backoff::RECONNECT.after(failures)) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
        }
        tracing::info!("relay stopped");
        Ok(())
    }

    /// Connects, stands by, leads; ends with an error when something broke.
    async fn serve(&self, shutdown: &CancellationToken, started: &mut bool, failures: &mut u32) -> Result<(), Error> {
        let until = |connecting| async move {
            tokio::select! {
                connected = connecting => Some(connected),
                () = shutdown.cancelled() => None,
            }
        };
        let Some(nats) = until(jetstream::connect(&self.config.nats, "aftercommit-relay", "_INBOX_relay")).await else {
            return Ok(());
        };
        let nats = nats?;
        self.nats.send_replace(Some(nats.clone()));
        let stream = StreamReader::new(&nats, &self.naming.stream);
        let mut log = self.connect().await?;
        relay_log::newest(&mut log).await.map_err(|error| database_error("reading the relay's log failed", error))?;
        self.check(&nats, &stream).await?;
        self.check_owner(&stream, &mut log).await?;
        self.check_sequence(&mut log).await?;
        *started = true;
        tracing::info!(stream = %self.naming.stream, holder = %self.holder, "relay started");
        let _service = AbortOnDropHandle::new(tokio::spawn(self.service(nats.clone())));
        let stood_by = tokio::time::Instant::now();
        while !shutdown.is_cancelled() {
            *failures = 0;
            let tenure = lease::acquire(&mut log, LEASE, &self.holder, self.config.lease)
                .await
                .map_err(|error| database_error("asking for the relay's lease failed", error))?;
            if let Some(tenure) = tenure {
                self.progress.lead(tenure.epoch);
                return Box::pin(self.lead(tenure, log, &nats, stream, shutdown)).await;
            }
            self.progress.enter(Phase::StandingBy, "another relay leads");
            // One that died would have lost its lease by now.
            if self.config.once && stood_by.elapsed() > self.config.lease * 3 / 2 {
                *started = false;
                return Err(Error::new(ErrorKind::NotReady, "another relay leads, and publishes what is there"));
            }
            tokio::select! {
                () = tokio::time::sleep(self.config.lease / 6) => {}
                () = shutdown.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Refuses servers and settings with which events would be lost, and tells settings that are not known.
    async fn check(&self, nats: &Connection, stream: &StreamReader) -> Result<(), Error> {
        if let Some(problem) = topology::server_problem(nats) {
            return Err(Error::new(ErrorKind::NotReady, problem));
        }
        self.check_batches(nats, stream.extent().await?.batches)?;
        let findings = self.guard(stream).findings().await?;
        Guard::refuse(&findings.problems, &self.naming.stream)?;
        Guard::tell_unknown(&findings.unknown, &self.naming.stream);
        Ok(())
    }

    /// Refuses an exclusive stream that another outbox has claimed.
    async fn check_owner(&self, stream: &StreamReader, log: &mut Session) -> Result<(), Error> {
        if self.config.mode == Mode::Shared {
            return Ok(());
        }
        let Some(theirs) = topology::owner(&stream.described().await?.config) else { return Ok(()) };
        let ours = identity::owner(log).await;
        let ours = ours.map_err(|error| database_error("asking which database the outbox is in failed", error))?;
        topology::is_of(&self.naming.stream, Some(&theirs), &ours)
    }

    fn guard(&self, stream: &StreamReader) -> Guard {
        Guard { stream: stream.clone(), naming: self.naming.clone(), shared: self.config.mode == Mode::Shared }
    }

    /// Refuses to publish in batches where no batch would be one.
    fn check_batches(&self, nats: &Connection, allowed: bool) -> Result<(), Error> {
        if self.config.publish != PublishMethod::Batched || fault::broken("batch-check") {
            return Ok(());
        }
        let (kind, problem) = if self.config.mode == Mode::Shared {
            (ErrorKind::Config, "it needs a stream that only this relay writes to: drop --mode shared".to_string())
        } else if !nats.client.is_server_compatible(2, 12, 1) {
            let version = nats.client.server_info().version;
            (ErrorKind::NotReady, format!("it needs nats-server 2.12.1 or newer, and the server is {version}"))
        } else if !allowed {
            let stream = &self.naming.stream;
            (ErrorKind::NotReady, format!("stream {stream} takes none: run `aftercommit provision`"))
        } else {
            return Ok(());
        };
        Err(Error::new(kind, format!("the relay cannot publish in batches (--publish batched): {problem}")))
    }

    /// Refuses a sequence whose ids do not follow the commits of a key.
    async fn check_sequence(&self, log: &mut Session) -> Result<(), Error> {
        let sequence = sequence::read(log).await;
        sequence.map_err(|error| database_error("reading the settings of the outbox's ids failed", error))?.check()
    }

    async fn lead(
        &self,
        tenure: Tenure,
        mut log: Session,
        nats: &Connection,
        stream: StreamReader,
        shutdown: &CancellationToken,
    ) -> Result<(), Error> {
        let epoch = tenure.epoch;
        tracing::info!(epoch, stream = %self.naming.stream, "leading");
        let was_paused = pause::is_paused(&mut log, &[LEASE]).await;
        let was_paused =
            was_paused.map_err(|error| database_error("reading whether the relay is paused failed", error))?;
        let (paused, told_paused) = watch::channel(was_paused);
        let (unfit, told_unfit) = watch::channel(false);
        let guarding = self.guard(&stream).watch(unfit, self.progress.subscribe());
        let answering = outbox_query::server::answer(self.config.postgres.clone(), nats.clone(), self.naming.clone());
        let _answering = AbortOnDropHandle::new(tokio::spawn(answering));
        let heartbeat = self.heartbeat(&tenure, self.progress.subscribe(), paused);
        let leading = async {
            let newest = relay_log::newest(&mut log).await;
            let newest = newest.map_err(|error| database_error("reading the relay's log failed", error))?;
            let taken = relay_log::take_over(&mut log, &newest, epoch).await;
            let Appended::Yes(state) = taken.map_err(|error| database_error("taking the lead failed", error))? else {
                return Err(Error::new(ErrorKind::Fenced, "another relay was faster at taking the lead"));
            };
            if state.timeline != newest.timeline {
                tracing::warn!(
                    was = newest.timeline,
                    now = state.timeline,
                    "a standby was promoted, or the database recovered to a point in time: everything behind the last \
                     settled event is looked up in the stream"
                );
            }
            let leader = Leader {
                config: &self.config,
                epoch,
                naming: self.naming.clone(),
                connection: nats,
                log,
                reader: Arc::new(Mutex::new(self.connect().await?)),
                publisher: Publisher::new(nats.clone()).await?,
                stream,
                state: *state,
                watch: None,
                unfinished: true,
                tail: Tail::default(),
                found: Found::default(),
                exceptions: Exceptions::default(),
                disordered: false,
                repairs: Repairs::new(),
                method: ActivePublishMethod::new(self.config.publish),
                cause: Cause::default(),
                progress: &self.progress,
                signals: Signals::new(shutdown.clone(), told_paused, told_unfit),
                limit_since: None,
            };
            leader.run().await
        };
        let result = tokio::select! {
            result = leading => result,
            () = guarding => Ok(()),
            error = heartbeat => Err(error),
            error = self.prune() => Err(error),
        };
        if !matches!(&result, Err(error) if error.kind() == ErrorKind::Fenced) {
            self.release(&tenure).await;
        }
        result
    }

    /// Renews the lease and tells how far the leader is. Ends with the reason when the lease cannot be kept.
    async fn heartbeat(
        &self,
        tenure: &Tenure,
        position: watch::Receiver<RelayPosition>,
        paused: watch::Sender<bool>,
    ) -> Error {
        let mut connection = None;
        let mut renewed = tokio::time::Instant::now();
        let mut ticks = tokio::time::interval(self.config.lease / 3);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let report = position.borrow().clone();
            let attempt =
                tokio::time::timeout_at(renewed + self.config.lease, self.beat(&mut connection, tenure, report));
            match attempt.await {
                Ok(Ok(Some(pause))) => {
                    renewed = tokio::time::Instant::now();
                    if paused.send_if_modified(|paused| std::mem::replace(paused, pause) != pause) {
                        let told =
                            if pause { "publishing paused by operator" } else { "publishing resumed by operator" };
                        tracing::info!(paused = pause, "{told}");
                    }
                }
                Ok(Ok(None)) => return Error::new(ErrorKind::Fenced, "the lease has passed to another relay"),
                Ok(Err(error)) => {
                    connection = None;
                    tracing::warn!(error = error.report(), "renewing the lease failed");
                }
                Err(_) => {
                    return Error::new(
                        ErrorKind::Database,
                        format!(
                            "the lease could not be renewed for {:?}: this relay does not lead any more",
                            self.config.lease
                        ),
                    );
                }
            }
            ticks.tick().await;
        }
    }

    async fn beat(
        &self,
        connection: &mut Option<Session>,
        tenure: &Tenure,
        position: RelayPosition,
    ) -> Result<Option<bool>, Error> {
        let mut open = match connection.take() {
            Some(open) => open,
            None => self.connect().await?,
        };
        let failed = |error| database_error("renewing the relay's lease failed", error);
        fault::point("relay-renew");
        if !tenure.renew(&mut open, self.config.lease).await.map_err(failed)? {
            return Ok(None);
        }
        let report = Report {
            holder: tenure.holder.clone(),
            epoch: tenure.epoch,
            stream: self.naming.stream.clone(),
            last_id: position.last_id,
            last_sequence: position.last_sequence,
            published: position.published,
            state: position.state,
        };
        relay_status::write(&mut open, &report).await.map_err(failed)?;
        let paused = pause::is_paused(&mut open, &[LEASE]).await.map_err(failed)?;
        *connection = Some(open);
        Ok(Some(paused))
    }

    /// Lets a standby lead at once. If it cannot be told, the lease runs out by itself.
    async fn release(&self, tenure: &Tenure) {
        let released = async {
            let mut connection = self.connect().await?;
            tenure.release(&mut connection).await.map_err(|error| database_error("releasing the lease failed", error))
        };
        match tokio::time::timeout(self.config.lease, released).await {
            Ok(Ok(())) => tracing::info!(epoch = tenure.epoch, "lease released"),
            Ok(Err(error)) => tracing::warn!(error = error.report(), "the lease will run out by itself"),
            Err(_) => tracing::warn!("the lease will run out by itself: the database does not answer"),
        }
    }

    fn sampler(&self) -> Sampler {
        Sampler {
            postgres: self.config.postgres.clone(),
            naming: self.naming.clone(),
            position: self.progress.subscribe(),
            samples: self.samples.clone(),
        }
    }

    /// Registers the relay as a NATS micro service, so that it can be found and asked with the `nats` program.
    fn service(&self, nats: Connection) -> impl Future<Output = ()> + use<> {
        let service = Service {
            name: "aftercommit-relay",
            description: "Publishes the events of an outbox to a stream",
            metadata: [("stream", self.naming.stream.clone()), ("holder", self.holder.clone())].into(),
            endpoint: "status",
            subject: format!("aftercommit.relay.{}.status", self.naming.stream),
        };
        let monitor = self.monitor();
        service::run(nats, service, move || serde_json::to_value(monitor.report()).unwrap_or_default())
    }

    async fn connect(&self) -> Result<Session, Error> {
        Ok(postgres::connect_relay(&self.config.postgres, "aftercommit-relay").await?.watched())
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("config", &self.config).field("holder", &self.holder).finish_non_exhaustive()
    }
}
