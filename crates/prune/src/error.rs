//! The error of pruning, and of what deletes as it does.

use std::error::Error as StdError;
use std::fmt;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres;
use aftercommit_outbox::PublishError;
use aftercommit_outbox::sqlstate;

/// Why nothing was deleted. What the statement had done so far was rolled back, and the caller's transaction goes on, unless
/// the connection is gone.
#[derive(Debug)]
pub struct PruneError {
    kind: PruneErrorKind,
    message: String,
    code: Option<String>,
    constraint: Option<String>,
    table: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What a [`PruneError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PruneErrorKind {
    /// The spec names a table or a column that is not there, or says something that cannot be.
    Spec,
    /// The primary key of the table has more than one column.
    CompositePrimaryKey,
    /// A row of another table still refers to one that was to go (SQLSTATE 23503): name that table as a child.
    ForeignKey,
    /// A trigger or a rule of the database made a second row with a unique value (23505).
    Unique,
    /// A check constraint refused a row (23514).
    Check,
    /// A column would have become NULL that must not be (23502), such as one with `on delete set null`.
    NotNull,
    /// An exclusion constraint refused a row (23P01).
    Exclusion,
    /// Others had locked what was to go, and time was up, or PostgreSQL undid it because of them (40001, 40P01, 55P03). Try
    /// again.
    Busy,
    /// A trigger or a row-level policy kept a row that was to go, whose children would be gone.
    Kept,
    /// The event that tells of it could not be written.
    Event,
    /// PostgreSQL cannot be reached, or it refused a statement.
    Database,
}

impl PruneError {
    /// What somebody asked for cannot be.
    pub fn spec(message: impl Into<String>) -> Self {
        Self::new(PruneErrorKind::Spec, message)
    }

    pub(crate) fn new(kind: PruneErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), code: None, constraint: None, table: None, source: None }
    }

    /// An error of the event that tells what was deleted from `table`.
    pub fn event(table: &str, error: PublishError) -> Self {
        let message = format!("deleting from {table}: the event was not written, and nothing was deleted");
        Self { source: Some(error.into()), ..Self::new(PruneErrorKind::Event, message) }
    }

    /// What PostgreSQL said of a statement about `table`.
    pub fn database(table: &str, error: sqlx::Error) -> Self {
        let Some(database) = error.as_database_error() else {
            let message = format!("deleting from {table} failed");
            return Self { source: Some(error.into()), ..Self::new(PruneErrorKind::Database, message) };
        };
        let code = database.code().unwrap_or_default();
        let (kind, way_out) = match &*code {
            "23503" => (PruneErrorKind::ForeignKey, "; name the table that still refers to it as a child in the spec"),
            "23505" => (PruneErrorKind::Unique, ""),
            "23514" => (PruneErrorKind::Check, ""),
            "23502" => (PruneErrorKind::NotNull, ""),
            "23P01" => (PruneErrorKind::Exclusion, ""),
            code if sqlstate::is_conflict(code) => (PruneErrorKind::Busy, "; this batch deleted nothing, try again"),
            _ => (PruneErrorKind::Database, ""),
        };
        let doing = format!("deleting from {table} failed");
        let told = match &*code {
            // What the caller's condition names, and not what of aftercommit may be missing.
            "42703" | "42P01" | "42883" | "3F000" | "42804" => format!(
                "{doing}: {} [{code}] (conditions see the table as t, and names as the search path of the session does)",
                sqlstate::without_values(&code, database.message())
            ),
            _ => sqlstate::told(&doing, &code, database.message()),
        };
        Self {
            code: Some(code.to_string()),
            constraint: database.constraint().map(Into::into),
            table: database.table().map(Into::into),
            ..Self::new(kind, format!("{told}{way_out}"))
        }
    }

    /// The same, said of a category.
    pub(crate) fn of(self, category: &str) -> Self {
        Self { message: format!("{category}: {}", self.message), ..self }
    }

    /// Whether a single row may be what it is about, so that others can go without it: an integrity constraint, or what a trigger of
    /// the row raised (classes 22, P0 and those of code that is called). Names that are not there concern all rows.
    pub(crate) fn may_be_a_row(&self) -> bool {
        use PruneErrorKind::{Check, Database, Exclusion, ForeignKey, Kept, NotNull, Unique};
        let raised = |code: &String| ["22", "2F", "38", "39", "44", "P0"].iter().any(|class| code.starts_with(class));
        match self.kind {
            ForeignKey | Unique | Check | NotNull | Exclusion | Kept => true,
            Database => self.code.as_ref().is_some_and(raised),
            _ => false,
        }
    }

    /// What it is about.
    pub fn kind(&self) -> PruneErrorKind {
        self.kind
    }

    /// The constraint that refused it, for the kinds that are about one.
    pub fn constraint(&self) -> Option<&str> {
        self.constraint.as_deref()
    }

    /// The table of that constraint, without its schema.
    pub fn table(&self) -> Option<&str> {
        self.table.as_deref()
    }
}

impl fmt::Display for PruneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for PruneError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<PruneError> for Error {
    fn from(error: PruneError) -> Self {
        let kind = match error.kind {
            PruneErrorKind::Spec | PruneErrorKind::CompositePrimaryKey => ErrorKind::Config,
            _ => ErrorKind::Database,
        };
        match error.source {
            Some(source) => Error::with_source(kind, error.message, source),
            None => Error::new(kind, error.message),
        }
    }
}

/// Whether the server is in trouble, rather than what was asked of it.
pub(crate) fn is_outage(error: &PruneError) -> bool {
    let source = error.source.as_ref().and_then(|source| source.downcast_ref::<sqlx::Error>());
    source.is_some_and(postgres::is_outage)
}
