//! What operators have switched off.

use chrono::{DateTime, Utc};
use sqlx::PgExecutor;

use super::session::{Session, Tx};
use super::time;

/// Whether any of these names is paused.
pub async fn is_paused(connection: &mut Session, names: &[&str]) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select exists (select from aftercommit.pause where name = any($1))")
        .bind(names)
        .fetch_one(connection)
        .await
}

/// Pauses, and returns the pause that was there already. With a reason, that one gets it, and who gave it.
pub async fn pause(tx: &mut Tx<'_>, name: &str, who: &str, reason: Option<&str>) -> Result<Option<Pause>, sqlx::Error> {
    let new = sqlx::query("insert into aftercommit.pause (name, reason) values ($1, $2) on conflict do nothing")
        .bind(name)
        .bind(reason)
        .execute(&mut *tx)
        .await?
        .rows_affected()
        == 1;
    let before: Option<Pause> =
        sqlx::query_as("select name, paused_at, paused_by, reason from aftercommit.pause where name = $1 for update")
            .bind(name)
            .fetch_optional(&mut *tx)
            .await?;
    sqlx::query(
        "update aftercommit.pause set paused_by = $2, reason = $3
          where name = $1 and ($4 or ($3 is not null and reason is distinct from $3))",
    )
    .bind(name)
    .bind(who)
    .bind(reason)
    .bind(new)
    .execute(tx)
    .await?;
    Ok(before.filter(|_| !new))
}

/// Resumes. False when it was not paused.
pub async fn resume(connection: impl PgExecutor<'_>, name: &str) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("delete from aftercommit.pause where name = $1").bind(name).execute(connection).await?;
    Ok(done.rows_affected() == 1)
}

/// Something that is switched off.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Pause {
    /// What is switched off: the name of a lease, such as `relay`.
    pub name: String,
    /// When it was switched off, by the database's clock.
    #[sqlx(rename = "paused_at", try_from = "time::Time")]
    pub since: DateTime<Utc>,
    /// Who switched it off, as the operator's tool was told.
    #[sqlx(rename = "paused_by")]
    pub by: String,
    /// Why; none when no reason was given.
    pub reason: Option<String>,
}

/// The first of these names that is paused.
pub async fn first(connection: &mut Session, names: &[&str]) -> Result<Option<Pause>, sqlx::Error> {
    sqlx::query_as(
        "select name, paused_at, paused_by, reason from aftercommit.pause where name = any($1) order by name limit 1",
    )
    .bind(names)
    .fetch_optional(connection)
    .await
}

/// All that is switched off, by name.
pub async fn list(connection: impl PgExecutor<'_>) -> Result<Vec<Pause>, sqlx::Error> {
    sqlx::query_as("select name, paused_at, paused_by, reason from aftercommit.pause order by name")
        .fetch_all(connection)
        .await
}
