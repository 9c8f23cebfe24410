//! Sends events back to a subscriber, so that its worker sees all that is to run of a key or nothing, and no live event of
//! the key gets in between.

use uuid::Uuid;

use crate::fault;
use crate::postgres::finding;
use crate::postgres::resend::{self, Event, Order};
use crate::postgres::session::{Session, Tx};

/// An open transaction.
pub struct Sending<'s> {
    tx: Tx<'s>,
    order: Order,
    /// The first row that it wrote.
    first: Option<i64>,
    sent: u64,
}

impl<'s> Sending<'s> {
    /// Begins the transaction.
    pub async fn begin(session: &'s mut Session, order: Order) -> Result<Self, sqlx::Error> {
        Ok(Self { tx: resend::begin(session).await?, order, first: None, sent: 0 })
    }

    /// Sends these events back, behind those of the calls before. Nothing is valid until [`commit`](Self::commit).
    pub async fn send(&mut self, events: &[Event]) -> Result<(), sqlx::Error> {
        if events.is_empty() {
            return Ok(());
        }
        let ids = resend::send(&mut self.tx, &self.order, events).await?;
        self.first = self.first.into_iter().chain(ids.iter().copied()).min();
        self.sent += ids.len() as u64;
        fault::point("resend-sent");
        Ok(())
    }

    /// Makes it valid, and returns how many rows are new.
    pub async fn commit(mut self, action: &str) -> Result<u64, sqlx::Error> {
        if let Some(first) = self.first {
            resend::sort(&mut self.tx, &self.order.subscriber, first).await?;
            resend::log(&mut self.tx, &self.order, action, self.sent).await?;
        }
        fault::point("resend-before-commit");
        self.tx.commit().await?;
        fault::point("resend-committed");
        Ok(self.sent)
    }

    /// Marks findings about events as on their way, with the same commit.
    pub async fn mark_repairing(&mut self, name: &str, kind: &str, events: &[Uuid]) -> Result<(), sqlx::Error> {
        finding::mark_repairing(&mut self.tx, name, kind, events).await
    }
}
