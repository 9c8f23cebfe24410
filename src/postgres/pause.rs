//! What operators have switched off.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{PgExecutor, Row};

use super::session::Session;

/// Whether any of these names is paused.
pub(crate) async fn is_paused(connection: &mut Session, names: &[&str]) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select exists (select from aftercommit.pause where name = any($1))")
        .bind(names)
        .fetch_one(connection)
        .await
}

/// Pauses. False when it was paused already.
pub(crate) async fn pause(
    connection: impl PgExecutor<'_>,
    name: &str,
    reason: Option<&str>,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("insert into aftercommit.pause (name, reason) values ($1, $2) on conflict do nothing")
        .bind(name)
        .bind(reason)
        .execute(connection)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Resumes. False when it was not paused.
pub(crate) async fn resume(connection: impl PgExecutor<'_>, name: &str) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("delete from aftercommit.pause where name = $1").bind(name).execute(connection).await?;
    Ok(done.rows_affected() == 1)
}

/// Something that is switched off.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pause {
    pub(crate) name: String,
    pub(crate) since: DateTime<Utc>,
    pub(crate) by: String,
    pub(crate) reason: Option<String>,
}

/// The first of these names that is paused.
pub(crate) async fn first(connection: &mut Session, names: &[&str]) -> Result<Option<Pause>, sqlx::Error> {
    let row = sqlx::query(
        "select name, paused_at, paused_by, reason from aftercommit.pause where name = any($1) order by name limit 1",
    )
    .bind(names)
    .fetch_optional(connection)
    .await?;
    row.as_ref().map(read).transpose()
}

/// All that is switched off, by name.
pub(crate) async fn list(connection: impl PgExecutor<'_>) -> Result<Vec<Pause>, sqlx::Error> {
    let rows = sqlx::query("select name, paused_at, paused_by, reason from aftercommit.pause order by name")
        .fetch_all(connection)
        .await?;
    rows.iter().map(read).collect()
}

fn read(row: &PgRow) -> Result<Pause, sqlx::Error> {
    Ok(Pause { name: row.try_get(0)?, since: row.try_get(1)?, by: row.try_get(2)?, reason: row.try_get(3)? })
}
