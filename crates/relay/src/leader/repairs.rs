//! Publishes what does not go out in the order of the outbox: events that an operator has released, and those that the
//! reconciler found missing in the stream. A batch at a time between the windows, behind everything else, each queue in
//! the order of its ids.
//!
//! Each batch has a window to itself that is opened right before it, so that its messages lie behind the base: whoever
//! resumes looks past them, and writes down which of them he saw. A batch takes about as long as a live event may wait.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::Leader;
use super::resume::{There, note};
use crate::chain::{Doubt, Sent};
use crate::classify::Class;
use crate::config::ParkPolicy;
use crate::pump::{MAX_BYTES, Pumped};
use crate::reader::{self, Prepared};
use aftercommit_core::backoff::Backoff;
use aftercommit_core::error::Error;
use aftercommit_core::fault;
use aftercommit_core::jetstream::publisher::Messages;
use aftercommit_core::postgres::fence::Written;
use aftercommit_core::postgres::repair::{self, Queued};
use aftercommit_core::postgres::{database_error, parked, window};
use aftercommit_core::relay::Mode;

/// Events in a batch at first, at least, and at most.
const BATCH: (u32, u32, u32) = (64, 16, 1000);
/// How long a batch is to take at most.
const LONG: Duration = Duration::from_millis(50);
/// How often an empty queue is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A round ends after so long although more has come behind: what was passed may be ready by now.
const ROUND: Duration = Duration::from_secs(5);
/// Waits after a refusal that may heal. Other events go out meanwhile.
const SLOW: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(5) };

/// Why an event is published out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RepairReason {
    Released,
    Missing,
}

/// One of the two queues: how far the leader has gone through it, and when it looks again.
#[derive(Debug)]
struct RepairQueue {
    /// When it is looked at next.
    next: Instant,
    /// The outbox id up to which it has been gone through in this round.
    after: i64,
    /// When the round began.
    round: Instant,
    /// Whether there was something to do at the last look.
    waiting: bool,
    failures: u32,
}

/// The queues of released and of missing events.
#[derive(Debug)]
pub(crate) struct Repairs {
    released: RepairQueue,
    missing: RepairQueue,
    /// Whose turn it was last.
    last: RepairReason,
    /// Whether the open window was opened for the next batch.
    window_open: bool,
    /// Events in the next batch.
    size: u32,
    /// Message ids of released events of which the server knows the usual one from another message.
    renamed: HashMap<i64, String>,
    /// The messages that released events replace.
    replaces: HashMap<i64, Vec<u64>>,
}

/// A batch, before its events are read.
struct RepairBatch {
    events: Vec<Queued>,
    /// Where the next one begins when all of this are done.
    end: i64,
}

impl RepairQueue {
    fn begin_round(&mut self) {
        (self.after, self.round) = (0, Instant::now());
    }
}

impl Repairs {
    pub(crate) fn new() -> Self {
        let queue =
            || RepairQueue { next: Instant::now(), after: 0, round: Instant::now(), waiting: false, failures: 0 };
        Self {
            released: queue(),
            missing: queue(),
            last: RepairReason::Missing,
            window_open: false,
            size: BATCH.0,
            renamed: HashMap::new(),
            replaces: HashMap::new(),
        }
    }

    /// Whether there was something to do at the last look.
    pub(crate) fn any_waiting(&self) -> bool {
        self.released.waiting || self.missing.waiting
    }

    fn queue(&mut self, why: RepairReason) -> &mut RepairQueue {
        match why {
            RepairReason::Released => &mut self.released,
            RepairReason::Missing => &mut self.missing,
        }
    }

    /// The queues that are due, the one whose turn it was last at the end.
    fn due(&self) -> impl Iterator<Item = RepairReason> + use<> {
        let now = Instant::now();
        let due =
            [(RepairReason::Released, self.released.next <= now), (RepairReason::Missing, self.missing.next <= now)];
        let mut due: Vec<RepairReason> = due.into_iter().filter_map(|(why, due)| due.then_some(why)).collect();
        due.sort_by_key(|why| *why == self.last);
        due.into_iter()
    }

    /// Adapts the size of batches to how long the last one took.
    fn took(&mut self, time: Duration) {
        let size = if time <= LONG { self.size.saturating_mul(2) } else { self.size / 2 };
        self.size = size.clamp(BATCH.1, BATCH.2);
    }
}

impl Leader<'_> {
    /// Publishes a batch of what is released or missing, if there is anything. False when there is nothing to do now;
    /// otherwise what is live has its turn, and then it is called again.
    pub(crate) async fn publish_repairs(&mut self) -> Result<bool, Error> {
        for why in self.repairs.due() {
            let Some(batch) = self.next_batch(why).await? else { continue };
            if !self.tail.is_known() || self.state.target.is_none() || !self.repairs.window_open {
                self.open().await?;
                self.repairs.window_open = true;
                return Ok(true);
            }
            self.repairs.window_open = false;
            self.repairs.last = why;
            let began = Instant::now();
            let count = u32::try_from(batch.events.len()).unwrap_or(BATCH.2);
            let prepared = self.prepare_repairs(why, &batch.events).await?;
            let whole = prepared.len() == batch.events.len();
            let done = self.repair(why, prepared).await?;
            self.repairs.took(began.elapsed());
            let rate = self.config.repair_rate.max(1);
            let queue = self.repairs.queue(why);
            if done {
                queue.failures = 0;
                queue.after = if whole { batch.end } else { queue.after };
                if queue.round.elapsed() > ROUND {
                    queue.begin_round();
                }
                if why == RepairReason::Missing {
                    queue.next = began + Duration::from_secs(1) * count / rate;
                }
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// What is next in a queue; none when nothing is.
    async fn next_batch(&mut self, why: RepairReason) -> Result<Option<RepairBatch>, Error> {
        let block = self.config.park_policy == ParkPolicy::Block;
        let (after, size) = (self.repairs.queue(why).after, self.repairs.size);
        let looked = match why {
            RepairReason::Released if !self.exceptions.any_parked() => Vec::new(),
            RepairReason::Released => {
                let looked = parked::released(&mut self.log, after, block, size.into()).await.map_err(failed)?;
                let event = |outbox_id, event_id| Queued { outbox_id, event_id, times: 0, replaces: Vec::new() };
                looked.into_iter().map(|(id, event_id, ready)| (event(id, event_id), ready)).collect()
            }
            RepairReason::Missing => {
                let size = size.min(self.config.repair_rate.max(1));
                repair::next(&mut self.log, after, block, size.into()).await.map_err(failed)?
            }
        };
        let end = looked.last().map(|(event, _)| event.outbox_id);
        let events: Vec<Queued> = looked.into_iter().filter_map(|(event, ready)| ready.then_some(event)).collect();
        let queue = self.repairs.queue(why);
        queue.waiting = !events.is_empty();
        match end {
            Some(end) if events.is_empty() => {
                // All of these wait for others. What is behind them may not.
                queue.after = end;
                Ok(None)
            }
            Some(end) => Ok(Some(RepairBatch { events, end })),
            None => {
                // Round again: what was passed may be ready by then.
                queue.begin_round();
                queue.next = Instant::now() + LOOK;
                Ok(None)
            }
        }
    }

    /// Reads the events and makes messages of them, of as many as may be in flight.
    async fn prepare_repairs(&mut self, why: RepairReason, batch: &[Queued]) -> Result<Vec<Prepared>, Error> {
        let ids: Vec<i64> = batch.iter().map(|queued| queued.outbox_id).collect();
        let mut rows = window::some(&mut self.log, &ids).await.map_err(failed)?;
        // Another event may have the outbox id of one that is gone: that one goes out by itself.
        rows.retain(|row| batch.iter().any(|queued| (queued.outbox_id, queued.event_id) == (row.id, row.event_id)));
        let there = |id: &i64| rows.binary_search_by_key(id, |row| row.id).is_ok();
        let removed: Vec<i64> = ids.iter().copied().filter(|id| !there(id)).collect();
        if !removed.is_empty() {
            self.refuse(why, &removed, "the event was removed from the outbox").await?;
        }
        let shared = self.config.mode == Mode::Shared;
        let mut messages = Messages::new(self.naming.prefix.clone());
        let (mut prepared, mut bytes) = (Vec::with_capacity(rows.len()), 0);
        for row in rows {
            let Some(queued) = batch.iter().find(|queued| queued.outbox_id == row.id) else { continue };
            let mut one = reader::prepare(&mut self.log, &mut messages, &self.naming.source, row, shared)
                .await
                .map_err(failed)?;
            bytes += one.event.bytes;
            if bytes > MAX_BYTES && !prepared.is_empty() {
                break;
            }
            let (id, mark, replaces) = match why {
                RepairReason::Missing => {
                    let replaces = queued.replaces.iter().map(|sequence| sequence.cast_unsigned()).collect();
                    (Some(format!("{}:r{}", one.event.event_id, queued.times)), "missing", replaces)
                }
                RepairReason::Released => {
                    let id = queued.outbox_id;
                    let replaces = self.repairs.replaces.get(&id).cloned().unwrap_or_default();
                    (self.repairs.renamed.get(&id).cloned(), "released", replaces)
                }
            };
            if let Some(id) = id {
                one.message.set_message_id(&id);
                one.event.renamed = Some(id);
            }
            one.message.mark_repair(mark);
            one.message.mark_replaces(&replaces);
            prepared.push(one);
        }
        Ok(prepared)
    }

    /// Publishes a batch, and writes down what of it is stored, however it ends. True when all of it is.
    async fn repair(&mut self, why: RepairReason, prepared: Vec<Prepared>) -> Result<bool, Error> {
        let keys: Vec<String> = prepared.iter().filter_map(|prepared| prepared.event.key.clone()).collect();
        let (chunks, received) = mpsc::channel(1);
        _ = chunks.send(Ok(prepared)).await;
        drop(chunks);
        let (listener, mut stored) = mpsc::unbounded_channel();
        let pumped = self.publish(received, Some(listener)).await?;
        fault::point("relay-repair-published");
        let mut done = Vec::new();
        while let Ok(Sent { outbox_id, event_id, sequence, .. }) = stored.try_recv() {
            done.push((outbox_id, event_id, sequence));
        }
        self.record_repairs(done).await?;
        fault::point("relay-repair-recorded");
        match pumped {
            Pumped::Done => {
                if why == RepairReason::Released && !self.exceptions.blocked_keys.is_empty() {
                    self.unblock(&keys).await?;
                }
                return Ok(true);
            }
            Pumped::Stopped => _ = self.tail.forget(),
            Pumped::Doubt(doubt) => self.deal_with_repair(why, &doubt).await?,
        }
        Ok(false)
    }

    async fn deal_with_repair(&mut self, why: RepairReason, doubt: &Doubt) -> Result<(), Error> {
        let class = self.interrupted(doubt);
        // What is left of the batch stays in this window.
        self.repairs.window_open = true;
        let queue = self.repairs.queue(why);
        queue.failures += 1;
        let failures = queue.failures;
        match (class, doubt) {
            (_, Doubt::Refused { .. }) if self.method.batches() => self.method.single_out(),
            (_, Doubt::Unbatched) => {
                self.method.is_unable();
                self.disordered = true;
            }
            (_, Doubt::Duplicate { event, sequence }) => self.repeated_repair(why, event, *sequence).await?,
            (Class::Park, _) => {
                if let Some(event) = doubt.event() {
                    self.refuse(why, &[event.outbox_id], &doubt.to_string()).await?;
                }
            }
            (Class::BackPressure | Class::Alarm, _) => self.wait_for(why, SLOW.after(failures)),
            _ if failures <= 1 => {}
            _ => self.wait_for(why, Backoff::RECONNECT.after(failures)),
        }
        Ok(())
    }

    /// Makes a queue wait; other events are published meanwhile.
    fn wait_for(&mut self, why: RepairReason, wait: Duration) {
        self.repairs.window_open = false;
        self.repairs.queue(why).next = Instant::now() + wait;
    }

    /// The server took an event for a repeat: it counts as published when it is there.
    async fn repeated_repair(&mut self, why: RepairReason, event: &Sent, sequence: u64) -> Result<(), Error> {
        let (outbox_id, event_id) = (event.outbox_id, event.event_id);
        let there = match self.look_for(event, sequence).await? {
            Some(There::Event) => return self.record_repairs(vec![(outbox_id, event_id, sequence)]).await,
            Some(there) => there,
            None => {
                let failures = self.repairs.queue(why).failures;
                self.wait_for(why, Backoff::RECONNECT.after(failures));
                return Ok(());
            }
        };
        tracing::warn!(%event_id, outbox_id, sequence, "{there}; publishing the event again");
        let forgery = (there == There::Forgery).then_some(sequence);
        match why {
            RepairReason::Missing => {
                let renamed = repair::rename(&mut self.log, self.epoch, outbox_id, forgery).await;
                self.led(renamed, "giving a repair another message id").map(drop)
            }
            RepairReason::Released => {
                self.repairs.renamed.insert(outbox_id, format!("{event_id}:r{sequence}"));
                if let Some(sequence) = forgery {
                    note(&mut self.repairs.replaces, outbox_id, sequence);
                }
                Ok(())
            }
        }
    }

    /// Takes events out of their queue that the stream will never take.
    async fn refuse(&mut self, why: RepairReason, outbox_ids: &[i64], reason: &str) -> Result<(), Error> {
        let written = match why {
            RepairReason::Missing => repair::refuse(&mut self.log, self.epoch, outbox_ids, reason).await,
            RepairReason::Released => parked::park_again(&mut self.log, self.epoch, outbox_ids, reason).await,
        };
        self.led(written, "taking events out of their queue").map(drop)
    }

    /// Writes down where events were seen that were published out of order: outbox id, event id, sequence.
    pub(crate) async fn record_repairs(&mut self, stored: Vec<(i64, Uuid, u64)>) -> Result<(), Error> {
        if stored.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = stored.iter().map(|(id, ..)| *id).collect();
        let event_ids: Vec<Uuid> = stored.iter().map(|(_, event_id, _)| *event_id).collect();
        let sequences: Vec<i64> = stored.iter().map(|(.., sequence)| sequence.cast_signed()).collect();
        let repaired = repair::published(&mut self.log, self.epoch, &ids, &event_ids, &sequences).await;
        let repaired = self.led(repaired, "recording where repairs are in the stream")?;
        let released = match self.exceptions.any_parked() {
            false => Ok(Written::Rows(0)),
            true => parked::found(&mut self.log, self.epoch, &ids, &sequences).await,
        };
        let released = self.led(released, "recording where released events are in the stream")?;
        ids.iter().for_each(|id| _ = (self.repairs.renamed.remove(id), self.repairs.replaces.remove(id)));
        if repaired + released > 0 {
            tracing::info!(
                missing = repaired,
                released,
                first_outbox_id = ids.first(),
                last_outbox_id = ids.last(),
                "published events out of the outbox's order"
            );
        }
        Ok(())
    }
}

fn failed(error: sqlx::Error) -> Error {
    database_error("publishing repairs failed", error)
}
