//! tokio-postgres.

use aftercommit::outbox::{EventId, PublishError, RawEvent};
use aftercommit_outbox::tokio_postgres as outbox;

use crate::{Connection, Placed, Transaction};

/// A client of tokio-postgres.
pub struct TokioPostgres(::tokio_postgres::Client);

impl Connection for TokioPostgres {
    type Transaction<'c> = ::tokio_postgres::Transaction<'c>;

    async fn connect(url: &str) -> Self {
        let (client, connection) = ::tokio_postgres::connect(url, ::tokio_postgres::NoTls).await.unwrap();
        // It fails when the session is ended, as one test wants.
        tokio::spawn(connection);
        Self(client)
    }

    async fn begin(&mut self) -> Self::Transaction<'_> {
        self.0.transaction().await.unwrap()
    }
}

impl Transaction for ::tokio_postgres::Transaction<'_> {
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
        let savepoint = self.transaction().await.unwrap();
        let id = outbox::publish_raw(&savepoint, event).await;
        savepoint.rollback().await.unwrap();
        id
    }

    async fn execute(&mut self, sql: &'static str) {
        self.batch_execute(sql).await.unwrap();
    }

    async fn commit(self) {
        self.commit().await.unwrap();
    }

    async fn rollback(self) {
        self.rollback().await.unwrap();
    }
}
