//! Where subscribers start that do not start with the oldest event.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};

use super::session::Session;
use super::{is_undefined, time};

/// Where a subscriber starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// When the stream was created in which that is.
    pub stream_created: DateTime<Utc>,
    /// The sequence of the first event that it gets.
    pub sequence: u64,
    /// About when that was stored.
    pub at: DateTime<Utc>,
}

impl FromRow<'_, PgRow> for Started {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            stream_created: time::at(row, "stream_created")?,
            sequence: row.try_get::<i64, _>("sequence")?.cast_unsigned(),
            at: time::at(row, "starts_at")?,
        })
    }
}

/// Where a subscriber starts in a stream; none when it starts with the oldest event. In a schema that is still to be migrated
/// all of them do.
pub async fn of(connection: &mut Session, subscriber: &str, stream: &str) -> Result<Option<Started>, sqlx::Error> {
    let found = sqlx::query_as(
        "select stream_created, sequence, starts_at from aftercommit.subscriber_start
          where subscriber = $1 and stream = $2",
    )
    .bind(subscriber)
    .bind(stream)
    .fetch_optional(connection)
    .await;
    match found {
        Err(error) if is_undefined(&error) => Ok(None),
        found => found,
    }
}

/// Writes down where a subscriber starts; `at` is the database's present time when there is none.
pub async fn record(
    connection: &mut Session,
    (subscriber, stream, asked): (&str, &str, &str),
    stream_created: DateTime<Utc>,
    sequence: u64,
    at: Option<DateTime<Utc>>,
) -> Result<Started, sqlx::Error> {
    sqlx::query_as(
        "insert into aftercommit.subscriber_start (subscriber, stream, stream_created, sequence, starts_at, asked)
         values ($1, $2, $3, $4, coalesce($5, clock_timestamp()), $6)
         on conflict (subscriber) do update
            set stream = excluded.stream, stream_created = excluded.stream_created, sequence = excluded.sequence,
                starts_at = excluded.starts_at, asked = excluded.asked, recorded_at = clock_timestamp()
         returning stream_created, sequence, starts_at",
    )
    .bind(subscriber)
    .bind(stream)
    .bind(stream_created)
    .bind(sequence.cast_signed())
    .bind(at)
    .bind(asked)
    .fetch_one(connection)
    .await
}
