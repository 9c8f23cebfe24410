//! What went wrong with a transaction: is the event at fault, or the world around it?

use crate::error::causes;
use crate::postgres::{self, clip};

use super::handler::HandlerError;

/// Why a transaction was not committed, and by which event of the group, if that is known.
pub(super) enum Trouble {
    /// The database is away, or does not let us do our own work.
    Outage(String),
    /// What the subscriber sends all of its events to is away.
    Unreachable(String),
    /// Others were in the way.
    Conflict {
        at: Option<usize>,
        error: HandlerError,
    },
    /// The handler says that something it needs is away.
    Interrupted {
        at: Option<usize>,
        error: HandlerError,
    },
    Failed {
        at: Option<usize>,
        error: HandlerError,
    },
}

/// What the subscriber sends all of its events to is away, for this reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreachable(pub(super) String);

impl Trouble {
    /// The culprit's place in the group.
    pub(super) fn culprit(&self) -> Option<usize> {
        match self {
            Self::Outage(_) | Self::Unreachable(_) => None,
            Self::Conflict { at, .. } | Self::Interrupted { at, .. } | Self::Failed { at, .. } => *at,
        }
    }
}

/// Sorts an error: is the event at fault, or the world around it?
pub(super) fn trouble(at: Option<usize>, error: HandlerError) -> Trouble {
    let cause = match &error {
        HandlerError::Retry { error: cause, .. } => cause,
        HandlerError::Unavailable { .. } => return Trouble::Interrupted { at, error },
        _ => return Trouble::Failed { at, error },
    };
    for cause in causes(cause.as_ref()) {
        if let Some(Unreachable(reason)) = cause.downcast_ref() {
            return Trouble::Unreachable(reason.clone());
        }
        if let Some(database) = cause.downcast_ref::<sqlx::Error>() {
            let mixed_up = database.as_database_error().is_some_and(postgres::is_mixed_up);
            if mixed_up || postgres::is_outage(database) {
                return Trouble::Interrupted { at, error };
            }
            if postgres::is_conflict(database) {
                return Trouble::Conflict { at, error };
            }
        }
    }
    Trouble::Failed { at, error }
}

/// Whether a statement was cancelled because it took too long: another instance holds the inbox row.
pub(super) fn timed_out(error: &HandlerError) -> bool {
    let HandlerError::Retry { error, .. } = error else { return false };
    let code = error.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
    code.as_deref() == Some("57014")
}

/// The error with its causes, on one line.
pub(crate) fn describe(error: &HandlerError) -> String {
    match error {
        HandlerError::Snooze(wait) => format!("snoozed for {wait:?}"),
        HandlerError::Reject { reason } => clip(reason),
        HandlerError::Retry { error, .. } | HandlerError::Unavailable { error, .. } => {
            postgres::describe(error.as_ref())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the repository failed")]
    struct Wrapped(#[source] sqlx::Error);

    fn lost() -> sqlx::Error {
        sqlx::Error::Io(io::ErrorKind::ConnectionReset.into())
    }

    #[test]
    fn a_lost_connection_is_found_behind_other_errors() {
        let errors: [HandlerError; 4] = [
            lost().into(),
            Wrapped(lost()).into(),
            io::Error::other(lost()).into(),
            HandlerError::retry_after(Duration::ZERO, Wrapped(sqlx::Error::PoolTimedOut)),
        ];
        for error in errors {
            let text = format!("{error:?}");
            assert!(matches!(trouble(Some(1), error), Trouble::Interrupted { at: Some(1), .. }), "{text}");
        }
    }

    #[test]
    fn everything_else_is_the_events_failure() {
        let errors: [HandlerError; 5] = [
            sqlx::Error::RowNotFound.into(),
            io::Error::from(io::ErrorKind::ConnectionRefused).into(),
            HandlerError::retry("connection reset"),
            HandlerError::reject("no"),
            HandlerError::snooze(Duration::ZERO),
        ];
        for error in errors {
            let text = format!("{error:?}");
            assert!(matches!(trouble(None, error), Trouble::Failed { at: None, .. }), "{text}");
        }
    }

    #[test]
    fn causes_are_told_once_and_on_storable_text() {
        let error = HandlerError::retry(Wrapped(sqlx::Error::RowNotFound));
        let cause = sqlx::Error::RowNotFound.to_string();
        assert_eq!(describe(&error), format!("the repository failed: {cause}"));
        assert_eq!(describe(&HandlerError::retry("a\0b")), "ab");
        assert_eq!(describe(&HandlerError::retry("ä".repeat(5000))).chars().count(), 2000);
    }
}
