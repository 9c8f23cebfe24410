//! Parked events: what the stream will never take, and what waits behind it.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgExecutor;
use uuid::Uuid;

use super::fence::{Written, leading};
use super::session::{Session, Tx};
use super::time;
use aftercommit_outbox::event::EventId;

/// What is parked when a relay takes the lead.
#[derive(Debug, Default)]
pub struct Parked {
    /// The highest outbox id that was ever parked; 0 when none was.
    pub last_id: i64,
    /// Keys whose events wait.
    pub keys: HashSet<String>,
}

/// Reads what is parked.
pub async fn load(connection: &mut Session) -> Result<Parked, sqlx::Error> {
    let last_id: Option<i64> = sqlx::query_scalar(
        "select max(outbox_id) from aftercommit.parked where aftercommit.reads_up_to(pg_current_snapshot())",
    )
    .fetch_one(&mut *connection)
    .await?;
    let keys: Vec<String> = sqlx::query_scalar(
        "select distinct key from aftercommit.parked where state in ('parked', 'released') and key is not null",
    )
    .fetch_all(connection)
    .await?;
    Ok(Parked { last_id: last_id.unwrap_or(0), keys: keys.into_iter().collect() })
}

/// Parks events of the outbox: one that cannot be stored with JetStream's error number, others that wait behind it
/// without. One that is parked already stays as it is; one behind an event that has been released meanwhile is released.
/// What is known of another event of the same outbox id is from a time before somebody set the ids back: it is replaced.
pub async fn park(
    connection: &mut Session,
    epoch: i64,
    outbox_ids: &[i64],
    code: Option<u64>,
    reason: &str,
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", parked as (
            insert into aftercommit.parked (outbox_id, event_id, type, key, code, reason, state)
            select o.id, o.event_id, o.type, o.key, $3, $4,
                   case when $3::bigint is not null
                          or exists (select from aftercommit.parked earlier
                                      where earlier.key = o.key and earlier.state = 'parked' and earlier.outbox_id < o.id)
                        then 'parked' else 'released' end
              from leads, aftercommit.outbox o where o.id = any($2)
            on conflict (outbox_id) do update
               set event_id = excluded.event_id, type = excluded.type, key = excluded.key, code = excluded.code,
                   reason = excluded.reason, state = excluded.state, parked_at = default, changed_at = default,
                   sequence = null
             where parked.event_id <> excluded.event_id
            returning 1)
         select exists (select from leads), (select count(*) from parked)"
    ))
    .bind(epoch)
    .bind(outbox_ids)
    .bind(code.map(u64::cast_signed))
    .bind(super::clip(reason))
    .fetch_one(connection)
    .await
    .map(Written::of)
}

/// Which of these events of the outbox have been parked, whatever became of them since, by their outbox ids. The event ids
/// count, too: an outbox id may have been handed out again.
pub async fn among(
    connection: &mut Session,
    outbox_ids: &[i64],
    event_ids: &[Uuid],
) -> Result<HashSet<i64>, sqlx::Error> {
    let ids: Vec<i64> = sqlx::query_scalar(
        "select p.outbox_id from unnest($1::bigint[], $2::uuid[]) as t(outbox_id, event_id)
           join aftercommit.parked p on p.outbox_id = t.outbox_id and p.event_id = t.event_id
          where aftercommit.reads_up_to(pg_current_snapshot())",
    )
    .bind(outbox_ids)
    .bind(event_ids)
    .fetch_all(connection)
    .await?;
    Ok(ids.into_iter().collect())
}

/// The next released events behind `after`, at most `limit` of them, each with whether it may go out: with `block`, not
/// before every earlier event of its key that waits, or that is released and lies at or before `after`.
pub async fn released(
    connection: &mut Session,
    after: i64,
    block: bool,
    limit: i64,
) -> Result<Vec<(i64, Uuid, bool)>, sqlx::Error> {
    sqlx::query_as(
        "with looked as materialized (
             select outbox_id, event_id, key from aftercommit.parked
              where state = 'released' and outbox_id > $1 and aftercommit.reads_up_to(pg_current_snapshot())
              order by outbox_id limit $3
         ), keyed as materialized (
             select key,
                    (select outbox_id from aftercommit.parked p where p.key = k.key and p.state = 'parked'
                      order by p.key, p.outbox_id limit 1) as waiting,
                    exists (select from aftercommit.parked p
                             where p.key = k.key and p.state in ('parked', 'released') and p.outbox_id <= $1) as passed
               from (select distinct key from looked where key is not null) as k
         )
         select outbox_id, event_id, not $2 or key is null or (not passed and coalesce(outbox_id < waiting, true))
           from looked left join keyed using (key)
          order by outbox_id",
    )
    .bind(after)
    .bind(block)
    .bind(limit)
    .fetch_all(connection)
    .await
}

/// Releases those events of these keys that wait for nothing: they were parked at the moment in which an operator let
/// go what they waited for. Returns the keys of which nothing is parked or on its way out any more.
pub async fn let_go(connection: &mut Session, epoch: i64, keys: &[String]) -> Result<Option<Vec<String>>, sqlx::Error> {
    let rows: Vec<Option<String>> = sqlx::query_scalar(concat!(
        leading!(),
        ", stuck as (
            update aftercommit.parked p set state = 'released', changed_at = clock_timestamp()
              from leads, unnest($2::text[]) as k(key)
             cross join lateral (select code from aftercommit.parked p where p.key = k.key and p.state = 'parked'
                                  order by p.key, p.outbox_id limit 1) as first
             where first.code is null and p.key = k.key and p.state = 'parked' and p.code is null
               and not exists (select from aftercommit.parked head
                                where head.key = p.key and head.state = 'parked' and head.code is not null
                                  and head.outbox_id < p.outbox_id)
            returning 1)
         select k.key from leads, unnest($2::text[]) as k(key)
          where not exists (select from aftercommit.parked p
                             where p.key = k.key and p.state in ('parked', 'released'))
         union all select null from leads"
    ))
    .bind(epoch)
    .bind(keys)
    .fetch_all(connection)
    .await?;
    Ok((!rows.is_empty()).then(|| rows.into_iter().flatten().collect()))
}

/// Parks a released event again, because it still cannot be stored: with a code, so that it waits for the operator and
/// not for an event before it.
pub async fn park_again(
    connection: &mut Session,
    epoch: i64,
    outbox_ids: &[i64],
    reason: &str,
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", parked as (
            update aftercommit.parked
               set state = 'parked', code = coalesce(code, 0), reason = $3, changed_at = clock_timestamp()
              from leads
             where outbox_id = any($2) and state = 'released'
            returning 1)
         select exists (select from leads), (select count(*) from parked)"
    ))
    .bind(epoch)
    .bind(outbox_ids)
    .bind(super::clip(reason))
    .fetch_one(connection)
    .await
    .map(Written::of)
}

/// Records where events that are parked, or on their way out, are in the stream. A parked one is there when a later time
/// than the one to which the database was restored had published it.
pub async fn found(
    connection: &mut Session,
    epoch: i64,
    outbox_ids: &[i64],
    sequences: &[i64],
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", published as (
            update aftercommit.parked p set state = 'published', sequence = t.sequence, changed_at = clock_timestamp()
              from leads, unnest($2::bigint[], $3::bigint[]) as t(outbox_id, sequence)
             where p.outbox_id = t.outbox_id and p.state in ('parked', 'released')
            returning 1)
         select exists (select from leads), (select count(*) from published)"
    ))
    .bind(epoch)
    .bind(outbox_ids)
    .bind(sequences)
    .fetch_one(connection)
    .await
    .map(Written::of)
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
pub async fn count(connection: &mut Session) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select count(*) from aftercommit.parked where state in ('parked', 'released')")
        .fetch_one(connection)
        .await
}

/// What is parked, in short.
#[derive(Debug, Clone, Default, PartialEq, sqlx::FromRow)]
pub struct Summary {
    /// Those that the stream would not take.
    pub events: i64,
    /// Those that wait behind them.
    pub behind: i64,
    /// How long ago the first of them was parked, in seconds.
    pub oldest_seconds: Option<f64>,
    /// Why that one was.
    pub reason: Option<String>,
}

/// What is parked, without what is on its way out.
pub async fn summary(connection: &mut Session) -> Result<Summary, sqlx::Error> {
    sqlx::query_as(
        "select count(*) filter (where code is not null) as events, count(*) filter (where code is null) as behind,
                case when count(*) > 0 then greatest(extract(epoch from clock_timestamp()) - extract(epoch from min(parked_at)), 0)::float8 end
                    as oldest_seconds,
                (select reason from aftercommit.parked
                  where state = 'parked' and code is not null order by outbox_id limit 1) as reason
           from aftercommit.parked where state = 'parked'",
    )
    .fetch_one(connection)
    .await
}

/// A parked event.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct ParkedEvent {
    /// Its position in the outbox.
    pub outbox_id: i64,
    /// Its identity.
    #[sqlx(try_from = "Uuid")]
    pub event_id: EventId,
    /// Its type.
    #[serde(rename = "type")]
    #[sqlx(rename = "type")]
    pub event_type: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// JetStream's error number, 0 when the client refused it; none for an event that waits behind another.
    pub code: Option<i64>,
    /// Why it is parked.
    pub reason: String,
    /// `parked`, or `released` while it is on its way out.
    pub state: String,
    /// Since when.
    #[sqlx(try_from = "time::Time")]
    pub parked_at: DateTime<Utc>,
}

/// The events that are parked or on their way out, in outbox order.
pub async fn list(connection: &mut Session, limit: i64) -> Result<Vec<ParkedEvent>, sqlx::Error> {
    sqlx::query_as(
        "select outbox_id, event_id, type, key, code, reason, state, parked_at from aftercommit.parked
          where state in ('parked', 'released') order by outbox_id limit $1",
    )
    .bind(limit)
    .fetch_all(connection)
    .await
}

/// Lets a parked event go, or gives it up, and with it what waits behind it. Returns how many were let go and whether
/// the event was parked at all.
pub async fn release(
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
