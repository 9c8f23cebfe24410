//! What the catalogue says of the tables of a spec.

use sqlx::PgConnection;

use super::table::Table;
use crate::error::PruneError;
use crate::spec::{Association, Child, Spec};

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
