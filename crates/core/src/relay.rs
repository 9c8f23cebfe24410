//! What others must know of relays.

/// The lease of the leading relay.
pub const LEASE: &str = "relay";

/// Who writes to the stream, and so how order is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only the relays of this outbox. Every message names its predecessor, so the server keeps the order and lets no
    /// second relay in between; each event is in the stream once, whatever fails.
    Exclusive,
    /// Others, too. Each key has at most one message in flight, which costs a round trip between two events of a key;
    /// what is sent again after a failure is dropped by the server within the stream's duplicate window.
    Shared,
}
