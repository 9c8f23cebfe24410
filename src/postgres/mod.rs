//! Everything that speaks SQL. One module per concern; functions take a session or an open transaction.

pub(crate) mod attempt;
pub(crate) mod audit;
#[cfg(feature = "cli")]
pub(crate) mod bench;
#[cfg(feature = "cli")]
pub(crate) mod bench_publish;
#[cfg(feature = "cli")]
pub(crate) mod bench_work;
pub(crate) mod compare;
pub(crate) mod connections;
#[cfg(any(feature = "cli", all(unix, feature = "testing")))]
pub(crate) mod database;
pub(crate) mod dead_letter;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod failure;
pub(crate) mod fence;
pub(crate) mod finding;
pub(crate) mod function;
pub(crate) mod handling;
pub(crate) mod identity;
pub(crate) mod inbox;
pub(crate) mod lease;
pub(crate) mod migrate;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod parked_choice;
pub(crate) mod pause;
pub(crate) mod pins;
pub(crate) mod place;
pub(crate) mod prune;
pub(crate) mod questions;
pub(crate) mod reached;
pub(crate) mod reconcile;
pub(crate) mod reconcile_status;
pub(crate) mod redrive;
pub(crate) mod relay_log;
pub(crate) mod relay_status;
pub(crate) mod repair;
pub(crate) mod resend;
pub(crate) mod restamp;
pub(crate) mod rights;
pub(crate) mod running;
pub(crate) mod sequence;
pub(crate) mod servers;
pub(crate) mod session;
pub(crate) mod snapshot;
pub(crate) mod start;
pub(crate) mod status;
pub(crate) mod subscriber;
#[cfg(feature = "testing")]
pub(crate) mod testing;
pub(crate) mod time;
mod url;
pub(crate) mod walk;
pub(crate) mod window;
pub(crate) mod worker_status;

use std::error::Error as StdError;
use std::sync::Arc;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use sqlx::{ConnectOptions, PgConnection};

use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind, causes, on_one_line};
use pins::Whose;
use servers::Servers;
use session::Session;

/// Reads the URL, and what the environment adds to it. Nothing secret gets into the error.
pub(crate) fn options(config: &PostgresConfig, application: &str) -> Result<Servers, Error> {
    if config.url.is_empty() {
        return Err(Error::new(
            ErrorKind::Config,
            "no database is named: set DATABASE_URL or --database-url to postgres://user@host/database",
        ));
    }
    let servers = url::read(&config.url, &|name| std::env::var(name).ok())?;
    servers.warn_of_clear_text();
    Ok(servers.map(|options| {
        let options = match options.get_application_name() {
            Some("") | None => options.application_name(application),
            Some(_) => options,
        };
        match config.pooled {
            // PgBouncer refuses to set what it does not watch, and nothing here needs it. Without the cache a handler's
            // statement that kept its name is prepared anew, and refused, rather than mistaken for somebody else's.
            true => options.extra_float_digits(None).statement_cache_capacity(0),
            false => options,
        }
        .disable_statement_logging()
    }))
}

/// The way to a database for sessions of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    servers: Servers,
    /// Whether a pooler in transaction mode may stand in between.
    pooled: bool,
    whose: Whose,
}

impl Way {
    fn new(servers: Servers, pooled: bool, whose: Whose) -> Self {
        Self { servers: servers.map(|options| pins::at_startup(options, whose, pooled)), pooled, whose }
    }

    /// The same for sessions that keep one plan for each statement. A pooler keeps none.
    fn keeping_plans(self) -> Self {
        match self.pooled {
            true => self,
            false => Self { servers: self.servers.map(|options| options.options([pins::KEEPS_PLANS])), ..self },
        }
    }

    /// Opens a connection.
    async fn open(&self) -> Result<Opened, sqlx::Error> {
        let mut connection = self.servers.connect().await?;
        let checked = async {
            let (server, state) = pins::check(&mut connection, self.whose, self.pooled).await?;
            let ends_with_client = !self.pooled && session::end_with_client(&mut connection).await?;
            Ok((server, state, ends_with_client))
        };
        let (server, state, ends_with_client) = session::heard(Some(url::CONNECT), checked).await?;
        Ok(Opened { connection, server, state, ends_with_client })
    }
}

/// A new connection, and what is known of it.
#[derive(Debug)]
struct Opened {
    connection: PgConnection,
    server: pins::Server,
    /// What it begins with: see [`handling`].
    state: String,
    /// Whether the server ends a statement whose client is gone.
    ends_with_client: bool,
}

/// Opens one connection for a relay, whose statements keep their plans.
pub(crate) async fn connect_relay(config: &PostgresConfig, application: &str) -> Result<Session, Error> {
    let way = Way::new(options(config, application)?, config.pooled, Whose::Ours).keeping_plans();
    Session::open(Arc::new(way)).await.map_err(|error| database_error("cannot connect to PostgreSQL", error))
}

/// Opens one connection.
pub(crate) async fn connect(config: &PostgresConfig, application: &str) -> Result<Session, Error> {
    Session::open(Arc::new(Way::new(options(config, application)?, config.pooled, Whose::Ours)))
        .await
        .map_err(|error| database_error("cannot connect to PostgreSQL", error))
}

/// The way out for a connection that turns out to be no session of its own.
pub(crate) const POOLED: &str = " (is it PgBouncer that answers? set AFTERCOMMIT_PGBOUNCER=true or --pgbouncer, in code \
    PostgresConfig::pooled; outbox::set_pooled where events are published; .persistent(false) in handlers' queries)";

/// An error of `doing`, without the server's DETAIL, which may hold a row's payload.
pub(crate) fn database_error(doing: impl Into<String>, error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(db) => {
            let doing = doing.into();
            let hint = match db.code().as_deref() {
                // A schema, a table, a column or a function that is not there.
                Some("3F000" | "42P01" | "42703" | "42883") => {
                    " (is the schema there, and up to date? run `aftercommit migrate`)"
                }
                Some("42501") if db.message().contains("row-level security") => ROW_SECURITY,
                Some("42501") => " (the role lacks a grant)",
                _ if is_mixed_up(&*db) || db.message().contains("startup parameter") => POOLED,
                _ => "",
            };
            let code = db.code().unwrap_or_default().into_owned();
            Error::new(ErrorKind::Database, format!("{doing}: {} [{code}]{hint}", without_values(&*db)))
        }
        // Each statement of ours that asks for one row is about one that is always there.
        sqlx::Error::RowNotFound => Error::with_source(
            ErrorKind::Database,
            format!("{}: a row that must be there is not to be seen{ROW_SECURITY}", doing.into()),
            sqlx::Error::RowNotFound,
        ),
        other => Error::with_source(ErrorKind::Database, format!("{}{}", doing.into(), tls_hint(&other)), other),
    }
}

/// Whether a table or schema is not there.
fn is_undefined(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("3F000" | "42P01"))
}

/// The way out where row-level security stands between a role and rows that it has a grant for.
const ROW_SECURITY: &str = " (does row-level security hide it from this role, because something turned it on? run \
    deploy/postgres/roles.sql, which makes the policies)";

/// Where to look when TLS with the server failed.
fn tls_hint(error: &sqlx::Error) -> &'static str {
    if !matches!(error, sqlx::Error::Io(_) | sqlx::Error::Tls(_)) {
        return "";
    }
    let text = error.to_string();
    if text.contains("peer certificate") {
        " (is the server's certificate valid, and from an authority in sslrootcert of DATABASE_URL or PGSSLROOTCERT?)"
    } else if text.contains("fatal alert") {
        " (does the server take the certificate in sslcert of DATABASE_URL or PGSSLCERT?)"
    } else if matches!(error, sqlx::Error::Tls(_)) {
        " (sslmode in DATABASE_URL or PGSSLMODE demands TLS)"
    } else {
        ""
    }
}

/// Whether an error says that the server or the way to it is in trouble, rather than that the statement was wrong.
/// Such an error is waited out; it is no failure of an event.
///
/// SQLSTATE classes from the PostgreSQL documentation, appendix A: 08 connection exception, 53 insufficient resources,
/// 57P operator intervention (shutdown, crash, cannot connect now), 58 system error, 25006 read-only (a former primary).
pub(crate) fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(db) => {
            let code = db.code().unwrap_or_default();
            code.starts_with("08")
                || code.starts_with("53")
                || code.starts_with("57P")
                || code.starts_with("58")
                || code == "25006"
        }
        _ => false,
    }
}

/// Whether an error of a transaction may be one event's own doing as well as an outage: it says so of the statement, and the
/// session goes on. Full disks are not among them: no event is to blame for those.
pub(crate) fn is_doubtful(error: &sqlx::Error) -> bool {
    match error {
        // Such as more parameters than the protocol has room for.
        sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(db) => {
            let code = db.code();
            let full = matches!(code.as_deref(), Some("53100" | "58030"));
            !full && !ends_session(error) && (is_mixed_up(&**db) || is_outage(error))
        }
        _ => false,
    }
}

/// Whether the session is over with this error.
pub(crate) fn ends_session(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(db) => db
            .try_downcast_ref::<PgDatabaseError>()
            .is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic)),
        _ => false,
    }
}

/// An error with its causes, on one line, without the server's DETAIL and without values, as a text column takes it.
pub(crate) fn describe(error: &(dyn StdError + 'static)) -> String {
    // What stands behind an error of the server is that error again.
    let server = causes(error).position(|cause| matches!(cause.downcast_ref(), Some(sqlx::Error::Database(_))));
    let causes = causes(error).take(server.map_or(usize::MAX, |at| at + 1));
    clip(&on_one_line(causes.map(|cause| cause.downcast_ref().map_or_else(|| cause.to_string(), message))))
}

/// The driver's error; of an error of the server only the message, without DETAIL and the place in its source.
pub(crate) fn message(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(database) if is_mixed_up(&**database) => format!("{}{POOLED}", database.message()),
        sqlx::Error::Database(database) => without_values(&**database),
        other => other.to_string(),
    }
}

/// The server's message. That of a value that does not fit (SQLSTATE class 22) quotes the value, which may be a part of a
/// payload, so it is left out.
fn without_values(error: &dyn DatabaseError) -> String {
    let message = error.message();
    let quotes = message.find(['"', '«', '„', '“']).zip(message.rfind(['"', '»', '“', '”']));
    match quotes {
        Some((first, last)) if first < last && error.code().is_some_and(|code| code.starts_with("22")) => {
            format!("{}…{}", &message[..first], message[last..].trim_start_matches(['"', '»', '“', '”']))
        }
        _ => message.to_string(),
    }
}

/// What fits into a log line and a text column.
pub(crate) fn clip(text: &str) -> String {
    text.chars().filter(|c| *c != '\0').take(2000).collect()
}

/// Whether somebody else's prepared statement was in our way, or ours was gone: it is not we alone who use this session
/// of the server.
pub(crate) fn is_mixed_up(error: &dyn DatabaseError) -> bool {
    matches!(error.code().as_deref(), Some("42P05" | "26000"))
}

/// Whether PostgreSQL undid the transaction because of others that ran beside it (serialization failure, deadlock, a lock
/// that was not free in time, a table that was changed): the same again may well succeed.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    let conflict = |db: &dyn DatabaseError| matches!(db.code().as_deref(), Some("40001" | "40P01" | "55P03"));
    matches!(error, sqlx::Error::Database(db) if conflict(&**db)) || is_stale_plan(error)
}

/// Whether a prepared statement of this session no longer fits its tables. In another session it will.
pub(crate) fn is_stale_plan(error: &sqlx::Error) -> bool {
    let stale = |db: &dyn DatabaseError| {
        db.code().as_deref() == Some("0A000")
            && db.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::routine)
                == Some("RevalidateCachedQuery")
    };
    matches!(error, sqlx::Error::Database(db) if stale(&**db))
}
