//! Why attempts of events failed, one by one, for operators. How many there were is counted elsewhere.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::session::Session;
use super::time;

/// How many of an event's failed attempts are kept.
const KEPT: i64 = 10;
/// How much of an error is kept.
const LENGTH: usize = 500;

/// A failed attempt.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Failure {
    /// Name of the subscriber.
    pub subscriber: String,
    /// Which attempt it was, from 1.
    pub attempt: i32,
    /// When it failed, by the database's clock.
    #[sqlx(try_from = "time::Time")]
    pub at: DateTime<Utc>,
    /// Why it failed, cut to 500 characters.
    pub error: String,
    /// The next attempt does not begin before.
    #[sqlx(try_from = "time::Time")]
    pub retry_at: DateTime<Utc>,
}

/// Writes down why an attempt failed and when the next one begins. Of those before it the last few stay.
pub async fn write(
    connection: &mut Session,
    subscriber: &str,
    event: Uuid,
    attempt: i32,
    error: &str,
    wait: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with written as (
            insert into aftercommit.failure (subscriber, event_id, attempt, error, retry_at)
            values ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5))
            on conflict do nothing)
         delete from aftercommit.failure
          where subscriber = $1 and event_id = $2
            and at <= (select at from aftercommit.failure where subscriber = $1 and event_id = $2
                        order by at desc offset $6 limit 1)",
    )
    .bind(subscriber)
    .bind(event)
    .bind(attempt)
    .bind(crate::text::cut(error, LENGTH))
    .bind(wait.as_secs_f64())
    // The statement does not see the row that it writes.
    .bind(KEPT - 1)
    .execute(connection)
    .await
    .map(drop)
}

/// The failed attempts of an event that are on record, by subscriber and time.
pub async fn of(connection: &mut Session, event: Uuid) -> Result<Vec<Failure>, sqlx::Error> {
    sqlx::query_as(
        "select subscriber, attempt, at, error, retry_at from aftercommit.failure where event_id = $1
          order by subscriber, at",
    )
    .bind(event)
    .fetch_all(connection)
    .await
}

/// Forgets up to `limit` attempts of a subscriber that failed before `age` ago. Returns how many.
pub async fn prune(connection: &mut Session, subscriber: &str, age: Duration, limit: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.failure
          where ctid = any(array(select ctid from aftercommit.failure
                                  where subscriber = $1 and at < clock_timestamp() - make_interval(secs => $2)
                                  order by at limit $3))",
    )
    .bind(subscriber)
    .bind(age.as_secs_f64())
    .bind(limit)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
