//! What only the bench asks: filling an outbox, and floors and controls beside which the product is measured.

pub(crate) mod capture;
pub(crate) mod publish;
pub(crate) mod work;

use std::ops::Range;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::session::{Session, Tx};
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::{database_error, window};

/// Rows per page, as the relay reads them.
const PAGE_ROWS: i64 = 1000;

/// The server's version.
pub(crate) async fn version(session: &mut Session) -> Result<String, Error> {
    sqlx::query_scalar("select current_setting('server_version')").fetch_one(session).await.map_err(failed)
}

/// Writes events with payloads of 256 bytes in one statement, those with the numbers in `numbers`. Their keys are
/// `writer` and a number below `keys`.
pub(crate) async fn fill(session: &mut Session, writer: u64, numbers: Range<u64>, keys: u64) -> Result<(), Error> {
    sqlx::query(
        "insert into aftercommit.outbox (event_id, type, key, payload)
         select gen_random_uuid(), 'bench.measured', $1::bigint || '-' || n % $4,
                convert_to(rpad('{\"number\":' || n || ',\"text\":\"', 254, 'x') || '\"}', 'UTF8')
           from generate_series($2::bigint, $3 - 1) as n",
    )
    .bind(writer.cast_signed())
    .bind(numbers.start.cast_signed())
    .bind(numbers.end.cast_signed())
    .bind(keys.cast_signed())
    .execute(session)
    .await
    .map(drop)
    .map_err(failed)
}

/// Lets what was filled come to rest: written to its files, with statistics, and with nothing left for whoever reads it first.
pub(crate) async fn come_to_rest(session: &mut Session) -> Result<(), Error> {
    sqlx::query("vacuum (analyze) aftercommit.outbox").execute(&mut *session).await.map_err(failed)?;
    // Only a superuser or a member of pg_checkpoint may; without it the figures are less steady.
    _ = sqlx::query("checkpoint").execute(session).await;
    Ok(())
}

/// The first `count` events of the outbox, by their outbox ids.
pub(crate) async fn event_ids(session: &mut Session, count: u64) -> Result<Vec<Uuid>, Error> {
    sqlx::query_scalar("select event_id from aftercommit.outbox order by id limit $1")
        .bind(i64::try_from(count).unwrap_or(i64::MAX))
        .fetch_all(session)
        .await
        .map_err(failed)
}

/// Publishes one event in a transaction of its own, as services in any language do, and returns its id.
pub(crate) async fn publish(session: &mut Session, key: u64) -> Result<Uuid, Error> {
    sqlx::query_scalar(
        "select aftercommit.publish('bench.measured', jsonb_build_object('text', repeat('x', 244)), $1::bigint::text)",
    )
    .bind(key.cast_signed())
    .fetch_one(session)
    .await
    .map_err(failed)
}

/// What the whole outbox holds now, as the end of a window.
pub(crate) async fn whole(session: &mut Session) -> Result<Mark, Error> {
    let (snapshot, last_id, next_xid): (String, i64, String) = sqlx::query_as(
        "select pg_current_snapshot()::text, case when is_called then last_value else 0 end,
                pg_snapshot_xmax(pg_current_snapshot())::text
           from aftercommit.outbox_id_seq",
    )
    .fetch_one(session)
    .await
    .map_err(failed)?;
    let unreadable = || Error::new(ErrorKind::Integrity, "a snapshot cannot be read");
    let snapshot = snapshot.parse().map_err(|_| unreadable())?;
    Ok(Mark { snapshot, last_id, next_xid: next_xid.parse().map_err(|_| unreadable())?, floor: 0 })
}

/// Counts everything that is there as published, as if another stream had it.
pub(crate) async fn settle(session: &mut Session) -> Result<(), Error> {
    sqlx::query(
        "insert into aftercommit.relay_log (seq, epoch, settled, settled_id, settled_xid, system_identifier)
         select log.seq + 1, log.epoch, pg_current_snapshot(), ids.last_value,
                pg_snapshot_xmax(pg_current_snapshot()), log.system_identifier
           from (select * from aftercommit.relay_log order by seq desc limit 1) as log, aftercommit.outbox_id_seq as ids",
    )
    .execute(session)
    .await
    .map(drop)
    .map_err(failed)
}

/// A control: a queue of so many rows with the same payload, of which each page is deleted when it is done.
pub(crate) async fn make_queue(session: &mut Session, rows: u64) -> Result<(), Error> {
    sqlx::query("create table public.queue (id bigint primary key, payload bytea not null)")
        .execute(&mut *session)
        .await
        .map_err(failed)?;
    sqlx::query(
        "insert into public.queue select n, convert_to(repeat('x', 256), 'UTF8') from generate_series(1, $1) as n",
    )
    .bind(rows.cast_signed())
    .execute(&mut *session)
    .await
    .map_err(failed)?;
    sqlx::query("vacuum (analyze) public.queue").execute(session).await.map(drop).map_err(failed)
}

/// Takes the next page of the queue as such queues do; returns how many rows it had.
pub(crate) async fn take_from_queue(session: &mut Session) -> Result<usize, Error> {
    let rows = sqlx::query(
        "delete from public.queue where id = any (array(
            select id from public.queue order by id limit $1 for update skip locked))
         returning id, payload",
    )
    .bind(PAGE_ROWS)
    .fetch_all(session)
    .await
    .map_err(failed)?;
    Ok(rows.len())
}

/// Takes a snapshot that is held until the transaction ends.
pub(crate) async fn hold_snapshot(session: &mut Session) -> Result<Tx<'_>, Error> {
    let begin = "begin isolation level repeatable read; set local idle_in_transaction_session_timeout = 0";
    let mut tx = session.begin_with(begin.into()).await.map_err(failed)?;
    sqlx::query("select count(*) from aftercommit.lease").execute(&mut tx).await.map_err(failed)?;
    Ok(tx)
}

/// Begins a transaction that has written an event and has not ended.
pub(crate) async fn hold_writing(session: &mut Session) -> Result<Tx<'_>, Error> {
    let mut tx = session.begin_and("; set local idle_in_transaction_session_timeout = 0").await.map_err(failed)?;
    sqlx::query("select aftercommit.publish('bench.held', '{}')").execute(&mut tx).await.map_err(failed)?;
    Ok(tx)
}

/// Lets it commit.
pub(crate) async fn commit(tx: Tx<'_>) -> Result<(), Error> {
    tx.commit().await.map_err(failed)
}

/// The first `count` events as they travel.
pub(crate) async fn envelopes(session: &mut Session, count: u64, source: &str) -> Result<Vec<Envelope>, Error> {
    let mut found = Vec::new();
    let (mut after, left) = (0, usize::try_from(count).unwrap_or(usize::MAX));
    while found.len() < left {
        let ids: Vec<i64> = sqlx::query_scalar("select id from aftercommit.outbox where id > $1 order by id limit $2")
            .bind(after)
            .bind(PAGE_ROWS)
            .fetch_all(&mut *session)
            .await
            .map_err(failed)?;
        let Some(last) = ids.last() else { break };
        after = *last;
        for row in window::some(session, &ids).await.map_err(failed)? {
            found.push(window::envelope(session, row, source).await.map_err(failed)?);
        }
    }
    found.truncate(left);
    Ok(found)
}

/// A floor: reads the first `count` events by primary key, a page at a time, every column as it is.
pub(crate) async fn read(session: &mut Session, count: u64) -> Result<u64, Error> {
    let (mut after, mut seen) = (0, 0);
    while seen < count {
        let rows: Vec<Columns> = sqlx::query_as(
            "select id, event_id, type, version, key, content_type, created_at, headers::text, payload
               from aftercommit.outbox where id > $1 order by id limit $2",
        )
        .bind(after)
        .bind(PAGE_ROWS)
        .fetch_all(&mut *session)
        .await
        .map_err(failed)?;
        let Some((last, ..)) = rows.last() else { break };
        after = *last;
        seen += rows.len() as u64;
    }
    Ok(seen)
}

/// Every column in the form in which a program needs it.
type Columns = (i64, Uuid, String, i32, Option<String>, String, DateTime<Utc>, String, Vec<u8>);

pub(crate) fn failed(error: sqlx::Error) -> Error {
    database_error("the bench's statement failed", error)
}
