//! Why a transaction was not committed: is an event at fault, or something around it?

use std::error::Error as StdError;
use std::time::Duration;

use aftercommit_core::error::causes;
use aftercommit_core::postgres::function::FunctionName;
use aftercommit_core::postgres::{self, clip, function};

use super::handler::HandlerError;
use super::loss::Loss;

/// Why a transaction was not committed, and by which event of the group, if that is known.
pub(super) enum TransactionError {
    /// The database is not available, or refuses the worker's own statements.
    Outage(String),
    /// The endpoint to which the subscriber sends all of its events is not available.
    Unreachable(String),
    /// The session has ended. If events ran in it, [`Self::Lost`] takes the place of this.
    Ended(String),
    /// The session was lost while events ran.
    Lost(Loss),
    /// One of several events has changed the session in which the others run.
    Changed,
    /// Other transactions were in the way, such as in a deadlock.
    Conflict {
        at: Option<usize>,
        error: HandlerError,
    },
    /// The handler says that a service that it needs is not available.
    Interrupted {
        at: Option<usize>,
        error: HandlerError,
    },
    /// Either the event is the cause, or something around it. The session still works.
    Doubtful {
        at: Option<usize>,
        error: HandlerError,
    },
    Failed {
        at: Option<usize>,
        error: HandlerError,
    },
}

/// The endpoint to which the subscriber sends all of its events is not available, for this reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreachable(pub(super) String);

impl TransactionError {
    /// The culprit's place in the group.
    pub(super) fn culprit(&self) -> Option<usize> {
        match self {
            Self::Outage(_) | Self::Unreachable(_) | Self::Ended(_) | Self::Lost(_) | Self::Changed => None,
            Self::Conflict { at, .. }
            | Self::Interrupted { at, .. }
            | Self::Doubtful { at, .. }
            | Self::Failed { at, .. } => *at,
        }
    }
}

/// Classifies an error: is the event at fault, or something around it?
pub(super) fn classify(at: Option<usize>, error: HandlerError) -> TransactionError {
    let cause = match &error {
        HandlerError::Retry { error: cause, .. } => cause,
        HandlerError::Unavailable { .. } => return TransactionError::Interrupted { at, error },
        _ => return TransactionError::Failed { at, error },
    };
    for cause in causes(cause.as_ref()) {
        if let Some(Unreachable(reason)) = cause.downcast_ref() {
            return TransactionError::Unreachable(reason.clone());
        }
        if let Some(database) = cause.downcast_ref::<sqlx::Error>() {
            if postgres::is_doubtful(database) {
                return TransactionError::Doubtful { at, error };
            }
            if postgres::is_outage(database) {
                return TransactionError::Interrupted { at, error };
            }
            if postgres::is_conflict(database) {
                return TransactionError::Conflict { at, error };
            }
        }
    }
    TransactionError::Failed { at, error }
}

/// The handler ran into the subscriber's time limit.
#[derive(Debug, thiserror::Error)]
#[error("the handler ran longer than the subscriber's time limit of {0:?}")]
pub(super) struct TooSlow(pub(super) Duration);

/// Whether it took too long: a handler, or a statement, which the server then cancelled.
pub(super) fn timed_out(error: &HandlerError) -> bool {
    let HandlerError::Retry { error, .. } = error else { return false };
    let code = |error: &sqlx::Error| error.as_database_error()?.code().map(|code| code == "57014");
    error.downcast_ref().and_then(code).unwrap_or(false) || gave_up(&**error)
}

/// Whether this process stopped waiting.
fn gave_up(error: &(dyn StdError + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<TooSlow>().is_some()
}

impl TransactionError {
    /// Whether this process stopped waiting for the handler.
    pub(super) fn gave_up(&self) -> bool {
        matches!(self, Self::Failed { error: HandlerError::Retry { error, .. }, .. } if gave_up(&**error))
    }

    /// Behind a pooler others use the session, too. When one of their prepared statements is in the way, no event is at fault.
    pub(super) fn behind_pooler(self) -> Self {
        let mixed_up = |error: &sqlx::Error| error.as_database_error().is_some_and(postgres::is_mixed_up);
        match self {
            Self::Doubtful { at, error: HandlerError::Retry { error, after } }
                if causes(error.as_ref()).any(|cause| cause.downcast_ref().is_some_and(mixed_up)) =>
            {
                Self::Interrupted { at, error: HandlerError::Retry { error, after } }
            }
            other => other,
        }
    }

    /// Whether it is about the subscriber's function itself, see [`function::is_about_the_function`].
    pub(super) fn is_about_the_function(&self, function: &FunctionName) -> bool {
        let Self::Failed { error: HandlerError::Retry { error, .. }, .. } = self else { return false };
        let about = |error| function::is_about_the_function(error, function);
        causes(error.as_ref()).any(|cause| cause.downcast_ref().is_some_and(about))
    }

    /// Whether it may be about the JSON of the event, see [`function::is_about_the_json`].
    pub(super) fn is_about_the_json(&self) -> bool {
        let Self::Failed { error: HandlerError::Retry { error, .. }, .. } = self else { return false };
        causes(error.as_ref()).any(|cause| cause.downcast_ref().is_some_and(function::is_about_the_json))
    }

    /// What the handler said, if it was a handler that failed.
    pub(super) fn told(&self) -> Option<String> {
        match self {
            Self::Conflict { error, .. }
            | Self::Interrupted { error, .. }
            | Self::Doubtful { error, .. }
            | Self::Failed { error, .. } => Some(describe(error)),
            _ => None,
        }
    }

    /// Whether a session is of no use any more, because a statement that it has prepared is outdated.
    pub(super) fn is_stale(&self) -> bool {
        let Self::Conflict { error: HandlerError::Retry { error, .. }, .. } = self else { return false };
        causes(error.as_ref()).any(|cause| cause.downcast_ref().is_some_and(postgres::is_stale_plan))
    }
}

/// The error with its causes, on one line.
pub fn describe(error: &HandlerError) -> String {
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
            assert!(matches!(classify(Some(1), error), TransactionError::Interrupted { at: Some(1), .. }), "{text}");
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
            assert!(matches!(classify(None, error), TransactionError::Failed { at: None, .. }), "{text}");
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
