//! The error of everything that runs: relay, worker, operator's tool.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::{io, iter};

/// What went wrong, with the thing it concerns and the way out in its message.
///
/// The message never holds a payload, a credential or a server's error DETAIL.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The area of an [`Error`], for deciding what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is missing, malformed or contradicts another one. Nothing was started.
    Config,
    /// PostgreSQL cannot be reached, or it refused a statement.
    Database,
    /// NATS cannot be reached, or it refused a request.
    Broker,
    /// A schema, stream or consumer is missing or set up in a way that would lose or re-order events.
    NotReady,
    /// Another process took over; this one must not write any more.
    Fenced,
    /// The data contradicts what must hold; somebody has to look.
    Integrity,
}

impl Error {
    /// An error of `kind` with a message for the operator.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The same with the cause behind it.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// The area of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message and every cause behind it, on one line.
    pub fn report(&self) -> String {
        with_causes(self)
    }
}

/// An error's message and every cause behind it, on one line.
pub fn with_causes(error: &(dyn StdError + 'static)) -> String {
    on_one_line(causes(error).map(ToString::to_string))
}

/// These texts, without those that the text before ends with.
pub fn on_one_line(texts: impl Iterator<Item = String>) -> String {
    let mut line = String::new();
    for text in texts {
        if !line.ends_with(&text) {
            line.push_str(if line.is_empty() { "" } else { ": " });
            line.push_str(&text);
        }
    }
    line
}

/// An error and every cause behind it.
pub fn causes<'e>(error: Cause<'e>) -> iter::Successors<Cause<'e>, fn(&Cause<'e>) -> Option<Cause<'e>>> {
    fn next<'e>(error: &Cause<'e>) -> Option<Cause<'e>> {
        let error: Cause<'e> = *error;
        // An io::Error names as its source the source of what it wraps, not the wrapped error itself.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|wrapped| wrapped as Cause<'e>).or_else(|| error.source())
    }
    iter::successors(Some(error), next)
}

type Cause<'e> = &'e (dyn StdError + 'static);

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
