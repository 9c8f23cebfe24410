//! What each process says of the subscribers that it serves, for operators.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::types::Json;

use super::session::Session;
use super::time;

/// What a process says of one of its subscribers.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Said {
    /// Name of the subscriber.
    pub subscriber: String,
    /// The process: host, process id and a random part.
    pub instance: String,
    /// Whether this process handles the subscriber's events, or stands by.
    pub active: bool,
    /// `connecting`, `standing_by`, `leading`, `paused` or `stopped`.
    pub phase: String,
    /// Whether nothing keeps it from working.
    pub ready: bool,
    /// What it does or waits for.
    pub state: String,
    /// After how many failed attempts an event becomes a dead letter.
    pub max_attempts: i64,
    /// See [`crate::told`]: single events that wait, or run for long.
    pub notes: Value,
}

/// Writes it down. What was said a day ago by processes that are gone is forgotten.
pub async fn write(connection: &mut Session, said: &Said) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with forgotten as (
            delete from aftercommit.worker_status
             where subscriber = $1 and instance <> $2 and seen_at < clock_timestamp() - interval '1 day')
         insert into aftercommit.worker_status as s
                (subscriber, instance, active, phase, ready, state, max_attempts, notes)
         values ($1, $2, $3, $4, $5, $6, $7, $8)
         on conflict (subscriber, instance) do update
            set since = case when s.active = excluded.active then s.since else excluded.since end,
                active = excluded.active, phase = excluded.phase, ready = excluded.ready, state = excluded.state,
                max_attempts = excluded.max_attempts, notes = excluded.notes, seen_at = excluded.seen_at",
    )
    .bind(&said.subscriber)
    .bind(&said.instance)
    .bind(said.active)
    .bind(&said.phase)
    .bind(said.ready)
    .bind(super::clip(&said.state))
    .bind(said.max_attempts)
    .bind(Json(&said.notes))
    .execute(connection)
    .await
    .map(drop)
}

/// What was said, and when.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Heard {
    /// What it said.
    #[sqlx(flatten)]
    pub said: Said,
    /// Since when it is active, or not.
    #[sqlx(try_from = "time::Time")]
    pub since: DateTime<Utc>,
    /// When it said that, by the database's clock.
    #[sqlx(try_from = "time::Time")]
    pub seen_at: DateTime<Utc>,
    /// How long ago that was, in seconds.
    pub age: f64,
}

/// What every process has said last, of one subscriber or of all, the newest first.
pub async fn list(connection: &mut Session, subscriber: Option<&str>) -> Result<Vec<Heard>, sqlx::Error> {
    sqlx::query_as(
        "select subscriber, instance, active, phase, ready, state, max_attempts, notes, since, seen_at,
                (extract(epoch from clock_timestamp()) - extract(epoch from seen_at))::float8 as age
           from aftercommit.worker_status where $1::text is null or subscriber = $1
          order by subscriber, seen_at desc",
    )
    .bind(subscriber)
    .fetch_all(connection)
    .await
}
