//! What would make pruning slow, or delete more than the spec says.

use aftercommit_core::postgres::quoted;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::catalogue::{Resolved, ResolvedChild};
use super::statement::Selection;
use crate::error::PruneError;

/// A foreign key that refers to a table.
#[derive(Debug, sqlx::FromRow)]
struct Reference {
    table: String,
    column: String,
    /// `c` cascades, `n` and `d` set NULL or the default, `a` and `r` refuse.
    on_delete: String,
    indexed: bool,
}

/// A part of a plan, as EXPLAIN has it in JSON.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(rename = "Index Name")]
    index: Option<String>,
    #[serde(rename = "Index Cond")]
    index_condition: Option<String>,
    #[serde(default)]
    plans: Vec<Node>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Explained {
    plan: Node,
}

pub(crate) async fn warnings(
    connection: &mut PgConnection,
    on: &Resolved,
    selection: &Selection<'_>,
) -> Result<Vec<String>, PruneError> {
    let mut warnings = Vec::new();
    if !has_index(connection, on, selection).await? {
        let (table, order) = (&on.table.label, quoted(&on.order));
        warnings.push(format!(
            "no index finds the finished rows of {table}: each batch reads the table; make one on ({order}) where the condition \
             of the spec holds"
        ));
    }
    references(connection, &on.table.name, &on.children, &mut warnings).await?;
    for association in &on.associations {
        let (table, id) = (&association.table, &association.association.id_column);
        if !is_indexed(connection, &table.name, &[id, &association.association.type_column]).await? {
            warnings.push(format!("{}.{id} has no index: each batch reads the table", table.label));
        }
    }
    Ok(warnings)
}

/// Whether the server finds the rows by an index: by a condition of it, or by an index that has only such rows.
async fn has_index(
    connection: &mut PgConnection,
    on: &Resolved,
    selection: &Selection<'_>,
) -> Result<bool, PruneError> {
    let failed = |error| PruneError::database(&on.table.label, error);
    let (sql, arguments) = selection.statement(on)?;
    // A small table is read as a whole, whatever indexes it has: what matters is which there are when it has grown.
    let mut tried = connection.begin().await.map_err(failed)?;
    let explained = async {
        sqlx::query("select pg_catalog.set_config('enable_seqscan', 'off', true)")
            .persistent(false)
            .execute(&mut *tried)
            .await?;
        let explain = AssertSqlSafe(format!("explain (format json) {sql}"));
        sqlx::query_scalar_with(explain, arguments).persistent(false).fetch_one(&mut *tried).await
    };
    let explained = explained.await;
    tried.rollback().await.map_err(failed)?;
    let Json(explained): Json<Vec<Explained>> = explained.map_err(failed)?;
    let mut nodes: Vec<Node> = explained.into_iter().map(|explained| explained.plan).collect();
    let mut whole = Vec::new();
    while let Some(node) = nodes.pop() {
        if node.index_condition.is_some() {
            return Ok(true);
        }
        whole.extend(node.index);
        nodes.extend(node.plans);
    }
    let suitable: Option<bool> = sqlx::query_scalar(
        "select pg_catalog.bool_or(i.indpred is not null)
           from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
          where c.relname::pg_catalog.text = any($1)",
    )
    .bind(&whole)
    .persistent(false)
    .fetch_one(&mut *connection)
    .await
    .map_err(failed)?;
    Ok(suitable.unwrap_or(false))
}

/// Whether an index of the table begins with one of these columns.
async fn is_indexed(connection: &mut PgConnection, table: &str, columns: &[&str]) -> Result<bool, PruneError> {
    let columns: Vec<String> = columns.iter().map(ToString::to_string).collect();
    sqlx::query_scalar(
        "select exists (select from pg_catalog.pg_index i
                          join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
                         where i.indrelid = $1::pg_catalog.regclass and i.indisvalid
                           and a.attname::pg_catalog.text = any($2))",
    )
    .bind(table)
    .bind(columns)
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| PruneError::database(table, error))
}

/// Looks at the foreign keys that refer to a table and its children.
async fn references(
    connection: &mut PgConnection,
    table: &str,
    children: &[ResolvedChild],
    warnings: &mut Vec<String>,
) -> Result<(), PruneError> {
    let found: Vec<Reference> = sqlx::query_as(
        "select n.nspname || '.' || c.relname as \"table\", a.attname::text as \"column\", k.confdeltype::text as on_delete,
                exists (select from pg_catalog.pg_index i
                         where i.indrelid = k.conrelid and i.indisvalid and i.indkey[0] = k.conkey[1]) as indexed
           from pg_catalog.pg_constraint k
           join pg_catalog.pg_class c on c.oid = k.conrelid
           join pg_catalog.pg_namespace n on n.oid = c.relnamespace
           join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
          where k.contype = 'f' and k.confrelid = $1::pg_catalog.regclass and k.conparentid = 0
          order by 1, 2",
    )
    .bind(table)
    .persistent(false)
    .fetch_all(&mut *connection)
    .await
    .map_err(|error| PruneError::database(table, error))?;
    let covered = |reference: &Reference| {
        children.iter().any(|child| child.table.label == reference.table && child.column == reference.column)
    };
    for reference in &found {
        let Reference { table: from, column, on_delete, indexed } = reference;
        if !indexed {
            warnings.push(format!(
                "{from}.{column} refers to it and has no index: each row that goes reads the table {from}"
            ));
        }
        if covered(reference) {
            continue;
        }
        match on_delete.as_str() {
            "c" => warnings
                .push(format!("{from}.{column} is not in the spec: its rows go by ON DELETE CASCADE, uncounted")),
            "n" | "d" => {}
            _ => warnings.push(format!(
                "{from}.{column} is not in the spec: a row of it that refers to a finished one refuses the batch"
            )),
        }
    }
    for child in children {
        let known =
            found.iter().any(|reference| child.table.label == reference.table && child.column == reference.column);
        if !known && !is_indexed(connection, &child.table.name, &[&child.column]).await? {
            warnings.push(format!("{}.{} has no index: each batch reads the table", child.table.label, child.column));
        }
        Box::pin(references(connection, &child.table.name, &child.children, warnings)).await?;
    }
    Ok(())
}
