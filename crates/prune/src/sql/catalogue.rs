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
            check_before(&table, column, spec.before_zone.is_some())?;
        }
        let order = spec.order_column.as_ref().or(spec.before_column.as_ref()).unwrap_or(&key).clone();
        table.column_type(&order)?;
        let children = resolve_children(connection, &[&table], &spec.children).await?;
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

/// Whether a moment can be compared with a column.
fn check_before(table: &Table, column: &str, zone: bool) -> Result<(), PruneError> {
    let (label, kind) = (&table.label, table.column_type(column)?);
    let problem = if kind.starts_with("timestamp") && kind.ends_with("with time zone") {
        return Ok(());
    } else if kind.starts_with("timestamp") || kind == "date" {
        if zone {
            return Ok(());
        }
        "say in which time zone it is written (before_zone), such as UTC"
    } else {
        "before_column must be a timestamp or a date"
    };
    Err(PruneError::spec(format!("the column {column:?} of {label} is of the type {kind}: {problem}")))
}

/// `above` are the tables from the spec's own to the parent.
async fn resolve_children(
    connection: &mut PgConnection,
    above: &[&Table],
    children: &[Child],
) -> Result<Vec<ResolvedChild>, PruneError> {
    let Some(parent) = above.last() else { return Ok(Vec::new()) };
    let mut resolved = Vec::new();
    for child in children {
        let table = Table::read(connection, &child.table).await?;
        table.column_type(&child.column)?;
        if above.iter().any(|other| other.name == table.name) {
            return Err(PruneError::spec(format!(
                "{} cannot be its own child: rows that are not finished would go, and no event would name them",
                table.label
            )));
        }
        let references = match &child.references {
            Some(column) => column.clone(),
            None => match table.referenced(connection, &child.column, parent).await? {
                Some(column) => column,
                None => parent.key()?.to_string(),
            },
        };
        parent.column_type(&references)?;
        let children = Box::pin(resolve_children(connection, &[above, &[&table]].concat(), &child.children)).await?;
        resolved.push(ResolvedChild { table, column: child.column.clone(), references, children });
    }
    Ok(resolved)
}
