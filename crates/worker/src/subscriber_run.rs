//! One term of service of a subscriber in this process: stand by, take over, work, hand over.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::health::Phase;
use aftercommit_core::jetstream::ack::Answers;
use aftercommit_core::jetstream::consumer::{self, ConsumerSpec, Position};
use aftercommit_core::jetstream::feed::Reached;
use aftercommit_core::jetstream::stored::Source;
use aftercommit_core::jetstream::{Connection, feed, witness};
use aftercommit_core::owner::Owner;
use aftercommit_core::postgres;
use aftercommit_core::postgres::attempt::{self, Left};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::function::{self, FunctionName};
use aftercommit_core::postgres::lease::{self, Tenure, Term};
use aftercommit_core::postgres::pause::{self, Pause};
use aftercommit_core::postgres::{identity, inbox, running, start};
use aftercommit_outbox::event::EventId;

use super::dispatcher::{self, Dispatcher, End};
use super::elsewhere::{self, Elsewhere};
use super::executor::Executor;
use super::progress::Progress;
use super::reached::{Account, WrittenPlaces};
use super::retention::Retention;
use super::subscriber::{Subscriber, Work};
use super::teller::Teller;
use aftercommit_core::subscription::{ALL, lease_name};

/// How long a lease lasts without a sign of life, by the database's clock.
pub(super) const LEASE: Duration = Duration::from_secs(4);
/// How often the holder renews it.
const RENEW: Duration = Duration::from_secs(1);
/// How often a standby looks whether it is free.
const LOOK: Duration = Duration::from_millis(500);

/// One subscriber at work, with its connections.
pub(super) struct SubscriberRun {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) spec: ConsumerSpec,
    pub(super) connections: Arc<Connections>,
    pub(super) nats: Connection,
    pub(super) holder: String,
    /// See [`Executor`].
    pub(super) process: Arc<RwLock<()>>,
    pub(super) remedy: String,
    pub(super) progress: Arc<Progress>,
}

impl SubscriberRun {
    /// Stands by or works until `stop`, and tells operators about it.
    pub(super) async fn run(self, stop: CancellationToken) {
        let teller = self.teller();
        let telling = AbortOnDropHandle::new(tokio::spawn(teller.clone().run()));
        self.stand_by_and_lead(stop).await;
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

    async fn stand_by_and_lead(&self, stop: CancellationToken) {
        let mut standing_by = false;
        let mut readiness = ReadinessLog::default();
        let mut term = Term::new(LEASE);
        while !stop.is_cancelled() {
            match self.acquire(&mut term).await {
                Ok(Some(tenure)) => {
                    readiness.over(self.name());
                    standing_by = false;
                    term = self.lead(tenure, term, &stop).await;
                }
                Ok(None) => {
                    readiness.over(self.name());
                    if !standing_by {
                        tracing::info!(subscriber = self.name(), "another instance is active, standing by");
                    }
                    standing_by = true;
                    self.progress.rest(Phase::StandingBy, "another instance is active");
                }
                Err(error) => {
                    readiness.report(self.name(), &error);
                    self.progress.connecting(error.report());
                }
            }
            rest(&stop, LOOK).await;
        }
    }

    fn name(&self) -> &str {
        &self.subscriber.name
    }

    async fn acquire(&self, term: &mut Term) -> Result<Option<Tenure>, Error> {
        let name = lease_name(self.name());
        let (asked, ttl) = (Instant::now(), term.ask_for());
        let acquired = self
            .connections
            .run_for_lease(async |connection| lease::acquire(connection, &name, &self.holder, ttl).await)
            .await;
        term.took(asked.elapsed());
        acquired.map_err(|error| postgres::database_error("asking for the subscriber's lease failed", error))
    }

    /// Works as long as the lease is ours, and returns how long the next one should last.
    async fn lead(&self, tenure: Tenure, term: Term, stop: &CancellationToken) -> Term {
        tracing::info!(subscriber = self.name(), epoch = tenure.epoch, holder = tenure.holder, "active");
        self.progress.lead(tenure.epoch);
        let tenure = Arc::new(tenure);
        let lost = CancellationToken::new();
        let (tell, mut told) = watch::channel(None);
        let (term, learnt) = watch::channel(term);
        let keeper = Keeper {
            connections: Arc::clone(&self.connections),
            tenure: Arc::clone(&tenure),
            progress: Arc::clone(&self.progress),
            term,
            lost: lost.clone(),
            tell,
        };
        let mut beside = Some((
            AbortOnDropHandle::new(tokio::spawn(keeper.keep())),
            AbortOnDropHandle::new(tokio::spawn(self.retention(&tenure).run())),
        ));
        while !stop.is_cancelled() && !lost.is_cancelled() {
            let Some(pausing) = self.wait_until_resumed(&mut told, stop, &lost).await else { break };
            // A pause ends the dispatcher's work as a stop does: what runs finishes, the rest goes back.
            let halt = &pausing.token;
            let Some(position) = self.wait_until_ready(halt, &lost).await else { continue };
            self.progress.work();
            let end = match self.work(&tenure, position, halt, &lost).await {
                Err(reason) => End::Broken(reason),
                Ok((end, dispatcher)) => {
                    // Whoever stands by need not wait for the slowest handler.
                    if end == End::Stopped && stop.is_cancelled() && beside.take().is_some() {
                        self.hand_over(&tenure).await;
                    }
                    dispatcher.finish(end).await
                }
            };
            match end {
                End::Stopped => {}
                End::Fenced => lost.cancel(),
                End::Broken(reason) => {
                    tracing::warn!(subscriber = self.name(), reason, "the subscriber starts again");
                    self.progress.trouble(format!("the subscriber starts again: {reason}"));
                    rest(halt, RENEW).await;
                }
            }
        }
        let learnt = learnt.borrow().clone();
        if lost.is_cancelled() {
            tracing::warn!(subscriber = self.name(), epoch = tenure.epoch, "another instance has taken over");
            return learnt;
        }
        if beside.take().is_some() {
            self.hand_over(&tenure).await;
        }
        self.clear(&tenure).await;
        learnt
    }

    /// Waits as long as the subscriber is paused, and then gives what tells of the next pause, or of the stop. None
    /// when it shall end.
    async fn wait_until_resumed(
        &self,
        told: &mut watch::Receiver<KnownPause>,
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

    fn retention(&self, tenure: &Tenure) -> Retention {
        Retention {
            holder: tenure.holder.clone(),
            subscriber: Arc::clone(&self.subscriber),
            connections: Arc::clone(&self.connections),
            source: Source::new(&self.nats, &self.spec.stream),
        }
    }

    /// Gives the lease up. What runs here goes on, and its keys wait for it at the successor.
    async fn hand_over(&self, tenure: &Tenure) {
        let released = self.connections.run_for_lease(async |connection| tenure.release(connection).await);
        match tokio::time::timeout(Duration::from_secs(2), released).await {
            Ok(Ok(())) => tracing::info!(subscriber = self.name(), epoch = tenure.epoch, "handed over"),
            // It runs out by itself.
            Ok(Err(error)) => {
                tracing::warn!(subscriber = self.name(), error = %error, "stopping, the lease was not released")
            }
            Err(_) => tracing::warn!(subscriber = self.name(), "stopping, the lease was not released in time"),
        }
    }

    /// Removes what executors could not remove. Nothing runs any more.
    async fn clear(&self, tenure: &Tenure) {
        let cleared =
            self.connections.run(async |connection| running::clear_all(connection, tenure, self.name()).await);
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), cleared).await {
            tracing::debug!(subscriber = self.name(), %error, "markers of batches that have ended were not removed");
        }
        tracing::info!(subscriber = self.name(), epoch = tenure.epoch, "stopped");
    }

    /// Waits for what the subscriber needs, saying what is missing. None when it shall end.
    async fn wait_until_ready(&self, stop: &CancellationToken, lost: &CancellationToken) -> Option<Position> {
        let mut readiness = ReadinessLog::default();
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
                        readiness.over(self.name());
                        return Some(position);
                    }
                    Err(error) => {
                        readiness.report(self.name(), &error);
                        self.progress.trouble(error.report());
                        rest(stop, Backoff::RECONNECT.after(readiness.reports)).await;
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
        found.await.map_err(|error| postgres::database_error("asking which database this is failed", error))
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

    /// Finds out which events ran when the process of a predecessor died and which ones it still runs, and reads what is on
    /// record of events.
    async fn take_over(&self, tenure: &Arc<Tenure>) -> Result<(HashMap<Uuid, Left>, Elsewhere), Error> {
        let found = self.connections.run(async |connection| {
            let died = running::take_over(connection, tenure, self.name()).await?;
            let elsewhere = running::elsewhere(connection, tenure, self.name()).await?;
            Ok((died, elsewhere, attempt::on_record(connection, self.name()).await?))
        });
        let (died, elsewhere, left) =
            found.await.map_err(|error| postgres::database_error("reading what a predecessor ran failed", error))?;
        for (event_id, crashes) in &died {
            tracing::warn!(subscriber = self.name(), %event_id, crashes, "{}", elsewhere::LEFT);
        }
        let elsewhere = Elsewhere::new(elsewhere, &self.connections, tenure, self.name());
        Ok((left.into_iter().collect(), elsewhere))
    }

    /// Asks the inbox which events are done. When it cannot be asked, none: an executor will find out.
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

    /// Works until the dispatcher ends, or says why none could begin. What it runs then goes on.
    async fn work(
        &self,
        tenure: &Arc<Tenure>,
        position: Position,
        stop: &CancellationToken,
        lost: &CancellationToken,
    ) -> Result<(End, Dispatcher), String> {
        let left = self.take_over(tenure).await.map_err(|error| error.report())?;
        let context = self.nats.jetstream();
        let executor = Executor {
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
        let loaded = WrittenPlaces::load(&self.connections, self.name(), &stream).await;
        let (places, known) = loaded.map_err(|error| error.report())?;
        let reached = (known && !fault::broken("ack after commit")).then(|| Reached(places.newest()));
        let account = Account::new(&self.connections, self.name(), &self.spec.stream, places);
        let budget = dispatcher::budget(&executor);
        let ack_wait = position.ack_wait;
        let feed = feed::start(&self.nats, &self.spec, position, reached, &budget, self.done());
        let answers = Answers::start(&self.nats.client);
        let mut dispatcher = Dispatcher::new(executor, left, answers, budget, account);
        let end = dispatcher.run(feed, ack_wait, stop, lost).await;
        Ok((end, dispatcher))
    }
}

/// What the keeper saw last: nothing yet, no pause, or a pause.
type KnownPause = Option<Option<Pause>>;

/// A token that is cancelled when the subscriber is paused or stopped.
struct Pausing {
    token: CancellationToken,
    _watch: AbortOnDropHandle<()>,
}

impl Pausing {
    fn new(mut told: watch::Receiver<KnownPause>, stop: &CancellationToken) -> Self {
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

/// Renews the lease until somebody else has it, and tells whether the subscriber is paused. While the database is away
/// nobody can take the lease either, and nothing can be committed: so that is waited out.
struct Keeper {
    connections: Arc<Connections>,
    tenure: Arc<Tenure>,
    progress: Arc<Progress>,
    term: watch::Sender<Term>,
    lost: CancellationToken,
    tell: watch::Sender<KnownPause>,
}

impl Keeper {
    async fn keep(self) {
        loop {
            let (asked, patience) = (Instant::now(), self.term.borrow().ask_for());
            let renewed = tokio::time::timeout(patience, self.renew(patience)).await;
            self.term.send_modify(|term| term.took(asked.elapsed()));
            match renewed {
                Ok(Ok((true, pause))) => {
                    self.progress.database(None);
                    self.tell.send_if_modified(|told| {
                        let changed = told.as_ref() != Some(&pause);
                        *told = Some(pause);
                        changed
                    });
                }
                Ok(Ok((false, _))) => {
                    self.lost.cancel();
                    return;
                }
                Ok(Err(error)) => {
                    tracing::debug!(lease = self.tenure.name, error = %error, "the lease was not renewed");
                    let error = postgres::database_error("renewing the subscriber's lease failed", error);
                    self.progress.database(Some(error.report()));
                }
                // The next one may take longer.
                Err(_) => {
                    tracing::debug!(lease = self.tenure.name, "the lease was not renewed in time");
                    self.progress.database(Some("PostgreSQL does not answer".into()));
                }
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Whether the lease is still ours, and what pauses the subscriber.
    async fn renew(&self, ttl: Duration) -> Result<(bool, Option<Pause>), sqlx::Error> {
        let tenure = &self.tenure;
        let renewed = self.connections.run_for_lease(async |connection| {
            let ours = tenure.renew(connection, ttl).await?;
            Ok((ours, pause::first(connection, &[&tenure.name, ALL]).await?))
        });
        renewed.await
    }
}

/// Says once what is wrong, again when that changes or has lasted, and when it is over.
#[derive(Default)]
struct ReadinessLog {
    last: String,
    reports: u32,
}

impl ReadinessLog {
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
