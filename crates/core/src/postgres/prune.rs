//! Retention: removing what is settled and old, in bounded batches.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::session::Session;
use super::snapshot::Mark;

/// What a batch came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// How many rows were removed.
    pub removed: u64,
    /// The next one goes on behind this id, or place.
    pub next: i64,
    /// Whether there may be more that is old.
    pub more: bool,
}

/// Looks at up to `limit` events behind the id `after`, and deletes those that were written before `retention` ago and
/// that `settled` holds. It stops at the first that is younger, because ids are handed out in the order of time, or
/// nearly; one that says that it was written tomorrow is passed over. Parked events stay until they are dealt with, and
/// so do those that are to be published again: [`parked`] and [`repairs`] remove them later.
pub async fn outbox(
    connection: &mut Session,
    settled: &Mark,
    retention: Duration,
    after: i64,
    limit: i64,
) -> Result<Batch, sqlx::Error> {
    let (removed, next, more): (i64, Option<i64>, bool) = sqlx::query_as(
        "with looked as materialized (
             select id, xid, created_at < clock_timestamp() - make_interval(secs => $2) as old,
                    created_at > clock_timestamp() + interval '1 day' as odd
               from aftercommit.outbox where id > $6 and id <= $1 order by id limit $4
         ), up_to as materialized (
             select coalesce((select min(id) - 1 from looked where not old and not odd),
                             (select max(id) from looked)) as id,
                    (select count(*) = $4 and bool_and(old or odd) from looked) as more
         ), gone as (
             delete from aftercommit.outbox o
              where o.id = any(array(
                    select l.id from looked l, up_to
                     where l.old and l.id <= up_to.id
                       and (l.id <= $5 or pg_visible_in_snapshot(l.xid, (select $3::text::pg_snapshot)))
                       and not exists (select from aftercommit.parked p
                                        where p.outbox_id = l.id and p.state in ('parked', 'released'))
                       and not exists (select from aftercommit.repair r
                                        where r.outbox_id = l.id and r.state = 'queued')))
             returning 1
         )
         select (select count(*) from gone), up_to.id, coalesce(up_to.more, false) from up_to",
    )
    .bind(settled.last_id)
    .bind(retention.as_secs_f64())
    .bind(settled.snapshot.to_string())
    .bind(limit)
    .bind(settled.floor)
    .bind(after)
    .fetch_one(connection)
    .await?;
    Ok(Batch { removed: removed.unsigned_abs(), next: next.unwrap_or(after).max(after), more })
}

/// Deletes up to `limit` parked events that were published or discarded before `retention` ago, first from the outbox,
/// then, with the next call, what is known of them.
pub async fn parked(
    connection: &mut Session,
    settled: &Mark,
    retention: Duration,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "with done as materialized (
             select outbox_id from aftercommit.parked
              where state in ('published', 'discarded') and changed_at < clock_timestamp() - make_interval(secs => $2)
              order by changed_at limit $4
         ), gone as (
             delete from aftercommit.outbox o
              where o.id = any(array(select outbox_id from done)) and o.created_at < clock_timestamp() - make_interval(secs => $2)
                and o.id <= $1 and (o.id <= $5 or pg_visible_in_snapshot(o.xid, (select $3::text::pg_snapshot)))
                and not exists (select from aftercommit.repair r where r.outbox_id = o.id and r.state = 'queued')
         )
         delete from aftercommit.parked p
          where p.outbox_id = any(array(select outbox_id from done)) and p.state in ('published', 'discarded')
            and not exists (select from aftercommit.outbox o where o.id = p.outbox_id)",
    )
    .bind(settled.last_id)
    .bind(retention.as_secs_f64())
    .bind(settled.snapshot.to_string())
    .bind(limit)
    .bind(settled.floor)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// The same with repairs of the stream that were published before `retention` ago.
pub async fn repairs(
    connection: &mut Session,
    settled: &Mark,
    retention: Duration,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "with done as materialized (
             select outbox_id from aftercommit.repair
              where state = 'published' and published_at < clock_timestamp() - make_interval(secs => $2)
              order by published_at limit $4
         ), gone as (
             delete from aftercommit.outbox o
              where o.id = any(array(select outbox_id from done)) and o.created_at < clock_timestamp() - make_interval(secs => $2)
                and o.id <= $1 and (o.id <= $5 or pg_visible_in_snapshot(o.xid, (select $3::text::pg_snapshot)))
                and not exists (select from aftercommit.parked p
                                 where p.outbox_id = o.id and p.state in ('parked', 'released'))
         )
         delete from aftercommit.repair r
          where r.outbox_id = any(array(select outbox_id from done)) and r.state = 'published'
            and not exists (select from aftercommit.outbox o where o.id = r.outbox_id)",
    )
    .bind(settled.last_id)
    .bind(retention.as_secs_f64())
    .bind(settled.snapshot.to_string())
    .bind(limit)
    .bind(settled.floor)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Looks at up to `limit` inbox rows of a subscriber behind the stream sequence `after`, and deletes those that are older than
/// `retention` and that no message can meet any more: `oldest` is the sequence and the time of the first message that the
/// stream still holds, none when it is empty. A row's own message is gone when its sequence is lower than that. The time is
/// for a stream that was made anew, whose sequences began again. The row of a dead letter stays with it. Up to when rows are
/// gone stays on record, see [`forgotten`].
pub async fn inbox(
    connection: &mut Session,
    subscriber: &str,
    retention: Duration,
    oldest: Option<(i64, DateTime<Utc>)>,
    after: i64,
    limit: i64,
) -> Result<Batch, sqlx::Error> {
    let (sequence, time) = oldest.unzip();
    let (removed, looked, first, last): (i64, i64, Option<i64>, Option<i64>) = sqlx::query_as(
        "with looked as materialized (
             select event_id, stream_seq, handled_at, outcome from aftercommit.inbox
              where subscriber = $1 and stream_seq > $6 and stream_seq < coalesce($4, 9223372036854775807)
              order by stream_seq limit $5
         ), gone as (
             delete from aftercommit.inbox
              where subscriber = $1 and event_id = any(array(
                    select event_id from looked l
                     where handled_at < least(clock_timestamp() - make_interval(secs => $2),
                                              coalesce($3::timestamptz, 'infinity'))
                       and (outcome <> 'dead'
                            or not exists (select from aftercommit.dead_letter d
                                            where d.subscriber = $1 and d.event_id = l.event_id)
                           and not exists (select from aftercommit.redrive r
                                            where r.subscriber = $1 and r.event_id = l.event_id))))
             returning handled_at
         ), noted as (
             insert into aftercommit.inbox_pruned as noted (subscriber, pruned_to)
             select $1, max(handled_at) from gone having count(*) > 0
             on conflict (subscriber) do update set pruned_to = greatest(noted.pruned_to, excluded.pruned_to)
         )
         select (select count(*) from gone), count(*), min(stream_seq), max(stream_seq) from looked",
    )
    .bind(subscriber)
    .bind(retention.as_secs_f64())
    .bind(time)
    .bind(sequence)
    .bind(limit)
    .bind(after)
    .fetch_one(connection)
    .await?;
    let more = looked == limit;
    let next = match last {
        // Not all rows of the last sequence may have been looked at. When nothing of just one was old, the rest is not either.
        Some(last) if more && (removed > 0 || first != Some(last)) => last - 1,
        Some(last) => last,
        None => after,
    };
    Ok(Batch { removed: removed.unsigned_abs(), next, more })
}

/// The inbox of a subscriber may lack events that were handled at or before this moment; none when it was never pruned.
pub async fn forgotten(connection: &mut Session, subscriber: &str) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    sqlx::query_scalar("select pruned_to from aftercommit.inbox_pruned where subscriber = $1")
        .bind(subscriber)
        .fetch_optional(connection)
        .await
}

/// Thins the relay's log out: of the states behind `thinned` and up to `up_to`, the first of each minute stays. A state
/// is a point to which the relay can go back when the stream has lost its end.
pub async fn thin_log(connection: &mut Session, thinned: i64, up_to: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.relay_log l
          where l.seq > $1 and l.seq <= $2
            and date_trunc('minute', l.created_at)
                = (select date_trunc('minute', before.created_at) from aftercommit.relay_log before
                    where before.seq < l.seq order by before.seq desc limit 1)",
    )
    .bind(thinned)
    .bind(up_to)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Deletes the first states of the log that are older than `retention`, up to `limit`, and none behind `up_to`.
pub async fn shorten_log(
    connection: &mut Session,
    up_to: i64,
    retention: Duration,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.relay_log
          where seq = any(array(
                select seq from (select seq, created_at from aftercommit.relay_log
                                  where seq <= $1 order by seq limit $3) as first
                 where created_at < clock_timestamp() - make_interval(secs => $2)))",
    )
    .bind(up_to)
    .bind(retention.as_secs_f64())
    .bind(limit)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
