//! Parked events: what the stream will never take, and what waits behind it.

use std::collections::HashSet;

use sqlx::{PgExecutor, Row};
use uuid::Uuid;

use super::session::{Session, Tx};

/// What is parked when a relay takes the lead.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    /// Whether there is any row at all, also one that was dealt with.
    pub(crate) any: bool,
    /// Keys whose events wait.
    pub(crate) keys: HashSet<String>,
}

/// Reads what is parked.
pub(crate) async fn load(connection: &mut Session) -> Result<Parked, sqlx::Error> {
    let any = sqlx::query_scalar("select exists (select from aftercommit.parked)").fetch_one(&mut *connection).await?;
    let keys: Vec<String> = sqlx::query_scalar(
        "select distinct key from aftercommit.parked where state in ('parked', 'released') and key is not null",
    )
    .fetch_all(connection)
    .await?;
    Ok(Parked { any, keys: keys.into_iter().collect() })
}

/// Parks events of the outbox: one that cannot be stored with JetStream's error number, others that wait behind it
/// without. One that is parked already stays as it is.
pub(crate) async fn park(
    connection: &mut Session,
    outbox_ids: &[i64],
    code: Option<u64>,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into aftercommit.parked (outbox_id, event_id, type, key, code, reason)
         select id, event_id, type, key, $2, $3 from aftercommit.outbox where id = any($1)
         on conflict do nothing",
    )
    .bind(outbox_ids)
    .bind(code.map(u64::cast_signed))
    .bind(super::clip(reason))
    .execute(connection)
    .await
    .map(drop)
}

/// Which of these outbox ids have been parked, whatever became of them since.
pub(crate) async fn among(connection: &mut Session, ids: &[i64]) -> Result<HashSet<i64>, sqlx::Error> {
    let ids: Vec<i64> = sqlx::query_scalar("select outbox_id from aftercommit.parked where outbox_id = any($1)")
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(ids.into_iter().collect())
}

/// The released event that is to be published next: the first of its key. One that came to wait when the event before
/// it had been released already counts as released.
pub(crate) async fn next_released(connection: &mut Session) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select outbox_id from aftercommit.parked p
          where (state = 'released' or (state = 'parked' and code is null))
            and not exists (select from aftercommit.parked earlier
                             where earlier.key = p.key and earlier.outbox_id < p.outbox_id and earlier.state = 'parked'
                               and earlier.code is not null)
          order by outbox_id limit 1",
    )
    .fetch_optional(connection)
    .await
}

/// Records what became of a released event: where it is stored now, or that it is parked again.
pub(crate) async fn settle_released(
    connection: &mut Session,
    outbox_id: i64,
    outcome: Result<u64, &str>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.parked
            set state = case when $2::bigint is null then 'parked' else 'published' end, sequence = $2,
                -- with a code, so that it waits for the operator and not for an event before it
                code = case when $2 is null then coalesce(code, 0) else code end,
                reason = coalesce($3, reason), changed_at = clock_timestamp()
          where outbox_id = $1 and state in ('parked', 'released')",
    )
    .bind(outbox_id)
    .bind(outcome.ok().map(u64::cast_signed))
    .bind(outcome.err())
    .execute(connection)
    .await
    .map(drop)
}

/// Records that events which are parked, or on their way out, are in the stream: a later time than the one to which the
/// database was restored had published them.
pub(crate) async fn found(connection: &mut Session, outbox_ids: &[i64], sequences: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.parked p set state = 'published', sequence = t.sequence, changed_at = clock_timestamp()
           from unnest($1::bigint[], $2::bigint[]) as t(outbox_id, sequence)
          where p.outbox_id = t.outbox_id and p.state in ('parked', 'released')",
    )
    .bind(outbox_ids)
    .bind(sequences)
    .execute(connection)
    .await
    .map(drop)
}

/// Releases the events again that were published behind `sequence`, because the stream has lost what was there.
pub(super) async fn lost_behind(tx: &mut Tx<'_>, sequence: u64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.parked set state = 'released', sequence = null, changed_at = clock_timestamp()
          where state = 'published' and sequence > $1",
    )
    .bind(sequence.cast_signed())
    .execute(tx)
    .await
    .map(drop)
}

/// How many events are parked or on their way out.
pub(crate) async fn count(connection: &mut Session) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select count(*) from aftercommit.parked where state in ('parked', 'released')")
        .fetch_one(connection)
        .await
}

/// A parked event as an operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParkedEvent {
    pub(crate) outbox_id: i64,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) key: Option<String>,
    pub(crate) code: Option<i64>,
    pub(crate) reason: String,
    pub(crate) state: String,
    pub(crate) parked_at: chrono::DateTime<chrono::Utc>,
}

/// The events that are parked or on their way out, in outbox order.
pub(crate) async fn list(connection: &mut Session, limit: i64) -> Result<Vec<ParkedEvent>, sqlx::Error> {
    let rows = sqlx::query(
        "select outbox_id, event_id, type, key, code, reason, state, parked_at from aftercommit.parked
          where state in ('parked', 'released') order by outbox_id limit $1",
    )
    .bind(limit)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(ParkedEvent {
                outbox_id: row.try_get(0)?,
                event_id: row.try_get(1)?,
                event_type: row.try_get(2)?,
                key: row.try_get(3)?,
                code: row.try_get(4)?,
                reason: row.try_get(5)?,
                state: row.try_get(6)?,
                parked_at: row.try_get(7)?,
            })
        })
        .collect()
}

/// Lets a parked event go, or gives it up, and with it what waits behind it. Returns how many were let go and whether
/// the event was parked at all.
pub(crate) async fn release(
    connection: impl PgExecutor<'_>,
    event_id: Uuid,
    discard: bool,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "with head as (
             update aftercommit.parked
                set state = case when $2 then 'discarded' else 'released' end, changed_at = clock_timestamp()
              where event_id = $1 and state = 'parked' and code is not null
             returning outbox_id, key
         ), behind as (
             update aftercommit.parked p set state = 'released', changed_at = clock_timestamp()
               from head
              where p.key = head.key and p.code is null and p.state = 'parked' and p.outbox_id > head.outbox_id
                and not exists (select from aftercommit.parked other
                                 where other.key = p.key and other.code is not null and other.state = 'parked'
                                   and other.outbox_id > head.outbox_id and other.outbox_id < p.outbox_id)
             returning 1
         )
         select (select count(*) from behind) + case when $2 then 0 else 1 end from head",
    )
    .bind(event_id)
    .bind(discard)
    .fetch_optional(connection)
    .await
}
