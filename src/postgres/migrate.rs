//! The schema `aftercommit` and its migrations, kept in a table of their own beside the application's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::{Connection, PgConnection};

use crate::error::{Error, ErrorKind};

/// Where applied migrations are recorded.
const TABLE: &str = "aftercommit.migrations";

/// The key of the transaction-level lock that makes migrators wait for each other: "aftercom" in ASCII.
const LOCK: i64 = i64::from_be_bytes(*b"aftercom");

/// The table as sqlx makes it, for the printed script.
const CREATE_TABLE: &str = "create table if not exists aftercommit.migrations (
    version        bigint      primary key,
    description    text        not null,
    installed_on   timestamptz not null default now(),
    success        boolean     not null,
    checksum       bytea       not null,
    execution_time bigint      not null
);
";

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.create_schema(Cow::Borrowed("aftercommit"));
    migrator.dangerous_set_table_name(TABLE);
    // sqlx would take a lock of the session, which a connection pooler in transaction mode gives to others.
    migrator.set_locking(false);
    migrator
}

/// Applies what is missing, all or nothing, and returns the names of the migrations that were new.
pub(crate) async fn run(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    let failed = |error| super::database_error("migrating the schema aftercommit failed, nothing was changed", error);
    let migrator = migrator();
    let mut tx = connection.begin().await.map_err(failed)?;
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *tx).await.map_err(failed)?;
    let before = applied(&mut tx).await?;
    migrator.run(&mut *tx).await.map_err(migrate_error)?;
    tx.commit().await.map_err(failed)?;
    Ok(migrator.iter().filter(|migration| !before.contains(&migration.version)).map(name).collect())
}

/// The versions that are recorded. A schema without a record is somebody else's work, not ours to go on with.
async fn applied(connection: &mut PgConnection) -> Result<Vec<i64>, Error> {
    let failed = |error| super::database_error("looking for the migrations of aftercommit failed", error);
    let (table, outbox): (bool, bool) =
        sqlx::query_as("select to_regclass($1) is not null, to_regclass('aftercommit.outbox') is not null")
            .bind(TABLE)
            .fetch_one(&mut *connection)
            .await
            .map_err(failed)?;
    match (table, outbox) {
        (true, _) => {
            sqlx::query_scalar("select version from aftercommit.migrations").fetch_all(connection).await.map_err(failed)
        }
        (false, false) => Ok(Vec::new()),
        (false, true) => Err(Error::new(
            ErrorKind::NotReady,
            "the table aftercommit.outbox is there, but no record in aftercommit.migrations of how it came: go on with \
             the tool that made it, or run the parts of `aftercommit migrate --print` that write the record",
        )),
    }
}

/// How the recorded migrations differ from those that this version knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Names of those that are not applied yet.
    pub(crate) missing: Vec<String>,
    /// Versions that only a newer aftercommit knows.
    pub(crate) unknown: Vec<i64>,
    /// Versions that were applied with another text.
    pub(crate) changed: Vec<i64>,
}

/// Compares the record with what this version knows.
pub(crate) async fn difference(connection: &mut PgConnection) -> Result<Difference, sqlx::Error> {
    let mut recorded: BTreeMap<i64, Vec<u8>> =
        sqlx::query_as::<_, (i64, Vec<u8>)>("select version, checksum from aftercommit.migrations where success")
            .fetch_all(connection)
            .await?
            .into_iter()
            .collect();
    let mut difference = Difference::default();
    for migration in migrator().iter() {
        match recorded.remove(&migration.version) {
            None => difference.missing.push(name(migration)),
            Some(checksum) if checksum != *migration.checksum => difference.changed.push(migration.version),
            Some(_) => {}
        }
    }
    difference.unknown = recorded.into_keys().collect();
    Ok(difference)
}

fn name(migration: &Migration) -> String {
    format!("{:04} {}", migration.version, migration.description)
}

fn migrate_error(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            super::database_error("migrating the schema aftercommit failed, nothing was changed", error)
        }
        MigrateError::VersionMissing(version) => Error::new(
            ErrorKind::NotReady,
            format!(
                "the database has migration {version}, which this version of aftercommit does not know: use a newer one"
            ),
        ),
        MigrateError::VersionMismatch(version) => Error::new(
            ErrorKind::Integrity,
            format!("the database has another migration {version} than this version of aftercommit: it was changed"),
        ),
        other => Error::with_source(ErrorKind::Database, "migrating the schema aftercommit failed", other),
    }
}

/// All migrations with their record as one script, for other migration tools.
pub(crate) fn sql() -> String {
    let mut script = format!(
        "-- The schema of aftercommit {}. Run it in one transaction: psql --single-transaction -v ON_ERROR_STOP=1\n\
         -- Each part ends with its record, by which `aftercommit migrate` knows that it is there. A newer version\n\
         -- prints the same parts and further ones behind them.\n\n\
         create schema if not exists aftercommit;\n{CREATE_TABLE}",
        env!("CARGO_PKG_VERSION"),
    );
    for migration in migrator().iter() {
        let (version, description) = (migration.version, &migration.description);
        let sql = migration.sql.as_str();
        let checksum = hex(&migration.checksum);
        // A String takes everything that is written to it.
        let _ = write!(
            script,
            "\n-- {version:04} {description}\n{sql}\n\
             insert into {TABLE} (version, description, success, checksum, execution_time)\n\
             values ({version}, '{description}', true, '\\x{checksum}', 0);\n",
        );
    }
    script
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
