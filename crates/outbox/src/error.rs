//! Why an event was not written.

use std::error::Error as StdError;
use std::fmt;

use crate::sqlstate;

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
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What to do about a [`PublishError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// The event could not be published or read as it is: its type, version, key, a header or the content type is
    /// illegal, the payload is too large, JSON cannot hold a field (NaN, infinity, bytes, a map whose keys are no
    /// strings), or the type cannot read its own JSON. Nothing was sent to the database; the transaction goes on.
    ///
    /// Also when there is no transaction to publish in, where the driver's types do not rule that out.
    Invalid,
    /// An event with this id is in the outbox. Roll back: the event was already published.
    Duplicate,
    /// PostgreSQL undid the transaction because of others that ran beside it. Run it again from its beginning.
    Conflict,
    /// PostgreSQL or the way to it is in trouble. Try again later.
    Unavailable,
    /// PostgreSQL refused the statement: the schema is missing, or the role lacks a grant.
    Database,
}

/// A refused field and why.
pub(crate) struct Problem {
    pub(crate) field: String,
    pub(crate) why: String,
}

impl Problem {
    pub(crate) fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

impl PublishError {
    pub(crate) fn invalid(event_type: &str, problem: Problem) -> Self {
        let Problem { field, why } = problem;
        Self {
            kind: PublishErrorKind::Invalid,
            message: format!("event {} is refused: {field} {why}", shown(event_type)),
            event_type: event_type.into(),
            field: Some(field),
            source: None,
        }
    }

    /// PostgreSQL refused the statement.
    pub(crate) fn refused(event_type: &str, refusal: &Refusal<'_>) -> Self {
        let Refusal { code, message, constraint, stale_plan } = refusal;
        let kind = match code {
            code if sqlstate::is_outage(code) => PublishErrorKind::Unavailable,
            code if sqlstate::is_conflict(code) || *stale_plan => PublishErrorKind::Conflict,
            _ if *constraint == Some("outbox_event_id_unique") => PublishErrorKind::Duplicate,
            _ => PublishErrorKind::Database,
        };
        let message = match *code {
            // Without it, nothing tells whether the message quotes a value: it is treated as if it did.
            "" => format!("{}: {}", not_written(event_type), sqlstate::without_values("22000", message)),
            code => sqlstate::told(&not_written(event_type), code, message),
        };
        Self { kind, event_type: event_type.into(), field: None, message, source: None }
    }

    /// The driver failed before PostgreSQL said anything. Its error must not show what a row holds.
    pub(crate) fn driver(
        event_type: &str,
        kind: PublishErrorKind,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        let message = not_written(event_type);
        Self { kind, event_type: event_type.into(), field: None, message, source: Some(source.into()) }
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
    /// into the payload such as `payload.items[2].price`; `transaction` when there is none to publish in.
    pub fn field(&self) -> Option<&str> {
        self.field.as_deref()
    }
}

fn not_written(event_type: &str) -> String {
    format!("event {} was not written", shown(event_type))
}

/// An error of the server, in the words of any driver.
pub(crate) struct Refusal<'a> {
    /// SQLSTATE; empty when the driver does not tell.
    pub(crate) code: &'a str,
    pub(crate) message: &'a str,
    pub(crate) constraint: Option<&'a str>,
    /// Whether a prepared statement of the session no longer fits its tables. In another session it will.
    pub(crate) stale_plan: bool,
}

/// Whether an error of the server with this code, from this routine of its source, tells of a prepared statement that
/// no longer fits its tables. Other errors have the same code.
#[cfg(any(feature = "sqlx08", feature = "sqlx09", feature = "tokio-postgres"))]
pub(crate) fn tells_of_stale_plan(code: &str, routine: Option<&str>) -> bool {
    code == "0A000" && routine == Some("RevalidateCachedQuery")
}

/// A text that may be anything, short and on one line.
pub(crate) fn shown(text: &str) -> String {
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
