//! What only the testing kit asks: the events of an open transaction, the state of the user's tables, and what is left to
//! deliver.
//!
//! On the user's own connections its statements have no name, so that tests may run through a pooler.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::mark_row;
use super::session::Session;
use super::snapshot::Mark;

/// The types of all events that are in the outbox.
pub async fn types(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("select distinct type from aftercommit.outbox order by type").fetch_all(connection).await
}

/// A row that the open transaction has written into the outbox.
#[derive(sqlx::FromRow)]
pub struct PendingRow {
    /// The event's id.
    pub event_id: Uuid,
    /// The event's type.
    #[sqlx(rename = "type")]
    pub event_type: String,
    /// The version of the type, from 1.
    pub version: i32,
    /// The event's key; none when it has none.
    pub key: Option<String>,
    /// The publisher's headers, as a JSON object.
    pub headers: String,
    /// The media type of the payload.
    pub content_type: String,
    /// The payload.
    pub payload: Vec<u8>,
}

/// The outbox rows of the open transaction, in the order in which they were written. A subtransaction's rows carry the
/// id of the whole transaction.
pub async fn pending(connection: &mut PgConnection) -> Result<Vec<PendingRow>, sqlx::Error> {
    sqlx::query_as(
        "select event_id, type, version, key, headers::text, content_type, payload
           from aftercommit.outbox where xid = pg_current_xact_id_if_assigned() order by id",
    )
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// Removes the outbox rows of the open transaction and returns how many there were.
pub async fn clear(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    sqlx::query("delete from aftercommit.outbox where xid = pg_current_xact_id_if_assigned()")
        .persistent(false)
        .execute(connection)
        .await
        .map(|done| done.rows_affected())
}

/// What a table holds, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// How many rows it has.
    pub rows: i64,
    hash: String,
}

/// The state of every table that the open transaction can see: the user's own, by name, and the outbox. Left out are
/// temporary tables and what the worker keeps for itself. Reads all rows.
pub async fn fingerprints(connection: &mut PgConnection) -> Result<BTreeMap<String, Fingerprint>, sqlx::Error> {
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

/// The present moment of the outbox. The statement's snapshot is taken before it reads the sequence, as a mark wants it.
/// As the end of a window: nothing is kept of what was running.
pub async fn now(connection: &mut Session) -> Result<Mark, sqlx::Error> {
    let row = sqlx::query(
        "select pg_current_snapshot()::text as snapshot, case when is_called then last_value else 0 end as last_id,
                pg_snapshot_xmax(pg_current_snapshot())::text as next_xid
           from aftercommit.outbox_id_seq",
    )
    .fetch_one(connection)
    .await?;
    mark_row::mark(&row, ["snapshot", "last_id", "next_xid"], 0)
}

/// The failed attempts of those of these events that have some, each with the last error.
pub async fn attempts(
    connection: &mut Session,
    subscriber: &str,
    events: &[Uuid],
) -> Result<Vec<(Uuid, i32, String)>, sqlx::Error> {
    sqlx::query_as(
        "select event_id, attempts, last_error from aftercommit.attempt where subscriber = $1 and event_id = any($2)",
    )
    .bind(subscriber)
    .bind(events)
    .fetch_all(connection)
    .await
}

/// What is known of an event at a subscriber.
#[derive(Debug, Default, sqlx::FromRow)]
pub struct Story {
    /// How the inbox says that it ended.
    pub outcome: Option<String>,
    /// Why it is dead, or the last error of a failed attempt.
    pub error: Option<String>,
}

/// Looks what became of an event.
pub async fn story(connection: &mut PgConnection, subscriber: &str, event: Uuid) -> Result<Story, sqlx::Error> {
    sqlx::query_as(
        "select (select outcome from aftercommit.inbox where subscriber = $1 and event_id = $2) as outcome,
                coalesce((select reason from aftercommit.dead_letter where subscriber = $1 and event_id = $2),
                         (select last_error from aftercommit.attempt where subscriber = $1 and event_id = $2)) as error",
    )
    .persistent(false)
    .bind(subscriber)
    .bind(event)
    .fetch_one(connection)
    .await
}
