//! A database session that was lost while events ran.

use uuid::Uuid;

use aftercommit_core::postgres::pins::Server;

use super::scheduler::EventPlace;

/// A session that ended while these events ran. Until the database answers nobody knows what that means.
#[derive(Debug)]
pub(super) struct Loss {
    /// The number of the executor that ran them; they are marked as running under it.
    pub(super) executor: i64,
    /// The events with the number of their failed attempts.
    pub(super) events: Vec<(EventPlace, Uuid, u32)>,
    /// The server that the session was on.
    pub(super) server: Server,
    pub(super) reason: String,
}

impl Loss {
    pub(super) fn places(&self) -> impl Iterator<Item = EventPlace> {
        self.events.iter().map(|(place, ..)| *place)
    }
}
