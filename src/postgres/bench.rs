//! What only the bench asks: filling an outbox, and floors and controls beside which the product is measured.

use std::ops::Range;

use chrono::{DateTime, Utc};
use sqlx::Row;
use uuid::Uuid;

use super::database_error;
use super::session::Session;
use super::window;
use crate::envelope::Envelope;
use crate::error::Error;

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

/// The events of the outbox, by their outbox ids.
pub(crate) async fn event_ids(session: &mut Session) -> Result<Vec<Uuid>, Error> {
    sqlx::query_scalar("select event_id from aftercommit.outbox order by id").fetch_all(session).await.map_err(failed)
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
    let (mut after, mut seen) = (0_i64, 0);
    while seen < count {
        let rows = sqlx::query(
            "select id, event_id, type, version, key, content_type, created_at, headers::text, payload
               from aftercommit.outbox where id > $1 order by id limit $2",
        )
        .bind(after)
        .bind(PAGE_ROWS)
        .fetch_all(&mut *session)
        .await
        .map_err(failed)?;
        let Some(last) = rows.last() else { break };
        after = last.try_get(0).map_err(failed)?;
        for row in &rows {
            read_row(row).map_err(failed)?;
        }
        seen += rows.len() as u64;
    }
    Ok(seen)
}

/// Every column in the form in which a program needs it.
fn read_row(row: &sqlx::postgres::PgRow) -> Result<(), sqlx::Error> {
    let _: (Uuid, String, i32) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    let _: (Option<String>, String, DateTime<Utc>) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
    let _: (String, Vec<u8>) = (row.try_get(7)?, row.try_get(8)?);
    Ok(())
}

fn failed(error: sqlx::Error) -> Error {
    database_error("the bench's statement failed", error)
}
