//! Everything that speaks SQL. One module per concern; functions take a session or an open transaction.

pub mod attempt;
pub mod audit;
pub mod capture;
pub mod compare;
pub mod connections;
pub mod database;
pub mod dead_letter;
pub mod doctor;
pub mod erasure;
pub mod explain;
pub mod failure;
pub mod fence;
pub mod finding;
pub mod forget;
pub mod function;
pub mod handling;
pub mod identity;
pub mod inbox;
pub mod job;
pub mod job_work;
pub mod lease;
mod mark_row;
mod maybe;
pub mod migrate;
pub mod outbox_event;
pub mod parked;
pub mod parked_choice;
mod patience;
pub mod pause;
pub mod pins;
pub mod place;
pub mod prune;
pub mod reached;
pub mod reconcile;
pub mod reconcile_status;
pub mod redrive;
pub mod relay_log;
pub mod relay_status;
pub mod repair;
pub mod resend;
pub mod restamp;
pub mod rights;
pub mod running;
pub mod seal;
pub mod search;
pub mod sequence;
pub mod servers;
pub mod session;
pub mod snapshot;
pub mod start;
pub mod status;
pub mod subscriber;
pub mod sweep;
#[cfg(feature = "testing")]
pub mod testing;
pub mod time;
pub mod upkeep;
mod url;
pub mod walk;
pub mod window;
pub mod worker_status;

use std::error::Error as StdError;
use std::sync::Arc;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use sqlx::{ConnectOptions, PgConnection};

use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind, causes, on_one_line};
use aftercommit_outbox::schema::Schema;
use aftercommit_outbox::sqlstate::{self, POOLED, ROW_SECURITY};
use aftercommit_outbox::sqlx09::is_stale_plan as is_stale;
use pins::Whose;
use servers::Servers;
use session::Session;

/// Reads the URL, and what the environment adds to it. Nothing secret gets into the error.
pub fn options(config: &PostgresConfig, application: &str) -> Result<Servers, Error> {
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
pub struct Way {
    servers: Servers,
    /// Whether a pooler in transaction mode may stand in between.
    pooled: bool,
    whose: Whose,
    schema: Schema,
}

impl Way {
    fn new(servers: Servers, (pooled, schema): (bool, Schema), whose: Whose) -> Self {
        Self { servers: servers.map(|options| pins::at_startup(options, whose, pooled)), pooled, whose, schema }
    }

    fn of(config: &PostgresConfig, application: &str) -> Result<Self, Error> {
        let way = Self::new(options(config, application)?, (config.pooled, config.schema.clone()), Whose::Ours);
        match config.reading {
            None => Ok(way),
            Some(_) if config.pooled => Err(Error::new(
                ErrorKind::Config,
                "who only looks connects to PostgreSQL itself: a pooler in transaction mode does not let its sessions be read-only",
            )),
            Some(limit) => Ok(Self { servers: way.servers.map(|options| pins::only_reading(options, limit)), ..way }),
        }
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
        let (server, state, ends_with_client) = patience::heard(Some(url::CONNECT), checked).await?;
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
pub async fn connect_relay(config: &PostgresConfig, application: &str) -> Result<Session, Error> {
    let way = Way::of(config, application)?.keeping_plans();
    Session::open(Arc::new(way)).await.map_err(|error| database_error("cannot connect to PostgreSQL", error))
}

/// Opens one connection.
pub async fn connect(config: &PostgresConfig, application: &str) -> Result<Session, Error> {
    Session::open(Arc::new(Way::of(config, application)?))
        .await
        .map_err(|error| database_error("cannot connect to PostgreSQL", error))
}

/// An error of `doing`, without the server's DETAIL, which may hold a row's payload.
pub fn database_error(doing: impl Into<String>, error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(db) => {
            let (doing, code) = (doing.into(), db.code().unwrap_or_default());
            Error::new(ErrorKind::Database, sqlstate::told(&doing, &code, db.message()))
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
pub fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(db) => sqlstate::is_outage(&db.code().unwrap_or_default()),
        _ => false,
    }
}

/// Whether an error of a transaction may be one event's own doing as well as an outage: it says so of the statement, and the
/// session goes on. Full disks are not among them: no event is to blame for those.
pub fn is_doubtful(error: &sqlx::Error) -> bool {
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
pub fn ends_session(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(db) => db
            .try_downcast_ref::<PgDatabaseError>()
            .is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic)),
        _ => false,
    }
}

/// An error with its causes, on one line, without the server's DETAIL and without values, as a text column takes it.
pub fn describe(error: &(dyn StdError + 'static)) -> String {
    // What stands behind an error of the server is that error again.
    let server = causes(error).position(|cause| matches!(cause.downcast_ref(), Some(sqlx::Error::Database(_))));
    let causes = causes(error).take(server.map_or(usize::MAX, |at| at + 1));
    clip(&on_one_line(causes.map(|cause| cause.downcast_ref().map_or_else(|| cause.to_string(), message))))
}

/// The driver's error; of an error of the server only the message, without DETAIL and the place in its source.
pub fn message(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(database) if is_mixed_up(&**database) => format!("{}{POOLED}", database.message()),
        sqlx::Error::Database(database) => without_values(&**database),
        other => other.to_string(),
    }
}

/// The server's message, without values.
fn without_values(error: &dyn DatabaseError) -> String {
    sqlstate::without_values(&error.code().unwrap_or_default(), error.message())
}

/// A name as SQL takes it: between double quotes, which may hold anything but a double quote, which is doubled.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What fits into a log line and a text column.
pub fn clip(text: &str) -> String {
    text.chars().filter(|c| *c != '\0').take(2000).collect()
}

/// Whether somebody else's prepared statement was in our way, or ours was gone: it is not we alone who use this session
/// of the server.
pub fn is_mixed_up(error: &dyn DatabaseError) -> bool {
    sqlstate::is_mixed_up(&error.code().unwrap_or_default())
}

/// Whether PostgreSQL undid the transaction because of others that ran beside it (serialization failure, deadlock, a lock
/// that was not free in time, a table that was changed): the same again may well succeed.
pub fn is_conflict(error: &sqlx::Error) -> bool {
    let conflict = |db: &dyn DatabaseError| sqlstate::is_conflict(&db.code().unwrap_or_default());
    matches!(error, sqlx::Error::Database(db) if conflict(&**db)) || is_stale_plan(error)
}

/// Whether a prepared statement of this session no longer fits its tables. In another session it will.
pub fn is_stale_plan(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(db) if is_stale(&**db))
}
