//! The audit trail: what operators did, and who and when.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use crate::config::PostgresConfig;
use crate::error::Error;
use crate::event::EventId;
use crate::postgres::session::Session;
use crate::postgres::{self, audit, database_error};

/// Which entries are wanted. An empty one wants them all.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Those that concern this event.
    pub event: Option<EventId>,
    /// Those that concern this subscriber.
    pub subscriber: Option<String>,
    /// Those of the last so long, by the database's clock.
    pub since: Option<Duration>,
}

/// Something that an operator did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditEntry {
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// Who, as the operator's tool was told.
    pub who: String,
    /// Who, as PostgreSQL knows it.
    pub role: String,
    /// What, such as `dead retry`.
    pub action: String,
    /// The subscriber that it concerns.
    pub subscriber: Option<String>,
    /// The event that it concerns.
    pub event_id: Option<EventId>,
    /// More about it. Payloads and headers that an action kept stay in the table `aftercommit.audit`.
    pub detail: Value,
}

/// The last `limit` entries that the filter wants, the oldest first.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn list(config: &PostgresConfig, filter: &AuditFilter, limit: i64) -> Result<Vec<AuditEntry>, Error> {
    read(&mut postgres::connect(config, "aftercommit").await?, filter, limit).await
}

pub(super) async fn read(connection: &mut Session, filter: &AuditFilter, limit: i64) -> Result<Vec<AuditEntry>, Error> {
    let wanted = audit::Wanted {
        event_id: filter.event.map(EventId::as_uuid),
        subscriber: filter.subscriber.as_deref(),
        since: filter.since.map(|since| since.as_secs_f64()),
    };
    let entries = audit::list(connection, &wanted, limit)
        .await
        .map_err(|error| database_error("reading the audit trail failed", error))?;
    Ok(entries.into_iter().map(AuditEntry::from).collect())
}

impl From<audit::Done> for AuditEntry {
    fn from(done: audit::Done) -> Self {
        let audit::Done { at, who, role, action, subscriber, event_id, detail } = done;
        Self { at, who, role, action, subscriber, event_id: event_id.map(EventId::from), detail }
    }
}
