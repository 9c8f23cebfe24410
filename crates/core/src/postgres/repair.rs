//! Repairs of the stream: events that the leading relay publishes again, because the stream does not hold them.

use uuid::Uuid;

use super::fence::{Written, leading};
use super::finding;
use super::place::Place;
use super::session::{Session, Tx};

/// A repair that waits for the relay.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Queued {
    /// The event's id in the outbox.
    pub outbox_id: i64,
    /// The event's id.
    pub event_id: Uuid,
    /// How often the event was missing. A part of the message's id, so that no server takes it for the lost one.
    pub times: i32,
    /// Messages of the stream that have the event's id and are not the event.
    pub replaces: Vec<i64>,
}

/// Queues events of the outbox that are missing in the stream as it was at `at`, and returns how many. The findings about
/// them, of the reconciler and the kind that are named, say so from the same transaction on. `seen` is where each had been
/// put by an earlier repair, as the caller knows it: one that has been repaired anew meanwhile is left alone. Nothing is
/// queued when the relay has gone back behind `at` since, because then it publishes them by itself; and should it go back
/// at this moment, `leave_to_window` waits for the end of this, or this for the end of that.
pub async fn queue(
    connection: &mut Session,
    (name, kind): (&str, &str),
    stream: &str,
    at: &Place,
    ids: &[i64],
    seen: &[Option<i64>],
) -> Result<u64, sqlx::Error> {
    let mut tx = connection.begin().await?;
    // Before the statement that looks at the log, so that it sees what a relay did that went back meanwhile.
    sqlx::query("lock table aftercommit.repair in row exclusive mode").execute(&mut tx).await?;
    let queued: Vec<Uuid> = sqlx::query_scalar(
        "insert into aftercommit.repair as r (outbox_id, event_id, key, sequence, queued_at)
         select o.id, o.event_id, o.key, t.seen,
                -- Readers go on behind what they have seen, so a clock that went back must not bring it in front of that.
                (select greatest(clock_timestamp(), max(queued_at) + interval '1 microsecond') from aftercommit.repair)
           from unnest($1::bigint[], $2::bigint[]) as t(id, seen)
           join aftercommit.outbox o on o.id = t.id
          where not exists (select from aftercommit.relay_log
                             where seq > $3 and stream = $4 and base_sequence < $5)
          order by o.id
         on conflict (outbox_id) do update
            set state = 'queued', times = r.times + 1, queued_at = excluded.queued_at, published_at = null,
                sequence = null, reason = null, event_id = excluded.event_id, key = excluded.key
          where r.state = 'published' and r.sequence = excluded.sequence
             -- What is known of another event of this id is from a time before somebody set the ids back.
             or r.event_id <> excluded.event_id
         returning event_id",
    )
    .bind(ids)
    .bind(seen)
    .bind(at.seq)
    .bind(stream)
    .bind(at.sequence.cast_signed())
    .fetch_all(&mut tx)
    .await?;
    finding::mark_repairing(&mut tx, name, kind, &queued).await?;
    tx.commit().await?;
    Ok(queued.len() as u64)
}

/// Queues events again of which messages have the id that are not the event, unless one was published before that
/// replaces them: outbox ids and sequences, sorted. Returns how many.
pub async fn replace(connection: &mut Session, forged: &[(i64, i64)]) -> Result<u64, sqlx::Error> {
    let (ids, sequences): (Vec<i64>, Vec<i64>) = forged.iter().copied().unzip();
    let done = sqlx::query(
        "insert into aftercommit.repair as r (outbox_id, event_id, key, replaces, queued_at)
         select o.id, o.event_id, o.key, t.sequences,
                (select greatest(clock_timestamp(), max(queued_at) + interval '1 microsecond') from aftercommit.repair)
           from (select id, array_agg(sequence) as sequences
                   from unnest($1::bigint[], $2::bigint[]) as t(id, sequence) group by id) as t
           join aftercommit.outbox o on o.id = t.id
          where not exists (select from aftercommit.parked p
                             where p.outbox_id = o.id and p.event_id = o.event_id and p.state <> 'published')
          order by o.id
         on conflict (outbox_id) do update
            set replaces = array(select distinct unnest(r.replaces || excluded.replaces)),
                event_id = excluded.event_id, key = excluded.key,
                state = 'queued', published_at = null, sequence = null, reason = null,
                times = case when r.state = 'queued' then r.times else r.times + 1 end,
                queued_at = case when r.state = 'queued' then r.queued_at else excluded.queued_at end
          where not r.replaces @> excluded.replaces and r.state <> 'refused' or r.event_id <> excluded.event_id",
    )
    .bind(ids)
    .bind(sequences)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// The next repairs behind `after`, in the order of the outbox, at most `limit`, each with whether it may go out. With
/// `block`, not one of a key that has an earlier event which the stream will never take.
pub async fn next(
    connection: &mut Session,
    after: i64,
    block: bool,
    limit: i64,
) -> Result<Vec<(Queued, bool)>, sqlx::Error> {
    #[derive(sqlx::FromRow)]
    struct Next {
        #[sqlx(flatten)]
        queued: Queued,
        may_go: bool,
    }
    let next: Vec<Next> = sqlx::query_as(
        "select outbox_id, event_id, times, replaces,
                not ($2 and exists (select from aftercommit.repair earlier
                                     where earlier.state = 'refused' and earlier.key = r.key
                                       and earlier.outbox_id < r.outbox_id)) as may_go
           from (select * from aftercommit.repair
                  where state = 'queued' and outbox_id > $1 order by outbox_id limit $3) as r
          where aftercommit.reads_up_to(pg_current_snapshot())
          order by outbox_id",
    )
    .bind(after)
    .bind(block)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(next.into_iter().map(|Next { queued, may_go }| (queued, may_go)).collect())
}

/// Records where repairs are in the stream. One that is not queued stays as it is.
pub async fn published(
    connection: &mut Session,
    epoch: i64,
    outbox_ids: &[i64],
    event_ids: &[Uuid],
    sequences: &[i64],
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", published as (
            update aftercommit.repair r set state = 'published', sequence = t.sequence, published_at = clock_timestamp()
              from leads, unnest($2::bigint[], $3::uuid[], $4::bigint[]) as t(outbox_id, event_id, sequence)
             where r.outbox_id = t.outbox_id and r.event_id = t.event_id and r.state = 'queued'
            returning 1)
         select exists (select from leads), (select count(*) from published)"
    ))
    .bind(epoch)
    .bind(outbox_ids)
    .bind(event_ids)
    .bind(sequences)
    .fetch_one(connection)
    .await
    .map(Written::of)
}

/// Records that the stream will never take these.
pub async fn refuse(
    connection: &mut Session,
    epoch: i64,
    outbox_ids: &[i64],
    reason: &str,
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", refused as (
            update aftercommit.repair set state = 'refused', reason = $3
              from leads where outbox_id = any($2) and state = 'queued'
            returning 1)
         select exists (select from leads), (select count(*) from refused)"
    ))
    .bind(epoch)
    .bind(outbox_ids)
    .bind(super::clip(reason))
    .fetch_one(connection)
    .await
    .map(Written::of)
}

/// Gives a repair another message id, because the server knows this one from a message that is gone, or from one that
/// is not the event: then the repair replaces that one.
pub async fn rename(
    connection: &mut Session,
    epoch: i64,
    outbox_id: i64,
    replaces: Option<u64>,
) -> Result<Written, sqlx::Error> {
    sqlx::query_as(concat!(
        leading!(),
        ", renamed as (
            update aftercommit.repair
               set times = times + 1,
                   replaces = case when $3 = any(replaces) then replaces else array_remove(replaces || $3::bigint, null) end
              from leads where outbox_id = $2 and state = 'queued'
            returning 1)
         select exists (select from leads), (select count(*) from renamed)"
    ))
    .bind(epoch)
    .bind(outbox_id)
    .bind(replaces.map(u64::cast_signed))
    .fetch_one(connection)
    .await
    .map(Written::of)
}

/// Takes those repairs out of the queue that the state `seq` of the relay's log does not count as settled: its leader
/// publishes them with their window.
pub(super) async fn leave_to_window(tx: &mut Tx<'_>, seq: i64) -> Result<(), sqlx::Error> {
    // Whoever queues repairs without having seen that state has to be done.
    sqlx::query("lock table aftercommit.repair in share row exclusive mode").execute(&mut *tx).await?;
    sqlx::query(
        "delete from aftercommit.repair r using aftercommit.outbox o, aftercommit.relay_log l
          where r.state = 'queued' and o.id = r.outbox_id and l.seq = $1 and o.id > l.settled_floor
            and (o.id > l.settled_id or not pg_visible_in_snapshot(o.xid, l.settled))",
    )
    .bind(seq)
    .execute(tx)
    .await
    .map(drop)
}

/// How many repairs wait, and the highest sequence of those that do not.
pub async fn progress(connection: &mut Session) -> Result<(i64, u64), sqlx::Error> {
    let (queued, sequence): (i64, Option<i64>) = sqlx::query_as(
        "select (select count(*) from aftercommit.repair where state = 'queued'),
                (select max(sequence) from aftercommit.repair where state = 'published')",
    )
    .fetch_one(connection)
    .await?;
    Ok((queued, sequence.unwrap_or(0).cast_unsigned()))
}
