//! Which parked events an operator means.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{FromRow, Postgres, Row};
use uuid::Uuid;

use super::parked::ParkedEvent;
use super::session::Session;

/// Which events are meant; what is none does not matter. Those that only wait behind another are let go with it.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Events with these ids.
    pub events: Option<Vec<Uuid>>,
    /// Events of this type.
    pub event_type: Option<String>,
    /// Events with this key.
    pub key: Option<String>,
    /// A part of the reason.
    pub error: Option<String>,
    /// Events parked at or before this time.
    pub parked_before: Option<DateTime<Utc>>,
    /// Events parked after this time.
    pub parked_after: Option<DateTime<Utc>>,
    /// Behind this outbox id.
    pub after: i64,
}

/// The condition that a [`Choice`] makes, with its seven parameters.
macro_rules! chosen {
    () => {
        " from aftercommit.parked
         where state = 'parked' and code is not null and outbox_id > $1
           and ($2::uuid[] is null or event_id = any($2)) and ($3::text is null or type = $3)
           and ($4::text is null or key = $4) and ($5::text is null or strpos(reason, $5) > 0)
           and ($6::timestamptz is null or parked_at <= $6) and ($7::timestamptz is null or parked_at > $7)"
    };
}

impl Choice {
    fn bind<'q>(&'q self, query: Query<'q, Postgres, PgArguments>) -> Query<'q, Postgres, PgArguments> {
        query
            .bind(self.after)
            .bind(&self.events)
            .bind(&self.event_type)
            .bind(&self.key)
            .bind(&self.error)
            .bind(self.parked_before)
            .bind(self.parked_after)
    }
}

/// The database's time.
pub async fn now(connection: &mut Session) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(connection).await
}

/// The chosen events in outbox order, up to `limit`.
pub async fn list(connection: &mut Session, choice: &Choice, limit: i64) -> Result<Vec<ParkedEvent>, sqlx::Error> {
    let query = sqlx::query(concat!(
        "select outbox_id, event_id, type, key, code, reason, state, parked_at",
        chosen!(),
        " order by outbox_id limit $8"
    ));
    choice.bind(query).bind(limit).fetch_all(connection).await?.iter().map(ParkedEvent::from_row).collect()
}

/// How many events are chosen.
pub async fn count(connection: &mut Session, choice: &Choice) -> Result<i64, sqlx::Error> {
    let row = choice.bind(sqlx::query(concat!("select count(*)", chosen!()))).fetch_one(connection).await?;
    row.try_get("count")
}
