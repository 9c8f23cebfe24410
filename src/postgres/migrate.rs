//! The schema `aftercommit` and its migrations, kept in a table of their own beside the application's.

use std::collections::BTreeMap;
use std::fmt::Write;

use sqlx::migrate::{Migration, Migrator};
use sqlx::{AssertSqlSafe, Executor, Row};

use super::session::{Session, Tx};
use crate::error::{Error, ErrorKind};

/// Where applied migrations are recorded.
const TABLE: &str = "aftercommit.migrations";

/// The key of the transaction-level lock that makes migrators wait for each other: "aftercom" in ASCII.
const LOCK: i64 = i64::from_be_bytes(*b"aftercom");

const CREATE_SCHEMA: &str = "create schema if not exists aftercommit;\n";

/// The record, as sqlx's own tools know it.
const CREATE_TABLE: &str = "create table if not exists aftercommit.migrations (
    version        bigint      primary key,
    description    text        not null,
    installed_on   timestamptz not null default now(),
    success        boolean     not null,
    checksum       bytea       not null,
    execution_time bigint      not null
);
";

/// All migrations, in order.
fn migrations() -> Migrator {
    sqlx::migrate!()
}

/// Applies what is missing, all or nothing, and returns the names of the migrations that were new.
///
/// Everything goes as simple queries in one transaction, so it leaves no prepared statement and no lock behind in a
/// session that a pooler gives to others. That is why it is not sqlx's migrator that runs them.
pub(crate) async fn run(session: &mut Session) -> Result<Vec<String>, Error> {
    let failed = |error| super::database_error("migrating the schema aftercommit failed, nothing was changed", error);
    let mut tx = session.begin().await.map_err(failed)?;
    tx.execute(AssertSqlSafe(format!("select pg_advisory_xact_lock({LOCK})"))).await.map_err(failed)?;
    let applied = applied(&mut tx).await?;
    let missing = missing(&migrations(), &applied)?;
    if applied.is_empty() {
        tx.execute(AssertSqlSafe(format!("{CREATE_SCHEMA}{CREATE_TABLE}"))).await.map_err(failed)?;
    }
    for migration in &missing {
        tx.execute(AssertSqlSafe(with_record(migration))).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)?;
    Ok(missing.iter().map(name).collect())
}

fn name(migration: &Migration) -> String {
    format!("{:04} {}", migration.version, migration.description)
}

/// The versions that are recorded, each with its checksum. A schema without a record is somebody else's work, not ours
/// to go on with.
async fn applied(tx: &mut Tx<'_>) -> Result<BTreeMap<i64, Vec<u8>>, Error> {
    let failed = |error| super::database_error("looking for the migrations of aftercommit failed", error);
    let row = tx
        .fetch_one(AssertSqlSafe(format!(
            "select to_regclass('{TABLE}') is not null, to_regclass('aftercommit.outbox') is not null"
        )))
        .await
        .map_err(failed)?;
    match (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?) {
        (true, _) => tx
            .fetch_all(AssertSqlSafe(format!("select version, checksum from {TABLE}")))
            .await
            .and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect())
            .map_err(failed),
        (false, false) => Ok(BTreeMap::new()),
        (false, true) => Err(Error::new(
            ErrorKind::NotReady,
            "the table aftercommit.outbox is there, but no record in aftercommit.migrations of how it came: go on with \
             the tool that made it, or run the parts of `aftercommit migrate --print` that write the record",
        )),
    }
}

/// The migrations that are still to come. Those that are recorded must be the same. What a newer version has added behind
/// all of ours is none of our business: in an update the older one runs beside it.
fn missing(known: &Migrator, applied: &BTreeMap<i64, Vec<u8>>) -> Result<Vec<Migration>, Error> {
    let changed = |migration: &&Migration| {
        applied.get(&migration.version).is_some_and(|checksum| checksum.as_slice() != &*migration.checksum)
    };
    if let Some(Migration { version, .. }) = known.iter().find(changed) {
        return Err(Error::new(
            ErrorKind::Integrity,
            format!("the database has another migration {version} than this version of aftercommit: it was changed"),
        ));
    }
    let missing: Vec<Migration> =
        known.iter().filter(|migration| !applied.contains_key(&migration.version)).cloned().collect();
    let last = known.iter().map(|migration| migration.version).max().unwrap_or_default();
    let unknown = applied.keys().find(|version| !known.version_exists(**version));
    match unknown {
        Some(version) if *version < last || !missing.is_empty() => Err(Error::new(
            ErrorKind::NotReady,
            format!(
                "the database has migration {version}, which this version of aftercommit does not know, but lacks others \
                 or has newer ones: use a newer version"
            ),
        )),
        _ => Ok(missing),
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
pub(crate) async fn difference(session: &mut Session) -> Result<Difference, sqlx::Error> {
    let rows =
        sqlx::query("select version, checksum from aftercommit.migrations where success").fetch_all(session).await?;
    let mut recorded = BTreeMap::new();
    for row in &rows {
        recorded.insert(row.try_get::<i64, _>(0)?, row.try_get::<Vec<u8>, _>(1)?);
    }
    let mut difference = Difference::default();
    for migration in migrations().iter() {
        match recorded.remove(&migration.version) {
            None => difference.missing.push(name(migration)),
            Some(checksum) if checksum != *migration.checksum => difference.changed.push(migration.version),
            Some(_) => {}
        }
    }
    difference.unknown = recorded.into_keys().collect();
    Ok(difference)
}

/// All migrations with their record as one script, for other migration tools.
pub(crate) fn sql() -> String {
    let mut script = format!(
        "-- The schema of aftercommit {}. Run it in one transaction: psql --single-transaction -v ON_ERROR_STOP=1\n\
         -- Each part ends with its record, by which `aftercommit migrate` knows that it is there. A newer version\n\
         -- prints the same parts and further ones behind them.\n\n\
         {CREATE_SCHEMA}{CREATE_TABLE}",
        env!("CARGO_PKG_VERSION"),
    );
    for migration in migrations().iter() {
        // A String takes everything that is written to it.
        let _ = write!(script, "\n-- {:04} {}\n{}", migration.version, migration.description, with_record(migration));
    }
    script
}

/// A migration's SQL, and behind it what records it.
fn with_record(migration: &Migration) -> String {
    let Migration { version, description, .. } = migration;
    format!(
        "{}\ninsert into {TABLE} (version, description, success, checksum, execution_time)\n\
         values ({version}, '{description}', true, '\\x{}', 0);\n",
        migration.sql.as_str(),
        hex(&migration.checksum),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
