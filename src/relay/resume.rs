//! Finds the leader's place in the stream: at the start of a leadership, and after every doubt.
//!
//! Most often the last message is of the open window, and the leader goes on behind it. When it is not, a restore lies
//! between the log and the stream: what the stream holds is then looked up message by message, and what it does not
//! hold is published. `docs/decisions/0006-restore.md` tells the rules.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::Mode;
use super::chain::Chain;
use super::keyed::Keyed;
use super::leader::{Leader, fenced};
use super::method::Takes;
use super::under_way::UnderWay;
use crate::error::{Error, ErrorKind};
use crate::jetstream::stream::{Extent, Stored};
use crate::postgres::database_error;
use crate::postgres::relay_log::{self, Base, Opening};
use crate::postgres::window::{self, Known};

/// Messages that are looked up at a time.
const SPAN: u64 = 1000;
/// Messages that are reported one by one; the others are counted.
const REPORTED: u64 = 20;

/// What the stream was found to hold behind the base of a window whose order there is unknown.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Up to where the stream has been read; 0 when nothing has.
    end: u64,
    /// Events of the outbox.
    present: u64,
    /// Events that the outbox does not have.
    ghosts: u64,
    /// Messages of others.
    foreign: u64,
    /// What this leader had published when the window was opened.
    published_before: u64,
}

impl Leader<'_> {
    /// Puts the leader behind the stream's end. Returns the outbox id up to which everything of the open window is in
    /// the stream, apart from what was found there one by one.
    pub(super) async fn resume(&mut self) -> Result<i64, Error> {
        let stream = self.extent().await?;
        self.still_leading().await?;
        self.stream_created = Some(stream.created);
        self.method.suit(self.takes(stream));
        self.rewind_if_lost(stream).await?;
        if stream.last < self.stored_end {
            // What was acknowledged is gone again.
            (self.stored_up_to, self.stored_end) = (0, 0);
        }
        let after = match self.state.scattered {
            true => self.catch_up(stream).await?,
            false => match self.place(stream).await? {
                Some(after) => after,
                None => {
                    tracing::warn!(
                        stream = %self.naming.stream, end = stream.last,
                        "the stream does not end as the relay's log says: the database was restored to an earlier time, \
                         or somebody else writes to the stream"
                    );
                    self.catch_up(stream).await?
                }
            },
        };
        self.progress.found(after, stream.last);
        self.under_way = Some(match self.config.mode {
            Mode::Exclusive => UnderWay::Chained(Chain::behind(&self.naming.stream, stream.last, !stream.replicated)),
            Mode::Shared => UnderWay::Keyed(Keyed::new(&self.naming.stream, stream.last)),
        });
        Ok(after)
    }

    /// Looks whether the stream is still as this leader left it; if not, the leader finds its place anew.
    pub(super) async fn look_at_stream(&mut self) {
        let Some(under_way) = &self.under_way else { return };
        let end = under_way.sequence();
        let as_left = match self.extent().await {
            Ok(stream) if self.config.mode == Mode::Shared => stream.last >= end,
            Ok(stream) => {
                let same = stream.last == end && Some(stream.created) == self.stream_created;
                same && self.method.suits(self.takes(stream))
            }
            Err(_) => false,
        };
        if !as_left {
            self.under_way = None;
        }
    }

    fn takes(&self, stream: Extent) -> Takes {
        let server = |minor, patch| self.connection.client.is_server_compatible(2, minor, patch);
        Takes { batches: stream.batches && server(12, 1), at_once: server(15, 0), replicated: stream.replicated }
    }

    async fn extent(&self) -> Result<Extent, Error> {
        let extent = async {
            self.connection.connected().await;
            self.stream.extent().await
        };
        tokio::select! {
            extent = extent => extent,
            () = self.shutdown.cancelled() => Err(stopped()),
        }
    }

    /// Checks, after the stream's end was read, that the log is still as this leader left it. Then all that the stream
    /// holds up to there is of windows that this leader knows, and should another one take over now, the server refuses
    /// whatever this one sends behind that end.
    async fn still_leading(&mut self) -> Result<(), Error> {
        let newest = relay_log::newest(&mut self.log).await;
        let newest = newest.map_err(|error| database_error("reading the relay's log failed", error))?;
        if newest.seq == self.state.seq { Ok(()) } else { Err(fenced()) }
    }

    /// Finds the last event of the open window in the stream and returns its outbox id, 0 when there is none yet. None
    /// when the stream holds what the log does not explain.
    ///
    /// Only the leader writes to an exclusive stream, and everything behind the base is of the open window, in its
    /// order. So if the last message is of that window, it tells all; and if a later time than the one to which the
    /// database was restored had published later windows, the last message is not of this one.
    async fn place(&mut self, stream: Extent) -> Result<Option<i64>, Error> {
        if self.config.mode == Mode::Shared {
            // From there the window is gone through again; what is stored is dropped as a repeat.
            return Ok(Some(self.stored_up_to));
        }
        let base = match &self.state.base {
            Some(base) if base.stream == self.naming.stream => base.sequence,
            Some(_) => {
                if self.state.target.is_some() {
                    let base = self.base_at(stream, stream.last);
                    self.open_window(&base, Opening::Again { scattered: false }).await?;
                }
                return Ok(Some(0));
            }
            None => 0,
        };
        let mut repairs = Vec::new();
        let mut last = None;
        for sequence in (stream.first.max(base + 1)..=stream.last).rev() {
            let Some(message) = self.stream.message(sequence).await? else { continue };
            let Some((event_id, outbox_id)) = self.own(&message) else { return Ok(None) };
            if !message.repair {
                last = Some((event_id, outbox_id));
                break;
            }
            repairs.push((outbox_id, event_id, sequence));
        }
        self.record_repairs(repairs).await?;
        if let Some((event_id, outbox_id)) = last {
            let known = self.known(&[event_id], &[outbox_id]).await?;
            let target = self.state.target.as_ref();
            return Ok(known.get(&event_id).and_then(|row| {
                let is_of_window = target.is_some_and(|target| target.holds(row.id, row.xid))
                    && !self.state.settled.holds(row.id, row.xid);
                is_of_window.then_some(row.id)
            }));
        }
        Ok(Some(0))
    }

    /// Opens a window over everything that is not settled, unless that is done, and reads what the stream holds of it.
    async fn catch_up(&mut self, stream: Extent) -> Result<i64, Error> {
        let base = match &self.state.base {
            Some(base) if base.stream == self.naming.stream => base.sequence,
            Some(_) => stream.last,
            None => 0,
        };
        if self.state.target.is_none() || !self.state.scattered {
            let base = self.base_at(stream, base);
            self.open_window(&base, Opening::Again { scattered: true }).await?;
        }
        if self.found.end == 0 || self.found.end > stream.last {
            self.found = Found { end: base, published_before: self.progress.published(), ..Found::default() };
            self.exceptions.found = Arc::default();
        }
        let mut ids = std::mem::take(&mut self.exceptions.found);
        let collected = self.collect(stream, Arc::make_mut(&mut ids)).await;
        Arc::make_mut(&mut ids).sort_unstable();
        self.exceptions.found = ids;
        collected?;
        self.load_parked().await?;
        // The window is gone through from here; what was found is left out.
        Ok(self.stored_up_to)
    }

    fn base_at(&self, stream: Extent, sequence: u64) -> Base {
        Base { stream: self.naming.stream.clone(), created: stream.created, sequence }
    }

    /// Reads the stream up to its end, from where it was read before.
    async fn collect(&mut self, stream: Extent, ids: &mut Vec<i64>) -> Result<(), Error> {
        while self.found.end < stream.last {
            if self.shutdown.is_cancelled() {
                return Err(stopped());
            }
            let first = stream.first.max(self.found.end + 1);
            let last = stream.last.min(first + SPAN - 1);
            self.progress.state(format!("looking up messages {first} to {} of the stream", stream.last));
            let messages = self.stream.messages(first..=last).await?;
            let own = messages.iter().filter_map(|message| self.own(message));
            let (event_ids, outbox_ids): (Vec<Uuid>, Vec<i64>) = own.unzip();
            let known = self.known(&event_ids, &outbox_ids).await?;
            let mut found = Vec::new();
            for message in &messages {
                match self.own(message) {
                    Some((event_id, _)) if let Some(row) = known.get(&event_id) => {
                        found.push((row.id, event_id, message.sequence));
                    }
                    Some((event_id, outbox_id)) => self.report_ghost(message, event_id, outbox_id),
                    None => self.report_foreign(message),
                }
            }
            self.found.present += found.len() as u64;
            ids.extend(found.iter().map(|(id, ..)| *id));
            self.record_repairs(found).await?;
            self.found.end = last;
        }
        Ok(())
    }

    /// The event id and outbox id of a message that says it is from this outbox.
    pub(super) fn own(&self, message: &Stored) -> Option<(Uuid, i64)> {
        let (event_id, source, outbox_id) = message.identity.as_ref()?;
        (*source == self.naming.source).then_some((*event_id, *outbox_id))
    }

    pub(super) async fn known(
        &mut self,
        event_ids: &[Uuid],
        outbox_ids: &[i64],
    ) -> Result<HashMap<Uuid, Known>, Error> {
        window::known(&mut self.log, event_ids, outbox_ids)
            .await
            .map_err(|error| database_error("looking up messages of the stream in the outbox failed", error))
    }

    fn report_ghost(&mut self, message: &Stored, event_id: Uuid, outbox_id: i64) {
        self.found.ghosts += 1;
        if self.found.ghosts <= REPORTED {
            tracing::error!(
                stream = %self.naming.stream, sequence = message.sequence, subject = message.subject, %event_id, outbox_id,
                "the stream has an event that the outbox has not: the database was restored to a time before it"
            );
        }
    }

    fn report_foreign(&mut self, message: &Stored) {
        self.found.foreign += 1;
        if self.config.mode == Mode::Exclusive && self.found.foreign <= REPORTED {
            tracing::error!(
                stream = %self.naming.stream, sequence = message.sequence, subject = message.subject,
                "a message in the stream is not from this outbox; nobody else may write to an exclusive stream"
            );
        }
    }

    /// Says what came of a window whose events were looked up one by one.
    pub(super) fn report_caught_up(&self) {
        let Found { present, ghosts, foreign, published_before, .. } = self.found;
        let published = self.progress.published() - published_before;
        if ghosts > 0 {
            tracing::error!(
                stream = %self.naming.stream, ghosts,
                "the stream has events that the outbox has not; subscribers have seen what the database has forgotten"
            );
        }
        tracing::warn!(
            stream = %self.naming.stream, present, published, ghosts, foreign,
            "the stream is complete again: what was present was left alone, the rest was published"
        );
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Broker, "told to stop")
}
