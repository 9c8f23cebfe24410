//! The error of deleting with hooks.

use std::error::Error as StdError;
use std::fmt;

use aftercommit_prune::{PruneError, PruneErrorKind};

/// Why nothing was deleted. What was done so far was rolled back, and the caller's transaction goes on, unless the connection is
/// gone.
#[derive(Debug)]
pub struct DeleteError {
    kind: DeleteErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What a [`DeleteError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeleteErrorKind {
    /// A required hook failed, took too long or panicked.
    Hook,
    /// Two hooks of one entity have the same name.
    Name,
    /// The database, the event or the names of tables and columns: as for pruning.
    Refused(PruneErrorKind),
}

impl DeleteError {
    pub(crate) fn new(kind: DeleteErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// What it is about.
    pub fn kind(&self) -> DeleteErrorKind {
        self.kind
    }

    /// The constraint that refused it, when one did.
    pub fn constraint(&self) -> Option<&str> {
        self.source.as_ref()?.downcast_ref::<PruneError>()?.constraint()
    }
}

impl From<PruneError> for DeleteError {
    fn from(error: PruneError) -> Self {
        let (kind, message) = (DeleteErrorKind::Refused(error.kind()), error.to_string());
        Self { kind, message, source: Some(error.into()) }
    }
}

impl fmt::Display for DeleteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for DeleteError {
    /// What is behind it; of an error of the database, what is behind that.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let source = self.source.as_deref()?;
        match source.downcast_ref::<PruneError>() {
            Some(error) => error.source(),
            None => Some(source),
        }
    }
}
