//! Reads the events of a batch whose payloads are not in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use futures_util::future::join_all;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::jetstream::stored::Read;
use aftercommit_core::postgres::attempt::Record;
use aftercommit_core::postgres::inbox;
use aftercommit_core::postgres::redrive::{self, Redriven};
use aftercommit_outbox::event::EventId;

use crate::executor::Lane;
use crate::executor::decide::{Halt, Report, Verdict, Wait};
use crate::route::Try;
use crate::scheduler::Place;

/// The most payload bytes that all lanes of a subscriber read from the table of redriven events at a time.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// One event to run.
pub(crate) struct Item {
    pub(crate) place: Place,
    /// Which event it is, if that is known.
    pub(crate) id: Option<EventId>,
    /// None when it has to be read from its place.
    pub(crate) event: Option<Arc<Envelope>>,
    pub(crate) deliveries: u64,
    /// How often in a row something that it needs was away.
    pub(crate) interruptions: u32,
    /// What is on record of it. A suspect is the only event of its batch.
    pub(crate) record: Record,
}

impl Item {
    pub(crate) fn queued(self, stream: &str, stream_seq: i64, event: Arc<Envelope>) -> Queued {
        let Self { place, deliveries, interruptions, record, .. } = self;
        let stream = stream.to_string();
        let (failures, fresh) = (AtomicU32::new(record.attempts), AtomicBool::new(false));
        Queued { place, stream, stream_seq, event, deliveries, interruptions, record, failures, fresh }
    }
}

/// An event with its payload.
pub(crate) struct Queued {
    pub(crate) place: Place,
    /// The stream that it was read from, perhaps long ago, and its sequence there.
    pub(crate) stream: String,
    pub(crate) stream_seq: i64,
    pub(crate) event: Arc<Envelope>,
    pub(crate) deliveries: u64,
    pub(crate) interruptions: u32,
    pub(crate) record: Record,
    /// The attempts that had failed when it was looked at last.
    pub(crate) failures: AtomicU32,
    /// Whether it was not done yet when it was looked at last.
    pub(crate) fresh: AtomicBool,
}

impl Queued {
    pub(crate) fn row(&self) -> inbox::Row {
        let sequence = Some(self.event.sequence).filter(|sequence| *sequence > 0);
        let live_key = self.event.key.clone().filter(|_| matches!(self.place, Place::Stream(_)));
        inbox::Row { event_id: self.event.id.as_uuid(), stream_seq: self.stream_seq, sequence, live_key }
    }

    /// As of when it was looked at last.
    pub(crate) fn this_try(&self) -> Try {
        Try { attempt: self.failures.load(Ordering::Relaxed) + 1, delivery_count: self.deliveries.max(1) }
    }
}

pub(crate) fn redrive_ids(places: impl Iterator<Item = Place>) -> Vec<i64> {
    let id = |place| match place {
        Place::Redrive(id) => Some(id),
        Place::Stream(_) => None,
    };
    places.filter_map(id).collect()
}

impl Lane {
    /// Reads the payloads that are not in memory. What follows one that cannot be read now is not run either, because
    /// it may have the same key.
    pub(crate) async fn load(&self, items: Vec<Item>, report: &mut Report) -> Result<Vec<Queued>, Halt> {
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

    async fn read_redriven(&self, items: &[Item]) -> Result<HashMap<Place, Redriven>, String> {
        let ids = redrive_ids(items.iter().map(|item| item.place));
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let share = MAX_BYTES / self.subscriber.settings.concurrency.max(1);
        let read = self.connections.run(async |connection| redrive::read(connection, &ids, share).await);
        Ok(self.own(read).await?.into_iter().map(|row| (Place::Redrive(row.id), row)).collect())
    }

    /// The event with its payload, or what becomes of it without.
    async fn complete(&self, item: Item, row: Option<Redriven>) -> Result<Queued, (Place, Verdict)> {
        let place = item.place;
        match (place, row) {
            (Place::Stream(sequence), _) => {
                let event = match &item.event {
                    Some(event) => Arc::clone(event),
                    None => Arc::new(self.read_again(sequence, item.id).await.map_err(|verdict| (place, verdict))?),
                };
                let sequence = i64::try_from(sequence).unwrap_or(i64::MAX);
                Ok(item.queued(self.source.stream(), sequence, event))
            }
            // Somebody else was faster.
            (Place::Redrive(_), None) => Err((place, Verdict::Done)),
            (Place::Redrive(_), Some(Redriven { event: None, .. })) => Err((place, Verdict::NotRun)),
            (Place::Redrive(_), Some(Redriven { event: Some(event), stream, stream_seq, .. })) => {
                Ok(item.queued(&stream, stream_seq, Arc::new(event)))
            }
        }
    }

    /// Reads an event of the stream again whose payload was let go to save memory.
    async fn read_again(&self, sequence: u64, id: Option<EventId>) -> Result<Envelope, Verdict> {
        // Whoever pulls finds that out, too, and begins anew.
        let lost = || Verdict::Interrupted { reason: "the stream has lost its end".into(), wait: Wait::Soon };
        match self.source.read(sequence).await {
            Ok(Read::Event(event)) if id.is_none_or(|id| id == event.id) => Ok(*event),
            Ok(Read::Event(_) | Read::Ended) => Err(lost()),
            Ok(Read::Removed) => self.read_removed(sequence, id).await,
            Err(error) => Err(Verdict::Interrupted { reason: error.report(), wait: Wait::Soon }),
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
                Err(Verdict::Interrupted { reason, wait: Wait::Soon })
            }
        }
    }
}
