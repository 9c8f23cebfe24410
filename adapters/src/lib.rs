//! What the drivers have in common, so that one table of tests can run over all of them, and a database to run it on.

#![expect(async_fn_in_trait, reason = "every test runs on one thread")]

pub mod database;
pub mod drivers;

use aftercommit::Event;
use aftercommit::outbox::{EventId, PublishError, RawEvent};
use serde::{Deserialize, Serialize};

/// A connection to PostgreSQL through one driver.
pub trait Connection: Sized {
    /// A transaction on it.
    type Transaction<'c>: Transaction
    where
        Self: 'c;

    /// Connects.
    async fn connect(url: &str) -> Self;

    /// Begins a transaction.
    async fn begin(&mut self) -> Self::Transaction<'_>;
}

/// An open transaction, with the functions of the driver's adapter.
pub trait Transaction: Sized {
    /// `publish`.
    async fn publish(&mut self, event: &Placed) -> Result<EventId, PublishError>;

    /// `publish_all`.
    async fn publish_all(&mut self, events: &[Placed]) -> Result<Vec<EventId>, PublishError>;

    /// `publish_raw`.
    async fn publish_raw(&mut self, event: RawEvent) -> Result<EventId, PublishError>;

    /// `publish_raw` within a savepoint, which is then rolled back.
    async fn publish_in_vain(&mut self, event: RawEvent) -> Result<EventId, PublishError>;

    /// Runs a statement without parameters.
    async fn execute(&mut self, sql: &'static str);

    /// Commits.
    async fn commit(self);

    /// Rolls back.
    async fn rollback(self);
}

/// An event with a type, a version and, for some, a key of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placed {
    /// Its number; below 0 without a key, 0 with one that is refused.
    pub order: i64,
    /// Any text.
    pub note: String,
}

impl Placed {
    /// An event with this number and a note that is not plain ASCII.
    pub fn number(order: i64) -> Self {
        Self { order, note: format!("Nr. {order}: \"Grüße\" \u{2028} \\") }
    }
}

impl Event for Placed {
    const TYPE: &'static str = "order.placed";
    const VERSION: u32 = 3;

    fn key(&self) -> Option<String> {
        match self.order {
            ..0 => None,
            0 => Some(String::new()),
            order => Some(format!("order-{order}")),
        }
    }
}
