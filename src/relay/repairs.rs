//! Publishes again what the reconciler found missing in the stream: in the order of the outbox, behind everything else,
//! a batch at a time between the windows.
//!
//! Each batch has a window to itself that is opened right before it, so that its messages lie behind the base: whoever
//! resumes looks past them, and writes down which of them he saw.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::chain::Doubt;
use super::classify::Class;
use super::leader::Leader;
use super::pump::{MAX_BYTES, Pumped};
use super::reader::{self, Prepared};
use super::under_way::UnderWay;
use super::{Mode, ParkPolicy};
use crate::backoff::Backoff;
use crate::error::Error;
use crate::fault;
use crate::jetstream::publisher::Messages;
use crate::postgres::repair::{self, Queued};
use crate::postgres::{database_error, parked, window};

/// Repairs in a batch at most.
const BATCH: u32 = 1000;
/// How often an empty queue is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Waits after a refusal that may heal.
const SLOW: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(5) };

/// What the leader knows of the queue.
#[derive(Debug)]
pub(super) struct Repairs {
    /// When it is looked at next.
    next: Instant,
    /// Whether there were some at the last look.
    pub(super) waiting: bool,
    /// Whether the open window was opened for the next batch.
    window_open: bool,
    failures: u32,
}

impl Repairs {
    pub(super) fn new() -> Self {
        Self { next: Instant::now(), waiting: false, window_open: false, failures: 0 }
    }

    pub(super) fn are_due(&self) -> bool {
        self.next <= Instant::now()
    }
}

impl Leader<'_> {
    /// Publishes a batch of repairs, if there are any. False when it must be called again as soon as the open window is
    /// in the stream.
    pub(super) async fn publish_repairs(&mut self) -> Result<bool, Error> {
        let rate = self.config.repair_rate.max(1);
        let block = self.config.park_policy == ParkPolicy::Block;
        let batch = repair::next(&mut self.log, block, BATCH.min(rate).into()).await.map_err(failed)?;
        self.repairs.waiting = !batch.is_empty();
        if batch.is_empty() {
            self.repairs = Repairs { next: Instant::now() + LOOK, ..Repairs::new() };
            return Ok(true);
        }
        if self.under_way.is_none() || self.state.target.is_none() || !self.repairs.window_open {
            self.open().await?;
            self.repairs.window_open = true;
            return Ok(false);
        }
        self.repairs.window_open = false;
        let began = Instant::now();
        let prepared = self.prepare_repairs(&batch).await?;
        let count = u32::try_from(prepared.len()).unwrap_or(BATCH);
        match self.config.mode {
            Mode::Exclusive => self.repair(prepared).await?,
            // Where others write too, only the last sequence is known.
            Mode::Shared => {
                for one in prepared {
                    self.repair(vec![one]).await?;
                    if self.under_way.is_none() {
                        break;
                    }
                }
            }
        }
        self.repairs.next = began + Duration::from_secs(1) * count / rate;
        Ok(true)
    }

    /// Reads the events and makes messages of them, of as many as may be under way.
    async fn prepare_repairs(&mut self, batch: &[Queued]) -> Result<Vec<Prepared>, Error> {
        let ids: Vec<i64> = batch.iter().map(|repair| repair.outbox_id).collect();
        let rows = window::some(&mut self.log, &ids).await.map_err(failed)?;
        let there = |id: &i64| rows.binary_search_by_key(id, |row| row.id).is_ok();
        let removed: Vec<i64> = ids.into_iter().filter(|id| !there(id)).collect();
        if !removed.is_empty() {
            repair::refuse(&mut self.log, &removed, "the event was removed from the outbox").await.map_err(failed)?;
        }
        let mut messages = Messages::new(self.naming.prefix.clone());
        let (mut prepared, mut bytes) = (Vec::with_capacity(rows.len()), 0);
        for row in rows {
            let times = batch.iter().find(|repair| repair.outbox_id == row.id).map_or(1, |repair| repair.times);
            let mut one =
                reader::prepare(&mut self.log, &mut messages, &self.naming.source, row).await.map_err(failed)?;
            bytes += one.event.bytes;
            if bytes > MAX_BYTES && !prepared.is_empty() {
                break;
            }
            let id = format!("{}:r{times}", one.event.event_id);
            one.message.set_message_id(&id);
            one.event.renamed = Some(id);
            one.message.mark_repair("missing");
            prepared.push(one);
        }
        Ok(prepared)
    }

    async fn repair(&mut self, prepared: Vec<Prepared>) -> Result<(), Error> {
        let before = self.under_way.as_ref().map_or(0, UnderWay::sequence);
        let events: Vec<(i64, Uuid)> =
            prepared.iter().map(|prepared| (prepared.event.outbox_id, prepared.event.event_id)).collect();
        let (chunks, received) = mpsc::channel(1);
        _ = chunks.send(Ok(prepared)).await;
        drop(chunks);
        match self.publish(received).await? {
            Pumped::Done => {
                fault::point("relay-repair-published");
                let last = self.under_way.as_ref().map_or(0, UnderWay::sequence);
                let first = if self.config.mode == Mode::Shared { last } else { before + 1 };
                let stored = events.into_iter().zip(first..).map(|((id, event_id), at)| (id, event_id, at)).collect();
                self.repairs.failures = 0;
                self.record_repairs(stored).await?;
                fault::point("relay-repair-recorded");
            }
            // What is stored is found and written down when resuming.
            Pumped::Stopped => self.under_way = None,
            Pumped::Doubt(doubt) => self.deal_with_repair(&doubt).await?,
        }
        Ok(())
    }

    async fn deal_with_repair(&mut self, doubt: &Doubt) -> Result<(), Error> {
        let class = self.interrupted(doubt);
        // What is left of the batch stays in this window.
        self.repairs.window_open = true;
        self.repairs.failures += 1;
        match (class, doubt) {
            (_, Doubt::Refused { .. }) if self.method.batches() => self.method.single_out(),
            (_, Doubt::Duplicate { event, sequence }) => {
                let message = self.stream.message(*sequence).await;
                match message.map(|message| message.and_then(|message| message.identity)) {
                    Ok(Some((id, ..))) if id == event.event_id => {
                        self.record_repairs(vec![(event.outbox_id, id, *sequence)]).await?;
                    }
                    Ok(_) => repair::rename(&mut self.log, event.outbox_id).await.map_err(failed)?,
                    Err(error) => {
                        tracing::warn!(error = error.report(), event_id = %event.event_id, "cannot look whether an event is in the stream");
                    }
                }
            }
            (Class::Park, _) => {
                if let Some(event) = doubt.event() {
                    repair::refuse(&mut self.log, &[event.outbox_id], &doubt.to_string()).await.map_err(failed)?;
                }
            }
            (Class::BackPressure | Class::Alarm, _) => self.rest(SLOW.after(self.repairs.failures)).await,
            _ if self.repairs.failures <= 1 => {}
            _ => self.rest(Backoff::RECONNECT.after(self.repairs.failures)).await,
        }
        Ok(())
    }

    /// Writes down where events were seen that were published out of order: outbox id, event id, sequence.
    pub(super) async fn record_repairs(&mut self, stored: Vec<(i64, Uuid, u64)>) -> Result<(), Error> {
        if stored.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = stored.iter().map(|(id, ..)| *id).collect();
        let event_ids: Vec<Uuid> = stored.iter().map(|(_, event_id, _)| *event_id).collect();
        let sequences: Vec<i64> = stored.iter().map(|(.., sequence)| sequence.cast_signed()).collect();
        let repaired = repair::published(&mut self.log, &ids, &event_ids, &sequences).await.map_err(failed)?;
        parked::found(&mut self.log, &ids, &sequences).await.map_err(failed)?;
        if repaired > 0 {
            tracing::info!(
                events = repaired,
                first_outbox_id = ids.first(),
                last_outbox_id = ids.last(),
                "published events that were missing in the stream"
            );
        }
        Ok(())
    }
}

fn failed(error: sqlx::Error) -> Error {
    database_error("publishing repairs failed", error)
}
