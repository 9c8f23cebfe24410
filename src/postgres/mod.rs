//! Everything that speaks SQL. One module per concern; functions take a connection or an open transaction.

pub(crate) mod connections;
#[cfg(all(unix, feature = "testing"))]
pub(crate) mod database;
pub(crate) mod dead_letter;
pub(crate) mod doctor;
pub(crate) mod function;
pub(crate) mod inbox;
pub(crate) mod lease;
pub(crate) mod migrate;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod pause;
pub(crate) mod prune;
pub(crate) mod relay_log;
pub(crate) mod relay_status;
pub(crate) mod snapshot;
pub(crate) mod status;
pub(crate) mod window;

use std::path::Path;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};

use crate::config::{PostgresConfig, read_file};
use crate::error::{Error, ErrorKind};

/// Reads the URL. The password stays out of the error.
fn options(config: &PostgresConfig, application: &str) -> Result<PgConnectOptions, Error> {
    if config.url.is_empty() {
        return Err(Error::new(
            ErrorKind::Config,
            "no database is named: set DATABASE_URL or --database-url to postgres://user@host/database",
        ));
    }
    check_files(&config.url)?;
    PgConnectOptions::from_str(&config.url)
        .map(|options| options.application_name(application).disable_statement_logging())
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

/// Opens one connection.
pub(crate) async fn connect(config: &PostgresConfig, application: &str) -> Result<PgConnection, Error> {
    options(config, application)?.connect().await.map_err(|error| database_error("cannot connect to PostgreSQL", error))
}

/// An error of `doing`, without the server's DETAIL, which may hold a row's payload.
pub(crate) fn database_error(doing: impl Into<String>, error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(db) => {
            let doing = doing.into();
            let hint = match db.code().as_deref() {
                Some("3F000" | "42P01") => " (is the schema there? run `aftercommit migrate`)",
                Some("42501") => " (the role lacks a grant)",
                _ => "",
            };
            let code = db.code().unwrap_or_default().into_owned();
            Error::new(ErrorKind::Database, format!("{doing}: {} [{code}]{hint}", db.message()))
        }
        other => Error::with_source(ErrorKind::Database, doing, other),
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

/// Whether PostgreSQL undid the transaction because of others that ran beside it (serialization failure, deadlock):
/// the same again may well succeed.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(db) if matches!(db.code().as_deref(), Some("40001" | "40P01")))
}
