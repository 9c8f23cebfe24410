//! An outbox that was restored into another cluster: transaction ids of the old one mean nothing in the new one.
//!
//! `docs/decisions/0006-restore.md` tells why it is done this way. It goes in steps of which each is kept, so that a large
//! backlog is no reason to begin again.

use super::relay_log::{self, Appended, State, appended, columns};
use super::session::Session;

/// The identifier of the cluster behind this connection.
pub async fn system_identifier(connection: &mut Session) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select system_identifier from pg_control_system()").fetch_one(connection).await
}

/// Rows that are looked at in a transaction.
const ROWS: i64 = 10_000;

/// What came of a step.
#[derive(Debug)]
pub enum Step {
    /// Up to this id everything is done, and so many rows were given a transaction id of this cluster.
    Done {
        /// The last outbox id that was looked at.
        up_to: i64,
        /// How many rows were given a transaction id of this cluster.
        rows: u64,
    },
    /// There is nothing behind it.
    End {
        /// How many rows were given a transaction id of this cluster.
        rows: u64,
    },
    /// Somebody else leads.
    Fenced,
}

/// When the id sequence was not restored, the ids of new rows may lie below the settled one, and the mark cannot tell
/// them apart: then nothing counts as settled, and the sequence is set forward. Returns the state that says so; none when
/// all is well. It still is one of the old cluster, so that whatever ends the work here, it goes on as it began.
pub async fn settle_nothing_if_behind(
    connection: &mut Session,
    after: &State,
) -> Result<Option<Appended>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    let behind: bool = sqlx::query_scalar(
        "select last_value < greatest((select max(id) from aftercommit.outbox), $1) from aftercommit.outbox_id_seq",
    )
    .bind(after.settled.last_id)
    .fetch_one(&mut tx)
    .await?;
    if !behind {
        tx.rollback().await?;
        return Ok(None);
    }
    let result = sqlx::query_as(concat!(
        "insert into aftercommit.relay_log
                (seq, epoch, settled, settled_id, settled_xid, settled_floor, floor, stream, stream_created,
                 base_sequence, scattered, system_identifier)
         select seq + 1, epoch, settled, 0, settled_xid, 0, 0, stream, stream_created,
                case when stream is not null then 0 end, true, system_identifier
           from aftercommit.relay_log where seq = $1
         returning ",
        columns!()
    ))
    .bind(after.seq)
    .fetch_one(&mut tx)
    .await;
    let Appended::Yes(state) = appended(result)? else { return Ok(Some(Appended::Fenced)) };
    relay_log::forget(&mut tx, -1, state.seq).await?;
    sqlx::query(
        "select setval('aftercommit.outbox_id_seq',
                       greatest((select max(id) from aftercommit.outbox), $1, (select last_value from aftercommit.outbox_id_seq)))",
    )
    .bind(after.settled.last_id)
    .execute(&mut tx)
    .await?;
    tx.commit().await?;
    Ok(Some(Appended::Yes(state)))
}

/// Gives the next rows behind an id that can be read, but whose number is not one of the past of this cluster, the number
/// of this transaction. Done twice it changes nothing. No other relay can take over meanwhile: what that one has
/// published must keep its number.
pub async fn step(connection: &mut Session, after: &State, behind: i64) -> Result<Step, sqlx::Error> {
    let mut tx = connection.begin().await?;
    sqlx::query("lock table aftercommit.relay_log in share mode").execute(&mut tx).await?;
    let newest: i64 = sqlx::query_scalar("select seq from aftercommit.relay_log order by seq desc limit 1")
        .fetch_one(&mut tx)
        .await?;
    if newest != after.seq {
        tx.rollback().await?;
        return Ok(Step::Fenced);
    }
    let (looked, up_to, rows): (i64, Option<i64>, i64) = sqlx::query_as(
        "with page as materialized (
             select id, pg_visible_in_snapshot(xid, pg_current_snapshot()) as past
               from aftercommit.outbox where id > $1 order by id limit $2
         ), done as (
             update aftercommit.outbox set xid = pg_current_xact_id()
              where id = any(array(select id from page where not past)) returning 1
         )
         select (select count(*) from page), (select max(id) from page), (select count(*) from done)",
    )
    .bind(behind)
    .bind(ROWS)
    .fetch_one(&mut tx)
    .await?;
    tx.commit().await?;
    let rows = rows.unsigned_abs();
    Ok(match up_to {
        Some(up_to) if looked == ROWS => Step::Done { up_to, rows },
        _ => Step::End { rows },
    })
}

/// Appends a state of this cluster behind one of another cluster, once every [`step`] is done.
///
/// Every row up to the last settled id is of the old cluster, and the settled mark tells in old numbers which of them
/// are settled. So the floor of every later mark is put there, and no number of such a row is looked at again. The rows
/// above it are not settled, whoever wrote them.
pub async fn finish(connection: &mut Session, after: &State, system_identifier: i64) -> Result<Appended, sqlx::Error> {
    let result = sqlx::query_as(concat!(
        "insert into aftercommit.relay_log
                (seq, epoch, settled, settled_id, settled_xid, settled_floor, floor, stream, stream_created,
                 base_sequence, scattered, system_identifier)
         select seq + 1, epoch, settled, settled_id, settled_xid, settled_floor, greatest(floor, settled_id),
                stream, stream_created, base_sequence, true, $2
           from aftercommit.relay_log where seq = $1
         returning ",
        columns!()
    ))
    .bind(after.seq)
    .bind(system_identifier)
    .fetch_one(connection)
    .await;
    appended(result)
}
