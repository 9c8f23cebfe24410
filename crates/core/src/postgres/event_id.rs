//! Ids of events in rows that are read into structs.

use sqlx::postgres::{PgTypeInfo, PgValueRef};
use sqlx::{Decode, Postgres, Type};
use uuid::Uuid;

use aftercommit_outbox::event::EventId;

/// One that may be null: the driver's derive has no conversion within an `Option`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MaybeEventId(Option<Uuid>);

impl Type<Postgres> for MaybeEventId {
    fn type_info() -> PgTypeInfo {
        <Uuid as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for MaybeEventId {
    fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
        Ok(Self(<Option<Uuid> as Decode<Postgres>>::decode(value)?))
    }
}

impl From<MaybeEventId> for Option<EventId> {
    fn from(id: MaybeEventId) -> Self {
        id.0.map(EventId::from)
    }
}
