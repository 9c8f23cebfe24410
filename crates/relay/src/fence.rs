//! What a relay says when another one has taken over.

use aftercommit_core::error::{Error, ErrorKind};

/// A write was refused because the lease is another relay's.
pub(super) fn fenced() -> Error {
    Error::new(ErrorKind::Fenced, "another relay has taken over: this one has stopped writing")
}
