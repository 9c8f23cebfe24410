//! What the catalogue says of the tables of an eraser.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::ops::RangeInclusive;

use aftercommit_core::postgres::quoted;
use aftercommit_prune::{PruneError, PruneErrorKind, Table, check_expression};
use aftercommit_worker::HandlerError;
use sqlx::{AssertSqlSafe, Connection, PgTransaction};

use super::catalogue::{cascades, check_visible, exists, is_indexed, is_partitioned, plain_type, uses_an_index};
use super::tables::{Rows, Which};

/// The tables in the order in which their rows go.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) entries: Vec<Entry>,
    /// What there is to say of it, such as a table that is not there.
    pub(super) notes: Vec<String>,
    /// Names of optional tables that are not there.
    missing: Vec<String>,
    /// Types of columns that are compared with the subject's id, with the column.
    types: Vec<(String, String)>,
}

/// Rows of one table.
#[derive(Debug)]
pub(super) struct Entry {
    /// For statements.
    pub(super) name: String,
    /// For people.
    pub(super) label: String,
    pub(super) partitioned: bool,
    /// Which rows go, of the table as `t`, with the subject's id as `$1`.
    pub(super) condition: String,
    /// The same of the chosen rows of the table at the top of its parents, whose places are `$2`; none when that has partitions.
    pub(super) chosen: Option<String>,
    /// The table at the top of its parents; its own when it has none.
    top: String,
    /// What goes with them by `on delete cascade`.
    pub(super) cascades: Vec<Cascade>,
    /// The column that finds them; none when only the server knows.
    found_by: Option<String>,
}

/// A table whose rows go with those that they refer to.
#[derive(Debug, Clone)]
pub(super) struct Cascade {
    pub(super) name: String,
    pub(super) label: String,
    /// Its columns, and those that they refer to, as SQL: `t."a", t."b"`.
    pub(super) columns: String,
    pub(super) references: String,
    /// The first of its columns.
    pub(super) first: String,
    /// Rows that are not to go.
    pub(super) keep: Option<String>,
    pub(super) below: Vec<Cascade>,
}

/// Why it cannot be, or did not work.
#[derive(Debug)]
pub(super) enum Problem {
    /// It never will.
    Wrong(String),
    /// It may another time.
    Failed { doing: String, source: Box<dyn StdError + Send + Sync>, foreign_key: bool },
}

impl Problem {
    pub(super) fn failed(table: &str, error: sqlx::Error) -> Self {
        let violated = error.as_database_error().filter(|error| error.code().as_deref() == Some("23503"));
        let own = violated.filter(|error| error.table().is_some_and(|own| table.ends_with(&format!(".{own}"))));
        if let Some(constraint) = own.and_then(|error| error.constraint()) {
            return Self::Wrong(format!(
                "rows of {table} refer to others of it by {constraint}, so they do not go a chunk at a time: make it `on delete \
                 cascade` or `on delete set null`, or the chunk as large as all of them"
            ));
        }
        let foreign_key = violated.is_some();
        Self::Failed { doing: format!("erasing from {table} failed"), source: error.into(), foreign_key }
    }

    /// Whether a row of another table refers to one that was to go.
    pub(super) fn is_foreign_key(&self) -> bool {
        matches!(self, Self::Failed { foreign_key: true, .. })
    }

    /// What a handler says of it.
    pub(super) fn of(self, eraser: &str) -> HandlerError {
        match self {
            Self::Wrong(problem) => HandlerError::reject(format!("the eraser {eraser}: {problem}")),
            failed @ Self::Failed { .. } => HandlerError::retry(failed),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(problem) => f.write_str(problem),
            Self::Failed { doing, .. } => f.write_str(doing),
        }
    }
}

impl StdError for Problem {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Wrong(_) => None,
            Self::Failed { source, .. } => Some(&**source),
        }
    }
}

impl From<PruneError> for Problem {
    fn from(error: PruneError) -> Self {
        match error.kind() {
            PruneErrorKind::Spec | PruneErrorKind::CompositePrimaryKey => Self::Wrong(error.to_string()),
            _ => {
                Self::Failed { doing: "reading the catalogue failed".into(), source: error.into(), foreign_key: false }
            }
        }
    }
}

/// What can be said of the tables without the database.
pub(super) fn check(rows: &[Rows]) -> Result<(), String> {
    if rows.is_empty() {
        return Err("it names no tables".into());
    }
    for (n, one) in rows.iter().enumerate() {
        let table = &one.table;
        if rows[..n].iter().any(|other| other.table == *table) {
            return Err(format!("the table {table} is named twice: join its conditions with `or`"));
        }
        let [which] = one.which.as_slice() else {
            return Err(format!("the table {table} needs exactly one of column, condition and parent"));
        };
        let wrong = |error: PruneError| format!("the table {table}: {error}");
        match which {
            Which::Condition(sql) => match check_expression(sql).map_err(wrong)? {
                1 => {}
                0 => return Err(format!("the table {table}: its condition does not ask for the subject's id, $1")),
                _ => {
                    return Err(format!(
                        "the table {table}: its condition has more placeholders than $1, the subject's id"
                    ));
                }
            },
            Which::Parent { table: parent, .. } => {
                if !rows[n + 1..].iter().any(|other| other.table == *parent) {
                    return Err(format!(
                        "the table {table}: its parent {parent} must be named below it, children first"
                    ));
                }
            }
            Which::Column(_) => {}
        }
        if let Some(keep) = &one.keep
            && check_expression(keep).map_err(wrong)? > 0
        {
            return Err(format!("the table {table}: `keep` has no placeholders"));
        }
    }
    Ok(())
}

/// Which rows of a table go.
struct Goes {
    condition: String,
    /// See [`Entry::chosen`].
    chosen: Option<String>,
    /// See [`Entry::top`].
    top: String,
    found_by: Option<String>,
}

impl Goes {
    /// Rows of a table that refer to these.
    fn below(&self, columns: &str, references: &str, parent: &str, found_by: String) -> Self {
        let below = |above: &String| format!("{columns} in (select {references} from {parent} as t where {above})");
        let (condition, chosen) = (below(&self.condition), self.chosen.as_ref().map(below));
        Self { condition, chosen, top: self.top.clone(), found_by: Some(found_by) }
    }

    /// Without those that stay.
    fn but(self, keep: &str) -> Self {
        let but = |condition: String| format!("({condition}) and ({keep}) is not true");
        Self { condition: but(self.condition), chosen: self.chosen.map(but), ..self }
    }
}

/// A table that is there.
struct Known {
    table: Table,
    partitioned: bool,
    goes: Goes,
    keep: Option<String>,
}

impl Plan {
    /// Looks up everything that the rows name.
    pub(super) async fn read(tx: &mut PgTransaction<'_>, rows: &[Rows]) -> Result<Self, Problem> {
        let mut plan = Self { entries: Vec::new(), notes: Vec::new(), missing: Vec::new(), types: Vec::new() };
        let mut known: HashMap<&str, Known> = HashMap::new();
        // Parents first: conditions of children have theirs within.
        for one in rows.iter().rev() {
            if one.optional && !exists(tx, &one.table).await? {
                plan.missing.push(one.table.clone());
                plan.notes.push(format!("there is no table {}: skipped", one.table));
                continue;
            }
            let table = Table::read(tx, &one.table).await?;
            check_visible(tx, &table.name, &table.label).await?;
            let partitioned = is_partitioned(tx, &table.name).await?;
            let mut goes = plan.goes(tx, &table, &one.which, &known).await?;
            if !matches!(one.which.first(), Some(Which::Parent { .. })) && !partitioned {
                let place = "t.ctid = any(($2::pg_catalog.text[])::pg_catalog.tid[])";
                goes.chosen = Some(format!("{place} and ({})", goes.condition));
            }
            if let Some(keep) = &one.keep {
                goes = goes.but(keep);
            }
            known.insert(&one.table, Known { table, partitioned, goes, keep: one.keep.clone() });
        }
        let keeps: HashMap<String, Option<String>> =
            known.values().map(|one| (one.table.label.clone(), one.keep.clone())).collect();
        for one in rows {
            let Some(Known { table, partitioned, goes, .. }) = known.remove(one.table.as_str()) else { continue };
            let cascades = cascades(tx, &table.name, &keeps, &mut vec![table.label.clone()]).await?;
            for cascade in &cascades {
                plan.implicit(tx, &table.name, &goes, cascade, &keeps).await?;
            }
            plan.push(table.name, table.label, partitioned, goes, cascades);
        }
        Ok(plan)
    }

    fn push(&mut self, name: String, label: String, partitioned: bool, goes: Goes, cascades: Vec<Cascade>) {
        let Goes { condition, chosen, top, found_by } = goes;
        self.entries.push(Entry { name, label, partitioned, condition, chosen, top, cascades, found_by });
    }

    /// The entries around this one that go together, some rows of the last one with all that refers to them at a time: so none of them
    /// is read as a whole again and again. None when it goes alone.
    pub(super) fn block(&self, at: usize) -> Option<RangeInclusive<usize>> {
        let top = &self.entries.get(at)?.top;
        let last = at + self.entries[at..].iter().position(|entry| entry.name == *top)?;
        let others = |entry: &Entry| entry.top != *top || entry.chosen.is_none();
        let first = self.entries[..last].iter().rposition(others).map_or(0, |other| other + 1);
        (first < last && (first..=last).contains(&at) && self.entries[last].chosen.is_some()).then_some(first..=last)
    }

    /// Which rows go, and the column that finds them.
    async fn goes(
        &mut self,
        tx: &mut PgTransaction<'_>,
        table: &Table,
        which: &[Which],
        known: &HashMap<&str, Known>,
    ) -> Result<Goes, Problem> {
        let top = |condition: String, found_by: Option<String>| Goes {
            condition,
            chosen: None,
            top: table.name.clone(),
            found_by,
        };
        match which.first() {
            Some(Which::Column(column)) => {
                table.column_type(column)?;
                let kind = plain_type(tx, &table.name, column).await?;
                let place = format!("{}.{column}", table.label);
                let condition = format!("t.{} = $1::pg_catalog.text::{kind}", quoted(column));
                self.types.push((place, kind));
                Ok(top(condition, Some(column.clone())))
            }
            Some(Which::Condition(sql)) => Ok(top(format!("({sql})"), None)),
            Some(Which::Parent { column, table: name, references }) => {
                table.column_type(column)?;
                let parent = known.get(name.as_str()).ok_or_else(|| {
                    Problem::Wrong(format!("there is no table {name}, which {} refers to", table.label))
                })?;
                let references = match references {
                    Some(references) => references.clone(),
                    None => match table.referenced(tx, column, &parent.table).await? {
                        Some(references) => references,
                        None => parent.table.key()?.to_string(),
                    },
                };
                parent.table.column_type(&references)?;
                let (child, references) = (format!("t.{}", quoted(column)), format!("t.{}", quoted(&references)));
                Ok(parent.goes.below(&child, &references, &parent.table.name, column.clone()))
            }
            None => Err(Problem::Wrong(format!("nothing says which rows of {} go", table.label))),
        }
    }

    /// Rows that go by cascade are deleted before, in chunks as all others, unless they are named themselves.
    async fn implicit(
        &mut self,
        tx: &mut PgTransaction<'_>,
        parent: &str,
        above: &Goes,
        cascade: &Cascade,
        keeps: &HashMap<String, Option<String>>,
    ) -> Result<(), Problem> {
        let Cascade { name, label, columns, references, first, .. } = cascade;
        if keeps.contains_key(label) || name == parent {
            return Ok(());
        }
        let goes = above.below(&format!("({columns})"), references, parent, first.clone());
        for below in &cascade.below {
            Box::pin(self.implicit(tx, name, &goes, below, keeps)).await?;
        }
        check_visible(tx, name, label).await?;
        let partitioned = is_partitioned(tx, name).await?;
        self.push(name.clone(), label.clone(), partitioned, goes, cascade.below.clone());
        Ok(())
    }

    /// Names of all tables, also of those that are not there.
    pub(super) fn labels(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.label.as_str()).chain(self.missing.iter().map(String::as_str))
    }

    /// The id must be written as the columns write it: another text could be cut, or be the id of somebody else.
    pub(super) async fn check_id(&self, tx: &mut PgTransaction<'_>, id: &str) -> Result<(), Problem> {
        for (place, kind) in &self.types {
            let mut inner = tx.begin().await.map_err(|error| Problem::failed(place, error))?;
            let sql = format!("select ($1::pg_catalog.text::{kind})::pg_catalog.text = $1::pg_catalog.text");
            let same = sqlx::query_scalar::<_, bool>(AssertSqlSafe(sql)).bind(id).persistent(false);
            let same = match same.fetch_one(&mut *inner).await {
                Ok(same) => same,
                Err(error)
                    if error.as_database_error().is_some_and(|error| is_about_the_value(error.code().as_deref())) =>
                {
                    false
                }
                Err(error) => return Err(Problem::failed(place, error)),
            };
            inner.rollback().await.map_err(|error| Problem::failed(place, error))?;
            if !same {
                let problem = format!("the subject's id is not written as the type of {place} writes it");
                return Err(Problem::Wrong(problem));
            }
        }
        Ok(())
    }

    /// Tables that are read as a whole for each chunk, because no index finds the rows.
    pub(super) async fn warnings(&self, tx: &mut PgTransaction<'_>, id: &str) -> Result<Vec<String>, Problem> {
        let mut warnings = Vec::new();
        for entry in &self.entries {
            let found = match &entry.found_by {
                Some(column) => is_indexed(tx, &entry.name, column).await?,
                None => uses_an_index(tx, entry, id).await?,
            };
            if !found {
                let column = entry.found_by.as_deref().map(|column| format!(" on {column}")).unwrap_or_default();
                warnings.push(format!(
                    "{} has no index{column} that finds the rows: each chunk reads the table",
                    entry.label
                ));
            }
            for cascade in &entry.cascades {
                if !is_indexed(tx, &cascade.name, &cascade.first).await? {
                    let Cascade { label, first, .. } = cascade;
                    let warning =
                        format!("{label} has no index on {first}: each row of {} that goes reads it", entry.label);
                    warnings.push(warning);
                }
            }
        }
        warnings.dedup();
        Ok(warnings)
    }
}

/// A value that a type does not take.
fn is_about_the_value(code: Option<&str>) -> bool {
    code.is_some_and(|code| code.starts_with("22") || code == "23514")
}
