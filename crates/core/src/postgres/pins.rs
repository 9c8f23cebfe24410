//! What our sessions do not leave to the defaults of a server, a database or a role.
//!
//! A name without a schema is looked up on the search path, and a function, operator or type there that fits better than
//! PostgreSQL's own is run with the rights of whoever asks. So our statements see `pg_catalog` and nothing else. The other
//! settings are those that a statement's meaning or its time depends on.
//!
//! Straight to the server they are startup options: nothing is left to the roles' defaults, and it costs no round trip.
//! A pooler in transaction mode refuses such options, so there each transaction begins with them.
//!
//! Handlers and users' reconcilers run in sessions that keep the role's own settings. Our few statements in their
//! transactions name the schema of everything: [`super::inbox`], [`super::handling`], [`super::redrive::take`], [`super::function`],
//! [`super::running`].

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{Error, PgConnection, Row};

/// `pg_temp` last, because without it a session's temporary tables and types come first.
const SEARCH_PATH: &str = "pg_catalog, pg_temp";

/// The settings of a session that runs our statements only.
const SETTINGS: [(&str, &str); 11] = [
    ("search_path", SEARCH_PATH),
    // Our statements are made for it; others make the server ask for repetitions (40001).
    ("default_transaction_isolation", "read committed"),
    ("plan_cache_mode", "auto"),
    // We wait for a minute ourselves; no time of a role's may end a statement that makes progress.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    // A process that is frozen in the middle of a transaction must not keep its locks for ever.
    ("idle_in_transaction_session_timeout", "60s"),
    ("row_security", "on"),
    ("standard_conforming_strings", "on"),
    ("transform_null_equals", "off"),
    ("intervalstyle", "postgres"),
    ("bytea_output", "hex"),
];

/// What a handler can change of a session that other events would notice.
macro_rules! state {
    () => {
        "pg_catalog.concat_ws('|', pg_catalog.current_setting('search_path'), pg_catalog.current_setting('role'),
            session_user, pg_catalog.current_setting('session_replication_role'),
            pg_catalog.current_setting('TimeZone'), pg_catalog.current_setting('DateStyle'))"
    };
}
pub(super) use state;

/// How a session gets back what it began with, after code that is not ours. Prepared statements stay: the driver counts on
/// its own.
pub(super) const RESET: &str = "close all; unlisten *; set session authorization default; reset role; reset all;
    select pg_catalog.pg_advisory_unlock_all(); discard temp; discard sequences";

/// A session that may rest: it is ours, and we keep it.
const RESTS: (&str, &str) = ("idle_session_timeout", "0");

/// How one of our transactions begins behind a pooler: BEGIN with all of the settings that are not the session's.
pub(super) const BEGIN_POOLED: &str = "begin isolation level read committed;
     set local search_path = pg_catalog, pg_temp; set local plan_cache_mode = auto; set local statement_timeout = 0;
     set local lock_timeout = 0; set local idle_in_transaction_session_timeout = '60s'; set local row_security = on;
     set local standard_conforming_strings = on; set local transform_null_equals = off;
     set local intervalstyle = postgres; set local bytea_output = hex";

/// For a session whose statements look rows up by ids and transaction numbers alone, and are written for the one index that
/// can serve each. Where much is retained, PostgreSQL would make a plan anew at each execution: the estimate for unknown
/// values grows with the table. Where subscribers differ much in size, that is right.
pub(super) const KEEPS_PLANS: (&str, &str) = ("plan_cache_mode", "force_generic_plan");

/// Whose statements a session runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Ours alone.
    Ours,
    /// Those of handlers and users' reconcilers, too.
    Others,
}

/// The startup options of a session.
pub(super) fn at_startup(options: PgConnectOptions, whose: Whose, pooled: bool) -> PgConnectOptions {
    match (pooled, whose) {
        (true, _) => options,
        (false, Whose::Ours) => options.options(SETTINGS).options([RESTS]),
        (false, Whose::Others) => options.options([RESTS]),
    }
}

/// The startup options of a session that writes nothing, and whose statements end after so long.
pub(super) fn only_reading(options: PgConnectOptions, limit: Duration) -> PgConnectOptions {
    let limit = format!("{}ms", limit.as_millis().clamp(1, 1_000_000_000));
    options.options([("default_transaction_read_only", "on"), ("statement_timeout", &limit)])
}

/// What is known of the server behind a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// When it was started, which tells it from its successor.
    started: String,
}

/// Asks a new connection which server it leads to, and whether it has what it was opened with: a pooler that ignores
/// startup options would give the session to others in between, too.
pub(super) async fn check(
    connection: &mut PgConnection,
    whose: Whose,
    pooled: bool,
) -> Result<(Server, String), Error> {
    let row = sqlx::raw_sql(concat!(
        "select pg_catalog.current_setting('search_path'), pg_catalog.pg_postmaster_start_time()::pg_catalog.text, ",
        state!(),
    ))
    .fetch_one(&mut *connection)
    .await?;
    let path: String = row.try_get(0)?;
    if whose == Whose::Ours && !pooled && path != SEARCH_PATH {
        return Err(Error::Configuration(
            format!("the session does not have the startup option search_path{}", super::POOLED).into(),
        ));
    }
    if !pooled {
        no_transaction_timeout(connection, whose).await?;
    }
    Ok((Server { started: row.try_get(1)? }, row.try_get(2)?))
}

/// PostgreSQL 17 brought `transaction_timeout`. An older one refuses it as a startup option.
async fn no_transaction_timeout(connection: &mut PgConnection, whose: Whose) -> Result<(), Error> {
    let new = connection.server_version_num().is_some_and(|version| version >= 170_000);
    if new && whose == Whose::Ours {
        sqlx::raw_sql("set transaction_timeout = 0").execute(connection).await?;
    }
    Ok(())
}

/// A connection was lost, and the server to which a new one leads is another one, or was started again.
pub(super) fn another_server() -> Error {
    Error::Io(std::io::Error::new(
        std::io::ErrorKind::ConnectionReset,
        "PostgreSQL was started again, or another server answers in its place",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_behind_a_pooler_begins_with_the_same_settings() {
        for (name, value) in SETTINGS {
            let local = match name {
                "default_transaction_isolation" => format!("isolation level {value}"),
                name => format!("set local {name} = {value}"),
            };
            assert!(BEGIN_POOLED.replace('\'', "").contains(&local), "{local}");
        }
    }
}
