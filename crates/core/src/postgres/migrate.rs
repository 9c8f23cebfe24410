//! The schema `aftercommit` and its migrations, kept in a table of their own beside the application's.
//!
//! An update happens while services publish, and they must not wait for it: not while it waits for a lock, because whoever
//! comes later waits behind it, and not while it has one. So
//!
//! - each migration is a transaction of its own, which waits for a lock for half a second at most, and is tried again a
//!   second later, until it succeeds;
//! - a migration takes its strongest lock on a table first, so that it waits once, and reads and writes no rows of the
//!   outbox: a constraint on rows that are there is `not valid`, an index belongs on a table that is small.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use sqlx::migrate::{Migration, Migrator};
use sqlx::{AssertSqlSafe, Executor, Row};

use super::session::{Session, Tx};
use crate::error::{Error, ErrorKind};
use aftercommit_outbox::schema::Schema;

/// Where applied migrations are recorded.
const TABLE: &str = "aftercommit.migrations";

/// The key of the transaction-level lock that makes migrators wait for each other: "aftercom" in ASCII.
const LOCK: i64 = i64::from_be_bytes(*b"aftercom");

/// As the first migration has it.
const CREATE_SCHEMA: &str = "create schema if not exists aftercommit;\n";

/// The same for an owner who may use the schema that an administrator has made, and may make none.
const MAKE_SCHEMA: &str = "do $$ begin
    if to_regnamespace('aftercommit') is null then create schema aftercommit; end if;
end $$;
";

/// What a script begins and ends with, so that it sees PostgreSQL's own functions, operators and types, and the tool that
/// runs it finds its search path as it was.
const PIN: &str =
    "select pg_catalog.set_config('aftercommit.search_path', pg_catalog.current_setting('search_path'), true),
       pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
       pg_catalog.set_config('standard_conforming_strings', 'on', true);
";
const UNPIN: &str = "
select pg_catalog.set_config('search_path', pg_catalog.current_setting('aftercommit.search_path'), true);
";

/// How long an update may wait for a lock, and with it everybody who comes later.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);
/// The time in between, for those who waited.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is said what is waited for.
const TELL: Duration = Duration::from_secs(10);

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

/// Applies what is missing and returns the names of the migrations that were new. A first migration is all or nothing.
///
/// Everything goes as simple queries, so it leaves no prepared statement and no lock behind in a session that a pooler
/// gives to others. That is why it is not sqlx's migrator that runs them.
pub async fn run(session: &mut Session) -> Result<Vec<String>, Error> {
    let mut new = Vec::new();
    let mut told: Option<Instant> = None;
    loop {
        let waiting = match step(session).await? {
            Step::Done => return Ok(new),
            Step::Applied(names) => {
                tracing::info!(migrations = names.join(", "), "applied");
                new.extend(names);
                continue;
            }
            Step::Waiting(whom) => whom,
        };
        let whom = blocking(session, waiting).await.unwrap_or_else(|error| super::message(&error));
        if told.is_none_or(|told| told.elapsed() >= TELL) {
            told = Some(Instant::now());
            tracing::warn!(what = waiting.what(), whom, "waiting; who publishes goes on meanwhile");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What came of one try.
enum Step {
    /// Nothing is missing any more.
    Done,
    /// These are there now.
    Applied(Vec<String>),
    Waiting(Waiting),
}

/// What is in the way.
#[derive(Debug, Clone, Copy)]
enum Waiting {
    /// Another session has the lock that migrators take.
    Migrator,
    /// A transaction has a table.
    Table,
}

impl Waiting {
    fn what(self) -> &'static str {
        match self {
            Self::Migrator => "the advisory lock of migrations, which another session holds",
            Self::Table => "a table of the schema, which another transaction holds",
        }
    }
}

/// Applies the first migration that is missing, or all of them to a database that has none.
async fn step(session: &mut Session) -> Result<Step, Error> {
    let schema = session.schema().clone();
    let doing = format!("migrating the schema {schema} failed, nothing was changed");
    let failed = |error| super::database_error(doing.as_str(), error);
    let limit = format!("; set local lock_timeout = {}", LOCK_TIMEOUT.as_millis());
    let mut tx = session.begin_and(&limit).await.map_err(failed)?;
    let row = tx.fetch_one(AssertSqlSafe(format!("select pg_try_advisory_xact_lock({LOCK})"))).await;
    if !row.and_then(|row| row.try_get(0)).map_err(failed)? {
        tx.rollback().await.map_err(failed)?;
        return Ok(Step::Waiting(Waiting::Migrator));
    }
    let applied = applied(&mut tx, &schema).await?;
    let mut missing = missing(&migrations(), &applied)?;
    if missing.is_empty() {
        tx.rollback().await.map_err(failed)?;
        return Ok(Step::Done);
    }
    let mut script = String::new();
    if applied.is_empty() {
        script = format!("{MAKE_SCHEMA}{CREATE_TABLE}");
    } else {
        missing.truncate(1);
    }
    script.extend(missing.iter().map(with_record));
    match tx.execute(AssertSqlSafe(script)).await {
        Ok(_) => tx.commit().await.map_err(failed)?,
        Err(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("55P03" | "40P01")) => {
            tx.rollback().await.map_err(failed)?;
            return Ok(Step::Waiting(Waiting::Table));
        }
        Err(error) => {
            let names: Vec<String> = missing.iter().map(name).collect();
            let names = names.join(", ");
            return Err(super::database_error(format!("{doing} by {names}"), error));
        }
    }
    Ok(Step::Applied(missing.iter().map(name).collect()))
}

/// Who is in the way, as far as the role may see it.
async fn blocking(session: &mut Session, waiting: Waiting) -> Result<String, sqlx::Error> {
    let condition = match waiting {
        Waiting::Migrator => format!(
            "l.locktype = 'advisory' and l.classid = {} and l.objid = {} and l.objsubid = 1",
            LOCK >> 32,
            LOCK & 0xffff_ffff
        ),
        Waiting::Table => "l.locktype = 'relation' and l.relation in (
             select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'aftercommit')"
            .into(),
    };
    let mut tx = session.begin().await?;
    let row = tx
        .fetch_optional(AssertSqlSafe(format!(
            "select format('pid %s, role %s, application %s%s%s', l.pid, coalesce(a.usename, '?'),
                           coalesce(nullif(a.application_name, ''), '?'), ', ' || a.state,
                           ', in a transaction since ' || date_trunc('second', a.xact_start))
               from pg_locks l left join pg_stat_activity a on a.pid = l.pid
              where {condition} and l.granted and l.pid is distinct from pg_backend_pid()
                and l.database = (select oid from pg_database where datname = current_database())
              order by a.xact_start nulls last, l.pid limit 1"
        )))
        .await?;
    tx.rollback().await?;
    row.map_or(Ok("nobody any more".into()), |row| row.try_get(0))
}

fn name(migration: &Migration) -> String {
    format!("{:04} {}", migration.version, migration.description)
}

/// Whether the table of that name has the columns of a record that is read here, for a row `c` of `pg_class`.
macro_rules! is_record {
    () => {
        "(select count(*) = 2 from pg_attribute a
           where a.attrelid = c.oid and not a.attisdropped
             and (a.attname, a.atttypid) in (('version', 'bigint'::regtype), ('checksum', 'bytea'::regtype)))"
    };
}
pub(super) use is_record;

/// The versions that are recorded, each with its checksum. A schema without a record is somebody else's work, not ours
/// to go on with, and neither is one whose table `migrations` is another program's.
async fn applied(tx: &mut Tx<'_>, schema: &Schema) -> Result<BTreeMap<i64, Vec<u8>>, Error> {
    let failed = |error| super::database_error("looking for the migrations of aftercommit failed", error);
    let row = tx
        .fetch_one(AssertSqlSafe(format!(
            "select (select {} from pg_class c where c.oid = to_regclass('{TABLE}')), to_regclass('aftercommit.outbox') is not null",
            is_record!()
        )))
        .await
        .map_err(failed)?;
    match (row.try_get::<Option<bool>, _>(0).map_err(failed)?, row.try_get(1).map_err(failed)?) {
        (Some(true), outbox) => {
            let rows = tx.fetch_all(AssertSqlSafe(format!("select version, checksum from {TABLE}"))).await.map_err(failed)?;
            let recorded = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let recorded: BTreeMap<i64, Vec<u8>> = recorded.collect::<Result<_, sqlx::Error>>().map_err(failed)?;
            match outbox || recorded.is_empty() {
                true => Ok(recorded),
                false => Err(foreign(schema, "has entries although there is no table aftercommit.outbox")),
            }
        }
        (Some(false), _) => Err(foreign(schema, "does not have its columns `version bigint` and `checksum bytea`")),
        (None, false) => Ok(BTreeMap::new()),
        (None, true) => Err(Error::new(
            ErrorKind::NotReady,
            schema.sql(
                "the table aftercommit.outbox is there, but no record in aftercommit.migrations of how it came: go on with \
             the tool that made it, or run the parts of `aftercommit migrate --print` that write the record",
            ),
        )),
    }
}

/// The schema's table `migrations` is another program's, as it shows.
fn foreign(schema: &Schema, shows: &str) -> Error {
    let problem = format!(
        "schema {schema}: the table aftercommit.migrations is not aftercommit's record of migrations: it {shows}. \
         Nothing was changed. Give aftercommit a schema of its own with --schema (AFTERCOMMIT_SCHEMA)"
    );
    Error::new(ErrorKind::NotReady, schema.sql(&problem))
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
            format!(
                "migration {version} in the database differs from this version's copy: it was edited after it was applied"
            ),
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
pub struct Difference {
    /// Names of those that are not applied yet.
    pub missing: Vec<String>,
    /// Versions that only a newer aftercommit knows.
    pub unknown: Vec<i64>,
    /// Versions that were applied with another text.
    pub changed: Vec<i64>,
}

/// Compares the record with what this version knows.
pub async fn difference(session: &mut Session) -> Result<Difference, sqlx::Error> {
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
pub fn sql(schema: &Schema) -> String {
    let mut script = format!(
        "-- The schema of aftercommit {}. Run it in one transaction: psql --single-transaction -v ON_ERROR_STOP=1\n\
         -- Each part ends with its record, by which `aftercommit migrate` knows that it is there. A newer version\n\
         -- prints the same parts and further ones behind them.\n\n\
         {PIN}{MAKE_SCHEMA}{CREATE_TABLE}{UNPIN}",
        env!("CARGO_PKG_VERSION"),
    );
    for migration in migrations().iter() {
        let Migration { version, description, .. } = migration;
        // A String takes everything that is written to it.
        let _ = write!(script, "\n-- {version:04} {description}\n{PIN}{}{UNPIN}", with_record(migration));
    }
    schema.sql(&script).into_owned()
}

/// A migration's SQL, and behind it what records it. The schema is there by then.
fn with_record(migration: &Migration) -> String {
    let Migration { version, description, .. } = migration;
    format!(
        "{}\ninsert into {TABLE} (version, description, success, checksum, execution_time)\n\
         values ({version}, '{description}', true, '\\x{}', 0);\n",
        migration.sql.as_str().replacen(CREATE_SCHEMA, "", 1),
        hex(&migration.checksum),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
