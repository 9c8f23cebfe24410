//! What the catalogue says of the tables of a spec.

use std::collections::BTreeMap;

use sqlx::types::Json;
use sqlx::{PgConnection, query_as};

use crate::error::{PruneError, PruneErrorKind};
use crate::spec::{Association, Child, Spec};

/// A table as the catalogue has it.
#[derive(Debug, Clone, sqlx::FromRow)]
pub(crate) struct Table {
    /// With its schema, quoted.
    pub(crate) name: String,
    /// The same for people, without quotes.
    pub(crate) label: String,
    kind: String,
    /// The columns of its primary key.
    key: Vec<String>,
    /// The type of each column.
    columns: Json<BTreeMap<String, String>>,
}

impl Table {
    /// Reads what `name`, as in SQL, is.
    pub(crate) async fn read(connection: &mut PgConnection, name: &str) -> Result<Self, PruneError> {
        let table: Option<Self> = query_as(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname) as name, n.nspname || '.' || c.relname as label,
                    c.relkind::text as kind,
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
            "r" | "p" => Ok(table),
            _ => Err(PruneError::spec(format!("{} is no table: only rows of tables can be pruned", table.label))),
        }
    }

    /// Its primary key, which has one column.
    pub(crate) fn key(&self) -> Result<&str, PruneError> {
        match self.key.as_slice() {
            [column] => Ok(column),
            [] => Err(PruneError::spec(format!("{} has no primary key: it cannot be pruned", self.label))),
            columns => Err(PruneError::new(
                PruneErrorKind::CompositePrimaryKey,
                format!(
                    "the primary key of {} has {} columns ({}): only tables with a key of one column can be pruned",
                    self.label,
                    columns.len(),
                    columns.join(", ")
                ),
            )),
        }
    }

    /// The type of a column.
    pub(crate) fn column_type(&self, column: &str) -> Result<&str, PruneError> {
        let found = self.columns.get(column).map(String::as_str);
        found.ok_or_else(|| PruneError::spec(format!("{} has no column {column:?}", self.label)))
    }
}

fn no_table(name: &str) -> PruneError {
    PruneError::spec(format!("there is no table {name:?}: name it as in SQL, with its schema"))
}

/// A spec whose names are those of the catalogue.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) table: Table,
    pub(crate) key: String,
    pub(crate) order: String,
    pub(crate) children: Vec<ResolvedChild>,
    pub(crate) associations: Vec<ResolvedAssociation>,
}

/// A child with what its rows refer to.
#[derive(Debug)]
pub(crate) struct ResolvedChild {
    pub(crate) table: Table,
    pub(crate) column: String,
    /// The parent's column.
    pub(crate) references: String,
    pub(crate) children: Vec<ResolvedChild>,
}

#[derive(Debug)]
pub(crate) struct ResolvedAssociation {
    pub(crate) table: Table,
    pub(crate) association: Association,
}

impl Resolved {
    /// Looks up everything that the spec names.
    pub(crate) async fn of(connection: &mut PgConnection, spec: &Spec) -> Result<Self, PruneError> {
        spec.check()?;
        let table = Table::read(connection, &spec.table).await?;
        let key = table.key()?.to_string();
        if let Some(column) = &spec.before_column {
            let kind = table.column_type(column)?;
            if !kind.starts_with("timestamp") && kind != "date" {
                let label = &table.label;
                return Err(PruneError::spec(format!(
                    "the column {column:?} of {label} is of the type {kind}: before_column must be a timestamp or a date"
                )));
            }
        }
        let order = spec.order_column.as_ref().or(spec.before_column.as_ref()).unwrap_or(&key).clone();
        table.column_type(&order)?;
        let children = resolve_children(connection, &table, &spec.children).await?;
        let mut associations = Vec::new();
        for association in spec.associations.clone() {
            let table = Table::read(connection, &association.table).await?;
            table.column_type(&association.type_column)?;
            table.column_type(&association.id_column)?;
            associations.push(ResolvedAssociation { table, association });
        }
        Ok(Self { table, key, order, children, associations })
    }
}

async fn resolve_children(
    connection: &mut PgConnection,
    parent: &Table,
    children: &[Child],
) -> Result<Vec<ResolvedChild>, PruneError> {
    let mut resolved = Vec::new();
    for child in children {
        let table = Table::read(connection, &child.table).await?;
        table.column_type(&child.column)?;
        let references = match &child.references {
            Some(column) => column.clone(),
            None => parent.key()?.to_string(),
        };
        parent.column_type(&references)?;
        let children = Box::pin(resolve_children(connection, &table, &child.children)).await?;
        resolved.push(ResolvedChild { table, column: child.column.clone(), references, children });
    }
    Ok(resolved)
}
