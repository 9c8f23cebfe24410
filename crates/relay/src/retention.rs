//! Retention: what is settled and old is removed, for as long as a relay leads.

use aftercommit_core::error::Error;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_prune::own::{DealtWith, Outbox, RelayLog};
use aftercommit_prune::sweep::{Pace, Sweeper};
use tokio_util::sync::CancellationToken;

use super::Relay;

/// As fast as a busy outbox grows: the budget is no limit, and the rest between two batches is for the others.
const PACE: Pace = Pace { batch: 5000, budget: u64::MAX, rest: 1.0 };

/// What a leading relay sweeps.
struct Categories {
    outbox: Outbox,
    parked: DealtWith,
    repairs: DealtWith,
    log: RelayLog,
}

impl Relay {
    /// Sweeps again and again. It ends only with the leadership, or when the settings cannot be: what could not be removed now is
    /// removed later.
    pub(super) async fn prune(&self) -> Error {
        let retention = self.config.retention;
        let mut categories = Categories {
            outbox: Outbox::new(retention),
            parked: DealtWith::parked(retention),
            repairs: DealtWith::repairs(retention),
            log: RelayLog::new(retention),
        };
        let connections = match Connections::new(&self.config.postgres, "aftercommit-relay") {
            Ok(connections) => connections,
            Err(error) => return error,
        };
        let mut ticks = tokio::time::interval(self.config.prune_interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.sweep(&connections, &mut categories).await {
                tracing::warn!(error = error.report(), "pruning failed, trying again later");
            }
            connections.forget_idle();
        }
    }

    async fn sweep(&self, connections: &Connections, categories: &mut Categories) -> Result<(), Error> {
        let sweeper = Sweeper { connections, holder: &self.holder, pace: PACE };
        // It is dropped with the leadership, between two statements or in one.
        let stop = CancellationToken::new();
        sweeper.sweep(&mut categories.outbox, &stop).await?;
        sweeper.sweep(&mut categories.parked, &stop).await?;
        sweeper.sweep(&mut categories.repairs, &stop).await?;
        sweeper.sweep(&mut categories.log, &stop).await.map(drop)
    }
}
