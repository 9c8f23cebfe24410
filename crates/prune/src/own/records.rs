//! What nobody's work removes: records of operators and of processes that are no more.

use std::time::Duration;

use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::sweep;

use crate::sweep::{Batch, BatchError, Category};

/// Entries of the audit trail. The database keeps those of the last 30 days in any case.
#[derive(Debug)]
pub struct AuditTrail {
    /// How long they are kept.
    pub period: Duration,
}

impl Category for AuditTrail {
    fn name(&self) -> &str {
        "audit"
    }

    fn period(&self) -> Option<Duration> {
        Some(self.period)
    }

    fn shared(&self) -> bool {
        true
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let removed = connections.run(async |session| sweep::audit(session, self.period, limit).await).await?;
        Ok(Batch::up_to(limit, removed))
    }
}

/// Leases of holders that died long ago, and of categories that are swept no more.
#[derive(Debug)]
pub struct Leases {
    /// How long they are kept.
    pub period: Duration,
}

impl Category for Leases {
    fn name(&self) -> &str {
        "leases"
    }

    fn period(&self) -> Option<Duration> {
        Some(self.period)
    }

    fn shared(&self) -> bool {
        true
    }

    async fn batch(&mut self, connections: &Connections, limit: u32) -> Result<Batch, BatchError> {
        let removed = connections.run(async |session| sweep::leases(session, self.period, limit).await).await?;
        Ok(Batch::up_to(limit, removed))
    }
}
