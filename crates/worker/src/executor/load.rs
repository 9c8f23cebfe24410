//! Reads the events of a batch whose payloads are not in memory.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::join_all;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::jetstream::stored::Read;
use aftercommit_core::postgres::redrive::{self, Redriven};
use aftercommit_outbox::event::EventId;

use super::Executor;
use crate::item::{Item, Queued, redrive_ids};
use crate::scheduler::EventPlace;
use crate::verdict::{BatchReport, Halt, OutageWait, Verdict};

/// The most payload bytes that all executors of a subscriber read from the table of redriven events at a time.
const MAX_BYTES: usize = 64 * 1024 * 1024;

impl Executor {
    /// Reads the payloads that are not in memory. What follows one that cannot be read now is not run either, because
    /// it may have the same key.
    pub(super) async fn load(&self, items: Vec<Item>, report: &mut BatchReport) -> Result<Vec<Queued>, Halt> {
        let mut redriven = match self.read_redriven(&items).await {
            Ok(redriven) => redriven,
            Err(reason) => {
                report.verdicts.extend(items.iter().map(|item| (item.place, Verdict::NotRun)));
                return Err(Halt::Outage(reason));
            }
        };
        let loaded = join_all(items.into_iter().map(|item| {
            let row = redriven.remove(&item.place);
            self.complete(item, row)
        }));
        let mut events = Vec::new();
        let mut stuck = false;
        for loaded in loaded.await {
            match loaded {
                Ok(event) if !stuck => events.push(event),
                Ok(event) => report.verdicts.push((event.place, Verdict::NotRun)),
                Err((place, verdict)) => {
                    stuck |= matches!(verdict, Verdict::Interrupted { .. } | Verdict::NotRun);
                    report.verdicts.push((place, verdict));
                }
            }
        }
        Ok(events)
    }

    async fn read_redriven(&self, items: &[Item]) -> Result<HashMap<EventPlace, Redriven>, String> {
        let ids = redrive_ids(items.iter().map(|item| item.place));
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let share = MAX_BYTES / self.subscriber.settings.concurrency.max(1);
        let read = self.connections.run(async |connection| redrive::read(connection, &ids, share).await);
        Ok(self.own(read).await?.into_iter().map(|row| (EventPlace::Redrive(row.id), row)).collect())
    }

    /// The event with its payload, or what becomes of it without.
    async fn complete(&self, item: Item, row: Option<Redriven>) -> Result<Queued, (EventPlace, Verdict)> {
        let place = item.place;
        match (place, row) {
            (EventPlace::Stream(sequence), _) => {
                let event = match &item.event {
                    Some(event) => Arc::clone(event),
                    None => Arc::new(self.read_again(sequence, item.id).await.map_err(|verdict| (place, verdict))?),
                };
                let sequence = i64::try_from(sequence).unwrap_or(i64::MAX);
                Ok(item.queued(self.source.stream(), sequence, event))
            }
            // Somebody else was faster.
            (EventPlace::Redrive(_), None) => Err((place, Verdict::Done)),
            (EventPlace::Redrive(_), Some(Redriven { event: None, .. })) => Err((place, Verdict::NotRun)),
            (EventPlace::Redrive(_), Some(Redriven { event: Some(event), stream, stream_seq, .. })) => {
                Ok(item.queued(&stream, stream_seq, Arc::new(event)))
            }
        }
    }

    /// Reads an event of the stream again whose payload was let go to save memory.
    async fn read_again(&self, sequence: u64, id: Option<EventId>) -> Result<Envelope, Verdict> {
        // Whoever pulls finds that out, too, and begins anew.
        let lost = || Verdict::Interrupted { reason: "the stream has lost its end".into(), wait: OutageWait::Soon };
        match self.source.read(sequence).await {
            Ok(Read::Event(event)) if id.is_none_or(|id| id == event.id) => Ok(*event),
            Ok(Read::Event(_) | Read::Ended) => Err(lost()),
            Ok(Read::Removed) => self.read_removed(sequence, id).await,
            Err(error) => Err(Verdict::Interrupted { reason: error.report(), wait: OutageWait::Soon }),
        }
    }

    /// Reads an event from the outbox that the stream dropped while it waited here. Without an answer it waits on: it is
    /// lost only when neither has it.
    async fn read_removed(&self, sequence: u64, id: Option<EventId>) -> Result<Envelope, Verdict> {
        let subscriber = &self.subscriber.name;
        let found = match id {
            Some(id) => self.source.ask_outbox(id).await,
            None => Ok(None),
        };
        let event_id = id.map(|id| id.to_string());
        match found {
            Ok(Some(event)) => {
                tracing::warn!(
                    subscriber,
                    event_id,
                    sequence,
                    "the stream dropped an event before it could be handled: its retention is too short. It comes from the outbox"
                );
                Ok(event)
            }
            Ok(None) => {
                tracing::error!(
                    subscriber,
                    event_id,
                    sequence,
                    "an event is lost: stream and outbox dropped it before it could be handled, their retention is too short"
                );
                Err(Verdict::Dead("stream and outbox dropped it before it could be handled".into()))
            }
            Err(error) => {
                let why = error.report();
                let reason = format!("the stream dropped it, and its outbox cannot be asked for it: {why}");
                Err(Verdict::Interrupted { reason, wait: OutageWait::Soon })
            }
        }
    }
}
