//! What a page says when it cannot be shown.

use axum::http::StatusCode;

use aftercommit_core::error::{Error, ErrorKind};

/// Why there is no page.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    /// There is no such thing.
    pub(crate) fn not_found(text: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, text)
    }

    /// The request itself is wrong.
    pub(crate) fn refused(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    /// What a person reads above the text.
    pub(crate) fn heading(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_REQUEST => "This cannot be asked",
            StatusCode::UNAUTHORIZED => "Log in first",
            StatusCode::FORBIDDEN => "Your role may not see this",
            StatusCode::NOT_FOUND => "This is not here",
            StatusCode::MISDIRECTED_REQUEST => "This is not the address of the console",
            StatusCode::TOO_MANY_REQUESTS => "Too many attempts",
            _ => "A server does not answer",
        }
    }
}

/// The message and its causes are made for operators, and hold neither payloads nor secrets.
impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::Config => StatusCode::BAD_REQUEST,
            ErrorKind::NotReady => StatusCode::NOT_FOUND,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.report())
    }
}
