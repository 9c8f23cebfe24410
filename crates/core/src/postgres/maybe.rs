//! What may be null in rows that are read into structs: the driver's derive has no conversion within an `Option`.

use chrono::{DateTime, Utc};
use sqlx::postgres::{PgTypeInfo, PgValueRef};
use sqlx::{Decode, Postgres, Type};
use uuid::Uuid;

use super::time::Time;
use aftercommit_outbox::event::EventId;

/// A value of the driver's that may be null and is converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Maybe<T>(Option<T>);

impl<T: Type<Postgres>> Type<Postgres> for Maybe<T> {
    fn type_info() -> PgTypeInfo {
        T::type_info()
    }
}

impl<'r, T: Type<Postgres> + Decode<'r, Postgres>> Decode<'r, Postgres> for Maybe<T> {
    fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
        Ok(Self(<Option<T> as Decode<Postgres>>::decode(value)?))
    }
}

impl From<Maybe<Time>> for Option<DateTime<Utc>> {
    fn from(time: Maybe<Time>) -> Self {
        time.0.map(DateTime::from)
    }
}

impl From<Maybe<Uuid>> for Option<EventId> {
    fn from(id: Maybe<Uuid>) -> Self {
        id.0.map(EventId::from)
    }
}
