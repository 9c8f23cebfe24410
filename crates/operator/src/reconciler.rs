//! What reconcilers did and found, in whatever process.

pub use aftercommit_core::postgres::finding::Finding;
pub use aftercommit_core::postgres::reconcile_status::ReconcileRun;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::{self, database_error, finding, reconcile_status};

/// Which findings are wanted. An empty one wants all that are open.
#[derive(Debug, Clone, Default)]
pub struct FindingFilter {
    /// Those of this reconciler.
    pub reconciler: Option<String>,
    /// Those of this kind.
    pub kind: Option<String>,
    /// Those that are settled, too.
    pub settled: bool,
}

/// The last `limit` findings that the filter wants, the oldest first.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn findings(config: &PostgresConfig, filter: &FindingFilter, limit: i64) -> Result<Vec<Finding>, Error> {
    let mut session = postgres::connect(config, "aftercommit").await?;
    let wanted = finding::Wanted {
        reconciler: filter.reconciler.as_deref(),
        kind: filter.kind.as_deref(),
        settled: filter.settled,
    };
    let entries = finding::list(&mut session, &wanted, limit).await;
    let entries = entries.map_err(|error| database_error("reading the findings failed", error))?;
    Ok(entries)
}

/// The last `limit` runs, of one reconciler or of all, the oldest first.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn runs(config: &PostgresConfig, reconciler: Option<&str>, limit: i64) -> Result<Vec<ReconcileRun>, Error> {
    let mut session = postgres::connect(config, "aftercommit").await?;
    let entries = reconcile_status::runs(&mut session, reconciler, limit).await;
    let entries = entries.map_err(|error| database_error("reading the runs of reconcilers failed", error))?;
    Ok(entries)
}
