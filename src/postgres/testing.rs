//! What only the testing kit asks: the events of an open transaction, and the state of the user's tables.
//!
//! Its statements have no name, so that a user's tests may run through a pooler.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, PgConnection, Row};
use uuid::Uuid;

/// A row that the open transaction has written into the outbox.
pub(crate) struct PendingRow {
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) version: i32,
    pub(crate) key: Option<String>,
    pub(crate) headers: String,
    pub(crate) content_type: String,
    pub(crate) payload: Vec<u8>,
}

/// The outbox rows of the open transaction, in the order in which they were written. A subtransaction's rows carry the
/// id of the whole transaction.
pub(crate) async fn pending(connection: &mut PgConnection) -> Result<Vec<PendingRow>, sqlx::Error> {
    let rows = sqlx::query(
        "select event_id, type, version, key, headers::text, content_type, payload
           from aftercommit.outbox where xid = pg_current_xact_id_if_assigned() order by id",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(PendingRow {
                event_id: row.try_get(0)?,
                event_type: row.try_get(1)?,
                version: row.try_get(2)?,
                key: row.try_get(3)?,
                headers: row.try_get(4)?,
                content_type: row.try_get(5)?,
                payload: row.try_get(6)?,
            })
        })
        .collect()
}

/// Removes the outbox rows of the open transaction and returns how many there were.
pub(crate) async fn clear(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    sqlx::query("delete from aftercommit.outbox where xid = pg_current_xact_id_if_assigned()")
        .persistent(false)
        .execute(connection)
        .await
        .map(|done| done.rows_affected())
}

/// What a table holds, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) rows: i64,
    hash: String,
}

/// The state of every table that the open transaction can see: the user's own, by name, and the outbox. Left out are
/// temporary tables and what the worker keeps for itself. Reads all rows.
pub(crate) async fn fingerprints(connection: &mut PgConnection) -> Result<BTreeMap<String, Fingerprint>, sqlx::Error> {
    let tables: Vec<(String, String)> = sqlx::query_as(
        "select case when nspname = 'public' then relname::text else nspname || '.' || relname end,
                format('%I.%I', nspname, relname)
           from pg_class join pg_namespace on pg_namespace.oid = relnamespace
          where relkind = 'r' and relpersistence <> 't' and nspname !~ '^pg_' and nspname <> 'information_schema'
            and (nspname <> 'aftercommit' or relname = 'outbox')",
    )
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let mut found = BTreeMap::new();
    for (name, quoted) in tables {
        // Whole rows as text, hashed and added up: no type needs more than its text form, and order does not count.
        let sql = format!(
            "select count(*), coalesce(sum(hashtextextended((this_row.*)::text, 0)::numeric), 0)::text
               from only {quoted} as this_row"
        );
        let (rows, hash) = sqlx::query_as(AssertSqlSafe(sql)).persistent(false).fetch_one(&mut *connection).await?;
        found.insert(name, Fingerprint { rows, hash });
    }
    Ok(found)
}
