//! One delete: lock, hooks, delete, publish.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;

use aftercommit_core::error::panic_text;
use aftercommit_core::fault;
use aftercommit_core::postgres::{describe, quoted};
use aftercommit_outbox::{EventId, RawEvent, publish_raw};
use aftercommit_prune::{PruneError, Table};
use futures_util::FutureExt;
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, Connection, PgTransaction};

use super::error::{DeleteError, DeleteErrorKind};
use super::registry::{DeleteHooks, Hook, HookPolicy};

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deleted {
    /// The ids of the rows that are gone, as text, each with its event.
    pub rows: Vec<(String, EventId)>,
    /// Ids of which there was no row, or whose row a trigger kept. Nothing was published about them.
    pub missing: Vec<String>,
}

/// What hooks said of a row.
#[derive(Debug, Default)]
struct Said {
    snapshot: Map<String, Value>,
    failed: Map<String, Value>,
}

impl DeleteHooks {
    /// Deletes the row with this primary key.
    ///
    /// # Errors
    /// As [`delete_many`](Self::delete_many).
    pub async fn delete(&self, tx: &mut PgTransaction<'_>, id: impl ToString) -> Result<Deleted, DeleteError> {
        self.delete_many(tx, &[id]).await
    }

    /// Deletes rows by their primary keys, in the caller's transaction: each is locked, every hook runs for it, it is deleted, and
    /// an event `<entity>.deleted` with the id as its key tells what the hooks said.
    ///
    /// The event's payload is `{"entity", "id", "snapshot": {hook: value}, "failed": {hook: error}}`.
    ///
    /// Rows are locked in the order of their keys, so that two deletes do not wait for each other in a circle. Without hooks nothing
    /// is locked beforehand.
    ///
    /// # Errors
    /// [`Hook`](DeleteErrorKind::Hook) when a required hook failed; [`Refused`](DeleteErrorKind::Refused) with the kind of
    /// integrity, such as a foreign key, and when the event cannot be written, such as one that is too large. Nothing is deleted
    /// then, of none of the rows.
    pub async fn delete_many(&self, tx: &mut PgTransaction<'_>, ids: &[impl ToString]) -> Result<Deleted, DeleteError> {
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let failed = |error| PruneError::database(&self.table, error);
        // What fails inside takes only what was done here with it: dropped, it is rolled back before the next statement.
        let mut inner = tx.begin().await.map_err(failed)?;
        let deleted = self.within(&mut inner, ids).await?;
        inner.commit().await.map_err(failed)?;
        Ok(deleted)
    }

    async fn within(&self, tx: &mut PgTransaction<'_>, ids: Vec<String>) -> Result<Deleted, DeleteError> {
        let table = Table::read(tx, &self.table).await?;
        let failed = |error| PruneError::database(&table.label, error);
        let key = table.key()?;
        let (column, kind) = (quoted(key), table.column_type(key)?);
        let wanted = format!("t.{column} = any(($1::pg_catalog.text[])::{kind}[])");
        let mut said = Vec::new();
        if !self.hooks.is_empty() {
            let lock = format!(
                "select t.{column}::text from {} as t where {wanted} order by t.{column} for update",
                table.name
            );
            let locked: Vec<String> = sqlx::query_scalar(AssertSqlSafe(lock))
                .persistent(false)
                .bind(&ids)
                .fetch_all(&mut **tx)
                .await
                .map_err(failed)?;
            fault::point("delete-locked");
            let limit: String = sqlx::query_scalar("select pg_catalog.current_setting('statement_timeout')")
                .persistent(false)
                .fetch_one(&mut **tx)
                .await
                .map_err(failed)?;
            for id in locked {
                let mut row = Said::default();
                for hook in &self.hooks {
                    self.ask(tx, hook, &id, &limit, &mut row).await?;
                }
                said.push((id, row));
            }
        }
        let delete = format!("delete from {} as t where {wanted} returning t.{column}::text", table.name);
        let gone: HashSet<String> = sqlx::query_scalar(AssertSqlSafe(delete))
            .persistent(false)
            .bind(&ids)
            .fetch_all(&mut **tx)
            .await
            .map_err(failed)?
            .into_iter()
            .collect();
        fault::point("delete-deleted");
        if self.hooks.is_empty() {
            said.extend(gone.iter().map(|id| (id.clone(), Said::default())));
        }
        let mut deleted = Deleted::default();
        for (id, row) in said.into_iter().filter(|(id, _)| gone.contains(id)) {
            let event = self.tell(tx, &table, &id, row).await?;
            deleted.rows.push((id, event));
        }
        fault::point("delete-told");
        deleted.missing = missing(tx, &table, kind, ids, &gone).await?;
        Ok(deleted)
    }

    /// Runs a hook in a savepoint of its own. The server ends its statements in time, too, so that the transaction is free to go on.
    async fn ask(
        &self,
        tx: &mut PgTransaction<'_>,
        hook: &Hook,
        id: &str,
        limit: &str,
        said: &mut Said,
    ) -> Result<(), DeleteError> {
        let failed = |error| PruneError::database(&self.table, error);
        let time = hook.time_limit.as_millis().clamp(1, i32::MAX.unsigned_abs().into());
        let begin = format!("savepoint aftercommit_hook; set local statement_timeout = {time}");
        sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut **tx).await.map_err(failed)?;
        let running = AssertUnwindSafe(hook.run.run(tx, id)).catch_unwind();
        let problem = match tokio::time::timeout(hook.time_limit, running).await {
            Ok(Ok(Ok(value))) => {
                // `limit` is the server's own text of a time.
                let end = format!("set local statement_timeout = '{limit}'; release savepoint aftercommit_hook");
                match sqlx::raw_sql(AssertSqlSafe(end)).execute(&mut **tx).await {
                    Ok(_) => {
                        fault::point("delete-asked");
                        said.snapshot.insert(hook.name.clone(), value);
                        return Ok(());
                    }
                    // It has swallowed an error of a statement, or ended the savepoint.
                    Err(error) => describe(&error),
                }
            }
            Ok(Ok(Err(error))) => describe(&*error),
            Ok(Err(panic)) => format!("it panicked: {}", panic_text(&*panic)),
            Err(_) => format!("it took longer than {:?}", hook.time_limit),
        };
        undo(tx).await.map_err(failed)?;
        let (entity, name) = (self.entity.as_str(), hook.name.as_str());
        match hook.policy {
            HookPolicy::BestEffort => {
                tracing::warn!(entity, hook = name, error = problem, "a hook failed, the delete goes on");
                said.failed.insert(hook.name.clone(), problem.into());
                Ok(())
            }
            HookPolicy::Required => {
                let message = format!("{entity} {id} was not deleted: the hook {name:?} failed: {problem}");
                Err(DeleteError::new(DeleteErrorKind::Hook, message))
            }
        }
    }

    async fn tell(
        &self,
        tx: &mut PgTransaction<'_>,
        table: &Table,
        id: &str,
        said: Said,
    ) -> Result<EventId, DeleteError> {
        let payload = json!({ "entity": self.entity, "id": id, "snapshot": said.snapshot, "failed": said.failed });
        let failed = |error| PruneError::event(&table.label, error);
        let event = RawEvent::json(format!("{}.deleted", self.entity), &payload).map_err(failed)?;
        Ok(publish_raw(tx, event.key(id)).await.map_err(failed)?)
    }
}

/// Undoes what a hook did. The answer to a statement that the hook had no time to wait for comes first, and may be an error of its own.
async fn undo(tx: &mut PgTransaction<'_>) -> Result<(), sqlx::Error> {
    const UNDO: &str = "rollback to savepoint aftercommit_hook; release savepoint aftercommit_hook";
    match sqlx::raw_sql(UNDO).execute(&mut **tx).await {
        Err(sqlx::Error::Database(_)) => sqlx::raw_sql(UNDO).execute(&mut **tx).await.map(drop),
        undone => undone.map(drop),
    }
}

/// The ids of which no row is gone. The server compares, because it may write an id in another way than the caller.
async fn missing(
    tx: &mut PgTransaction<'_>,
    table: &Table,
    kind: &str,
    ids: Vec<String>,
    gone: &HashSet<String>,
) -> Result<Vec<String>, DeleteError> {
    if ids.iter().all(|id| gone.contains(id)) {
        return Ok(Vec::new());
    }
    let sql = format!(
        "select i.id from pg_catalog.unnest($1::pg_catalog.text[]) with ordinality as i (id, place)
          where i.id::{kind}::text <> all($2::pg_catalog.text[]) order by i.place"
    );
    sqlx::query_scalar(AssertSqlSafe(sql))
        .persistent(false)
        .bind(&ids)
        .bind(gone.iter().collect::<Vec<_>>())
        .fetch_all(&mut **tx)
        .await
        .map_err(|error| PruneError::database(&table.label, error).into())
}
