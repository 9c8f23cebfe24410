//! The questions about tables that the catalogue answers.

use std::collections::HashMap;

use aftercommit_core::postgres::quoted;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgTransaction};

use super::plan::{Cascade, Entry, Problem};

/// Whether there is such a table.
pub(super) async fn exists(connection: &mut PgConnection, table: &str) -> Result<bool, Problem> {
    sqlx::query_scalar("select pg_catalog.to_regclass($1) is not null")
        .bind(table)
        .persistent(false)
        .fetch_one(connection)
        .await
        .map_err(|error| Problem::failed(table, error))
}

/// Rows that row-level security hides would be counted as none, and never go: only a policy that shows all of them is as good as none.
pub(super) async fn check_visible(connection: &mut PgConnection, table: &str, label: &str) -> Result<(), Problem> {
    let hidden: bool = sqlx::query_scalar(
        "with policy as (
             select p.polpermissive as permissive, p.polcmd = '*' and pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true' as whole
               from pg_catalog.pg_policy p
              where p.polrelid = $1::pg_catalog.regclass
                and exists (select from pg_catalog.unnest(p.polroles) as r where r = 0 or pg_catalog.pg_has_role(r, 'usage')))
         select pg_catalog.row_security_active($1::pg_catalog.regclass::pg_catalog.oid)
            and (exists (select from policy where not permissive) or not exists (select from policy where permissive and whole))",
    )
    .bind(table)
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| Problem::failed(label, error))?;
    if hidden {
        return Err(Problem::Wrong(format!(
            "row-level security may hide rows of {label} from this role: give it a policy for all commands `using (true)`, or \
             `bypassrls`"
        )));
    }
    Ok(())
}

/// Whether the table has partitions.
pub(super) async fn is_partitioned(connection: &mut PgConnection, table: &str) -> Result<bool, Problem> {
    sqlx::query_scalar("select relkind = 'p' from pg_catalog.pg_class where oid = $1::pg_catalog.regclass")
        .bind(table)
        .persistent(false)
        .fetch_one(connection)
        .await
        .map_err(|error| Problem::failed(table, error))
}

/// A column's type without its length: a cast to a type with a length cuts what is longer, and would find somebody else.
pub(super) async fn plain_type(connection: &mut PgConnection, table: &str, column: &str) -> Result<String, Problem> {
    sqlx::query_scalar(
        "select pg_catalog.format('%I.%I', n.nspname, y.typname)
           from pg_catalog.pg_attribute a
           join pg_catalog.pg_type y on y.oid = a.atttypid
           join pg_catalog.pg_namespace n on n.oid = y.typnamespace
          where a.attrelid = $1::pg_catalog.regclass and a.attname = $2",
    )
    .bind(table)
    .bind(column)
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| Problem::failed(table, error))
}

/// Whether an index begins with the column.
pub(super) async fn is_indexed(connection: &mut PgConnection, table: &str, column: &str) -> Result<bool, Problem> {
    sqlx::query_scalar(
        "select exists (select from pg_catalog.pg_index i
                          join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                         where i.indrelid = $1::pg_catalog.regclass and i.indisvalid and a.attname = $2)",
    )
    .bind(table)
    .bind(column)
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| Problem::failed(table, error))
}

/// Whether the server finds rows of a condition by an index. A small table is read as a whole, whatever indexes it has, so that is
/// forbidden meanwhile.
pub(super) async fn uses_an_index(tx: &mut PgTransaction<'_>, entry: &Entry, id: &str) -> Result<bool, Problem> {
    let failed = |error| Problem::failed(&entry.label, error);
    let mut inner = tx.begin().await.map_err(failed)?;
    sqlx::query("select pg_catalog.set_config('enable_seqscan', 'off', true)")
        .persistent(false)
        .execute(&mut *inner)
        .await
        .map_err(failed)?;
    let sql = format!("explain (costs off) select from {} as t where {}", entry.name, entry.condition);
    let lines: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql))
        .bind(id)
        .persistent(false)
        .fetch_all(&mut *inner)
        .await
        .map_err(failed)?;
    inner.rollback().await.map_err(failed)?;
    Ok(lines.iter().any(|line| line.trim_start().starts_with("Index Cond:")))
}

/// A foreign key with `on delete cascade`.
#[derive(sqlx::FromRow)]
struct Key {
    name: String,
    label: String,
    columns: Vec<String>,
    references: Vec<String>,
}

/// Tables whose rows go with those of a table, with what goes with them. `above` are those from the first table on.
pub(super) async fn cascades(
    connection: &mut PgConnection,
    table: &str,
    keeps: &HashMap<String, Option<String>>,
    above: &mut Vec<String>,
) -> Result<Vec<Cascade>, Problem> {
    let keys: Vec<Key> = sqlx::query_as(
        "select pg_catalog.format('%I.%I', n.nspname, c.relname) as name, n.nspname || '.' || c.relname as label,
                array(select a.attname::text from pg_catalog.unnest(k.conkey) with ordinality as u (number, place)
                        join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.number
                       order by u.place) as columns,
                array(select a.attname::text from pg_catalog.unnest(k.confkey) with ordinality as u (number, place)
                        join pg_catalog.pg_attribute a on a.attrelid = k.confrelid and a.attnum = u.number
                       order by u.place) as \"references\"
           from pg_catalog.pg_constraint k
           join pg_catalog.pg_class c on c.oid = k.conrelid
           join pg_catalog.pg_namespace n on n.oid = c.relnamespace
          where k.contype = 'f' and k.confdeltype = 'c' and k.confrelid = $1::pg_catalog.regclass and k.conparentid = 0
          order by 2, 3",
    )
    .bind(table)
    .persistent(false)
    .fetch_all(&mut *connection)
    .await
    .map_err(|error| Problem::failed(table, error))?;
    let mut found = Vec::new();
    for Key { name, label, columns, references } in keys {
        let list =
            |names: &[String]| names.iter().map(|name| format!("t.{}", quoted(name))).collect::<Vec<_>>().join(", ");
        let below = if above.contains(&label) {
            Vec::new()
        } else {
            above.push(label.clone());
            let below = Box::pin(cascades(connection, &name, keeps, above)).await?;
            above.pop();
            below
        };
        let keep = keeps.get(&label).cloned().flatten();
        let (first, references) = (columns.first().cloned().unwrap_or_default(), list(&references));
        found.push(Cascade { name, label, columns: list(&columns), references, first, keep, below });
    }
    Ok(found)
}
