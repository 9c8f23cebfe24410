//! The settings of a relay.

use std::time::Duration;

use super::method::PublishMethod;
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::relay::Mode;

/// What a relay needs to know.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// How long to wait for an acknowledgement before finding out what was stored. Defaults to 5 seconds.
    pub ack_timeout: Duration,
    /// The longest pause between two looks at an outbox that has nothing new. Defaults to 25 milliseconds.
    pub idle_poll: Duration,
    /// How long the leader may be silent before a standby takes over. It is renewed three times in that span. The relays
    /// of an outbox should agree: a lease that ends in more than twice this time and more than a minute counts as free,
    /// because only a clock that went back explains it. Defaults to 3 seconds.
    pub lease: Duration,
    /// Messages in flight to the stream at most. Defaults to 2,048.
    pub max_in_flight: usize,
    /// Whether others write to the stream, too. Defaults to [`Mode::Exclusive`].
    pub mode: Mode,
    /// Stream, subjects and source.
    pub naming: Naming,
    /// The NATS servers.
    pub nats: NatsConfig,
    /// Publish what is in the outbox, then stop. Defaults to false: publish until stopped.
    pub once: bool,
    /// How long the relay waits, when the server or the stream takes only smaller events than the largest of an outbox, for
    /// that limit to be raised, before it parks what exceeds it. Defaults to one minute.
    pub park_after: Duration,
    /// What becomes of later events of a key when one of it can never be stored. Defaults to [`ParkPolicy::Block`].
    pub park_policy: ParkPolicy,
    /// The outbox's database.
    pub postgres: PostgresConfig,
    /// How messages go to an exclusive stream. Defaults to [`PublishMethod::Auto`].
    pub publish: PublishMethod,
    /// How often old events are removed. Defaults to one minute.
    pub prune_interval: Duration,
    /// How many events that the reconciler found missing in the stream are published again in a second at most. Defaults
    /// to 5,000.
    pub repair_rate: u32,
    /// How long events stay in the outbox after they were written, for replay and proof; what is not in the stream yet
    /// stays longer. Defaults to 7 days.
    pub retention: Duration,
    /// Report unhealthy after this long without progress while events wait. Defaults to 30
    /// seconds.
    pub unhealthy_after: Duration,
}

/// What becomes of later events of a key when one of it can never be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParkPolicy {
    /// They wait behind it, so that no subscriber sees the key with a gap, until an operator releases or discards it.
    Block,
    /// They are published without it.
    Skip,
}

impl RelayConfig {
    /// The defaults for an outbox and its stream.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        Self {
            ack_timeout: Duration::from_secs(5),
            idle_poll: Duration::from_millis(25),
            lease: Duration::from_secs(3),
            max_in_flight: 2048,
            mode: Mode::Exclusive,
            naming,
            nats,
            once: false,
            park_after: Duration::from_mins(1),
            park_policy: ParkPolicy::Block,
            postgres,
            publish: PublishMethod::Auto,
            prune_interval: Duration::from_mins(1),
            repair_rate: 5000,
            retention: Duration::from_hours(7 * 24),
            unhealthy_after: Duration::from_secs(30),
        }
    }
}
