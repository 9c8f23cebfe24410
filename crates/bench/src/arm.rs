//! Floors that run in a process of their own, so that their cost can be told from that of measuring.

use crate::cost::Clock;
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::publisher::Messages;
use aftercommit_core::{jetstream, postgres};

/// What such a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arm {
    /// Publish the events of an outbox, prepared in memory, many in flight, each naming its predecessor
    PublishChained,
    /// Publish them in atomic batches, some of them in flight
    PublishBatches,
    /// Read the events of an outbox, page by page
    Read,
}

impl Arm {
    /// How the command line calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PublishChained => "publish-chained",
            Self::PublishBatches => "publish-batches",
            Self::Read => "read",
        }
    }
}

/// Runs an arm in this process and returns what it cost, as JSON.
///
/// # Errors
/// When a server cannot be reached or refuses something.
pub(crate) async fn run_arm(
    arm: Arm,
    events: u64,
    postgres: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
) -> Result<String, Error> {
    let mut session = postgres::connect(&postgres, "aftercommit-bench").await?;
    let cost = match arm {
        Arm::Read => {
            let clock = Clock::start();
            crate::postgres::read(&mut session, events).await?;
            clock.stop()
        }
        Arm::PublishChained | Arm::PublishBatches => {
            let envelopes = crate::postgres::envelopes(&mut session, events, &naming.source).await?;
            let mut make = Messages::new(naming.prefix.clone());
            let messages = envelopes.iter().map(|event| make.message(event));
            let connection = jetstream::connect(&nats, "aftercommit-bench", "_INBOX").await?;
            if arm == Arm::PublishChained {
                let messages = crate::jetstream::chained(messages);
                let clock = Clock::start();
                crate::jetstream::publish(&connection, messages).await?;
                clock.stop()
            } else {
                let messages = crate::jetstream::batched(messages);
                let clock = Clock::start();
                crate::jetstream::publish_batches(&connection, messages).await?;
                clock.stop()
            }
        }
    };
    Ok(serde_json::json!(cost).to_string())
}
