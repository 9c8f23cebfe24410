//! The leading relay: opens windows and sees each one into the stream.

mod ids;
pub(super) mod repairs;
mod restamp;
pub(super) mod resume;
mod rewind;
mod room;
pub(super) mod tail;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::batch::BatchPump;
use super::cause::{Cause, ToldCause, unreadable};
use super::chain::{Doubt, Sent};
use super::classify::Class;
use super::config::{ParkPolicy, RelayConfig};
use super::fence::fenced;
use super::in_flight::InFlight;
use super::method::ActivePublishMethod;
use super::polling::{self, Polling};
use super::progress::Progress;
use super::pump::{Checks, Limits, Pump, Pumped, Setting};
use super::reader::{Exceptions, Prepared, Reader, Remainder};
use super::signals::Signals;
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
use tail::Tail;

/// After so long without new events the leader writes into the log that the window is done, and its mark moves past
/// transactions that were rolled back. Also how often it looks for keys that no longer have a parked event.
const REST: Duration = Duration::from_secs(1);
/// After so many ids that were taken and not committed the mark moves at once, so that looks stay cheap.
const MANY_IDS: i64 = 1000;
/// So many blocked keys are looked at at a time.
const KEYS: usize = 1000;
/// How often a leader looks, between two windows, whether the stream is still as it left it.
const STREAM_LOOK: Duration = Duration::from_secs(5);
/// Waits between tries when the stream is full or a setting is wrong.
pub(super) const SLOW: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(5) };

/// The server's error when a batch holds a message that the stream has already.
const REPEAT_IN_BATCH: u64 = 10201;

/// Its error when it believes that it is storing a message of this id at the moment.
const ID_IN_PROCESS: u64 = 10158;

/// A relay that holds the lease. It is dropped at any await when the lease is lost.
pub(super) struct Leader<'a> {
    pub(super) config: &'a RelayConfig,
    /// The epoch of its lease.
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
    pub(super) tail: Tail,
    /// What was found in the stream behind the base.
    pub(super) found: Found,
    pub(super) exceptions: Exceptions,
    /// The stream may hold events of the window in no known order.
    pub(super) disordered: bool,
    pub(super) repairs: Repairs,
    pub(super) method: ActivePublishMethod,
    pub(super) cause: Cause,
    pub(super) progress: &'a Progress,
    pub(super) signals: Signals,
    /// Since when events are too large that would not be by default; none when none is.
    pub(super) limit_since: Option<Instant>,
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
        while !self.signals.is_shut_down() {
            if self.signals.is_paused() {
                self.progress.enter(Phase::Paused, "paused");
                self.signals.resumed().await;
                self.progress.enter(Phase::Leading, "resumed");
                continue;
            }
            if self.unfinished || !self.tail.is_known() {
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
                () = self.signals.shut_down() => {}
            }
        }
        Ok(())
    }

    /// Up to where every event is in the stream.
    pub(super) fn handled(&self) -> &Mark {
        self.state.target.as_ref().unwrap_or(&self.state.settled)
    }

    /// Opens the next window, unless the stream must be looked at first.
    pub(super) async fn open(&mut self) -> Result<(), Error> {
        match self.tail.base(&self.naming.stream) {
            Some(base) => self.open_window(&base, Opening::Next).await,
            None => Ok(()),
        }
    }

    pub(super) async fn open_window(&mut self, base: &Base, opening: Opening) -> Result<(), Error> {
        fault::point("relay-before-barrier");
        let appended = relay_log::open_window(&mut self.log, &self.state, base, opening).await;
        self.append(appended)?;
        fault::point("relay-after-barrier");
        self.exceptions.begin_window();
        self.method.go_on();
        self.found = Found::default();
        self.tail.begin_window();
        self.unfinished = true;
        Ok(())
    }

    /// Writes down that everything is handled, unless it is written or the stream must be looked at first.
    async fn settle(&mut self) -> Result<(), Error> {
        if let (Some(_), Some(base)) = (&self.state.target, self.tail.base(&self.naming.stream)) {
            let appended = relay_log::settle(&mut self.log, &self.state, &base).await;
            self.append(appended)?;
            fault::point("relay-settled");
        }
        Ok(())
    }

    pub(super) async fn load_parked(&mut self) -> Result<(), Error> {
        let parked = parked::load(&mut self.log).await.map_err(reading_parked)?;
        self.exceptions.parked(parked.last_id);
        self.exceptions.blocked_keys.replace(match self.config.park_policy {
            ParkPolicy::Block => parked.keys,
            ParkPolicy::Skip => HashSet::new(),
        });
        Ok(())
    }

    /// Unblocks keys that no longer have a parked event. It looks at a bounded number of keys at a time.
    async fn unblock_keys(&mut self) -> Result<(), Error> {
        let keys = self.exceptions.blocked_keys.next(KEYS);
        if keys.is_empty() { Ok(()) } else { self.unblock(&keys).await }
    }

    /// The same for these keys.
    pub(super) async fn unblock(&mut self, keys: &[String]) -> Result<(), Error> {
        let free = parked::let_go(&mut self.log, self.epoch, keys).await.map_err(reading_parked)?.ok_or_else(fenced)?;
        self.exceptions.blocked_keys.unblock(&free);
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
        while !self.signals.is_told_to_stop() {
            if !self.tail.is_known() {
                match self.resume().await {
                    Ok(last) => after = last,
                    Err(_) if self.signals.is_shut_down() => return Ok(()),
                    Err(error) if matches!(error.kind(), ErrorKind::Database | ErrorKind::Fenced) => return Err(error),
                    Err(error) => {
                        failures += 1;
                        let remedy = unreadable(&error, failures, self.connection.is_up());
                        let way_out = remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
                        self.progress.state(format!("waiting for the stream: {}{way_out}", error.report()));
                        tracing::warn!(
                            error = error.report(),
                            remedy,
                            "the relay cannot publish to the stream, trying again"
                        );
                        self.signals.rest(Backoff::RECONNECT.after(failures)).await;
                        continue;
                    }
                }
            }
            let Some(target) = self.state.target.clone() else {
                self.unfinished = false;
                return Ok(());
            };
            let before = self.tail.sequence();
            let unfit = self.signals.turns_unfit();
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
                    self.tail.forget();
                    self.publisher.restart();
                }
                Pumped::Doubt(doubt) if self.waits_for_room(&doubt, failures + 1).await => failures += 1,
                Pumped::Doubt(doubt) => {
                    let went_on = self.tail.sequence() > before;
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
        let Some(in_flight) = self.tail.in_flight() else { return Ok(Pumped::Stopped) };
        let messages = if self.method.is_one_at_a_time() { 1 } else { self.config.max_in_flight };
        let setting = Setting {
            connection: self.connection,
            progress: self.progress,
            limits: Limits { messages, ack_timeout: self.config.ack_timeout },
            signals: self.signals.clone(),
            stored,
        };
        if !self.method.batches() || matches!(in_flight, InFlight::Keyed(_)) {
            let (watch, stream) = (self.method.watch(), &self.stream);
            let pump =
                Pump { publisher, in_flight, setting: setting.clone(), watch, stream, checks: Checks::default() };
            let (pumped, stored_up_to) = pump.run(&mut chunks, &mut waiting).await?;
            let end = in_flight.sequence();
            self.tail.stored(stored_up_to, end);
            if let Some(pumped) = pumped {
                return Ok(pumped);
            }
        }
        match self.tail.in_flight() {
            Some(InFlight::Chained(chain)) => BatchPump { publisher, chain, setting }.run(&mut chunks, waiting).await,
            // Its pace changes nothing, so its pump tells how it ended.
            Some(InFlight::Keyed(_)) | None => Ok(Pumped::Stopped),
        }
    }

    /// Logs why publishing was interrupted. The stream must be looked at next.
    pub(super) fn interrupted(&mut self, doubt: &Doubt) -> Class {
        let end = self.tail.forget();
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

    /// Does what the class of a doubt demands, so that the next try can succeed.
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
                    self.exceptions.parked(event.outbox_id);
                    if let (Some(key), ParkPolicy::Block) = (&event.key, self.config.park_policy) {
                        self.exceptions.blocked_keys.block(key);
                    }
                }
            }
            (_, Doubt::Duplicate { event, sequence }) => self.repeated(event, *sequence).await?,
            (Class::BackPressure | Class::Alarm, _) => self.signals.rest(SLOW.after(failures)).await,
            // The first look costs nothing, and most often it is the answer.
            _ if failures <= 1 => {}
            _ => self.signals.rest(Backoff::RECONNECT.after(failures)).await,
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
                tracing::warn!(%event_id, outbox_id, sequence, "the event is in the stream already, publishing continues behind it");
                self.exceptions.present.insert(outbox_id);
            }
            Some(there) => {
                tracing::warn!(%event_id, outbox_id, sequence, "{there}; publishing the event again");
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
