//! The server and its databases as a whole, for tests and the bench.

use sqlx::AssertSqlSafe;

use super::quoted;
use super::session::Session;
use crate::error::Error;

/// Makes an empty database.
#[cfg(all(unix, feature = "testing"))]
pub async fn create(connection: &mut Session, name: &str) -> Result<(), Error> {
    let sql = format!("create database {}", quoted(name));
    sqlx::query(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .map(std::mem::drop)
        .map_err(|error| super::database_error(format!("making the database {name} failed"), error))
}

/// Makes a database with what is in another one, to which nobody is connected.
pub async fn copy(connection: &mut Session, of: &str, name: &str) -> Result<(), Error> {
    sqlx::query(AssertSqlSafe(format!("create database {} template {}", quoted(name), quoted(of))))
        .execute(connection)
        .await
        .map(std::mem::drop)
        .map_err(|error| super::database_error(format!("making the database {name} failed"), error))
}

/// Removes a database, whoever is connected to it.
pub async fn drop(connection: &mut Session, name: &str) -> Result<(), Error> {
    let sql = format!("drop database if exists {} with (force)", quoted(name));
    sqlx::query(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .map(std::mem::drop)
        .map_err(|error| super::database_error(format!("removing the database {name} failed"), error))
}

/// The name that the server was started under.
#[cfg(all(unix, feature = "testing"))]
pub async fn cluster_name(connection: &mut Session) -> Result<String, Error> {
    sqlx::query_scalar("select current_setting('cluster_name')")
        .fetch_one(connection)
        .await
        .map_err(|error| super::database_error("reading the name of the server failed", error))
}
