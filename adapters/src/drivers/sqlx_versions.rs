//! The versions of sqlx.

use aftercommit::outbox::{EventId, PublishError, RawEvent};

use crate::{Connection, Placed, Transaction};

macro_rules! driver {
    ($sqlx:ident, $adapter:ident, $name:ident) => {
        #[doc = concat!("A connection of ", stringify!($adapter), ".")]
        pub struct $name(::$sqlx::PgConnection);

        impl Connection for $name {
            type Transaction<'c> = ::$sqlx::Transaction<'c, ::$sqlx::Postgres>;

            async fn connect(url: &str) -> Self {
                use ::$sqlx::ConnectOptions;
                let options: ::$sqlx::postgres::PgConnectOptions = url.parse().unwrap();
                // PgBouncer does not know this parameter.
                Self(options.extra_float_digits(None).connect().await.unwrap())
            }

            async fn begin(&mut self) -> Self::Transaction<'_> {
                ::$sqlx::Connection::begin(&mut self.0).await.unwrap()
            }
        }

        impl Transaction for ::$sqlx::Transaction<'_, ::$sqlx::Postgres> {
            async fn publish(&mut self, event: &Placed) -> Result<EventId, PublishError> {
                aftercommit_outbox::$adapter::publish(self, event).await
            }

            async fn publish_all(&mut self, events: &[Placed]) -> Result<Vec<EventId>, PublishError> {
                aftercommit_outbox::$adapter::publish_all(self, events).await
            }

            async fn publish_raw(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
                aftercommit_outbox::$adapter::publish_raw(self, event).await
            }

            async fn publish_in_vain(&mut self, event: RawEvent) -> Result<EventId, PublishError> {
                let mut savepoint = ::$sqlx::Connection::begin(&mut **self).await.unwrap();
                let id = aftercommit_outbox::$adapter::publish_raw(&mut savepoint, event).await;
                savepoint.rollback().await.unwrap();
                id
            }

            async fn execute(&mut self, sql: &'static str) {
                ::$sqlx::raw_sql(sql).execute(&mut **self).await.unwrap();
            }

            async fn commit(self) {
                self.commit().await.unwrap();
            }

            async fn rollback(self) {
                self.rollback().await.unwrap();
            }
        }
    };
}

driver!(sqlx08, sqlx08, Sqlx08);
driver!(sqlx, sqlx09, Sqlx09);
