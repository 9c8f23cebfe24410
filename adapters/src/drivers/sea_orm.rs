//! SeaORM.

use ::sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, TransactionTrait};
use aftercommit::outbox::{EventId, PublishError, RawEvent};
use aftercommit_outbox::sea_orm as outbox;

use crate::{Connection, Placed, Transaction};

/// A pool of SeaORM with one connection.
pub struct SeaOrm(DatabaseConnection);

impl Connection for SeaOrm {
    type Transaction<'c> = DatabaseTransaction;

    async fn connect(url: &str) -> Self {
        let mut options = ConnectOptions::new(url);
        options.max_connections(1).sqlx_logging(false);
        Self(Database::connect(options).await.unwrap())
    }

    async fn begin(&mut self) -> Self::Transaction<'_> {
        self.0.begin().await.unwrap()
    }
}

impl Transaction for DatabaseTransaction {
    async fn publish(&mut self, event: &Placed) -> Result<EventId, PublishError> {
        outbox::publish(self, event).await
    }

    async fn publish_all(&mut self, events: &[Placed]) -> Result<Vec<EventId>, PublishError> {
        outbox::publish_all(self, events).await
    }

    async fn publish_raw(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        outbox::publish_raw(self, event).await
    }

    async fn publish_in_vain(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
        let savepoint = self.begin().await.unwrap();
        let id = outbox::publish_raw(&savepoint, event).await;
        savepoint.rollback().await.unwrap();
        id
    }

    async fn execute(&mut self, sql: &'static str) {
        self.execute_unprepared(sql).await.unwrap();
    }

    async fn commit(self) {
        self.commit().await.unwrap();
    }

    async fn rollback(self) {
        self.rollback().await.unwrap();
    }
}
