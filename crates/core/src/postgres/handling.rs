//! Statements around what handlers do in a transaction of ours.
//!
//! They run with the search path that a handler has left, so they name the schema of each function, operator and type.
//! And they run with the worker's role, whatever a handler has made of it.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Executor, Row};

use super::pins::state;
use super::session::{Session, Tx};

/// Says that a handling transaction begins; what a handler commits before [`close`] is refused.
pub(super) const OPEN: &str = "set local aftercommit.handling = 'on'";

/// What handlers have left of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Whether it is still the one that has the inbox rows: not when a handler has rolled it back.
    pub has_rows: bool,
    /// Whether the session is another one for the next event: its search path, its role, temporary tables.
    pub changed: bool,
}

/// No statement takes longer than that, and none is given up sooner.
fn within(limit: Duration) -> String {
    format!("set local statement_timeout = {}; set local lock_timeout = 0", limit.as_millis().min(1_000_000_000))
}

/// Ends what handlers may do: from now on the transaction may commit, durably, and its statements run with the worker's
/// role. `transaction` is the one that has the inbox rows, if there are any. Fails when the transaction is aborted: a handler
/// that drops the error of a statement would otherwise make COMMIT report success for a rollback.
pub async fn close(
    tx: &mut Tx<'_>,
    state: Option<&str>,
    transaction: Option<u64>,
    limit: Duration,
) -> Result<Left, sqlx::Error> {
    let has_rows = match transaction {
        Some(id) => format!(
            "coalesce(pg_catalog.pg_current_xact_id_if_assigned() operator(pg_catalog.=) '{id}'::pg_catalog.xid8, false)"
        ),
        None => "true".into(),
    };
    // One simple query, so one round trip. A commit that does not wait for the disk could be lost after its ack.
    let statement = format!(
        "{within}; select {state}, pg_catalog.pg_my_temp_schema() operator(pg_catalog.<>) 0::pg_catalog.oid;
         set session authorization default; reset role; set local aftercommit.handling = 'done';
         select {has_rows}, pg_catalog.set_config('synchronous_commit',
                    case when pg_catalog.current_setting('synchronous_commit')
                              operator(pg_catalog.=) any (array['off', 'local']::pg_catalog.text[])
                         then 'on' else pg_catalog.current_setting('synchronous_commit') end, true)",
        within = within(limit),
        state = state!(),
    );
    let rows = tx.fetch_all(sqlx::raw_sql(AssertSqlSafe(statement))).await?;
    let [before, after] = rows.as_slice() else { return Err(sqlx::Error::RowNotFound) };
    let now: String = before.try_get(0)?;
    // A session that has ever had a temporary table keeps the schema for them.
    let changed = state.is_some_and(|state| state != now) || (before.try_get(1)? && has_temporary_tables(tx).await?);
    Ok(Left { has_rows: after.try_get(0)?, changed })
}

/// Asked apart, because planning it costs each batch more than the rest of [`close`].
async fn has_temporary_tables(tx: &mut Tx<'_>) -> Result<bool, sqlx::Error> {
    let statement = "select exists (select from pg_catalog.pg_class
                                     where relnamespace operator(pg_catalog.=) pg_catalog.pg_my_temp_schema())";
    tx.fetch_one(sqlx::raw_sql(statement)).await?.try_get(0)
}

/// Takes back what handlers have made of a session, before the next one gets it.
pub async fn reset(connection: &mut Session) -> Result<(), sqlx::Error> {
    connection.reset().await
}
