//! The subscriber's side: which events are done. What is on record of those that are not is in [`super::attempt`].
//!
//! The statements that take a [`Tx`] run among a handler's, with the search path of its role, and after whatever the handler
//! has set: they name the schema of each function, operator and type.

use std::time::Duration;

use sqlx::Executor;
use uuid::Uuid;

use super::dead_letter::storable;
use super::handling;
use super::running::Marker;
use super::session::{Session, Tx};

/// Opens a transaction in which no statement may take longer than `limit`. When this process stops talking in the middle
/// of it (frozen, or cut off), the server ends it, so that its locks do not keep a successor waiting for ever; that takes
/// a little longer than `limit`, which a living process enforces itself.
pub async fn begin(connection: &mut Session, limit: Duration) -> Result<Tx<'_>, sqlx::Error> {
    Ok(connection.begin_with(begin_within(limit)).await?.unhurried())
}

/// The same for a batch of events. The marker that names them is committed before, so that it stays when the process
/// dies in the middle.
pub async fn begin_batch<'s>(
    connection: &'s mut Session,
    limit: Duration,
    marker: Marker<'_>,
    events: &[Uuid],
) -> Result<Tx<'s>, sqlx::Error> {
    // A crash of PostgreSQL empties the table anyway, so nothing has to wait for the disk.
    let mark = format!("begin; set local synchronous_commit = off; {}; commit", marker.set(events)?);
    let begin = format!("{mark}; {}; {}", begin_within(limit), handling::OPEN);
    Ok(connection.begin_with(begin).await?.unhurried())
}

/// One simple query, so one round trip. SET LOCAL ends with the transaction, as transaction pooling wants it.
fn begin_within(limit: Duration) -> String {
    // A little sooner than this process gives a statement up, so that it is the server that ends it, and says so.
    let statement = limit.saturating_sub((limit / 10).min(Duration::from_secs(1))).as_millis().clamp(1, 1_000_000_000);
    let limit = limit.as_millis().min(1_000_000_000);
    let idle = limit + 5_000;
    format!("begin; set local statement_timeout = {statement}; set local idle_in_transaction_session_timeout = {idle}")
}

/// An event that is about to be handled.
pub struct Row {
    /// The event's id.
    pub event_id: Uuid,
    /// The event's sequence in the stream.
    pub stream_seq: i64,
    /// Its place in the publisher's outbox, if that is known.
    pub sequence: Option<i64>,
    /// The key of an event that comes from the stream: it waits while others of the key were redriven.
    pub live_key: Option<String>,
}

/// What the inbox says of a batch of events.
#[derive(Debug, Default)]
pub struct Entered {
    /// Those that are new, each with the number of its failed attempts, if there is something on record about it.
    pub fresh: Vec<(Uuid, Option<i32>)>,
    /// Those that may not run yet, because events of their key that were redriven wait.
    pub held: Vec<Uuid>,
    /// All but those, when a successor has taken the marker: it has just counted a crash for those that were not done, and
    /// they are now.
    pub suspected: Vec<Uuid>,
    /// The transaction that has the rows of those that are new.
    pub transaction: Option<u64>,
}

/// Writes the inbox rows of `events` and removes the marker, both valid with the commit. Waits for another transaction
/// that is handling one of them right now. An event that was redriven is neither new nor held as long as its row waits:
/// it runs from there.
pub async fn insert(tx: &mut Tx<'_>, marker: Marker<'_>, events: &[Row]) -> Result<Entered, sqlx::Error> {
    /// An event that is new, or held, or suspected.
    #[derive(sqlx::FromRow)]
    struct Found {
        event_id: Uuid,
        attempts: Option<i32>,
        held: bool,
        suspected: bool,
        transaction: Option<String>,
    }
    let found: Vec<Found> = sqlx::query_as(
        "with event as (
            select event_id, stream_seq, sequence,
                   exists (select from aftercommit.redrive r
                            where r.subscriber operator(pg_catalog.=) $1 and r.key operator(pg_catalog.=) e.key
                              and pg_catalog.hashtextextended(r.key, 0)
                                  operator(pg_catalog.=) pg_catalog.hashtextextended(e.key, 0))
                   and not exists (select from aftercommit.inbox i
                                    where i.subscriber operator(pg_catalog.=) $1
                                      and i.event_id operator(pg_catalog.=) e.event_id) as held
              from unnest($2::pg_catalog.uuid[], $3::bigint[], $4::bigint[], $5::pg_catalog.text[])
                   as e(event_id, stream_seq, sequence, key)
             where not exists (select from aftercommit.redrive r
                                where r.subscriber operator(pg_catalog.=) $1
                                  and r.event_id operator(pg_catalog.=) e.event_id)),
         fresh as (
            insert into aftercommit.inbox (subscriber, event_id, stream_seq, sequence)
            select $1, event_id, stream_seq, sequence from event where not held order by stream_seq
            on conflict do nothing
            returning event_id),
         unmarked as (
            delete from aftercommit.running
             where subscriber operator(pg_catalog.=) $1 and epoch operator(pg_catalog.=) $6
               and lane operator(pg_catalog.=) $7
            returning lane)
         select fresh.event_id, attempt.attempts, false as held, false as suspected,
                pg_catalog.pg_current_xact_id()::pg_catalog.text as transaction
           from fresh left join aftercommit.attempt
             on attempt.subscriber operator(pg_catalog.=) $1 and attempt.event_id operator(pg_catalog.=) fresh.event_id
         union all
         select event_id, null, true, false, null from event where held
         union all
         select event_id, null, false, true, null from event where not held and not exists (select from unmarked)",
    )
    .bind(marker.subscriber)
    .bind(events.iter().map(|event| event.event_id).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.stream_seq).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.sequence).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.live_key.as_deref().map(storable)).collect::<Vec<_>>())
    .bind(marker.epoch)
    .bind(marker.lane)
    .fetch_all(tx)
    .await?;
    let mut entered = Entered::default();
    for Found { event_id, attempts, held, suspected, transaction } in found {
        match (held, suspected) {
            (_, true) => entered.suspected.push(event_id),
            (true, _) => entered.held.push(event_id),
            (false, _) => {
                entered.transaction = transaction.and_then(|id| id.parse().ok());
                entered.fresh.push((event_id, attempts));
            }
        }
    }
    Ok(entered)
}

/// Forgets that an event was handled when what was handled is one of these messages of the stream, which have its id and
/// are not the event: its row, and the attempts that failed. False when it was not.
pub async fn forget_forgery(
    tx: &mut Tx<'_>,
    subscriber: &str,
    event: Uuid,
    sequences: &[i64],
) -> Result<bool, sqlx::Error> {
    let done =
        sqlx::query("delete from aftercommit.inbox where subscriber = $1 and event_id = $2 and stream_seq = any($3)")
            .bind(subscriber)
            .bind(event)
            .bind(sequences)
            .execute(&mut *tx)
            .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    clear_attempts(tx, subscriber, &[event]).await?;
    Ok(true)
}

/// Which of `events` the subscriber is done with.
pub async fn done(connection: &mut Session, subscriber: &str, events: &[Uuid]) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("select event_id from aftercommit.inbox where subscriber = $1 and event_id = any($2)")
        .bind(subscriber)
        .bind(events)
        .fetch_all(connection)
        .await
}

/// Forgets the failed attempts and crashes of events that are now handled.
pub async fn clear_attempts(tx: &mut Tx<'_>, subscriber: &str, events: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "delete from aftercommit.attempt
          where subscriber operator(pg_catalog.=) $1 and event_id operator(pg_catalog.=) any($2)",
    )
    .bind(subscriber)
    .bind(events)
    .execute(tx)
    .await
    .map(|_| ())
}

/// Fails when the transaction is aborted: a handler that drops the error of a statement would otherwise make COMMIT
/// report success for a rollback.
pub(crate) async fn check_alive(tx: &mut Tx<'_>) -> Result<(), sqlx::Error> {
    tx.execute("select 1").await.map(|_| ())
}

/// Fails when the database does not answer.
pub async fn answers(connection: &mut Session) -> Result<(), sqlx::Error> {
    connection.execute("select 1").await.map(|_| ())
}
