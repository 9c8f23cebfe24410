//! Everything that speaks SQL. One module per concern; functions take a session or an open transaction.

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
pub(crate) mod finding;
pub(crate) mod function;
pub(crate) mod inbox;
pub(crate) mod lease;
pub(crate) mod migrate;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod pause;
pub(crate) mod place;
pub(crate) mod prune;
pub(crate) mod questions;
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
pub(crate) mod session;
pub(crate) mod snapshot;
pub(crate) mod status;
#[cfg(feature = "testing")]
pub(crate) mod testing;
pub(crate) mod window;

use std::error::Error as StdError;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use sqlx::error::DatabaseError;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};

use crate::config::{PostgresConfig, read_file};
use crate::error::{Error, ErrorKind, causes, on_one_line};
use session::Session;

/// Reads the URL. The password stays out of the error.
pub(crate) fn options(config: &PostgresConfig, application: &str) -> Result<PgConnectOptions, Error> {
    if config.url.is_empty() {
        return Err(Error::new(
            ErrorKind::Config,
            "no database is named: set DATABASE_URL or --database-url to postgres://user@host/database",
        ));
    }
    check_files(&config.url)?;
    PgConnectOptions::from_str(&config.url)
        .map(|options| options.application_name(application).disable_statement_logging())
        .map(|options| match config.pooled {
            // PgBouncer refuses to set what it does not watch, and nothing here needs it. Without the cache a handler's
            // statement that kept its name is prepared anew, and refused, rather than mistaken for somebody else's.
            true => options.extra_float_digits(None).statement_cache_capacity(0),
            false => options,
        })
        .map_err(|_| {
            Error::new(
                ErrorKind::Config,
                "DATABASE_URL is not a URL of the form postgres://user:password@host:5432/database",
            )
        })
}

/// Checks the files that the URL's TLS parameters name, because the driver's errors do not name them, and refuses the
/// passphrase of a key, because the driver would ignore it and write it to the log.
fn check_files(url: &str) -> Result<(), Error> {
    let Some((_, parameters)) = url.split_once('?') else { return Ok(()) };
    for (name, value) in parameters.split('&').filter_map(|parameter| parameter.split_once('=')) {
        let value = percent_decode_str(value).decode_utf8_lossy();
        match name {
            "sslrootcert" | "sslcert" | "sslkey" if !value.starts_with("-----BEGIN") => {
                read_file(Path::new(&*value), &format!("{name} in DATABASE_URL"))?;
            }
            "sslpassword" => {
                return Err(Error::new(
                    ErrorKind::Config,
                    "sslpassword in DATABASE_URL is not supported: use a key file without a passphrase",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// How long to wait for a server that does not even refuse.
const CONNECT: Duration = Duration::from_secs(10);

async fn open(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    let late = |_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()));
    tokio::time::timeout(CONNECT, options.connect()).await.unwrap_or_else(late)
}

/// Opens one connection.
pub(crate) async fn connect(config: &PostgresConfig, application: &str) -> Result<Session, Error> {
    open(&options(config, application)?)
        .await
        .map(|connection| Session::new(connection, config.pooled))
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
                // A schema, a table or a column that is not there.
                Some("3F000" | "42P01" | "42703") => {
                    " (is the schema there, and up to date? run `aftercommit migrate`)"
                }
                Some("42501") => " (the role lacks a grant)",
                _ if is_mixed_up(&*db) || db.message().contains("startup parameter") => POOLED,
                _ => "",
            };
            let code = db.code().unwrap_or_default().into_owned();
            Error::new(ErrorKind::Database, format!("{doing}: {} [{code}]{hint}", without_values(&*db)))
        }
        other => Error::with_source(ErrorKind::Database, format!("{}{}", doing.into(), tls_hint(&other)), other),
    }
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

/// Whether PostgreSQL undid the transaction because of others that ran beside it (serialization failure, deadlock):
/// the same again may well succeed.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(db) if matches!(db.code().as_deref(), Some("40001" | "40P01")))
}
