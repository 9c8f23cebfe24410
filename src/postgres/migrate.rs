//! The schema `aftercommit` and its migrations, kept in a table of their own beside the application's.

use std::borrow::Cow;

use sqlx::PgConnection;
use sqlx::migrate::{MigrateError, Migrator};

use crate::error::{Error, ErrorKind};

/// Where applied migrations are recorded.
const TABLE: &str = "aftercommit.migrations";

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.create_schema(Cow::Borrowed("aftercommit"));
    migrator.dangerous_set_table_name(TABLE);
    migrator
}

/// Applies what is missing and returns the names of the migrations that were new.
pub(crate) async fn run(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    let before = applied(connection).await?;
    migrator().run(&mut *connection).await.map_err(|error| match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            super::database_error("migrating the schema aftercommit failed, nothing of the failed step was kept", error)
        }
        MigrateError::VersionMissing(version) => Error::new(
            ErrorKind::NotReady,
            format!(
                "the database has migration {version}, which this version of aftercommit does not know: use a newer one"
            ),
        ),
        other => Error::with_source(ErrorKind::Database, "migrating the schema aftercommit failed", other),
    })?;
    Ok(migrator()
        .iter()
        .filter(|migration| !before.contains(&migration.version))
        .map(|migration| format!("{:04} {}", migration.version, migration.description))
        .collect())
}

/// The SQL of all migrations, for other migration tools.
pub(crate) fn sql() -> String {
    migrator()
        .iter()
        .map(|migration| format!("-- {:04} {}\n{}\n", migration.version, migration.description, migration.sql.as_str()))
        .collect()
}

async fn applied(connection: &mut PgConnection) -> Result<Vec<i64>, Error> {
    let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
        .bind(TABLE)
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| super::database_error("looking for the migration table failed", error))?;
    if !there {
        return Ok(Vec::new());
    }
    sqlx::query_scalar("select version from aftercommit.migrations where success")
        .fetch_all(connection)
        .await
        .map_err(|error| super::database_error("reading the migration table failed", error))
}
