//! The error of jobs.

use std::error::Error as StdError;
use std::fmt;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::database_error;
use aftercommit_outbox::PublishError;

/// Why nothing was done about a job.
#[derive(Debug)]
pub struct JobError {
    kind: JobErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What a [`JobError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobErrorKind {
    /// The request cannot be: no participants, a name twice, an empty key.
    Request,
    /// There is no such job, or no such participant.
    Unknown,
    /// The job, or the participant, is in a state in which this cannot be done.
    State,
    /// A guard refuses the request, such as a name that is another one's.
    Refused,
    /// The event could not be written.
    Event,
    /// The database failed.
    Database,
}

impl JobError {
    pub(crate) fn new(kind: JobErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn event(error: PublishError) -> Self {
        let message = "the event of the job was not written";
        Self { source: Some(error.into()), ..Self::new(JobErrorKind::Event, message) }
    }

    /// What it is about.
    pub fn kind(&self) -> JobErrorKind {
        self.kind
    }
}

impl From<sqlx::Error> for JobError {
    fn from(error: sqlx::Error) -> Self {
        let told = database_error("the job cannot be read or written", error);
        Self { source: Some(told.into()), ..Self::new(JobErrorKind::Database, "the job cannot be read or written") }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for JobError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<JobError> for Error {
    fn from(error: JobError) -> Self {
        let kind = match error.kind {
            JobErrorKind::Request => ErrorKind::Config,
            JobErrorKind::Unknown | JobErrorKind::State | JobErrorKind::Refused => ErrorKind::NotReady,
            _ => ErrorKind::Database,
        };
        match error.source {
            Some(source) => Error::with_source(kind, error.message, source),
            None => Error::new(kind, error.message),
        }
    }
}
