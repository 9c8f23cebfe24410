//! The leading relay: opens windows and sees each one into the stream.

mod ids;
pub(super) mod repairs;
mod restamp;
pub(super) mod resume;
mod rewind;
mod room;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::batch::BatchPump;
use super::cause::{Cause, ToldCause, unreadable};
use super::chain::{Doubt, Sent};
use super::classify::Class;
use super::config::{ParkPolicy, RelayConfig};
use super::fence::fenced;
use super::guard;
use super::in_flight::InFlight;
use super::method::ActivePublishMethod;
use super::polling::{self, Polling};
use super::progress::Progress;
use super::pump::{Checks, Limits, Pump, Pumped, Setting};
use super::reader::{Exceptions, Prepared, Reader, Remainder};
use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::Naming;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::health::Phase;
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::publisher::Publisher;
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::postgres::fence::Written;
use aftercommit_core::postgres::relay_log::{self, Appended, Base, Opening, State};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::window::Watch;
use aftercommit_core::postgres::{database_error, parked};
use aftercommit_core::relay::Mode;
use repairs::Repairs;
use resume::{Found, There, note};

/// After so long without news the window is closed in the log, and its mark moves past transactions that came to
/// nothing. Also how often the leader looks whether keys wait for nothing any more.
const REST: Duration = Duration::from_secs(1);
/// So many ids that were handed out and not committed move the mark at once, so that looks stay cheap.
const MANY_IDS: i64 = 1000;
/// So many blocked keys are looked at at a time.
const KEYS: usize = 1000;
/// How often a leader looks, between two windows, whether the stream is still as it left it.
const STREAM_LOOK: Duration = Duration::from_secs(5);
/// Waits between tries when the stream is full or a setting is wrong.
pub(super) const SLOW: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(5) };

/// The server's error when a batch holds a message that the stream has already.
const REPEAT_IN_BATCH: u64 = 10201;

/// Its error when it is about to store a message of this id, or believes so.
const ID_IN_PROCESS: u64 = 10158;

/// A leader's tools and state. It is dropped, wherever it is, when the lease is lost.
pub(super) struct Leader<'a> {
    pub(super) config: &'a RelayConfig,
    /// Under which it leads.
    pub(super) epoch: i64,
    pub(super) naming: Arc<Naming>,
    pub(super) connection: &'a Connection,
    pub(super) log: Session,
    pub(super) reader: Arc<Mutex<Session>>,
    pub(super) publisher: Publisher,
    pub(super) stream: StreamReader,
    pub(super) state: State,
    /// Looks for what `state` does not hold.
    pub(super) watch: Option<Watch>,
    /// Whether the open window may have events that are not in the stream yet.
    pub(super) unfinished: bool,
    /// What is in flight; none when the stream must be looked at first.
    pub(super) in_flight: Option<InFlight>,
    /// In a shared stream: the outbox id up to which the open window is known to be stored.
    pub(super) stored_up_to: i64,
    /// Where the stream ended when that was learnt.
    pub(super) stored_end: u64,
    /// What was found in the stream behind the base.
    pub(super) found: Found,
    /// When the stream was created; none until it was looked at.
    pub(super) stream_created: Option<DateTime<Utc>>,
    pub(super) exceptions: Exceptions,
    /// How many of the blocked keys have been looked at in this round.
    pub(super) unblocked: usize,
    /// The stream may hold events of the window in no known order.
    pub(super) disordered: bool,
    pub(super) repairs: Repairs,
    pub(super) method: ActivePublishMethod,
    pub(super) cause: Cause,
    pub(super) progress: &'a Progress,
    pub(super) paused: watch::Receiver<bool>,
    /// Whether the stream's settings would lose events at present.
    pub(super) unfit: watch::Receiver<bool>,
    /// Since when events are too large that would not be by default; none when none is.
    pub(super) limit_since: Option<Instant>,
    pub(super) shutdown: &'a CancellationToken,
}

impl Leader<'_> {
    /// Publishes until shutdown, until everything is published when it was asked for no more, or until an error ends
    /// the leadership.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        self.restamp_if_restored().await?;
        self.load_parked().await?;
        let mut polling = Polling::new(self.config.idle_poll, std::time::Instant::now());
        let mut last_news = Instant::now();
        let mut last_rest = Instant::now();
        let mut last_stream_look = Instant::now();
        while !self.shutdown.is_cancelled() {
            if *self.paused.borrow() {
                self.progress.enter(Phase::Paused, "paused");
                self.wait_while_paused().await;
                self.progress.enter(Phase::Leading, "resumed");
                continue;
            }
            if self.unfinished || self.in_flight.is_none() {
                self.progress.state("publishing");
                self.finish().await?;
                continue;
            }
            if last_stream_look.elapsed() > STREAM_LOOK {
                last_stream_look = Instant::now();
                self.look_at_stream().await;
                continue;
            }
            if last_rest.elapsed() > REST {
                last_rest = Instant::now();
                self.unblock_keys().await?;
            }
            if self.publish_repairs().await? {
                continue;
            }
            let look = self.look().await?;
            let unseen = look.last_id - self.handled().last_id;
            if !look.orderly || unseen < 0 {
                self.correct_ids().await?;
            }
            if look.news || unseen > MANY_IDS {
                self.open().await?;
                if look.news {
                    polling.news(std::time::Instant::now());
                    last_news = Instant::now();
                }
                continue;
            }
            if self.config.once && !self.repairs.any_waiting() {
                return self.settle().await;
            }
            if last_news.elapsed() > REST {
                last_news = Instant::now();
                if unseen > 0 {
                    self.open().await?;
                    continue;
                }
                self.settle().await?;
            }
            self.progress.idle();
            let pause = polling.pause(std::time::Instant::now());
            tokio::select! {
                () = polling::sleep(pause) => {}
                () = self.shutdown.cancelled() => {}
            }
        }
        Ok(())
    }

    async fn wait_while_paused(&mut self) {
        let shutdown = self.shutdown;
        tokio::select! {
            // The sender lives as long as this leader.
            _ = self.paused.wait_for(|paused| !paused) => {}
            () = shutdown.cancelled() => {}
        }
    }

    pub(super) async fn rest(&self, wait: Duration) {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    /// Up to where every event is in the stream.
    pub(super) fn handled(&self) -> &Mark {
        self.state.target.as_ref().unwrap_or(&self.state.settled)
    }

    /// Opens the next window, unless the stream must be looked at first.
    pub(super) async fn open(&mut self) -> Result<(), Error> {
        match self.base() {
            Some(base) => self.open_window(&base, Opening::Next).await,
            None => Ok(()),
        }
    }

    pub(super) async fn open_window(&mut self, base: &Base, opening: Opening) -> Result<(), Error> {
        fault::point("relay-before-barrier");
        let appended = relay_log::open_window(&mut self.log, &self.state, base, opening).await;
        self.append(appended)?;
        fault::point("relay-after-barrier");
        self.exceptions.present.clear();
        self.exceptions.renamed.clear();
        self.exceptions.forged.clear();
        self.method.go_on();
        self.exceptions.found = Arc::default();
        self.found = Found::default();
        (self.stored_up_to, self.stored_end) = (0, 0);
        self.unfinished = true;
        Ok(())
    }

    /// Where the next window begins; none when the stream must be looked at first.
    fn base(&self) -> Option<Base> {
        let sequence = self.in_flight.as_ref()?.sequence();
        Some(Base { stream: self.naming.stream.clone(), created: self.stream_created?, sequence })
    }

    /// Writes down that everything is handled, unless it is written or the stream must be looked at first.
    async fn settle(&mut self) -> Result<(), Error> {
        if let (Some(_), Some(base)) = (&self.state.target, self.base()) {
            let appended = relay_log::settle(&mut self.log, &self.state, &base).await;
            self.append(appended)?;
            fault::point("relay-settled");
        }
        Ok(())
    }

    pub(super) async fn load_parked(&mut self) -> Result<(), Error> {
        let parked = parked::load(&mut self.log).await.map_err(reading_parked)?;
        self.exceptions.last_parked.fetch_max(parked.last_id, Ordering::Relaxed);
        self.exceptions.blocked_keys = Arc::new(match self.config.park_policy {
            ParkPolicy::Block => parked.keys,
            ParkPolicy::Skip => HashSet::new(),
        });
        Ok(())
    }

    /// Lets those keys go of which nothing is parked any more, a bounded number at a time.
    async fn unblock_keys(&mut self) -> Result<(), Error> {
        let Exceptions { blocked_keys, .. } = &self.exceptions;
        if blocked_keys.is_empty() {
            return Ok(());
        }
        let keys: Vec<&str> = blocked_keys
            .iter()
            .map(String::as_str)
            .cycle()
            .skip(self.unblocked)
            .take(KEYS.min(blocked_keys.len()))
            .collect();
        self.unblocked = (self.unblocked + keys.len()) % blocked_keys.len();
        let keys: Vec<String> = keys.into_iter().map(String::from).collect();
        self.unblock(&keys).await
    }

    /// The same for these keys.
    pub(super) async fn unblock(&mut self, keys: &[String]) -> Result<(), Error> {
        let free = parked::let_go(&mut self.log, self.epoch, keys).await.map_err(reading_parked)?.ok_or_else(fenced)?;
        if !free.is_empty() {
            let blocked = Arc::make_mut(&mut self.exceptions.blocked_keys);
            free.iter().for_each(|key| _ = blocked.remove(key));
        }
        Ok(())
    }

    /// How many rows a fenced write has changed.
    pub(super) fn led(&self, written: Result<Written, sqlx::Error>, doing: &str) -> Result<u64, Error> {
        match written.map_err(|error| database_error(format!("{doing} failed"), error))? {
            Written::Rows(rows) => Ok(rows),
            Written::Fenced => Err(fenced()),
        }
    }

    pub(super) fn append(&mut self, appended: Result<Appended, sqlx::Error>) -> Result<(), Error> {
        match appended.map_err(|error| database_error("writing the relay's log failed", error))? {
            Appended::Yes(state) => {
                self.state = *state;
                Ok(())
            }
            Appended::Fenced => Err(fenced()),
        }
    }

    /// Sees every event of the open window into the stream, whatever happens to the connection on the way.
    async fn finish(&mut self) -> Result<(), Error> {
        let mut failures = 0;
        let mut after = 0;
        while !self.shutdown.is_cancelled() && !*self.paused.borrow() {
            if self.in_flight.is_none() {
                match self.resume().await {
                    Ok(last) => after = last,
                    Err(_) if self.shutdown.is_cancelled() => return Ok(()),
                    Err(error) if matches!(error.kind(), ErrorKind::Database | ErrorKind::Fenced) => return Err(error),
                    Err(error) => {
                        failures += 1;
                        let remedy = unreadable(&error, failures, self.connection.is_up());
                        let way_out = remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
                        self.progress.state(format!("waiting for the stream: {}{way_out}", error.report()));
                        tracing::warn!(error = error.report(), remedy, "cannot go on with the stream, trying again");
                        self.rest(Backoff::RECONNECT.after(failures)).await;
                        continue;
                    }
                }
            }
            let Some(target) = self.state.target.clone() else {
                self.unfinished = false;
                return Ok(());
            };
            let before = self.in_flight.as_ref().map_or(0, InFlight::sequence);
            let unfit = guard::turns_unfit(self.unfit.clone());
            let pumped = tokio::select! {
                pumped = self.pump(target, after) => pumped?,
                // Whatever is on its way is found again when the settings are mended.
                () = unfit => Pumped::Stopped,
            };
            match pumped {
                Pumped::Done => {
                    fault::point("relay-window-done");
                    self.progress.window_done();
                    self.unfinished = false;
                    if self.state.scattered {
                        self.report_caught_up();
                        self.settle().await?;
                    }
                    return Ok(());
                }
                Pumped::Stopped => {
                    self.in_flight = None;
                    self.publisher.restart();
                }
                Pumped::Doubt(doubt) if self.waits_for_room(&doubt, failures + 1).await => failures += 1,
                Pumped::Doubt(doubt) => {
                    let went_on = self.in_flight.as_ref().is_some_and(|in_flight| in_flight.sequence() > before);
                    failures = if went_on { 1 } else { failures + 1 };
                    let class = self.interrupted(&doubt);
                    self.deal_with(&doubt, class, failures).await?;
                }
            }
        }
        Ok(())
    }

    async fn pump(&mut self, target: Mark, after: i64) -> Result<Pumped, Error> {
        let (chunks, received) = mpsc::channel(1);
        let remainder = Remainder { settled: self.state.settled.clone(), target, after };
        let reader = Reader {
            connection: self.reader.clone(),
            naming: self.naming.clone(),
            exceptions: self.exceptions.clone(),
            epoch: self.epoch,
            shared: self.config.mode == Mode::Shared,
        };
        let reader = tokio::spawn(reader.run(remainder, chunks));
        let pumped = self.publish(received, None).await;
        // It has ended or ends at its next send, since nobody listens any more.
        reader.await.map_err(|error| Error::with_source(ErrorKind::Database, "the outbox reader failed", error))?;
        pumped
    }

    pub(super) async fn publish(
        &mut self,
        mut chunks: mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        stored: Option<mpsc::UnboundedSender<Sent>>,
    ) -> Result<Pumped, Error> {
        let (publisher, mut waiting) = (&mut self.publisher, VecDeque::new());
        let Some(in_flight) = &mut self.in_flight else { return Ok(Pumped::Stopped) };
        let messages = if self.method.is_one_at_a_time() { 1 } else { self.config.max_in_flight };
        let setting = Setting {
            connection: self.connection,
            progress: self.progress,
            limits: Limits { messages, ack_timeout: self.config.ack_timeout },
            paused: self.paused.clone(),
            shutdown: self.shutdown,
            stored,
        };
        if !self.method.batches() || matches!(in_flight, InFlight::Keyed(_)) {
            let (watch, stream) = (self.method.watch(), &self.stream);
            let pump =
                Pump { publisher, in_flight, setting: setting.clone(), watch, stream, checks: Checks::default() };
            let (pumped, stored_up_to) = pump.run(&mut chunks, &mut waiting).await?;
            self.stored_up_to = self.stored_up_to.max(stored_up_to);
            self.stored_end = in_flight.sequence();
            if let Some(pumped) = pumped {
                return Ok(pumped);
            }
        }
        match in_flight {
            InFlight::Chained(chain) => BatchPump { publisher, chain, setting }.run(&mut chunks, waiting).await,
            // Its pace changes nothing, so its pump tells how it ended.
            InFlight::Keyed(_) => Ok(Pumped::Stopped),
        }
    }

    /// Takes in that publishing was interrupted, and says why. The stream must be looked at next.
    pub(super) fn interrupted(&mut self, doubt: &Doubt) -> Class {
        let end = self.in_flight.take().map_or(0, |in_flight| in_flight.sequence());
        self.publisher.restart();
        let told = self.cause.of(doubt, end);
        self.progress.interrupted(&told);
        let (event_id, outbox_id) = match doubt.event() {
            Some(event) => (Some(event.event_id.to_string()), Some(event.outbox_id)),
            None => (None, None),
        };
        let ToldCause { class, code, error, remedy } = told;
        let label = class.label();
        match class {
            Class::Alarm | Class::Park => {
                tracing::error!(event_id, outbox_id, code, class = label, error = %error, remedy, "publishing was interrupted");
            }
            _ => {
                tracing::warn!(event_id, outbox_id, code, class = label, error = %error, remedy, "publishing was interrupted")
            }
        }
        class
    }

    /// Does what the class of a doubt asks for, so that the next try can get further.
    async fn deal_with(&mut self, doubt: &Doubt, class: Class, failures: u32) -> Result<(), Error> {
        let batched = self.method.batches();
        match (class, doubt) {
            // The answer is for the batch. One by one it shows which event is meant.
            (Class::Park | Class::Alarm, Doubt::Refused { .. }) | (_, Doubt::Refused { code: REPEAT_IN_BATCH, .. })
                if batched =>
            {
                self.method.single_out();
                return Ok(());
            }
            // Before 2.12 a stream with replicas keeps the id of a message that it has refused, until its duplicate window
            // is over. The sequence that a message names keeps a repeat out as well.
            (_, Doubt::Refused { event, code: ID_IN_PROCESS, .. })
                if failures > 1 && !batched && self.config.mode == Mode::Exclusive =>
            {
                let id = format!("{}:r{}", event.event_id, uuid::Uuid::now_v7().simple());
                self.exceptions.renamed.insert(event.outbox_id, id);
            }
            (_, Doubt::Refused { .. }) if batched && failures > 1 => self.method.single_out(),
            (_, Doubt::Unbatched) => {
                self.method.is_unable();
                // What it stored by itself was checked by nothing.
                self.disordered = true;
            }
            (Class::Park, _) => {
                if let Some(event) = doubt.event() {
                    fault::point("relay-parking");
                    let (code, reason) = (Some(doubt.code().unwrap_or(0)), doubt.to_string());
                    let parked = parked::park(&mut self.log, self.epoch, &[event.outbox_id], code, &reason).await;
                    self.led(parked, "parking an event")?;
                    self.exceptions.last_parked.fetch_max(event.outbox_id, Ordering::Relaxed);
                    if let (Some(key), ParkPolicy::Block) = (&event.key, self.config.park_policy) {
                        Arc::make_mut(&mut self.exceptions.blocked_keys).insert(key.clone());
                    }
                }
            }
            (_, Doubt::Duplicate { event, sequence }) => self.repeated(event, *sequence).await?,
            (Class::BackPressure | Class::Alarm, _) => self.rest(SLOW.after(failures)).await,
            // The first look costs nothing, and most often it is the answer.
            _ if failures <= 1 => {}
            _ => self.rest(Backoff::RECONNECT.after(failures)).await,
        }
        if !batched {
            self.method.go_on();
        }
        Ok(())
    }

    /// The server took an event for a repeat. Either it is in the stream, or only its id is known there: of a message that
    /// is gone, or of one that somebody else has written.
    async fn repeated(&mut self, event: &Sent, sequence: u64) -> Result<(), Error> {
        let (event_id, outbox_id) = (event.event_id, event.outbox_id);
        match self.look_for(event, sequence).await? {
            Some(There::Event) => {
                tracing::warn!(%event_id, outbox_id, sequence, "the event is in the stream already, going on behind it");
                self.exceptions.present.insert(outbox_id);
            }
            Some(there) => {
                tracing::warn!(%event_id, outbox_id, sequence, "{there}; publishing the event anew");
                self.exceptions.renamed.insert(outbox_id, format!("{event_id}:r{sequence}"));
                if there == There::Forgery {
                    note(&mut self.exceptions.forged, outbox_id, sequence);
                }
            }
            // It is asked again at the next try.
            None => {}
        }
        Ok(())
    }
}

fn reading_parked(error: sqlx::Error) -> Error {
    database_error("reading the parked events failed", error)
}
