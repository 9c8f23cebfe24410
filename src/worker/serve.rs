//! The life of one subscriber in one process: stand by, take over, work, hand over.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind};
use crate::event::EventId;
use crate::fault;
use crate::health::Phase;
use crate::jetstream::ack::Answers;
use crate::jetstream::consumer::{self, ConsumerSpec, Position};
use crate::jetstream::feed::Reached;
use crate::jetstream::stored::Source;
use crate::jetstream::{Connection, feed, witness};
use crate::owner::Owner;
use crate::postgres;
use crate::postgres::attempt::{self, Left};
use crate::postgres::connections::Connections;
use crate::postgres::function::{self, FunctionName};
use crate::postgres::lease::{self, Tenure};
use crate::postgres::pause::{self, Pause};
use crate::postgres::{identity, inbox, running, start};

use super::lane::Lane;
use super::notes::Teller;
use super::progress::Progress;
use super::pruner::Pruner;
use super::reached::{Account, Places};
use super::session::{self, End, Session};
use super::subscriber::{Subscriber, Work};

/// How long a lease lasts without a sign of life, by the database's clock.
pub(super) const LEASE: Duration = Duration::from_secs(4);
/// How often the holder prolongs it.
const RENEW: Duration = Duration::from_secs(1);
/// How often a standby looks whether it is free.
const LOOK: Duration = Duration::from_millis(500);
/// What pauses all subscribers of a database.
pub(crate) const ALL: &str = "subscriber:*";

/// What its instances compete for.
pub(crate) fn lease_name(subscriber: &str) -> String {
    format!("subscriber:{subscriber}")
}

/// One subscriber with its connections.
pub(super) struct Service {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) spec: ConsumerSpec,
    pub(super) connections: Arc<Connections>,
    pub(super) nats: Connection,
    pub(super) holder: String,
    /// See [`Lane`].
    pub(super) process: Arc<RwLock<()>>,
    pub(super) remedy: String,
    pub(super) progress: Arc<Progress>,
}

impl Service {
    /// Serves until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        let teller = self.teller();
        let telling = AbortOnDropHandle::new(tokio::spawn(teller.clone().run()));
        self.serve(stop).await;
        drop(telling);
        teller.stopped().await;
    }

    fn teller(&self) -> Teller {
        Teller {
            subscriber: Arc::clone(&self.subscriber),
            connections: Arc::clone(&self.connections),
            progress: Arc::clone(&self.progress),
            instance: self.holder.clone(),
        }
    }

    async fn serve(&self, stop: CancellationToken) {
        let mut standing_by = false;
        let mut trouble = Trouble::default();
        while !stop.is_cancelled() {
            match self.acquire().await {
                Ok(Some(tenure)) => {
                    trouble.over(self.name());
                    standing_by = false;
                    self.lead(tenure, &stop).await;
                }
                Ok(None) => {
                    trouble.over(self.name());
                    if !standing_by {
                        tracing::info!(subscriber = self.name(), "another instance is active, standing by");
                    }
                    standing_by = true;
                    self.progress.rest(Phase::StandingBy, "another instance is active");
                }
                Err(error) => {
                    trouble.report(self.name(), &error);
                    self.progress.connecting(error.report());
                }
            }
            rest(&stop, LOOK).await;
        }
    }

    fn name(&self) -> &str {
        &self.subscriber.name
    }

    async fn acquire(&self) -> Result<Option<Tenure>, Error> {
        let name = lease_name(self.name());
        let acquired = self
            .connections
            .run_for_lease(async |connection| lease::acquire(connection, &name, &self.holder, LEASE).await)
            .await;
        let epoch =
            acquired.map_err(|error| postgres::database_error("the subscriber's lease cannot be looked at", error))?;
        Ok(epoch.map(|epoch| Tenure { name, holder: self.holder.clone(), epoch }))
    }

    /// Works as long as the lease is ours.
    async fn lead(&self, tenure: Tenure, stop: &CancellationToken) {
        tracing::info!(subscriber = self.name(), epoch = tenure.epoch, holder = tenure.holder, "active");
        self.progress.lead(tenure.epoch);
        let tenure = Arc::new(tenure);
        let lost = CancellationToken::new();
        let (tell, mut told) = watch::channel(None);
        let keeper =
            keep(Arc::clone(&self.connections), Arc::clone(&tenure), Arc::clone(&self.progress), lost.clone(), tell);
        let keeper = AbortOnDropHandle::new(tokio::spawn(keeper));
        let pruner = AbortOnDropHandle::new(tokio::spawn(self.pruner().run()));
        while !stop.is_cancelled() && !lost.is_cancelled() {
            let Some(pausing) = self.wait_until_resumed(&mut told, stop, &lost).await else { break };
            // A pause ends the session as a stop does: what runs finishes, the rest goes back.
            let halt = &pausing.token;
            let Some(position) = self.wait_until_ready(halt, &lost).await else { continue };
            self.progress.work();
            match self.work(&tenure, position, halt, &lost).await {
                End::Stopped => {}
                End::Fenced => lost.cancel(),
                End::Broken(reason) => {
                    tracing::warn!(subscriber = self.name(), reason, "starting over");
                    self.progress.trouble(format!("starting over: {reason}"));
                    rest(halt, RENEW).await;
                }
            }
        }
        drop((keeper, pruner));
        if lost.is_cancelled() {
            tracing::warn!(subscriber = self.name(), epoch = tenure.epoch, "another instance has taken over");
            return;
        }
        self.hand_over(&tenure).await;
    }

    /// Waits as long as the subscriber is paused, and then gives what tells of the next pause, or of the stop. None
    /// when it shall end.
    async fn wait_until_resumed(
        &self,
        told: &mut watch::Receiver<Told>,
        stop: &CancellationToken,
        lost: &CancellationToken,
    ) -> Option<Pausing> {
        let mut was_paused = false;
        loop {
            match &*told.borrow_and_update() {
                Some(Some(pause)) => {
                    let text = describe(pause);
                    if !was_paused {
                        tracing::info!(subscriber = self.name(), pause = pause.name, "{text}");
                    }
                    was_paused = true;
                    self.progress.rest(Phase::Paused, text);
                }
                Some(None) => break,
                None => {}
            }
            tokio::select! {
                () = stop.cancelled() => return None,
                () = lost.cancelled() => return None,
                changed = told.changed() => changed.ok()?,
            }
        }
        if was_paused {
            tracing::info!(subscriber = self.name(), "resumed");
            self.progress.rest(Phase::Leading, "resuming");
        }
        Some(Pausing::new(told.clone(), stop))
    }

    fn pruner(&self) -> Pruner {
        Pruner {
            subscriber: Arc::clone(&self.subscriber),
            connections: Arc::clone(&self.connections),
            source: Source::new(&self.nats, &self.spec.stream),
        }
    }

    async fn hand_over(&self, tenure: &Tenure) {
        let released = self.connections.run_for_lease(async |connection| {
            running::clear_all(connection, tenure, self.name()).await?;
            lease::release(connection, &tenure.name, &tenure.holder, tenure.epoch).await
        });
        match tokio::time::timeout(Duration::from_secs(2), released).await {
            Ok(Ok(())) => tracing::info!(subscriber = self.name(), epoch = tenure.epoch, "stopped"),
            // It runs out by itself.
            Ok(Err(error)) => {
                tracing::warn!(subscriber = self.name(), error = %error, "stopped, the lease was not released")
            }
            Err(_) => tracing::warn!(subscriber = self.name(), "stopped, the lease was not released in time"),
        }
    }

    /// Waits for what the subscriber needs, saying what is missing. None when it shall end.
    async fn wait_until_ready(&self, stop: &CancellationToken, lost: &CancellationToken) -> Option<Position> {
        let mut trouble = Trouble::default();
        loop {
            let look = async {
                if let Work::Function { function, .. } = &self.subscriber.work {
                    self.check(function).await?;
                }
                let context = self.nats.jetstream();
                let (ours, start) = self.place().await?;
                let spec = ConsumerSpec { start, ..self.spec.clone() };
                consumer::check(&context, &spec, &ours, &self.remedy).await
            };
            tokio::select! {
                () = stop.cancelled() => return None,
                () = lost.cancelled() => return None,
                found = look => match found {
                    Ok(position) => {
                        trouble.over(self.name());
                        return Some(position);
                    }
                    Err(error) => {
                        trouble.report(self.name(), &error);
                        self.progress.trouble(error.report());
                        rest(stop, Backoff::RECONNECT.after(trouble.reports)).await;
                    }
                }
            }
        }
    }

    /// The subscriber's database, and where the subscriber starts.
    async fn place(&self) -> Result<(Owner, Option<u64>), Error> {
        let found = self.connections.run(async |connection| {
            let started = start::of(connection, &self.spec.name, &self.spec.stream).await?;
            Ok((identity::owner(connection).await?, started.map(|started| started.sequence)))
        });
        found.await.map_err(|error| postgres::database_error("which database this is cannot be told", error))
    }

    async fn check(&self, function: &FunctionName) -> Result<(), Error> {
        let found = self.connections.run_for_others(async |connection| function::obstacle(connection, function).await);
        match found.await {
            Ok(None) => Ok(()),
            Ok(Some(obstacle)) => {
                Err(Error::new(ErrorKind::NotReady, format!("the function {function}(jsonb) {obstacle}")))
            }
            Err(error) => Err(postgres::database_error(format!("looking for the function {function} failed"), error)),
        }
    }

    /// Finds out which events ran when the process of a predecessor died, and reads what is on record of events.
    async fn take_over(&self, tenure: &Tenure) -> Result<HashMap<Uuid, Left>, Error> {
        let found = self.connections.run(async |connection| {
            let died = running::take_over(connection, tenure, self.name()).await?;
            Ok((died, attempt::on_record(connection, self.name()).await?))
        });
        let (died, left) = found
            .await
            .map_err(|error| postgres::database_error("what a predecessor ran cannot be looked at", error))?;
        for (event_id, crashes) in &died {
            tracing::warn!(subscriber = self.name(), %event_id, crashes, "the worker's process died while an event ran");
        }
        Ok(left.into_iter().collect())
    }

    /// Asks the inbox which events are done. When it cannot be asked, none: a lane will find out.
    fn done(&self) -> feed::Done {
        let (connections, subscriber) = (Arc::clone(&self.connections), Arc::clone(&self.subscriber));
        Box::new(move |events| {
            let (connections, subscriber) = (Arc::clone(&connections), Arc::clone(&subscriber));
            Box::pin(async move {
                let events: Vec<Uuid> = events.into_iter().map(EventId::as_uuid).collect();
                let found =
                    connections.run(async |connection| inbox::done(connection, &subscriber.name, &events).await);
                match tokio::time::timeout(LEASE, found).await {
                    Ok(Ok(found)) => found.into_iter().map(EventId::from).collect(),
                    _ => HashSet::new(),
                }
            })
        })
    }

    async fn work(
        &self,
        tenure: &Arc<Tenure>,
        position: Position,
        stop: &CancellationToken,
        lost: &CancellationToken,
    ) -> End {
        let on_record = match self.take_over(tenure).await {
            Ok(on_record) => on_record,
            Err(error) => return End::Broken(error.report()),
        };
        let context = self.nats.jetstream();
        let lane = Lane {
            subscriber: Arc::clone(&self.subscriber),
            connections: Arc::clone(&self.connections),
            source: Source::new(&self.nats, &self.spec.stream),
            tenure: Arc::clone(tenure),
            process: Arc::clone(&self.process),
            progress: Arc::clone(&self.progress),
            number: 0,
            alone: false,
        };
        let stream = witness::Stream::new(&context, &self.spec.stream);
        let (places, known) = match Places::load(&self.connections, self.name(), &stream).await {
            Ok(loaded) => loaded,
            Err(error) => return End::Broken(error.report()),
        };
        let reached = (known && !fault::broken("ack after commit")).then(|| Reached(places.newest()));
        let account = Account::new(&self.connections, self.name(), &self.spec.stream, places);
        let budget = session::budget(&lane);
        let ack_wait = position.ack_wait;
        let feed = feed::start(&self.nats, &self.spec, position, reached, &budget, self.done());
        let answers = Answers::start(&self.nats.client);
        Session::new(lane, on_record, answers, budget, account).run(feed, ack_wait, stop, lost).await
    }
}

/// What the keeper saw last: nothing yet, no pause, or a pause.
type Told = Option<Option<Pause>>;

/// A token that is cancelled when the subscriber is paused or stopped.
struct Pausing {
    token: CancellationToken,
    _watch: AbortOnDropHandle<()>,
}

impl Pausing {
    fn new(mut told: watch::Receiver<Told>, stop: &CancellationToken) -> Self {
        let token = stop.child_token();
        let pausing = token.clone();
        let watch = async move {
            if told.wait_for(|told| matches!(told, Some(Some(_)))).await.is_ok() {
                pausing.cancel();
            }
        };
        Self { token, _watch: AbortOnDropHandle::new(tokio::spawn(watch)) }
    }
}

/// `paused by me: the shop is closed`.
fn describe(pause: &Pause) -> String {
    let Pause { name, by, reason, .. } = pause;
    let all = if name == ALL { " with all subscribers" } else { "" };
    let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("paused{all} by {by}{reason}")
}

/// Prolongs the lease until somebody else has it, and tells whether the subscriber is paused. While the database is away
/// nobody can take the lease either, and nothing can be committed: so that is waited out.
async fn keep(
    connections: Arc<Connections>,
    tenure: Arc<Tenure>,
    progress: Arc<Progress>,
    lost: CancellationToken,
    tell: watch::Sender<Told>,
) {
    loop {
        let looked = connections.run_for_lease(async |connection| {
            let ours = lease::renew(connection, &tenure.name, &tenure.holder, tenure.epoch, LEASE).await?;
            Ok((ours, pause::first(connection, &[&tenure.name, ALL]).await?))
        });
        match tokio::time::timeout(LEASE, looked).await {
            Ok(Ok((true, pause))) => {
                progress.database(None);
                tell.send_if_modified(|told| {
                    let changed = told.as_ref() != Some(&pause);
                    *told = Some(pause);
                    changed
                });
            }
            Ok(Ok((false, _))) => {
                lost.cancel();
                return;
            }
            Ok(Err(error)) => {
                tracing::debug!(lease = tenure.name, error = %error, "the lease was not prolonged");
                progress.database(Some(postgres::database_error("the lease cannot be prolonged", error).report()));
            }
            Err(_) => {
                tracing::debug!(lease = tenure.name, "the lease was not prolonged in time");
                progress.database(Some("PostgreSQL does not answer".into()));
            }
        }
        tokio::time::sleep(RENEW).await;
    }
}

/// Says once what is wrong, again when that changes or has lasted, and when it is over.
#[derive(Default)]
struct Trouble {
    last: String,
    reports: u32,
}

impl Trouble {
    fn report(&mut self, subscriber: &str, error: &Error) {
        let text = error.report();
        self.reports = self.reports.saturating_add(1);
        if self.last != text || self.reports.is_multiple_of(30) {
            tracing::error!(subscriber, error = text, "not ready, waiting");
        }
        self.last = text;
    }

    fn over(&mut self, subscriber: &str) {
        if self.reports > 0 {
            tracing::info!(subscriber, "ready");
        }
        *self = Self::default();
    }
}

async fn rest(stop: &CancellationToken, time: Duration) {
    let _ = tokio::time::timeout(time, stop.cancelled()).await;
}
