//! The leading relay: opens windows and sees each one into the stream.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::chain::{Chain, Doubt};
use super::progress::Progress;
use super::pump::{Limits, Pump, Pumped};
use super::reader::{self, Remainder};
use crate::backoff::Backoff;
use crate::config::Naming;
use crate::error::{Error, ErrorKind};
use crate::jetstream::Connection;
use crate::jetstream::publisher::Publisher;
use crate::jetstream::stream::StreamReader;
use crate::postgres::relay_log::{self, Appended, State, Window};
use crate::postgres::snapshot::Mark;
use crate::postgres::{database_error, window};

/// The shortest pause between two looks at an outbox that has just had something.
const BUSY_POLL: Duration = Duration::from_millis(2);
/// After so long without news the window is closed in the log, and its mark moves past transactions that came to nothing.
const SETTLE_AFTER: Duration = Duration::from_secs(1);
/// So many ids that were handed out and not committed move the mark at once, so that looks stay cheap.
const MANY_IDS: i64 = 1000;

/// A leader's tools and state. It is dropped, wherever it is, when the lease is lost.
pub(super) struct Leader<'a> {
    pub(super) naming: Arc<Naming>,
    pub(super) limits: Limits,
    pub(super) idle_poll: Duration,
    pub(super) connection: &'a Connection,
    pub(super) log: PgConnection,
    pub(super) reader: Arc<Mutex<PgConnection>>,
    pub(super) publisher: Publisher,
    pub(super) stream: StreamReader,
    pub(super) state: State,
    pub(super) chain: Option<Chain>,
    pub(super) progress: &'a Progress,
    pub(super) shutdown: &'a CancellationToken,
}

/// The end of what is known to be in the stream.
struct Tail {
    /// The stream's last sequence.
    sequence: u64,
    /// The outbox id of this window's last event in the stream; none before its first.
    outbox_id: Option<i64>,
}

impl Leader<'_> {
    /// Publishes until shutdown, or until an error ends the leadership.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        if let Some(open) = self.state.window.clone() {
            tracing::info!(base_sequence = open.base_sequence, "resuming the open window");
            self.finish(&open).await?;
        }
        let mut pause = BUSY_POLL;
        let mut last_news = Instant::now();
        while !self.shutdown.is_cancelled() {
            let handled = self.handled();
            let look = window::look(&mut self.log, &handled)
                .await
                .map_err(|error| database_error("looking for new events failed", error))?;
            let unseen = look.last_id - handled.last_id;
            if look.news || unseen > MANY_IDS {
                self.progress.state("publishing");
                let open = self.open().await?;
                self.finish(&open).await?;
                if look.news {
                    (pause, last_news) = (BUSY_POLL, Instant::now());
                    continue;
                }
            } else if last_news.elapsed() > SETTLE_AFTER && (self.state.window.is_some() || unseen > 0) {
                self.settle(unseen > 0).await?;
                last_news = Instant::now();
            }
            self.progress.idle();
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(self.idle_poll),
                () = self.shutdown.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Up to where every event is in the stream.
    fn handled(&self) -> Mark {
        match &self.state.window {
            Some(window) => window.target.clone(),
            None => self.state.settled.clone(),
        }
    }

    async fn open(&mut self) -> Result<Window, Error> {
        let base = match &self.chain {
            Some(chain) => chain.sequence(),
            None => self.stream_end().await?,
        };
        let appended = relay_log::open_window(&mut self.log, &self.state, &self.naming.stream, base).await;
        self.append(appended)?;
        self.state
            .window
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::Integrity, "a window that was opened is not in the relay's log"))
    }

    /// Writes down that everything is handled. With ids that came to nothing, the mark moves past them first.
    async fn settle(&mut self, move_mark: bool) -> Result<(), Error> {
        if move_mark {
            let open = self.open().await?;
            self.finish(&open).await?;
        }
        let appended = relay_log::settle(&mut self.log, &self.state).await;
        self.append(appended)
    }

    fn append(&mut self, appended: Result<Appended, sqlx::Error>) -> Result<(), Error> {
        match appended.map_err(|error| database_error("writing the relay's log failed", error))? {
            Appended::Yes(state) => {
                self.state = state;
                Ok(())
            }
            Appended::Fenced => Err(fenced()),
        }
    }

    /// Sees every event of a window into the stream, whatever happens to the connection on the way.
    async fn finish(&mut self, open: &Window) -> Result<(), Error> {
        let mut failures = 0;
        let mut after = None;
        while !self.shutdown.is_cancelled() {
            if self.chain.is_none() {
                match self.resume(open).await {
                    Ok(tail) => {
                        after = tail.outbox_id;
                        self.chain = Some(Chain::behind(&self.naming.stream, tail.sequence));
                    }
                    Err(error) if matches!(error.kind(), ErrorKind::Database | ErrorKind::Fenced) => return Err(error),
                    Err(error) => {
                        failures += 1;
                        self.progress.state(format!("waiting for the stream: {}", error.report()));
                        tracing::warn!(error = error.report(), "cannot read the stream's end, trying again");
                        self.pause(Backoff::RECONNECT.after(failures)).await;
                        continue;
                    }
                }
            }
            let before = self.chain.as_ref().map_or(0, Chain::sequence);
            match self.pump(open, after.unwrap_or(0)).await? {
                Pumped::Done => {
                    self.progress.window_done();
                    return Ok(());
                }
                Pumped::Stopped => {
                    self.chain = None;
                    return Ok(());
                }
                Pumped::Doubt(doubt) => {
                    let went_on = self.chain.take().is_some_and(|chain| chain.sequence() > before);
                    failures = if went_on { 1 } else { failures + 1 };
                    self.report(&doubt);
                    self.pause(Backoff::RECONNECT.after(failures)).await;
                    self.publisher.restart();
                }
            }
        }
        Ok(())
    }

    async fn pump(&mut self, open: &Window, after: i64) -> Result<Pumped, Error> {
        let Some(chain) = &mut self.chain else { return Ok(Pumped::Stopped) };
        let (chunks, received) = mpsc::channel(1);
        let remainder = Remainder { settled: self.state.settled.clone(), target: open.target.clone(), after };
        let reader = tokio::spawn(reader::read(self.reader.clone(), self.naming.clone(), remainder, chunks));
        let pump = Pump {
            publisher: &mut self.publisher,
            connection: self.connection,
            chain,
            progress: self.progress,
            limits: self.limits,
            shutdown: self.shutdown,
        };
        let pumped = pump.run(received).await;
        // It has ended or ends at its next send, since nobody listens any more.
        reader.await.map_err(|error| Error::with_source(ErrorKind::Database, "the outbox reader failed", error))?;
        pumped
    }

    fn report(&self, doubt: &Doubt) {
        self.progress.interrupted(doubt);
        match doubt {
            Doubt::Refused { event, .. }
            | Doubt::Duplicate { event, .. }
            | Doubt::Misplaced { event, .. }
            | Doubt::TooLarge { event, .. } => {
                tracing::warn!(
                    event_id = %event.event_id,
                    outbox_id = event.outbox_id,
                    error = %doubt,
                    "publishing was interrupted, reading the stream's end"
                );
            }
            _ => tracing::warn!(error = %doubt, "publishing was interrupted, reading the stream's end"),
        }
    }

    async fn pause(&self, wait: Duration) {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.shutdown.cancelled() => {}
        }
    }

    async fn stream_end(&self) -> Result<u64, Error> {
        self.connection.connected().await;
        Ok(self.stream.info().await?.state.last_sequence)
    }

    /// Checks, after the stream's end was read, that the log is still as this leader left it. Then all that the stream
    /// holds up to there is of windows that this leader knows, and should another one take over now, the server refuses
    /// whatever this one sends behind that end.
    async fn still_leading(&mut self) -> Result<(), Error> {
        let newest = relay_log::newest(&mut self.log).await;
        let newest = newest.map_err(|error| database_error("reading the relay's log failed", error))?;
        if newest.seq == self.state.seq { Ok(()) } else { Err(fenced()) }
    }

    /// Finds the last event of the window in the stream. Only this relay writes to it, and everything of this window
    /// lies behind the window's base; messages of others are passed over and reported.
    async fn resume(&mut self, open: &Window) -> Result<Tail, Error> {
        let end = self.stream_end().await?;
        self.still_leading().await?;
        let base = if open.stream == self.naming.stream { open.base_sequence } else { end };
        if end < base {
            tracing::error!(
                stream = %self.naming.stream, base, end,
                "the stream ends before the window began: messages that were acknowledged are gone from it"
            );
        }
        let mut sequence = end;
        while sequence > base {
            if let Some(message) = self.stream.message(sequence).await? {
                let identity = message.identity.as_ref().filter(|(_, source, _)| *source == self.naming.source);
                if let Some((event_id, _, outbox_id)) = identity {
                    let ours = window::is_unsettled(&mut self.log, &self.state.settled, *outbox_id, *event_id)
                        .await
                        .map_err(|error| database_error("looking up the stream's last event failed", error))?;
                    if ours {
                        self.progress.found(*outbox_id, end);
                        return Ok(Tail { sequence: end, outbox_id: Some(*outbox_id) });
                    }
                }
                tracing::error!(
                    stream = %self.naming.stream, sequence, subject = message.subject,
                    "a message in the stream is not from this outbox; nobody else may write to an exclusive stream"
                );
            }
            sequence -= 1;
        }
        Ok(Tail { sequence: end, outbox_id: None })
    }
}

fn fenced() -> Error {
    Error::new(ErrorKind::Fenced, "another relay has taken over; this one writes no more")
}
