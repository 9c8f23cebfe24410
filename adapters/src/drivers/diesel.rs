//! diesel with connections that wait.

use ::diesel::connection::{SimpleConnection, TransactionManager};
use ::diesel::{Connection as _, PgConnection};
use aftercommit::outbox::{EventId, PublishError, RawEvent};
use aftercommit_outbox::diesel as outbox;

use crate::{Connection, Placed, Transaction};

/// A connection of diesel.
pub struct Diesel(PgConnection);

/// Such a connection with a transaction open.
pub struct Open<'c>(&'c mut PgConnection);

type Transactions = <PgConnection as ::diesel::Connection>::TransactionManager;

impl Connection for Diesel {
    type Transaction<'c> = Open<'c>;

    async fn connect(url: &str) -> Self {
        Self(PgConnection::establish(url).unwrap())
    }

    async fn begin(&mut self) -> Self::Transaction<'_> {
        Transactions::begin_transaction(&mut self.0).unwrap();
        Open(&mut self.0)
    }
}

impl Transaction for Open<'_> {
    async fn publish(&mut self, event: &Placed) -> Result<EventId, PublishError> {
        outbox::publish(self.0, event)
    }

    async fn publish_all(&mut self, events: &[Placed]) -> Result<Vec<EventId>, PublishError> {
        outbox::publish_all(self.0, events)
    }

    async fn publish_raw(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        outbox::publish_raw(self.0, event)
    }

    async fn publish_in_vain(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        Transactions::begin_transaction(self.0).unwrap();
        let id = outbox::publish_raw(self.0, event);
        Transactions::rollback_transaction(self.0).unwrap();
        id
    }

    async fn execute(&mut self, sql: &'static str) {
        self.0.batch_execute(sql).unwrap();
    }

    async fn commit(self) {
        Transactions::commit_transaction(self.0).unwrap();
    }

    async fn rollback(self) {
        Transactions::rollback_transaction(self.0).unwrap();
    }
}
