//! Retention: removing what is settled and old, in bounded batches.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::session::Session;
use super::snapshot::Mark;

/// Deletes up to `limit` events that were written before `retention` ago and that `settled` holds. Parked events stay
/// until they are dealt with, and so do those that are to be published again.
pub(crate) async fn outbox(
    connection: &mut Session,
    settled: &Mark,
    retention: Duration,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.outbox
          where id in (
                select id from aftercommit.outbox o
                 where id <= $1 and created_at < clock_timestamp() - make_interval(secs => $2)
                   and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
                   and not exists (select from aftercommit.parked p
                                    where p.outbox_id = o.id and p.state in ('parked', 'released'))
                   and not exists (select from aftercommit.repair r
                                    where r.outbox_id = o.id and r.state = 'queued')
                 order by id limit $4)",
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

/// Deletes up to `limit` inbox rows of a subscriber that are older than `retention` and that no message can meet any
/// more: `oldest` is the sequence and the time of the first message that the stream still holds, none when it is empty.
/// A row's own message is gone when its sequence is lower than that. The time is for a stream that was made anew, whose
/// sequences began again. The row of a dead letter stays with it.
pub(crate) async fn inbox(
    connection: &mut Session,
    subscriber: &str,
    retention: Duration,
    oldest: Option<(i64, DateTime<Utc>)>,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let (sequence, time) = oldest.unzip();
    // now(), not clock_timestamp(), so that the index can be used.
    let done = sqlx::query(
        "delete from aftercommit.inbox
          where subscriber = $1 and event_id in (
                select event_id from aftercommit.inbox i
                 where subscriber = $1
                   and handled_at < least(now() - make_interval(secs => $2), coalesce($3, 'infinity'))
                   and stream_seq < coalesce($4, 9223372036854775807)
                   and (outcome <> 'dead'
                        or not exists (select from aftercommit.dead_letter d
                                        where d.subscriber = $1 and d.event_id = i.event_id)
                       and not exists (select from aftercommit.redrive r
                                        where r.subscriber = $1 and r.event_id = i.event_id))
                 limit $5)",
    )
    .bind(subscriber)
    .bind(retention.as_secs_f64())
    .bind(time)
    .bind(sequence)
    .bind(limit)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Thins the relay's log out: the newest `keep` states stay, of older ones the first of each minute until they are
/// older than `retention`. A state is a point to which the relay can go back when the stream has lost its end.
pub(crate) async fn relay_log(
    connection: &mut Session,
    newest: i64,
    keep: i64,
    retention: Duration,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.relay_log l
          where l.seq <= $1 - $2
            and (l.created_at < clock_timestamp() - make_interval(secs => $3)
                 or exists (select from aftercommit.relay_log before
                             where before.seq = l.seq - 1
                               and date_trunc('minute', before.created_at) = date_trunc('minute', l.created_at)))",
    )
    .bind(newest)
    .bind(keep)
    .bind(retention.as_secs_f64())
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
