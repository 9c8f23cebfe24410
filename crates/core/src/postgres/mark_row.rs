//! A mark in the columns of a row.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::snapshot::Mark;

/// The mark in three columns: its snapshot and the next transaction's id, both as text, and between them the last id.
pub(super) fn mark(row: &PgRow, [snapshot, last_id, next_xid]: [&str; 3], floor: i64) -> Result<Mark, sqlx::Error> {
    Ok(Mark {
        snapshot: row.try_get::<&str, _>(snapshot)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
        last_id: row.try_get(last_id)?,
        next_xid: row.try_get::<&str, _>(next_xid)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
        floor,
    })
}
