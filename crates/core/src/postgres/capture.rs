//! Captures: the functions that install, check and remove triggers. All that they do is SQL; this calls them, on the connection
//! of whoever owns the table.

use serde::Serialize;
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};

use aftercommit_outbox::schema::Schema;

/// What `aftercommit.capture()` is asked for.
#[derive(Debug, Clone)]
pub struct Arguments<'a> {
    /// The table, named as in SQL.
    pub table: &'a str,
    /// What the events' types begin with.
    pub event_type: &'a str,
    /// The columns of the ordering key, as the caller named them; none for the primary key.
    pub key: Option<&'a str>,
    /// The columns that events carry; none for all that may be.
    pub columns: Option<&'a [String]>,
    /// An update is told only when one of these changed; none for `columns`.
    pub watch: Option<&'a [String]>,
    /// Whether updates carry the old values, too.
    pub old: bool,
    /// Headers: a text, or `{"column": name}`.
    pub headers: Value,
    /// `insert`, `update`, `delete`.
    pub operations: &'a [&'static str],
    /// Columns that look like secrets and are captured all the same.
    pub allow: &'a [String],
    /// `fail`, `truncate-columns` or `key-only`.
    pub oversize: &'static str,
    /// Whether the triggers fire in sessions that play a replica, too.
    pub always: bool,
}

/// A table whose changes become events.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct Captured {
    /// The table, as SQL names it.
    pub table: String,
    /// What the events' types begin with.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub event_type: String,
    /// The columns of the ordering key.
    #[sqlx(json)]
    pub key: Vec<String>,
    /// The columns that events carry.
    #[sqlx(json)]
    pub columns: Vec<String>,
    /// The columns of which one must change for an update to be published.
    #[sqlx(json)]
    pub watch: Vec<String>,
    /// Whether updates carry the old values, too.
    pub old: bool,
    /// The headers, as they were given.
    #[sqlx(json)]
    pub headers: Value,
    /// The operations: `insert`, `update`, `delete`.
    #[sqlx(rename = "on", json)]
    #[serde(rename = "on")]
    pub operations: Vec<String>,
    /// What happens to an event that is too large.
    pub oversize: String,
    /// Whether sessions with `session_replication_role = replica` are captured, too.
    pub always: bool,
    /// The version of the generator that made the function.
    pub version: i32,
    /// The function that the triggers call.
    pub function: String,
    /// The SQL that captures the table in this way; none when the table is gone.
    pub call: Option<String>,
}

/// How a capture compares with its table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct Checked {
    /// The table, as SQL names it.
    pub table: String,
    /// Whether all is as it was asked for.
    pub ok: bool,
    /// What is not, in words.
    pub problems: Vec<String>,
    /// What is worth knowing and no problem, such as a column that came later.
    pub notes: Vec<String>,
    /// The SQL that puts it right; none when nothing is wrong, or when something else has to be done, which the problem says.
    pub remedy: Option<String>,
}

/// Installs a capture, or replaces it. Returns what the function returns.
pub async fn install(
    connection: &mut PgConnection,
    schema: &Schema,
    capture: &Arguments<'_>,
) -> Result<String, sqlx::Error> {
    let sql = "select aftercommit.capture($1::text::regclass, $2, key => $3, columns => $4, watch => $5, old => $6,
                                          headers => $7, \"on\" => $8, allow => $9, oversize => $10, always => $11)";
    sqlx::query_scalar(AssertSqlSafe(schema.sql(sql).into_owned()))
        .bind(capture.table)
        .bind(capture.event_type)
        .bind(capture.key)
        .bind(capture.columns)
        .bind(capture.watch)
        .bind(capture.old)
        .bind(Json(&capture.headers))
        .bind(capture.operations)
        .bind(capture.allow)
        .bind(capture.oversize)
        .bind(capture.always)
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// All captures, by table.
pub async fn list(connection: &mut PgConnection, schema: &Schema) -> Result<Vec<Captured>, sqlx::Error> {
    let sql =
        "select \"table\", type, key, columns, watch, old, headers, \"on\", oversize, always, version, function, call
                 from aftercommit.captures order by 1";
    sqlx::query_as(AssertSqlSafe(schema.sql(sql).into_owned())).persistent(false).fetch_all(connection).await
}

/// Compares all captures with their tables, by table.
pub async fn check(connection: &mut PgConnection, schema: &Schema) -> Result<Vec<Checked>, sqlx::Error> {
    let sql = "select \"table\", ok, problems, notes, remedy from aftercommit.capture_check()";
    sqlx::query_as(AssertSqlSafe(schema.sql(sql).into_owned())).persistent(false).fetch_all(connection).await
}

/// Whether the schema has captures, and the role may look at them.
pub async fn can_check(connection: &mut PgConnection, schema: &Schema) -> Result<bool, sqlx::Error> {
    let sql = "select exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                               where n.nspname = 'aftercommit' and p.proname = 'capture_check'
                                 and has_schema_privilege(n.oid, 'usage') and has_function_privilege(p.oid, 'execute'))";
    sqlx::query_scalar(AssertSqlSafe(schema.sql(sql).into_owned())).persistent(false).fetch_one(connection).await
}

/// Whether there is such a table, or anything else with such a name.
pub async fn is_there(connection: &mut PgConnection, table: &str) -> Result<bool, sqlx::Error> {
    let sql = "select to_regclass($1) is not null";
    sqlx::query_scalar(sql).bind(table).persistent(false).fetch_one(connection).await
}

/// Removes a capture. Returns whether there was one.
pub async fn remove(connection: &mut PgConnection, schema: &Schema, table: &str) -> Result<bool, sqlx::Error> {
    let sql = "select aftercommit.capture_remove($1::text::regclass)";
    sqlx::query_scalar(AssertSqlSafe(schema.sql(sql).into_owned()))
        .bind(table)
        .persistent(false)
        .fetch_one(connection)
        .await
}
