//! What the catalogue says of a table.

use std::collections::BTreeMap;

use sqlx::types::Json;
use sqlx::{PgConnection, query_as};

use crate::error::{PruneError, PruneErrorKind};

/// A table as the catalogue has it: what statements are built from.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Table {
    /// Its name with its schema, quoted where it must be: for statements.
    pub name: String,
    /// The same for people, without quotes.
    pub label: String,
    kind: String,
    /// Whether it is PostgreSQL's own, or one of a schema of aftercommit.
    reserved: bool,
    /// Whether other tables inherit from it, other than partitions.
    inherited: bool,
    /// The columns of its primary key.
    key: Vec<String>,
    /// The type of each column.
    columns: Json<BTreeMap<String, String>>,
}

impl Table {
    /// Reads what `name`, as in SQL, is.
    ///
    /// # Errors
    /// [`Spec`](PruneErrorKind::Spec) when there is no such table, or it is a view or something else.
    pub async fn read(connection: &mut PgConnection, name: &str) -> Result<Self, PruneError> {
        let table: Option<Self> = query_as(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname) as name, n.nspname || '.' || c.relname as label,
                    c.relkind::text as kind,
                    n.nspname like 'pg\\_%' or n.nspname = 'information_schema'
                        or pg_catalog.to_regclass(pg_catalog.format('%I.relay_log', n.nspname)) is not null
                       and pg_catalog.to_regclass(pg_catalog.format('%I.outbox', n.nspname)) is not null as reserved,
                    c.relkind = 'r' and exists (select from pg_catalog.pg_inherits h where h.inhparent = c.oid) as inherited,
                    coalesce((select pg_catalog.array_agg(a.attname::text order by k.place)
                                from pg_catalog.pg_index i
                               cross join pg_catalog.unnest(i.indkey::int2[]) with ordinality as k (number, place)
                                join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.number
                               where i.indrelid = c.oid and i.indisprimary), '{}') as key,
                    (select coalesce(pg_catalog.jsonb_object_agg(
                                a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)), '{}')
                       from pg_catalog.pg_attribute a
                      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) as columns
               from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
              where c.oid = pg_catalog.to_regclass($1)",
        )
        .bind(name)
        .persistent(false)
        .fetch_optional(connection)
        .await
        .map_err(|error| match error.as_database_error().and_then(|error| error.code()) {
            // Not a name at all, or one with too many parts.
            Some(code) if matches!(&*code, "42601" | "42602" | "0A000") => no_table(name),
            _ => PruneError::database(name, error),
        })?;
        let table = table.ok_or_else(|| no_table(name))?;
        match table.kind.as_str() {
            "r" | "p" if table.reserved => Err(PruneError::spec(format!(
                "{} belongs to PostgreSQL or to aftercommit: its rows are nobody else's to delete",
                table.label
            ))),
            "r" | "p" if table.inherited => Err(PruneError::spec(format!(
                "other tables inherit from {}, and its key is not unique among their rows: name those tables instead",
                table.label
            ))),
            "r" | "p" => Ok(table),
            _ => Err(PruneError::spec(format!("{} is no table: only rows of tables can be deleted", table.label))),
        }
    }

    /// The column of its primary key.
    ///
    /// # Errors
    /// [`CompositePrimaryKey`](PruneErrorKind::CompositePrimaryKey) when there are several, [`Spec`](PruneErrorKind::Spec) when there
    /// is none.
    pub fn key(&self) -> Result<&str, PruneError> {
        match self.key.as_slice() {
            [column] => Ok(column),
            [] => Err(PruneError::spec(format!("{} has no primary key: its rows cannot be named", self.label))),
            columns => Err(PruneError::new(
                PruneErrorKind::CompositePrimaryKey,
                format!(
                    "the primary key of {} has {} columns ({}): only tables with a key of one column are supported",
                    self.label,
                    columns.len(),
                    columns.join(", ")
                ),
            )),
        }
    }

    /// The column of `parent` that a foreign key of this table's `column` refers to; none without such a foreign key.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub async fn referenced(
        &self,
        connection: &mut PgConnection,
        column: &str,
        parent: &Self,
    ) -> Result<Option<String>, PruneError> {
        sqlx::query_scalar(
            "select a.attname::text
               from pg_catalog.pg_constraint k
               join pg_catalog.pg_attribute own on own.attrelid = k.conrelid and own.attnum = k.conkey[1]
               join pg_catalog.pg_attribute a on a.attrelid = k.confrelid and a.attnum = k.confkey[1]
              where k.contype = 'f' and k.conrelid = $1::pg_catalog.regclass and k.confrelid = $2::pg_catalog.regclass
                and pg_catalog.cardinality(k.conkey) = 1 and own.attname = $3
              order by k.oid limit 1",
        )
        .bind(&self.name)
        .bind(&parent.name)
        .bind(column)
        .persistent(false)
        .fetch_optional(connection)
        .await
        .map_err(|error| PruneError::database(&self.label, error))
    }

    /// The type of a column, as in SQL.
    ///
    /// # Errors
    /// [`Spec`](PruneErrorKind::Spec) when there is no such column.
    pub fn column_type(&self, column: &str) -> Result<&str, PruneError> {
        let found = self.columns.get(column).map(String::as_str);
        found.ok_or_else(|| PruneError::spec(format!("{} has no column {column:?}", self.label)))
    }
}

fn no_table(name: &str) -> PruneError {
    PruneError::spec(format!("there is no table {name:?}: name it as in SQL, with its schema"))
}
