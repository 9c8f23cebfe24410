//! The outboxes: how each keeps an event and how its relay is started.

mod aftercommit;
mod distributed;
mod outbox_core;

use std::future::Future;
use std::pin::Pin;

use crate::scratch::Scratch;

/// Which outbox, or which queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Aftercommit,
    OutboxCore,
    Distributed,
    GraphileWorker,
}

/// A relay that runs; calling it stops the relay and waits for its end.
pub type Stop = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

impl Kind {
    /// Those that publish to a stream.
    pub const OUTBOXES: [Self; 3] = [Self::Aftercommit, Self::OutboxCore, Self::Distributed];

    /// Those that run handlers.
    pub const WORKERS: [Self; 2] = [Self::Aftercommit, Self::GraphileWorker];

    /// As the report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aftercommit => "aftercommit",
            Self::OutboxCore => "outbox-core 0.6 + outbox-postgres 0.3",
            Self::Distributed => "distributed 4.12",
            Self::GraphileWorker => "graphile_worker 0.14 with its local queue",
        }
    }

    /// The name of its database, stream and subjects.
    pub fn short(self) -> &'static str {
        match self {
            Self::Aftercommit => "rival_aftercommit",
            Self::OutboxCore => "rival_outbox_core",
            Self::Distributed => "rival_distributed",
            Self::GraphileWorker => "rival_graphile",
        }
    }

    /// Its tables.
    pub async fn migrate(self, scratch: &Scratch) -> anyhow::Result<()> {
        match self {
            Self::Aftercommit => aftercommit::migrate(scratch).await,
            Self::OutboxCore => outbox_core::migrate(scratch).await,
            Self::Distributed => distributed::migrate(scratch).await,
            Self::GraphileWorker => Ok(()),
        }
    }

    /// Writes one event per row of `events(payload jsonb, key text)`, which the statement is put behind.
    pub fn insert(self) -> &'static str {
        match self {
            Self::Aftercommit => aftercommit::INSERT,
            Self::OutboxCore => outbox_core::INSERT,
            Self::Distributed => distributed::INSERT,
            Self::GraphileWorker => "select 1",
        }
    }

    /// Starts its relay.
    pub async fn start(self, scratch: &Scratch) -> anyhow::Result<Stop> {
        match self {
            Self::Aftercommit => aftercommit::start(scratch),
            Self::OutboxCore => outbox_core::start(scratch).await,
            Self::Distributed => distributed::start(scratch).await,
            Self::GraphileWorker => anyhow::bail!("a job queue publishes nothing"),
        }
    }
}
