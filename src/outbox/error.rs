use std::error::Error as StdError;
use std::fmt;

use crate::postgres;

/// Why an event was not written.
///
/// Its message names the event's type and, for a refused event, the field. It never holds a payload, a header's value
/// or the server's error DETAIL, which would show the row.
#[derive(Debug)]
pub struct PublishError {
    kind: PublishErrorKind,
    event_type: String,
    field: Option<String>,
    message: String,
    source: Option<Box<sqlx::Error>>,
}

/// What to do about a [`PublishError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// The event could not be published or read as it is: its type, version, key, a header or the content type is
    /// illegal, the payload is too large, JSON cannot hold a field (NaN, infinity, bytes, a map whose keys are no
    /// strings), or the type cannot read its own JSON. Nothing was sent to the database; the transaction goes on.
    Invalid,
    /// An event with this id is in the outbox. Roll back: what the caller wanted to tell has been told.
    Duplicate,
    /// PostgreSQL undid the transaction because of others that ran beside it. Run it again from its beginning.
    Conflict,
    /// PostgreSQL or the way to it is in trouble. Try again later.
    Unavailable,
    /// PostgreSQL refused the statement: the schema is missing, or the role lacks a grant.
    Database,
}

/// A refused field and why.
pub(super) struct Problem {
    pub(super) field: String,
    pub(super) why: String,
}

impl Problem {
    pub(super) fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

impl PublishError {
    pub(super) fn invalid(event_type: &str, problem: Problem) -> Self {
        let Problem { field, why } = problem;
        Self {
            kind: PublishErrorKind::Invalid,
            message: format!("event {} is refused: {field} {why}", shown(event_type)),
            event_type: event_type.into(),
            field: Some(field),
            source: None,
        }
    }

    pub(super) fn database(event_type: &str, error: sqlx::Error) -> Self {
        let kind = match &error {
            error if postgres::is_outage(error) => PublishErrorKind::Unavailable,
            error if postgres::is_conflict(error) => PublishErrorKind::Conflict,
            sqlx::Error::Database(db) if db.constraint() == Some("outbox_event_id_unique") => {
                PublishErrorKind::Duplicate
            }
            _ => PublishErrorKind::Database,
        };
        let doing = format!("event {} was not written", shown(event_type));
        let (message, source) = match error {
            // Its Debug shows the DETAIL.
            error @ sqlx::Error::Database(_) => (postgres::database_error(doing, error).to_string(), None),
            other => (doing, Some(Box::new(other))),
        };
        Self { kind, event_type: event_type.into(), field: None, message, source }
    }

    /// What to do about it.
    pub fn kind(&self) -> PublishErrorKind {
        self.kind
    }

    /// The type of the event, as it was given.
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// The refused field: `type`, `version`, `key`, `headers`, `headers.<name>`, `content_type`, `payload`, or a path
    /// into the payload such as `payload.items[2].price`.
    pub fn field(&self) -> Option<&str> {
        self.field.as_deref()
    }
}

/// A text that may be anything, short and on one line.
pub(super) fn shown(text: &str) -> String {
    let mut start: String = text.chars().take(64).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for PublishError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
