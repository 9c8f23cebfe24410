//! An outbox that was restored into another cluster: transaction ids of the old one mean nothing in the new one.
//!
//! `docs/decisions/0006-restore.md` tells why it is done this way.

use super::relay_log::{self, Appended, State, appended, columns};
use super::session::Session;

/// The identifier of the cluster behind this connection.
pub(crate) async fn system_identifier(connection: &mut Session) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select system_identifier from pg_control_system()").fetch_one(connection).await
}

/// What was found and done.
#[derive(Debug)]
pub(crate) struct Restamped {
    pub(crate) state: State,
    /// Rows that were given a transaction id of this cluster.
    pub(crate) rows: u64,
    /// The id sequence was behind the ids that were handed out, and was set forward.
    pub(crate) sequence_was_behind: bool,
}

/// Appends a state of this cluster behind one of another cluster; none when somebody else was faster.
///
/// Every row up to the last settled id is of the old cluster, and the settled mark tells in old numbers which of them
/// are settled. So the floor of every later mark is put there, and no number of such a row is looked at again. The rows
/// above it are not settled, whoever wrote them. Those that can be read but whose number is not one of the past of this
/// cluster get the number of this transaction.
///
/// When the id sequence was not restored, the ids of new rows may lie below the settled one, and the mark cannot tell
/// them apart. Then nothing counts as settled.
pub(crate) async fn restamp(
    connection: &mut Session,
    after: &State,
    system_identifier: i64,
) -> Result<Option<Restamped>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    let sequence_was_behind = sqlx::query_scalar(
        "select last_value < greatest((select max(id) from aftercommit.outbox), $1) from aftercommit.outbox_id_seq",
    )
    .bind(after.settled.last_id)
    .fetch_one(&mut tx)
    .await?;
    let result = sqlx::query(concat!(
        "insert into aftercommit.relay_log
                (seq, epoch, settled, settled_id, settled_xid, settled_floor, floor, stream, stream_created,
                 base_sequence, scattered, system_identifier)
         select seq + 1, epoch, settled, case when $3 then 0 else settled_id end, settled_xid,
                case when $3 then 0 else settled_floor end, case when $3 then 0 else greatest(floor, settled_id) end,
                stream, stream_created, case when not $3 then base_sequence when stream is not null then 0 end, true, $2
           from aftercommit.relay_log where seq = $1
         returning ",
        columns!()
    ))
    .bind(after.seq)
    .bind(system_identifier)
    .bind(sequence_was_behind)
    .fetch_one(&mut tx)
    .await;
    let Appended::Yes(state) = appended(result)? else { return Ok(None) };
    if sequence_was_behind {
        relay_log::forget(&mut tx, -1, state.seq).await?;
        sqlx::query(
            "select setval('aftercommit.outbox_id_seq',
                           greatest((select max(id) from aftercommit.outbox), $1, (select last_value from aftercommit.outbox_id_seq)))",
        )
        .bind(after.settled.last_id)
        .execute(&mut tx)
        .await?;
    }
    let done = sqlx::query(
        "update aftercommit.outbox set xid = pg_current_xact_id()
          where id > $1 and not pg_visible_in_snapshot(xid, pg_current_snapshot())",
    )
    .bind(if sequence_was_behind { 0 } else { after.settled.last_id })
    .execute(&mut tx)
    .await?;
    tx.commit().await?;
    Ok(Some(Restamped { state: *state, rows: done.rows_affected(), sequence_was_behind }))
}
