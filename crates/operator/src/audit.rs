//! The audit trail: what operators did, and who and when.

use super::When;
pub use aftercommit_core::postgres::audit::AuditEntry;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, audit, database_error};
use aftercommit_outbox::event::EventId;

/// Which entries are wanted. An empty one wants them all.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Those that concern this event.
    pub event: Option<EventId>,
    /// Those that concern this subscriber.
    pub subscriber: Option<String>,
    /// Those since then.
    pub since: Option<When>,
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
        since: match filter.since {
            Some(When::Ago(age)) => Some(age.as_secs_f64()),
            _ => None,
        },
        from: match filter.since {
            Some(When::At(at)) => Some(at),
            _ => None,
        },
    };
    let entries = audit::list(connection, &wanted, limit)
        .await
        .map_err(|error| database_error("reading the audit trail failed", error))?;
    Ok(entries)
}

/// Writes down what was provisioned.
#[cfg(feature = "cli")]
pub async fn provisioned(config: &PostgresConfig, who: &str, stream: &str, changes: &[String]) -> Result<(), Error> {
    let detail = serde_json::json!({ "stream": stream, "changes": changes });
    write(config, who, "provision", detail).await
}

/// Writes down what a comparison on demand has repaired.
#[cfg(feature = "cli")]
pub async fn reconciled(config: &PostgresConfig, who: &str, reconciler: &str, repaired: u64) -> Result<(), Error> {
    let detail = serde_json::json!({ "reconciler": reconciler, "repaired": repaired });
    write(config, who, "reconcile --repair", detail).await
}

#[cfg(feature = "cli")]
async fn write(config: &PostgresConfig, who: &str, action: &str, detail: serde_json::Value) -> Result<(), Error> {
    let failed = |error| database_error("writing the audit trail failed", error);
    let mut session = postgres::connect(config, "aftercommit").await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let entry = audit::Entry { who, action, subscriber: None, event_id: None, detail };
    audit::write(&mut tx, &entry).await.map_err(failed)?;
    tx.commit().await.map_err(failed)
}
