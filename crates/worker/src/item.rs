//! An event that is to run: before its payload is read, and with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aftercommit_core::envelope::Envelope;
use aftercommit_core::postgres::attempt::Record;
use aftercommit_core::postgres::inbox;
use aftercommit_outbox::event::EventId;

use super::route::Try;
use super::scheduler::EventPlace;

/// One event to run.
pub(super) struct Item {
    pub(super) place: EventPlace,
    /// Which event it is, if that is known.
    pub(super) id: Option<EventId>,
    /// None when it has to be read from its place.
    pub(super) event: Option<Arc<Envelope>>,
    pub(super) deliveries: u64,
    /// How often in a row something that it needs was away.
    pub(super) interruptions: u32,
    /// What is on record of it. A suspect is the only event of its batch.
    pub(super) record: Record,
}

impl Item {
    pub(super) fn queued(self, stream: &str, stream_seq: i64, event: Arc<Envelope>) -> Queued {
        let Self { place, deliveries, interruptions, record, .. } = self;
        let stream = stream.to_string();
        let (failures, fresh) = (AtomicU32::new(record.attempts), AtomicBool::new(false));
        Queued { place, stream, stream_seq, event, deliveries, interruptions, record, failures, fresh }
    }
}

/// An event with its payload.
pub(super) struct Queued {
    pub(super) place: EventPlace,
    /// The stream that it was read from, perhaps long ago, and its sequence there.
    pub(super) stream: String,
    pub(super) stream_seq: i64,
    pub(super) event: Arc<Envelope>,
    pub(super) deliveries: u64,
    pub(super) interruptions: u32,
    pub(super) record: Record,
    /// The attempts that had failed when it was looked at last.
    pub(super) failures: AtomicU32,
    /// Whether it was not done yet when it was looked at last.
    pub(super) fresh: AtomicBool,
}

impl Queued {
    pub(super) fn row(&self) -> inbox::Row {
        let sequence = Some(self.event.sequence).filter(|sequence| *sequence > 0);
        let live_key = self.event.order_key().filter(|_| matches!(self.place, EventPlace::Stream(_))).map(String::from);
        inbox::Row { event_id: self.event.id.as_uuid(), stream_seq: self.stream_seq, sequence, live_key }
    }

    /// As of when it was looked at last.
    pub(super) fn this_try(&self) -> Try {
        Try { attempt: self.failures.load(Ordering::Relaxed) + 1, delivery_count: self.deliveries.max(1) }
    }
}

pub(super) fn redrive_ids(places: impl Iterator<Item = EventPlace>) -> Vec<i64> {
    let id = |place| match place {
        EventPlace::Redrive(id) => Some(id),
        EventPlace::Stream(_) => None,
    };
    places.filter_map(id).collect()
}
