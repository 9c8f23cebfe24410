//! Compares an outbox with its stream, a stream with a subscriber's consumer and inbox, and the outbox with the inbox, and
//! repairs what is missing.
#![warn(clippy::unwrap_used, clippy::expect_used)]

mod outbox;
mod subscriber;

pub use outbox::OutboxComparison;
pub use subscriber::{ConsumerComparison, InboxComparison, with_comparisons};
