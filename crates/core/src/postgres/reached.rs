//! How far subscribers have come in their streams by their own account.

use super::session::Session;

/// A message at or before which everything is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub struct Row {
    /// The number of the row; a later one is higher.
    pub id: i64,
    /// The message's sequence in the stream.
    pub sequence: i64,
    /// When it was stored, in nanoseconds since 1970.
    pub stored_at: i64,
}

/// What a subscriber has written down of a stream, the newest first.
pub async fn rows(session: &mut Session, subscriber: &str, stream: &str) -> Result<Vec<Row>, sqlx::Error> {
    sqlx::query_as(
        "select id, sequence, stored_at from aftercommit.reached
          where subscriber = $1 and stream = $2 order by id desc limit 1000",
    )
    .bind(subscriber)
    .bind(stream)
    .fetch_all(session)
    .await
}

/// Writes down a place, removes others, and returns its id.
pub async fn write(
    session: &mut Session,
    subscriber: &str,
    stream: &str,
    (sequence, stored_at): (u64, i64),
    without: &[i64],
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "with gone as (delete from aftercommit.reached where id = any($5))
         insert into aftercommit.reached (subscriber, stream, sequence, stored_at) values ($1, $2, $3, $4) returning id",
    )
    .bind(subscriber)
    .bind(stream)
    .bind(sequence.cast_signed())
    .bind(stored_at)
    .bind(without)
    .fetch_one(session)
    .await
}

/// Removes places that are none any more.
pub async fn remove(session: &mut Session, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query("delete from aftercommit.reached where id = any($1)").bind(ids).execute(session).await.map(drop)
}
