//! The statements of one pruning. Ids go as one array, so their number does not matter (a statement has at most 65,535
//! parameters), as text that the server turns into the column's type.

use aftercommit_core::postgres::quoted;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgArguments;
use sqlx::{Arguments, AssertSqlSafe, PgConnection};

use super::catalogue::{Resolved, ResolvedAssociation, ResolvedChild};
use crate::condition::Condition;
use crate::error::PruneError;
use crate::spec::Spec;

/// How rows that others have locked are met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// Waits for them.
    #[default]
    Wait,
    /// Passes them over, so that several pruners share a table without waiting for each other. What is passed over is for
    /// the next time.
    SkipLocked,
}

/// Which rows of a spec are meant.
#[derive(Debug)]
pub(crate) struct Selection<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) conditions: &'a [Condition],
    pub(crate) before: Option<DateTime<Utc>>,
    /// Where the last batch ended, in the order's column as text.
    pub(crate) from: Option<&'a str>,
    /// Ids of rows that are left alone.
    pub(crate) without: &'a [String],
    pub(crate) limit: u32,
    /// None to look only.
    pub(crate) locking: Option<Locking>,
}

/// A row that is to go.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Selected {
    pub(crate) id: String,
    /// Its place in the order.
    pub(crate) place: Option<String>,
}

impl Selection<'_> {
    /// The statement that finds the rows, and locks them. Who changes a row first decides: its conditions are looked at
    /// once more when the lock is there.
    pub(crate) fn statement(&self, on: &Resolved) -> Result<(String, PgArguments), PruneError> {
        let mut arguments = PgArguments::default();
        let mut conditions = Vec::new();
        for condition in std::iter::once(&self.spec.finished).chain(self.conditions) {
            let sql = condition.write(arguments.len(), &mut arguments)?;
            conditions.push(format!("({sql})"));
        }
        let mut compare = |column: &str, operator: &str, value: String, cast: &str| {
            arguments.add(value).map_err(|error| PruneError::spec(format!("a value cannot be sent: {error}")))?;
            conditions.push(format!("t.{} {operator} ${}::pg_catalog.text::{cast}", quoted(column), arguments.len()));
            Ok::<_, PruneError>(())
        };
        if let (Some(before), Some(column)) = (self.before, &self.spec.before_column) {
            let kind = on.table.column_type(column)?;
            match self.spec.before_zone.as_ref().filter(|_| !kind.ends_with("with time zone")) {
                None => compare(column, "<", before.to_rfc3339(), "pg_catalog.timestamptz")?,
                Some(zone) => {
                    // A moment as a clock in that zone shows it.
                    let zone = zone.replace('\'', "''");
                    let shown = format!("pg_catalog.timestamptz at time zone '{zone}')::{kind}");
                    compare(column, "< (", before.to_rfc3339(), &shown)?;
                }
            }
        }
        if let Some(from) = self.from {
            compare(&on.order, ">=", from.into(), on.table.column_type(&on.order)?)?;
        }
        if !self.without.is_empty() {
            let failed = |error| PruneError::spec(format!("ids cannot be sent: {error}"));
            arguments.add(self.without).map_err(failed)?;
            let (key, kind) = (quoted(&on.key), on.table.column_type(&on.key)?);
            conditions.push(format!("t.{key} <> all((${}::pg_catalog.text[])::{kind}[])", arguments.len()));
        }
        let lock = match self.locking {
            None => "",
            Some(Locking::Wait) => " for update of t",
            Some(Locking::SkipLocked) => " for update of t skip locked",
        };
        let (key, order, table) = (quoted(&on.key), quoted(&on.order), &on.table.name);
        let sql = format!(
            "select t.{key}::text as id, t.{order}::text as place from {table} as t where {} order by t.{order} limit {}{lock}",
            conditions.join(" and "),
            self.limit,
        );
        Ok((sql, arguments))
    }

    /// The rows, in order.
    pub(crate) async fn rows(&self, connection: &mut PgConnection, on: &Resolved) -> Result<Vec<Selected>, PruneError> {
        let (sql, arguments) = self.statement(on)?;
        sqlx::query_as_with(AssertSqlSafe(sql), arguments)
            .persistent(false)
            .fetch_all(connection)
            .await
            .map_err(|error| PruneError::database(&on.table.label, error))
    }
}

/// The values of a column that are among the ids in `$1`, as a piece of SQL.
fn ids_as(column_type: &str) -> String {
    format!("any(($1::pg_catalog.text[])::{column_type}[])")
}

/// Which rows of a child go: those that refer to rows of the parent which `parents` selects by `references`.
#[derive(Debug, Clone)]
pub(crate) struct ChildRows {
    /// A condition on `t`.
    condition: String,
}

impl ChildRows {
    /// Of a child of the table itself.
    pub(crate) fn of_parent(on: &Resolved, child: &ResolvedChild) -> Result<Self, PruneError> {
        let column = quoted(&child.column);
        let condition = if child.references == on.key {
            let kind = on.table.column_type(&on.key)?;
            format!("t.{column} = {}", ids_as(kind))
        } else {
            let (table, key, references) = (&on.table.name, quoted(&on.key), quoted(&child.references));
            let ids = ids_as(on.table.column_type(&on.key)?);
            format!("t.{column} in (select p.{references} from {table} as p where p.{key} = {ids})")
        };
        Ok(Self { condition })
    }

    /// Of a child of a child.
    pub(crate) fn below(&self, child: &ResolvedChild, grandchild: &ResolvedChild) -> Self {
        let (column, references) = (quoted(&grandchild.column), quoted(&grandchild.references));
        let (table, condition) = (&child.table.name, &self.condition);
        Self { condition: format!("t.{column} in (select t.{references} from {table} as t where {condition})") }
    }

    /// Locks them, so that nobody adds rows that refer to them.
    pub(crate) fn lock(&self, child: &ResolvedChild) -> String {
        let condition = &self.condition;
        format!(
            "select count(*) from (select from {} as t where {condition} for update of t) as locked",
            child.table.name
        )
    }

    pub(crate) fn count(&self, child: &ResolvedChild) -> String {
        format!("select count(*) from {} as t where {}", child.table.name, self.condition)
    }

    pub(crate) fn delete(&self, child: &ResolvedChild) -> String {
        format!("delete from {} as t where {}", child.table.name, self.condition)
    }
}

impl ResolvedAssociation {
    fn condition(&self) -> String {
        let (kind, id) = (quoted(&self.association.type_column), quoted(&self.association.id_column));
        format!("t.{kind}::pg_catalog.text = $2 and t.{id}::pg_catalog.text = any($1::pg_catalog.text[])")
    }

    pub(crate) fn count(&self) -> String {
        format!("select count(*) from {} as t where {}", self.table.name, self.condition())
    }

    pub(crate) fn delete(&self) -> String {
        format!("delete from {} as t where {}", self.table.name, self.condition())
    }
}

/// Deletes the rows themselves. Those that a trigger kept are not among what it returns.
pub(crate) fn delete_parents(on: &Resolved) -> Result<String, PruneError> {
    let (key, ids) = (quoted(&on.key), ids_as(on.table.column_type(&on.key)?));
    Ok(format!("delete from {} as t where t.{key} = {ids} returning t.{key}::text", on.table.name))
}
