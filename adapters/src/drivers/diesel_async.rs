//! diesel-async.

use ::diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection, TransactionManager};
use aftercommit::outbox::{EventId, PublishError, RawEvent};
use aftercommit_outbox::diesel_async as outbox;

use crate::{Connection, Placed, Transaction};

/// A connection of diesel-async.
pub struct DieselAsync(AsyncPgConnection);

/// Such a connection with a transaction open.
pub struct Open<'c>(&'c mut AsyncPgConnection);

type Transactions = <AsyncPgConnection as AsyncConnection>::TransactionManager;

impl Connection for DieselAsync {
    type Transaction<'c> = Open<'c>;

    async fn connect(url: &str) -> Self {
        Self(AsyncPgConnection::establish(url).await.unwrap())
    }

    async fn begin(&mut self) -> Self::Transaction<'_> {
        Transactions::begin_transaction(&mut self.0).await.unwrap();
        Open(&mut self.0)
    }
}

impl Transaction for Open<'_> {
    async fn publish(&mut self, event: &Placed) -> Result<EventId, PublishError> {
        outbox::publish(self.0, event).await
    }

    async fn publish_all(&mut self, events: &[Placed]) -> Result<Vec<EventId>, PublishError> {
        outbox::publish_all(self.0, events).await
    }

    async fn publish_raw(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        outbox::publish_raw(self.0, event).await
    }

    async fn publish_in_vain(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        Transactions::begin_transaction(self.0).await.unwrap();
        let id = outbox::publish_raw(self.0, event).await;
        Transactions::rollback_transaction(self.0).await.unwrap();
        id
    }

    async fn execute(&mut self, sql: &'static str) {
        self.0.batch_execute(sql).await.unwrap();
    }

    async fn commit(self) {
        Transactions::commit_transaction(self.0).await.unwrap();
    }

    async fn rollback(self) {
        Transactions::rollback_transaction(self.0).await.unwrap();
    }
}
