//! What operators have switched off.

use super::session::Session;

/// Whether any of these names is paused.
pub(crate) async fn is_paused(connection: &mut Session, names: &[&str]) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select exists (select from aftercommit.pause where name = any($1))")
        .bind(names)
        .fetch_one(connection)
        .await
}

/// Pauses. False when it was paused already.
pub(crate) async fn pause(connection: &mut Session, name: &str, reason: Option<&str>) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("insert into aftercommit.pause (name, reason) values ($1, $2) on conflict do nothing")
        .bind(name)
        .bind(reason)
        .execute(connection)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Resumes. False when it was not paused.
pub(crate) async fn resume(connection: &mut Session, name: &str) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("delete from aftercommit.pause where name = $1").bind(name).execute(connection).await?;
    Ok(done.rows_affected() == 1)
}
