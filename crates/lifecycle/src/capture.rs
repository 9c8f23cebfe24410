//! Captures: triggers that publish each changed row of a table, whoever changes it.
//!
//! ```no_run
//! use aftercommit::capture::{self, Capture, Operation};
//!
//! # async fn example(pool: aftercommit::sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut tx = pool.begin().await?;
//! Capture::new("public.orders", "order")
//!     .columns(["id", "customer_id", "cents", "state"])
//!     .watch(["state"])
//!     .operations([Operation::Update, Operation::Delete])
//!     .old_values()
//!     .header("origin", "shop")
//!     .install(&mut tx)
//!     .await?;
//! tx.commit().await?;
//!
//! let mut connection = pool.acquire().await?;
//! for checked in capture::check(&mut connection).await?.iter().filter(|checked| !checked.ok) {
//!     eprintln!("{}: {}", checked.table, checked.problems.join(", "));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Everything happens in functions of the schema `aftercommit`, so that SQL can do the same: `aftercommit.capture()`. They are
//! called in the schema of this process ([`set_schema`](aftercommit_outbox::set_schema)), on the caller's connection and with its
//! rights: it must own the table, and may publish. `docs/sql-contract.md` says what events carry.

use std::fmt::Write;

use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use sqlx::postgres::PgDatabaseError;

pub use aftercommit_core::postgres::capture::{Captured, Checked};

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::{capture as sql, database_error};
use aftercommit_outbox::schema::{Schema, published};

/// What is done to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// It is written: events of the type `….inserted`.
    Insert,
    /// A watched column changes: `….updated`.
    Update,
    /// It is deleted: `….deleted`; and `….truncated` once for a table that is truncated.
    Delete,
}

impl Operation {
    /// Its name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// What becomes of an event with more bytes than the outbox takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Oversize {
    /// The statement fails that changes the row.
    Fail,
    /// The largest columns are left out, until the rest fits.
    #[default]
    TruncateColumns,
    /// All columns but those of the key are left out.
    KeyOnly,
}

impl Oversize {
    /// Its name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::TruncateColumns => "truncate-columns",
            Self::KeyOnly => "key-only",
        }
    }
}

/// What an installation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// The table was not captured.
    Installed,
    /// It was, and in another way.
    Replaced,
    /// It was in just this way.
    Unchanged,
}

/// What is to be captured of one table.
#[derive(Debug, Clone)]
#[must_use = "nothing is captured before it is installed"]
pub struct Capture {
    table: String,
    event_type: String,
    key: Option<String>,
    columns: Option<Vec<String>>,
    watch: Option<Vec<String>>,
    old: bool,
    headers: Map<String, Value>,
    operations: Vec<&'static str>,
    allow: Vec<String>,
    oversize: Oversize,
    always: bool,
}

fn names(names: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
    names.into_iter().map(Into::into).collect()
}

impl Capture {
    /// A table, named as in SQL (`public.orders`, `"Orders"`), whose events have types that begin with this one: `order` makes
    /// `order.inserted`, `order.updated`, `order.deleted` and `order.truncated`.
    pub fn new(table: impl Into<String>, event_type: impl Into<String>) -> Self {
        Self {
            table: table.into(),
            event_type: event_type.into(),
            key: None,
            columns: None,
            watch: None,
            old: false,
            headers: Map::new(),
            operations: [Operation::Insert, Operation::Update, Operation::Delete].map(Operation::name).into(),
            allow: Vec::new(),
            oversize: Oversize::default(),
            always: true,
        }
    }

    /// The ordering key: a column, or several as SQL identifiers with commas between them. Defaults to the primary key.
    pub fn key(self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// The columns that events carry. Defaults to all that are there now, but generated ones.
    pub fn columns(self, columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { columns: Some(names(columns)), ..self }
    }

    /// Publish an update only when one of these columns changes. Defaults to the columns that events carry.
    pub fn watch(self, columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { watch: Some(names(columns)), ..self }
    }

    /// Publish only these operations. Defaults to all.
    pub fn operations(self, operations: impl IntoIterator<Item = Operation>) -> Self {
        Self { operations: operations.into_iter().map(Operation::name).collect(), ..self }
    }

    /// Let updates carry the old values of the columns, too. By default they carry the old key when it changes; deletes carry
    /// all columns in any case.
    pub fn old_values(self) -> Self {
        Self { old: true, ..self }
    }

    /// A header with the same value in each event.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), Value::String(value.into()));
        self
    }

    /// A header with a column's value. Where the column is null there is no header.
    pub fn header_from(mut self, name: impl Into<String>, column: impl Into<String>) -> Self {
        self.headers.insert(name.into(), json!({ "column": column.into() }));
        self
    }

    /// Columns that look like a secret by their name and are none. Defaults to none.
    pub fn allow(self, columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { allow: names(columns), ..self }
    }

    /// What becomes of an event that is too large. Defaults to [`Oversize::TruncateColumns`].
    pub fn oversize(self, oversize: Oversize) -> Self {
        Self { oversize, ..self }
    }

    /// Leave sessions alone that have `session_replication_role = replica`, such as those that apply what another server sends.
    /// By default they are captured, too.
    pub fn only_origin(self) -> Self {
        Self { always: false, ..self }
    }

    /// Installs it, in the transaction of the connection if there is one. Where the same is installed nothing is done; anything
    /// else is replaced. Nobody can write to the table until the transaction ends.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the table or one of its columns is not there or cannot be captured, or when a setting is wrong;
    /// [`ErrorKind::NotReady`] when the schema is older than captures; [`ErrorKind::Database`] when a right is missing, when the
    /// table is locked by others for longer than `lock_timeout`, and when the database cannot be reached.
    pub async fn install(&self, connection: &mut PgConnection) -> Result<Installed, Error> {
        self.install_in(&published(), connection).await
    }

    /// [`Self::install`] with the outbox in this schema.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub async fn install_in(&self, schema: &Schema, connection: &mut PgConnection) -> Result<Installed, Error> {
        let doing = format!("capturing {} failed", self.table);
        must_be_there(connection, &self.table, &doing).await?;
        let done = sql::install(connection, schema, &self.arguments()).await;
        let done = done.map_err(|error| failed(&doing, error))?;
        Ok(match done.as_str() {
            "installed" => Installed::Installed,
            "replaced" => Installed::Replaced,
            _ => Installed::Unchanged,
        })
    }

    fn arguments(&self) -> sql::Arguments<'_> {
        sql::Arguments {
            table: &self.table,
            event_type: &self.event_type,
            key: self.key.as_deref(),
            columns: self.columns.as_deref(),
            watch: self.watch.as_deref(),
            old: self.old,
            headers: Value::Object(self.headers.clone()),
            operations: &self.operations,
            allow: &self.allow,
            oversize: self.oversize.name(),
            always: self.always,
        }
    }

    /// The statement that installs it, for another migration tool. What has its default is left out.
    pub fn sql(&self, schema: &Schema) -> String {
        let mut sql = format!("select {schema}.capture({}, type => {}", quoted(&self.table), quoted(&self.event_type));
        let mut argument = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                _ = write!(sql, ", {name} => {value}");
            }
        };
        let list = |names: &[String]| {
            format!("array[{}]::text[]", names.iter().map(|n| quoted(n)).collect::<Vec<_>>().join(", "))
        };
        argument("key", self.key.as_deref().map(quoted));
        argument("columns", self.columns.as_deref().map(list));
        argument("watch", self.watch.as_deref().map(list));
        argument("old", self.old.then(|| "true".into()));
        argument("headers", Some(&self.headers).filter(|h| !h.is_empty()).map(|h| quoted(&json!(h).to_string())));
        argument(
            "\"on\"",
            Some(&self.operations).filter(|o| o.len() != 3).map(|o| quoted(&format!("{{{}}}", o.join(",")))),
        );
        argument("allow", Some(&self.allow).filter(|a| !a.is_empty()).map(|a| list(a)));
        argument("oversize", Some(self.oversize).filter(|o| *o != Oversize::default()).map(|o| quoted(o.name())));
        argument("always", (!self.always).then(|| "false".into()));
        sql + ");\n"
    }
}

/// A text as SQL takes it, whatever `standard_conforming_strings` is.
fn quoted(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if text.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// All tables that are captured.
///
/// # Errors
/// [`ErrorKind::NotReady`] when the schema is older than captures, [`ErrorKind::Database`] otherwise.
pub async fn list(connection: &mut PgConnection) -> Result<Vec<Captured>, Error> {
    list_in(&published(), connection).await
}

/// [`list`] with the outbox in this schema.
///
/// # Errors
/// As [`list`].
pub async fn list_in(schema: &Schema, connection: &mut PgConnection) -> Result<Vec<Captured>, Error> {
    sql::list(connection, schema).await.map_err(|error| failed("the captures cannot be read", error))
}

/// Compares each capture with its table: after a change of the schema a column may be gone, or a trigger disabled.
///
/// # Errors
/// As [`list`].
pub async fn check(connection: &mut PgConnection) -> Result<Vec<Checked>, Error> {
    check_in(&published(), connection).await
}

/// [`check`] with the outbox in this schema.
///
/// # Errors
/// As [`list`].
pub async fn check_in(schema: &Schema, connection: &mut PgConnection) -> Result<Vec<Checked>, Error> {
    sql::check(connection, schema).await.map_err(|error| failed("the captures cannot be checked", error))
}

/// Captures a table no longer. Events that were written stay. Returns whether it was captured.
///
/// # Errors
/// [`ErrorKind::Config`] when there is no such table, and as [`Capture::install`].
pub async fn remove(connection: &mut PgConnection, table: &str) -> Result<bool, Error> {
    remove_in(&published(), connection, table).await
}

/// [`remove`] with the outbox in this schema.
///
/// # Errors
/// As [`remove`].
pub async fn remove_in(schema: &Schema, connection: &mut PgConnection, table: &str) -> Result<bool, Error> {
    let doing = format!("the capture of {table} cannot be removed");
    must_be_there(connection, table, &doing).await?;
    let removed = sql::remove(connection, schema, table).await;
    removed.map_err(|error| failed(&doing, error))
}

/// Before anything else is asked: a schema that is not there is the table's then, and not that of the outbox.
async fn must_be_there(connection: &mut PgConnection, table: &str, doing: &str) -> Result<(), Error> {
    match sql::is_there(connection, table).await.map_err(|error| failed(doing, error))? {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Config, format!("{doing}: there is no table {table}"))),
    }
}

/// The server's refusals name what is wrong and what to do, and hold no values of rows.
fn failed(doing: &str, error: sqlx::Error) -> Error {
    let refusal = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    let Some(refusal) = refusal else { return database_error(doing, error) };
    let kind = match refusal.code() {
        // The function or the view of captures is not there.
        "42883" | "3F000" => {
            let text = format!("{doing}: {}; run `aftercommit migrate`", refusal.message());
            return Error::new(ErrorKind::NotReady, text);
        }
        "22023" | "42602" | "42703" | "42809" | "42P01" => ErrorKind::Config,
        "42501" => ErrorKind::Database,
        "55P03" => {
            let text =
                format!("{doing}: others hold a lock on the table for too long; nothing was changed, try it again");
            return Error::new(ErrorKind::Database, text);
        }
        _ => return database_error(doing, error),
    };
    let hint = refusal.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
    Error::new(kind, format!("{doing}: {}{hint}", refusal.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_statement_names_what_is_not_the_default() {
        let schema = Schema::default();
        let short = Capture::new("public.orders", "order");
        assert_eq!(short.sql(&schema), "select aftercommit.capture('public.orders', type => 'order');\n");
        let long = short
            .key("id, \"o'clock\"")
            .columns(["a\\b"])
            .watch(["a"])
            .operations([Operation::Delete])
            .old_values()
            .header("origin", "shop")
            .header_from("tenant", "tenant_id")
            .allow(["token_count"])
            .oversize(Oversize::KeyOnly)
            .only_origin();
        assert_eq!(
            long.sql(&"shop".parse().unwrap()),
            "select shop.capture('public.orders', type => 'order', key => 'id, \"o''clock\"', columns => array[E'a\\\\b']::text[], \
             watch => array['a']::text[], old => true, headers => '{\"origin\":\"shop\",\"tenant\":{\"column\":\"tenant_id\"}}', \
             \"on\" => '{delete}', allow => array['token_count']::text[], oversize => 'key-only', always => false);\n"
        );
    }
}
