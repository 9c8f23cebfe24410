//! Events of the outbox, by what they are.

use chrono::{DateTime, Utc};
use serde::Serialize;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
pub use aftercommit_core::postgres::search::{Found, Wanted};
use aftercommit_core::postgres::{self, database_error, search};

/// What a search has found, and how far it looked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Search {
    /// The events, the newest first.
    pub events: Vec<Found>,
    /// From where to go on, when the search has not come to the end.
    pub before: Option<i64>,
    /// Up to when it has looked back; none when it has come to the end, or has found as many as were wanted.
    pub looked_back_to: Option<DateTime<Utc>>,
}

/// Looks for up to `limit` events before the place `before` in the outbox (none: from its end), the newest first. One search looks at
/// 100,000 rows, so that it costs the same however much is retained; [`Search::before`] goes on.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn search(
    config: &PostgresConfig,
    wanted: &Wanted<'_>,
    before: Option<i64>,
    limit: i64,
) -> Result<Search, Error> {
    let failed = |error| database_error("searching the outbox failed", error);
    let mut session = postgres::connect(config, "aftercommit").await?;
    let before = before.unwrap_or(i64::MAX);
    let events = search::search(&mut session, wanted, before, limit).await.map_err(failed)?;
    if events.len() as i64 >= limit {
        let before = events.last().map(|event| event.outbox_id);
        return Ok(Search { events, before, looked_back_to: None });
    }
    let reach = search::reach(&mut session, before).await.map_err(failed)?;
    Ok(Search { events, before: reach.map(|(id, _)| id), looked_back_to: reach.map(|(_, at)| at) })
}
