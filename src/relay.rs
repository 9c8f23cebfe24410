//! The relay, to be run within a program: what `aftercommit-relay` runs.

pub use aftercommit_core::relay::Mode;
pub use aftercommit_relay::{Monitor, ParkPolicy, PublishMethod, Relay, RelayConfig, RelayReport};
