//! The relay's progress: a log of states, the newest one valid, fenced by its own primary key.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use super::snapshot::Mark;

/// The relay's state as the log holds it.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) seq: i64,
    pub(crate) epoch: i64,
    pub(crate) settled: Mark,
    pub(crate) window: Option<Window>,
    /// The cluster whose snapshots these are.
    pub(crate) system_identifier: i64,
}

/// An open window: what `target` holds and the settled mark does not, on its way into `stream`.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    pub(crate) target: Mark,
    pub(crate) stream: String,
    /// The stream's last sequence when the window was opened: all of the window lies behind it.
    pub(crate) base_sequence: u64,
}

/// What came of appending a state.
#[derive(Debug)]
pub(crate) enum Appended {
    /// It is the newest state now.
    Yes(State),
    /// Somebody else appended first: this process leads no more.
    Fenced,
}

/// The newest state.
pub(crate) async fn newest(connection: &mut Session) -> Result<State, sqlx::Error> {
    let row = sqlx::query(
        "select seq, epoch, settled::text, settled_id, settled_xid::text, target::text, target_id, target_xid::text,
                stream, base_sequence, system_identifier
           from aftercommit.relay_log order by seq desc limit 1",
    )
    .fetch_one(connection)
    .await?;
    state(&row)
}

/// Appends the same state under a new epoch. From then on no earlier leader can append.
pub(crate) async fn take_over(connection: &mut Session, after: &State, epoch: i64) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query(
            "insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, target, target_id, target_xid, stream, base_sequence,
                     system_identifier)
             select seq + 1, $2, settled, settled_id, settled_xid, target, target_id, target_xid, stream, base_sequence,
                    system_identifier
               from aftercommit.relay_log where seq = $1
             returning seq, epoch, settled::text, settled_id, settled_xid::text, target::text, target_id,
                       target_xid::text, stream, base_sequence, system_identifier",
        )
        .bind(after.seq)
        .bind(epoch)
        .fetch_one(connection)
        .await,
    )
}

/// Opens a window from everything handled so far to this moment; an open window counts as handled.
///
/// The statement is also the durability barrier. It commits synchronously whatever the database's default is, and
/// PostgreSQL's log is sequential: once it is on disk, so is every commit that the new target sees. It must run in a
/// transaction of its own, so that its transaction id is taken after the sequence was read.
pub(crate) async fn open_window(
    connection: &mut Session,
    after: &State,
    stream: &str,
    base_sequence: u64,
) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query(
            "with durable as materialized (
                 select set_config('synchronous_commit',
                     case when current_setting('synchronous_commit') in ('off', 'local') then 'on'
                          else current_setting('synchronous_commit') end, true)
             ), position as materialized (
                 select case when is_called then last_value else 0 end as last_id from aftercommit.outbox_id_seq
             )
             insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, target, target_id, target_xid, stream, base_sequence,
                     system_identifier)
             select l.seq + 1, l.epoch, coalesce(l.target, l.settled), coalesce(l.target_id, l.settled_id),
                    coalesce(l.target_xid, l.settled_xid), pg_current_snapshot(), position.last_id,
                    pg_current_xact_id(), $2, $3, l.system_identifier
               from durable, position, aftercommit.relay_log l
              where l.seq = $1
             returning seq, epoch, settled::text, settled_id, settled_xid::text, target::text, target_id,
                       target_xid::text, stream, base_sequence, system_identifier",
        )
        .bind(after.seq)
        .bind(stream)
        .bind(base_sequence.cast_signed())
        .fetch_one(connection)
        .await,
    )
}

/// Closes the open window: everything up to its target is handled.
pub(crate) async fn settle(connection: &mut Session, after: &State) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query(
            "insert into aftercommit.relay_log (seq, epoch, settled, settled_id, settled_xid, system_identifier)
             select seq + 1, epoch, coalesce(target, settled), coalesce(target_id, settled_id),
                    coalesce(target_xid, settled_xid), system_identifier
               from aftercommit.relay_log where seq = $1
             returning seq, epoch, settled::text, settled_id, settled_xid::text, target::text, target_id,
                       target_xid::text, stream, base_sequence, system_identifier",
        )
        .bind(after.seq)
        .fetch_one(connection)
        .await,
    )
}

fn appended(result: Result<PgRow, sqlx::Error>) -> Result<Appended, sqlx::Error> {
    match result {
        Ok(row) => state(&row).map(Appended::Yes),
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(Appended::Fenced),
        Err(error) => Err(error),
    }
}

fn state(row: &PgRow) -> Result<State, sqlx::Error> {
    let window = match row.try_get::<Option<String>, _>(8)? {
        Some(stream) => {
            Some(Window { target: mark(row, 5)?, stream, base_sequence: row.try_get::<i64, _>(9)?.cast_unsigned() })
        }
        None => None,
    };
    Ok(State {
        seq: row.try_get(0)?,
        epoch: row.try_get(1)?,
        settled: mark(row, 2)?,
        window,
        system_identifier: row.try_get(10)?,
    })
}

fn mark(row: &PgRow, at: usize) -> Result<Mark, sqlx::Error> {
    Ok(Mark {
        snapshot: row.try_get::<&str, _>(at)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
        last_id: row.try_get(at + 1)?,
        next_xid: row.try_get::<&str, _>(at + 2)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
    })
}
