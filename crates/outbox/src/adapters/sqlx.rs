//! Publishing with sqlx, whose versions differ in nothing that matters here.

/// The functions of an adapter for the version of sqlx that is the crate `$sqlx`.
macro_rules! adapter {
    ($sqlx:ident) => {
        use ::$sqlx::error::DatabaseError;
        use ::$sqlx::postgres::{PgDatabaseError, Postgres};
        use ::$sqlx::types::Json;
        use ::$sqlx::{Error, Transaction};

        use crate::check::{self, NewEvent};
        use crate::error::{PublishError, PublishErrorKind, Refusal, tells_of_stale_plan};
        use crate::event::{Event, EventId};
        use crate::insert::{Columns, MANY, ONE, admitted, statements, written};
        use crate::is_pooled;
        use crate::raw::RawEvent;

        /// Writes one event in the caller's transaction. Its payload is the event's JSON.
        ///
        /// # Errors
        /// [`PublishErrorKind::Invalid`] when the event is refused; then nothing was written and the transaction is
        /// still usable. Any other kind when PostgreSQL refused the statement; then the transaction can only be rolled
        /// back.
        pub async fn publish<E: Event>(tx: &mut Transaction<'_, Postgres>, event: &E) -> Result<EventId, PublishError> {
            publish_raw(tx, RawEvent::of(event)?).await
        }

        /// Writes any number of events of one type in the caller's transaction, in their order and in one statement (a
        /// further one for each 64 MiB of payload). Without events it does nothing.
        ///
        /// # Errors
        /// As [`publish`]; when one event is refused, none is written.
        pub async fn publish_all<'e, E: Event>(
            tx: &mut Transaction<'_, Postgres>,
            events: impl IntoIterator<Item = &'e E>,
        ) -> Result<Vec<EventId>, PublishError> {
            write(tx, is_pooled(), &admitted(events)?).await
        }

        /// Writes one event whose bytes, content type, headers or id the caller chose.
        ///
        /// # Errors
        /// As [`publish`], and [`PublishErrorKind::Duplicate`] when an event with the caller's id is in the outbox.
        pub async fn publish_raw(tx: &mut Transaction<'_, Postgres>, event: RawEvent) -> Result<EventId, PublishError> {
            publish_through(is_pooled(), tx, event).await
        }

        /// [`publish_raw`], where it is known how this transaction's connection goes: `pooled` when a pooler in
        /// transaction mode may stand in between.
        ///
        /// # Errors
        /// As [`publish_raw`].
        pub async fn publish_through(
            pooled: bool,
            tx: &mut Transaction<'_, Postgres>,
            event: RawEvent,
        ) -> Result<EventId, PublishError> {
            let event = check::admit(event)?;
            write(tx, pooled, std::slice::from_ref(&event)).await?;
            Ok(event.event_id.into())
        }

        async fn write(
            tx: &mut Transaction<'_, Postgres>,
            pooled: bool,
            events: &[NewEvent],
        ) -> Result<Vec<EventId>, PublishError> {
            if let Some(first) = events.first() {
                insert(tx, pooled, events).await.map_err(|error| failed(&first.event_type, error))?;
            }
            Ok(written(events))
        }

        /// It asks for nothing back, so that the right to insert is enough. `pooled` when a pooler in transaction mode
        /// may stand in between, so that prepared statements have no name.
        async fn insert(tx: &mut Transaction<'_, Postgres>, pooled: bool, events: &[NewEvent]) -> Result<(), Error> {
            if let [event] = events {
                return insert_one(tx, pooled, event).await;
            }
            for events in statements(events) {
                insert_many(tx, pooled, events).await?;
            }
            Ok(())
        }

        async fn insert_one(tx: &mut Transaction<'_, Postgres>, pooled: bool, event: &NewEvent) -> Result<(), Error> {
            ::$sqlx::query(ONE.sql())
                .bind(event.event_id)
                .bind(&event.event_type)
                .bind(event.version)
                .bind(&event.key)
                .bind(Json(&event.headers))
                .bind(&event.payload)
                .bind(&event.content_type)
                .persistent(!pooled)
                .execute(&mut **tx)
                .await?;
            Ok(())
        }

        async fn insert_many(
            tx: &mut Transaction<'_, Postgres>,
            pooled: bool,
            events: &[NewEvent],
        ) -> Result<(), Error> {
            let Columns { event_ids, types, versions, keys, headers, payloads, content_types } = Columns::of(events);
            ::$sqlx::query(MANY.sql())
                .bind(event_ids)
                .bind(types)
                .bind(versions)
                .bind(keys)
                .bind(headers.into_iter().map(Json).collect::<Vec<_>>())
                .bind(payloads)
                .bind(content_types)
                .persistent(!pooled)
                .execute(&mut **tx)
                .await?;
            Ok(())
        }

        fn failed(event_type: &str, error: Error) -> PublishError {
            match refusal(event_type, &error) {
                Ok(refused) => refused,
                Err(kind) => PublishError::driver(event_type, kind, error),
            }
        }

        /// What PostgreSQL said, or else what it means that the driver failed.
        pub(crate) fn refusal(event_type: &str, error: &Error) -> Result<PublishError, PublishErrorKind> {
            match error {
                Error::Database(error) => Ok(PublishError::refused(
                    event_type,
                    &Refusal {
                        code: &error.code().unwrap_or_default(),
                        message: error.message(),
                        constraint: error.constraint(),
                        stale_plan: is_stale_plan(&**error),
                    },
                )),
                Error::Io(_)
                | Error::Tls(_)
                | Error::PoolTimedOut
                | Error::PoolClosed
                | Error::WorkerCrashed
                | Error::Protocol(_) => Err(PublishErrorKind::Unavailable),
                _ => Err(PublishErrorKind::Database),
            }
        }

        /// Whether a prepared statement of this session no longer fits its tables. In another session it will.
        pub fn is_stale_plan(error: &dyn DatabaseError) -> bool {
            let routine = || error.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::routine);
            error.code().is_some_and(|code| tells_of_stale_plan(&code, routine()))
        }
    };
}

pub(crate) use adapter;
