//! What reconcilers did and found, in whatever process.

use chrono::{DateTime, Utc};
use serde::Serialize;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::{self, database_error, finding, reconcile_status};
use aftercommit_outbox::event::EventId;

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

/// Something that a reconciler found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Its number.
    pub id: i64,
    /// Who found it.
    pub reconciler: String,
    /// What it is, such as `item_failed`.
    pub kind: String,
    /// What it is about.
    pub item: String,
    /// The event that it is about.
    pub event_id: Option<EventId>,
    /// That event's key.
    pub key: Option<String>,
    /// Where it is in the stream.
    pub stream_sequence: Option<i64>,
    /// More, in one line.
    pub detail: String,
    /// `open`, `repairing`, `repaired` or `gone`.
    pub state: String,
    /// When it was first found, by the database's clock.
    pub found_at: DateTime<Utc>,
    /// When it was settled.
    pub settled_at: Option<DateTime<Utc>>,
    /// The last run that found it.
    pub last_run: i64,
}

/// A run of a reconciler.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReconcileRun {
    /// Its number.
    pub id: i64,
    /// Whose it is.
    pub reconciler: String,
    /// `scheduled` or `demand`.
    pub cause: String,
    /// `report` or `repair`.
    pub mode: String,
    /// `new`, `full` or `keys`.
    pub scope: String,
    /// When it began, by the database's clock.
    pub started_at: DateTime<Utc>,
    /// When it ended; none when it runs, or its process died and no other run has noticed yet.
    pub ended_at: Option<DateTime<Utc>>,
    /// `ok`, `failed` or `stopped`.
    pub result: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many items it has looked at so far.
    pub scanned: i64,
    /// How many differences it found.
    pub found: i64,
    /// How many of them it repaired, or queued the repair of.
    pub repaired: i64,
    /// How many items failed.
    pub failed: i64,
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
    Ok(entries.into_iter().map(Finding::from).collect())
}

/// The last `limit` runs, of one reconciler or of all, the oldest first.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn runs(config: &PostgresConfig, reconciler: Option<&str>, limit: i64) -> Result<Vec<ReconcileRun>, Error> {
    let mut session = postgres::connect(config, "aftercommit").await?;
    let entries = reconcile_status::runs(&mut session, reconciler, limit).await;
    let entries = entries.map_err(|error| database_error("reading the runs of reconcilers failed", error))?;
    Ok(entries.into_iter().map(ReconcileRun::from).collect())
}

impl From<finding::Entry> for Finding {
    fn from(entry: finding::Entry) -> Self {
        let finding::Entry { id, reconciler, kind, item, event_id, key, stream_sequence, .. } = entry;
        let finding::Entry { detail, state, found_at, settled_at, last_run, .. } = entry;
        let event_id = event_id.map(EventId::from);
        Self {
            id,
            reconciler,
            kind,
            item,
            event_id,
            key,
            stream_sequence,
            detail,
            state,
            found_at,
            settled_at,
            last_run,
        }
    }
}

impl From<reconcile_status::RunEntry> for ReconcileRun {
    fn from(entry: reconcile_status::RunEntry) -> Self {
        let reconcile_status::RunEntry { id, reconciler, cause, mode, scope, started_at, ended_at, .. } = entry;
        let reconcile_status::RunEntry { result, error, scanned, found, repaired, failed, .. } = entry;
        Self {
            id,
            reconciler,
            cause,
            mode,
            scope,
            started_at,
            ended_at,
            result,
            error,
            scanned,
            found,
            repaired,
            failed,
        }
    }
}
