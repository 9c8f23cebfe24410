//! The relay's progress: a log of states, the newest one valid, fenced by its own primary key.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgExecutor, Row};

use super::mark_row;
use super::session::{Session, Tx};
use super::snapshot::Mark;
use super::time;
use super::{parked, repair};
use crate::fault;

/// The columns of a state, as [`State`] is read from them.
macro_rules! columns {
    () => {
        "seq, settled::text, settled_id, settled_xid::text, settled_floor, target::text, target_id,
         target_xid::text, floor, stream, stream_created, base_sequence, scattered, system_identifier, created_at, timeline"
    };
}
pub(super) use columns;

/// The relay's state as the log holds it.
#[derive(Debug, Clone)]
pub struct State {
    /// The number of the state; each has that of its predecessor plus one.
    pub seq: i64,
    /// What is in the stream for certain.
    pub settled: Mark,
    /// An open window: what this mark holds and `settled` does not is on its way into the stream.
    pub target: Option<Mark>,
    /// None before the first window.
    pub base: Option<Base>,
    /// What the stream holds behind the base is in no known order: each message must be looked up.
    pub scattered: bool,
    /// The cluster in which the state was written.
    pub system_identifier: i64,
    /// When the state was written, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// The timeline of the write-ahead log in which the state was written. Another one means that a standby was
    /// promoted, or the cluster recovered to a point in time: every later write may have been forgotten.
    pub timeline: i64,
}

/// A place in a stream: what is settled lies at or before it, what is not settled lies behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Name of the stream.
    pub stream: String,
    /// When the stream was created, in whole microseconds.
    pub created: DateTime<Utc>,
    /// The sequence of the place.
    pub sequence: u64,
}

/// So many ids from the first new row on are in a window at most.
const WINDOW_IDS: i64 = 1_000_000;

/// What came of appending a state.
#[derive(Debug)]
pub enum Appended {
    /// It is the newest state now.
    Yes(Box<State>),
    /// Somebody else appended first: this process leads no more.
    Fenced,
}

/// The newest state.
pub async fn newest(connection: &mut Session) -> Result<State, sqlx::Error> {
    sqlx::query_as(concat!("select ", columns!(), " from aftercommit.relay_log order by seq desc limit 1"))
        .fetch_one(connection)
        .await
}

/// The newest state whose base lies at or before `sequence` in `stream`.
pub async fn newest_at(connection: &mut Session, stream: &str, sequence: u64) -> Result<Option<State>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from aftercommit.relay_log where stream = $1 and base_sequence <= $2 order by seq desc limit 1"
    ))
    .bind(stream)
    .bind(sequence.cast_signed())
    .fetch_optional(connection)
    .await
}

/// Appends the same state under a new epoch. From then on no earlier leader can append. After a change of the timeline,
/// what lies behind the base is scattered: the writes that made a leader pass an event may be forgotten, and the state,
/// which was written behind those that it rests on, is the last that is surely shared.
pub async fn take_over(connection: &mut Session, after: &State, epoch: i64) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query_as(concat!(
            "insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, settled_floor, target, target_id, target_xid, cut,
                     floor, stream, stream_created, base_sequence, scattered, system_identifier)
             select seq + 1, $2, settled, settled_id, settled_xid, settled_floor,
                    case when same then target end, case when same then target_id end, case when same then target_xid end,
                    cut and same, floor, stream, stream_created, base_sequence,
                    scattered or (not same and stream is not null), system_identifier
               from (select *, timeline = aftercommit.timeline() as same from aftercommit.relay_log where seq = $1) as l
             returning ",
            columns!()
        ))
        .bind(after.seq)
        .bind(epoch)
        .fetch_one(connection)
        .await,
    )
}

/// Which window is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// From everything handled so far; an open window counts as handled.
    Next,
    /// From the settled mark: an open window is opened anew, up to now.
    Again {
        /// See [`State::scattered`].
        scattered: bool,
    },
}

/// Opens a window up to this moment.
///
/// The statement is also the durability barrier. It commits synchronously whatever the database's default is, and
/// PostgreSQL's log is sequential: once it is on disk, so is every commit that the new target sees. It must run in a
/// transaction of its own, so that its transaction id is taken after the sequence was read.
///
/// The target's last id is the sequence's, but never lower than before, and not lower than any row: a sequence that was set
/// back, or never moved, must not hide rows. Behind a large backlog the window is cut, so that its base moves on; but
/// not when what the stream holds behind the base has to be looked up, because that may be of any id.
pub async fn open_window(
    connection: &mut Session,
    after: &State,
    base: &Base,
    opening: Opening,
) -> Result<Appended, sqlx::Error> {
    if fault::broken("barrier") {
        let mut tx = connection.begin().await?;
        let appended = open_window_in(&mut tx, after, base, opening).await?;
        sqlx::raw_sql("set local synchronous_commit = off").execute(&mut tx).await?;
        return tx.commit().await.map(|()| appended);
    }
    open_window_in(connection, after, base, opening).await
}

async fn open_window_in(
    executor: impl PgExecutor<'_>,
    after: &State,
    base: &Base,
    opening: Opening,
) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query_as(concat!(
            "with durable as materialized (
                 select set_config('synchronous_commit',
                     case when current_setting('synchronous_commit') in ('off', 'local') then 'on'
                          else current_setting('synchronous_commit') end, true)
             ), position as materialized (
                 select case when is_called then last_value else 0 end as last_id from aftercommit.outbox_id_seq
             ), before as materialized (
                 select *, case when target is null or $5 then settled_id else target_id end as handled_id
                   from aftercommit.relay_log where seq = $1
             ), known as materialized (
                 select before.handled_id, greatest(position.last_id, before.handled_id) as last_id from before, position
             ), reach as materialized (
                 select greatest(last_id, (select max(id) from aftercommit.outbox where id > known.last_id)) as last_id,
                        (select min(id) from aftercommit.outbox where id > known.handled_id) as first_id
                   from known
             ), goal as materialized (
                 select last_id, case when $6 then last_id else least(last_id, first_id - 1 + $7) end as target_id
                   from reach
             )
             insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, settled_floor, target, target_id, target_xid, cut,
                     floor, stream, stream_created, base_sequence, scattered, system_identifier)
             select l.seq + 1, l.epoch,
                    case when l.target is null or $5 then l.settled else l.target end,
                    l.handled_id,
                    case when l.target is null or $5 then l.settled_xid else l.target_xid end,
                    case when l.target is null or $5 then l.settled_floor else l.floor end,
                    pg_current_snapshot(), goal.target_id, pg_current_xact_id(), goal.target_id < goal.last_id,
                    l.floor, $2, $3, $4, $6, l.system_identifier
               from durable, goal, before l
              where l.timeline = aftercommit.timeline()
             returning ",
            columns!()
        ))
        .bind(after.seq)
        .bind(&base.stream)
        .bind(base.created)
        .bind(base.sequence.cast_signed())
        .bind(opening != Opening::Next)
        .bind(opening == Opening::Again { scattered: true })
        .bind(WINDOW_IDS)
        .fetch_one(executor)
        .await,
    )
}

/// Closes the open window: everything up to its target is handled, and lies in the stream at or before `base`.
pub async fn settle(connection: &mut Session, after: &State, base: &Base) -> Result<Appended, sqlx::Error> {
    appended(
        sqlx::query_as(concat!(
            "insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, settled_floor, floor, stream, stream_created,
                     base_sequence, system_identifier)
             select seq + 1, epoch, target, target_id, target_xid, floor, floor, $2, $3, $4, system_identifier
               from aftercommit.relay_log where seq = $1 and timeline = aftercommit.timeline()
             returning ",
            columns!()
        ))
        .bind(after.seq)
        .bind(&base.stream)
        .bind(base.created)
        .bind(base.sequence.cast_signed())
        .fetch_one(connection)
        .await,
    )
}

/// Goes back to what was settled at an earlier state, or to nothing settled when there is none to go back to. The states
/// in between speak of a part of the stream that is gone and are removed. Events that were parked, and published later
/// into that part, are to be published again.
pub async fn go_back(
    connection: &mut Session,
    after: &State,
    earlier: Option<&State>,
    base: &Base,
    stream_end: u64,
) -> Result<Appended, sqlx::Error> {
    let mut tx = connection.begin().await?;
    let back = appended(
        sqlx::query_as(concat!(
            "insert into aftercommit.relay_log
                    (seq, epoch, settled, settled_id, settled_xid, settled_floor, floor, stream, stream_created,
                     base_sequence, scattered, system_identifier)
             select n.seq + 1, n.epoch, coalesce(e.settled, pg_current_snapshot()), coalesce(e.settled_id, 0),
                    coalesce(e.settled_xid, pg_snapshot_xmax(pg_current_snapshot())), coalesce(e.settled_floor, 0),
                    n.floor, $3, $4, $5, true, n.system_identifier
               from aftercommit.relay_log n left join aftercommit.relay_log e on e.seq = $2
              where n.seq = $1
             returning ",
            columns!()
        ))
        .bind(after.seq)
        .bind(earlier.map(|state| state.seq))
        .bind(&base.stream)
        .bind(base.created)
        .bind(base.sequence.cast_signed())
        .fetch_one(&mut tx)
        .await,
    )?;
    let Appended::Yes(state) = back else { return Ok(Appended::Fenced) };
    forget(&mut tx, earlier.map_or(-1, |state| state.seq), state.seq).await?;
    parked::lost_behind(&mut tx, stream_end).await?;
    repair::leave_to_window(&mut tx, state.seq).await?;
    tx.commit().await?;
    Ok(Appended::Yes(state))
}

/// Removes the states between two.
pub(super) async fn forget(tx: &mut Tx<'_>, after: i64, before: i64) -> Result<(), sqlx::Error> {
    sqlx::query("delete from aftercommit.relay_log where seq > $1 and seq < $2")
        .bind(after)
        .bind(before)
        .execute(tx)
        .await
        .map(drop)
}

/// What came of inserting a state behind another one.
pub(super) fn appended(result: Result<State, sqlx::Error>) -> Result<Appended, sqlx::Error> {
    match result {
        Ok(state) => Ok(Appended::Yes(Box::new(state))),
        // Its successor is there, or the state itself was left behind and removed, or is of another timeline.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(Appended::Fenced),
        Err(sqlx::Error::RowNotFound) => Ok(Appended::Fenced),
        Err(error) => Err(error),
    }
}

impl FromRow<'_, PgRow> for State {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let floor = row.try_get("floor")?;
        let target = match row.try_get::<Option<i64>, _>("target_id")? {
            Some(_) => Some(mark_row::mark(row, ["target", "target_id", "target_xid"], floor)?),
            None => None,
        };
        let base = match row.try_get("stream")? {
            Some(stream) => Some(Base {
                stream,
                created: time::at(row, "stream_created")?,
                sequence: row.try_get::<i64, _>("base_sequence")?.cast_unsigned(),
            }),
            None => None,
        };
        Ok(Self {
            seq: row.try_get("seq")?,
            settled: mark_row::mark(row, ["settled", "settled_id", "settled_xid"], row.try_get("settled_floor")?)?,
            target,
            base,
            scattered: row.try_get("scattered")?,
            system_identifier: row.try_get("system_identifier")?,
            created_at: time::at(row, "created_at")?,
            timeline: row.try_get("timeline")?,
        })
    }
}
