//! The error of sealed events.

use std::error::Error as StdError;
use std::fmt;

use aftercommit_core::postgres::database_error;
use aftercommit_outbox::PublishError;

/// Why an event was not sealed or not opened. Its message holds neither payloads nor keys nor the subject's id.
#[derive(Debug)]
pub struct SealError {
    kind: SealErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What a [`SealError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SealErrorKind {
    /// JSON cannot hold the event, or what was opened is another type's.
    Event,
    /// The subject's kind or id is empty or too long.
    Subject,
    /// A master key is missing, or is another one than its id says.
    Master,
    /// The database has never had the event's key.
    Unknown,
    /// The event was changed, or belongs to another id.
    Changed,
    /// The system gives no random numbers.
    Random,
    /// The database failed.
    Database,
}

impl SealError {
    pub(super) fn new(kind: SealErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(super) fn event(error: PublishError) -> Self {
        Self { source: Some(error.into()), ..Self::new(SealErrorKind::Event, "the event cannot be sealed") }
    }

    /// What it is about.
    pub fn kind(&self) -> SealErrorKind {
        self.kind
    }
}

impl From<sqlx::Error> for SealError {
    fn from(error: sqlx::Error) -> Self {
        let message = "the keys of sealed events cannot be read or written";
        let told = database_error(message, error);
        Self { source: Some(told.into()), ..Self::new(SealErrorKind::Database, message) }
    }
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for SealError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
