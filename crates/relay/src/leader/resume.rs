//! Finds the leader's place in the stream: at the start of a leadership, and after every doubt.
//!
//! Most often the last message is of the open window, and the leader continues behind it. When it is not, a restore lies
//! between the log and the stream: what the stream holds is then looked up message by message, and what it does not
//! hold is published. `docs/decisions/0006-restore.md` tells the rules.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::Leader;
use super::room::DEFAULT_MAX_PAYLOAD;
use crate::chain::{Chain, Sent};
use crate::fence::fenced;
use crate::guard::{self, Guard};
use crate::in_flight::InFlight;
use crate::keyed::Keyed;
use crate::method::StreamTakes;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::jetstream::stream::{Extent, Identity, Stored};
use aftercommit_core::jetstream::topology;
use aftercommit_core::postgres::database_error;
use aftercommit_core::postgres::relay_log::{self, Base, Opening};
use aftercommit_core::postgres::window::{self, Known};
use aftercommit_core::relay::Mode;

/// Messages that are looked up at a time.
const SPAN: u64 = 1000;
/// Messages that are read at a time on the way back to the last event of a window, after the first one.
const BACKWARDS: u64 = 64;
/// Messages that are reported one by one; the others are counted.
const REPORTED: u64 = 20;

/// What the stream was found to hold behind the base of a window whose order there is unknown.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Up to where the stream has been read; 0 when nothing has.
    end: u64,
    /// Events of the outbox.
    present: u64,
    /// Events that the outbox does not have.
    ghosts: u64,
    /// Messages of others.
    foreign: u64,
    /// Messages of others that say they are an event of the outbox.
    forged: u64,
    /// What this leader had published when the window was opened.
    published_before: u64,
}

/// What the stream has at a sequence at which the server says that an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    Event,
    /// A message that has the event's id, or its message id, and is not the event.
    Forgery,
    Nothing,
}

/// What a message is that has the ids of an event of the outbox.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Claim {
    Event(Known),
    /// It is made of something else.
    Forgery,
}

impl fmt::Display for There {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Event => "the event is in the stream",
            Self::Forgery => "somebody else has written a message under the event's id into the stream",
            Self::Nothing => "the event was removed from the stream",
        })
    }
}

/// Takes note of a message that has an event's id and is not the event.
pub(crate) fn note(forged: &mut HashMap<i64, Vec<u64>>, outbox_id: i64, sequence: u64) {
    let sequences = forged.entry(outbox_id).or_default();
    if !sequences.contains(&sequence) {
        sequences.push(sequence);
    }
}

impl Leader<'_> {
    /// Puts the leader behind the stream's end. Returns the outbox id up to which everything of the open window is in
    /// the stream, apart from what was found there one by one.
    pub(crate) async fn resume(&mut self) -> Result<i64, Error> {
        let stream = self.extent().await?;
        self.still_leading().await?;
        self.tail.saw(stream.created);
        self.method.suit(self.takes(stream));
        self.rewind_if_lost(stream).await?;
        self.tail.ends_at(stream.last);
        let after = match self.state.scattered || self.disordered {
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
        self.tail.go_on(match self.config.mode {
            Mode::Exclusive => InFlight::Chained(Chain::behind(&self.naming.stream, stream.last, !stream.replicated)),
            Mode::Shared => InFlight::Keyed(Keyed::new(&self.naming.stream, stream.last)),
        });
        Ok(after)
    }

    /// Looks whether the stream is still as this leader left it; if not, the leader finds its place anew.
    pub(crate) async fn look_at_stream(&mut self) {
        let Some(end) = self.tail.sequence() else { return };
        let as_left = match self.extent().await {
            Ok(stream) if self.config.mode == Mode::Shared => stream.last >= end,
            Ok(stream) => {
                let same = stream.last == end && self.tail.was_created(stream.created);
                same && self.method.suits(self.takes(stream))
            }
            Err(_) => false,
        };
        if !as_left {
            self.tail.forget();
        }
    }

    /// What the stream takes; with other writers it gets single messages that name nothing.
    fn takes(&self, stream: Extent) -> StreamTakes {
        if self.config.mode == Mode::Shared {
            return StreamTakes::default();
        }
        let server = |minor, patch| self.connection.client.is_server_compatible(2, minor, patch);
        if fault::broken("batch-check") {
            return StreamTakes { batches: true, at_once: true, replicated: stream.replicated };
        }
        StreamTakes { batches: stream.batches && server(12, 1), at_once: server(15, 0), replicated: stream.replicated }
    }

    /// Where the stream begins and ends. An error, too, while its settings would lose events: nothing is published then.
    async fn extent(&mut self) -> Result<Extent, Error> {
        let extent = async {
            self.connection.connected().await;
            let described = self.stream.described().await?;
            let findings = topology::findings(&described.config, &self.naming, self.config.mode == Mode::Shared);
            Guard::refuse(guard::lossy(&findings.problems), &self.naming.stream)?;
            let takes_all = findings.problems.is_empty() && self.connection.client.max_payload() >= DEFAULT_MAX_PAYLOAD;
            Ok::<_, Error>((Extent::of(&described.info), takes_all))
        };
        let (extent, takes_all) = tokio::select! {
            extent = extent => extent?,
            () = self.signals.shut_down() => return Err(stopped()),
        };
        if takes_all {
            self.limit_since = None;
        }
        Ok(extent)
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
            return Ok(Some(self.tail.stored_up_to()));
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
        let mut end = stream.last;
        let mut step = 1;
        while end > base && end >= stream.first {
            let first = stream.first.max(base + 1).max((end + 1).saturating_sub(step));
            let messages = self.stream.messages(first..=end).await?;
            let known = self.known(&messages).await?;
            let mut repairs = Vec::new();
            let mut last = None;
            for message in messages.iter().rev() {
                let Some(identity) = self.own(message) else { return Ok(None) };
                match (message.repair, known.get(&message.sequence)) {
                    (true, Some(Claim::Event(row))) => repairs.push((row.id, identity.event_id, message.sequence)),
                    (true, Some(Claim::Forgery)) => return Ok(None),
                    // Removed from the outbox since.
                    (true, None) => {}
                    (false, Some(Claim::Event(row))) => {
                        last = Some(*row);
                        break;
                    }
                    (false, _) => return Ok(None),
                }
            }
            self.record_repairs(repairs).await?;
            if let Some(row) = last {
                let target = self.state.target.as_ref();
                let is_of_window = target.is_some_and(|target| target.holds(row.id, row.xid))
                    && !self.state.settled.holds(row.id, row.xid);
                return Ok(is_of_window.then_some(row.id));
            }
            (end, step) = (first - 1, BACKWARDS);
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
        if self.state.target.is_none() || !self.state.scattered || self.disordered {
            let base = self.base_at(stream, base);
            self.open_window(&base, Opening::Again { scattered: true }).await?;
            self.disordered = false;
        }
        if self.found.end == 0 || self.found.end > stream.last {
            self.found = Found { end: base, published_before: self.progress.published(), ..Found::default() };
            self.exceptions.found = Arc::default();
            self.exceptions.forged.clear();
        }
        let mut ids = std::mem::take(&mut self.exceptions.found);
        let collected = self.collect(stream, Arc::make_mut(&mut ids)).await;
        Arc::make_mut(&mut ids).sort_unstable();
        self.exceptions.found = ids;
        collected?;
        self.load_parked().await?;
        // The window is gone through from here; what was found is left out.
        Ok(self.tail.stored_up_to())
    }

    fn base_at(&self, stream: Extent, sequence: u64) -> Base {
        Base { stream: self.naming.stream.clone(), created: stream.created, sequence }
    }

    /// Reads the stream up to its end, from where it was read before.
    async fn collect(&mut self, stream: Extent, ids: &mut Vec<i64>) -> Result<(), Error> {
        while self.found.end < stream.last {
            if self.signals.is_shut_down() {
                return Err(stopped());
            }
            let first = stream.first.max(self.found.end + 1);
            let last = stream.last.min(first + SPAN - 1);
            self.progress.state(format!("looking up messages {first} to {} of the stream", stream.last));
            let messages = self.stream.messages(first..=last).await?;
            let known = self.known(&messages).await?;
            let mut found = Vec::new();
            for message in &messages {
                match (self.own(message), known.get(&message.sequence)) {
                    (Some(identity), Some(Claim::Event(row))) => {
                        found.push((row.id, identity.event_id, message.sequence));
                    }
                    (Some(identity), Some(Claim::Forgery)) => self.report_forgery(message, identity),
                    (Some(identity), None) => self.report_ghost(message, identity),
                    (None, _) => self.report_foreign(message),
                }
            }
            self.found.present += found.len() as u64;
            ids.extend(found.iter().map(|(id, ..)| *id));
            self.record_repairs(found).await?;
            self.found.end = last;
        }
        Ok(())
    }

    /// Which event a message is that says it is from this outbox.
    pub(crate) fn own<'m>(&self, message: &'m Stored) -> Option<&'m Identity> {
        message.identity.as_ref().filter(|identity| identity.source == self.naming.source)
    }

    /// What those messages are that say they are events of this outbox, by their sequences. Those that the outbox does not
    /// know are left out.
    pub(crate) async fn known(&mut self, messages: &[Stored]) -> Result<HashMap<u64, Claim>, Error> {
        let own: Vec<(u64, &Identity)> =
            messages.iter().filter_map(|message| Some((message.sequence, self.own(message)?))).collect();
        let rows = self.rows(own.iter().map(|(_, identity)| *identity)).await?;
        let claim = |identity: &Identity| {
            let row = rows.get(&(identity.event_id, identity.outbox_id))?;
            Some(if row.is(identity.digest) { Claim::Event(*row) } else { Claim::Forgery })
        };
        Ok(own.into_iter().filter_map(|(sequence, identity)| Some((sequence, claim(identity)?))).collect())
    }

    /// The rows of the outbox with these ids, whatever they are made of.
    async fn rows<'i>(
        &mut self,
        identities: impl Iterator<Item = &'i Identity>,
    ) -> Result<HashMap<(Uuid, i64), Known>, Error> {
        let (event_ids, ids): (Vec<Uuid>, Vec<i64>) =
            identities.map(|identity| (identity.event_id, identity.outbox_id)).unzip();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        window::known(&mut self.log, &event_ids, &ids)
            .await
            .map_err(|error| database_error("looking up messages of the stream in the outbox failed", error))
    }

    /// Looks at the message for which the server took an event. None when it cannot be read now.
    pub(crate) async fn look_for(&mut self, event: &Sent, sequence: u64) -> Result<Option<There>, Error> {
        let event_id = event.event_id;
        let message = match self.stream.message(sequence).await {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(error = error.report(), %event_id, "cannot look whether an event is in the stream");
                return Ok(None);
            }
        };
        let Some(message) = message else { return Ok(Some(There::Nothing)) };
        let ids = (event_id, event.outbox_id);
        let identity = message.identity.as_ref().filter(|identity| (identity.event_id, identity.outbox_id) == ids);
        // Not by its source, which an operator may have changed since.
        let same = match identity {
            Some(identity) => {
                self.rows(std::iter::once(identity)).await?.get(&ids).is_some_and(|row| row.is(identity.digest))
            }
            None => false,
        };
        Ok(Some(if same { There::Event } else { There::Forgery }))
    }

    fn report_ghost(&mut self, message: &Stored, identity: &Identity) {
        self.found.ghosts += 1;
        let Identity { event_id, outbox_id, .. } = identity;
        if self.found.ghosts <= REPORTED {
            tracing::error!(
                stream = %self.naming.stream, sequence = message.sequence, subject = message.subject, %event_id, outbox_id,
                "the stream has an event that the outbox does not have: the database was restored to a time before it"
            );
        }
    }

    fn report_forgery(&mut self, message: &Stored, identity: &Identity) {
        self.found.forged += 1;
        let Identity { event_id, outbox_id, .. } = identity;
        note(&mut self.exceptions.forged, *outbox_id, message.sequence);
        if self.found.forged <= REPORTED {
            tracing::error!(
                stream = %self.naming.stream, sequence = message.sequence, subject = message.subject, %event_id, outbox_id,
                "a message in the stream has an event's id and other contents: somebody else has written it; subscribers \
                 handle the event itself when they get it, and have handled the forgery before"
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

    /// Logs what became of a window whose events were looked up one by one.
    pub(crate) fn report_caught_up(&self) {
        let Found { present, ghosts, foreign, forged, published_before, .. } = self.found;
        let published = self.progress.published() - published_before;
        if ghosts > 0 {
            tracing::error!(
                stream = %self.naming.stream, ghosts,
                "the stream has events that the outbox does not have; subscribers may have handled what the database has lost"
            );
        }
        tracing::warn!(
            stream = %self.naming.stream, present, published, ghosts, foreign, forged,
            "the stream is complete again: the events that it had stay, the others were published"
        );
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Broker, "told to stop")
}
