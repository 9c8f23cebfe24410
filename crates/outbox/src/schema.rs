//! The schema that has the tables and functions of aftercommit, when it is not `aftercommit`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Its name by default, and in every statement of ours as it is written.
const DEFAULT: &str = "aftercommit";

/// The most bytes in a name of PostgreSQL (`NAMEDATALEN`).
const MAX_BYTES: usize = 63;

/// Words that PostgreSQL does not take for the name of a schema without quotes: reserved ones, and those that only a
/// function or a type may have (PostgreSQL 14 to 18, appendix C of its manual).
#[rustfmt::skip]
const RESERVED: [&str; 101] = [
    "all", "analyse", "analyze", "and", "any", "array", "as", "asc", "asymmetric", "authorization", "binary", "both", "case",
    "cast", "check", "collate", "collation", "column", "concurrently", "constraint", "create", "cross", "current_catalog",
    "current_date", "current_role", "current_schema", "current_time", "current_timestamp", "current_user", "default",
    "deferrable", "desc", "distinct", "do", "else", "end", "except", "false", "fetch", "for", "foreign", "freeze", "from",
    "full", "grant", "group", "having", "ilike", "in", "initially", "inner", "intersect", "into", "is", "isnull", "join",
    "lateral", "leading", "left", "like", "limit", "localtime", "localtimestamp", "natural", "not", "notnull", "null",
    "offset", "on", "only", "or", "order", "outer", "overlaps", "placing", "primary", "references", "returning", "right",
    "select", "session_user", "similar", "some", "symmetric", "system_user", "table", "tablesample", "then", "to", "trailing",
    "true", "union", "unique", "user", "using", "variadic", "verbose", "when", "where", "window", "with",
];

/// The name of the schema. Defaults to `aftercommit`; with another one several systems share a database.
///
/// It is a plain name of PostgreSQL: lower-case letters, digits and `_`, not beginning with a digit, up to 63 bytes, no
/// reserved word, and none of PostgreSQL's own (`public`, `information_schema`, `pg_…`). So it means the same with and
/// without quotes.
///
/// ```
/// # use aftercommit::config::Schema;
/// let schema: Schema = "shop_events".parse()?;
/// assert_eq!(schema.name(), "shop_events");
/// assert!("Shop; drop".parse::<Schema>().is_err());
/// # Ok::<(), aftercommit::config::SchemaError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Schema(Cow<'static, str>);

/// Why a name cannot be that of the schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the schema {name:?} {problem}")]
pub struct SchemaError {
    name: String,
    problem: Cow<'static, str>,
}

impl Default for Schema {
    fn default() -> Self {
        Self(Cow::Borrowed(DEFAULT))
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Schema {
    type Err = SchemaError;

    fn from_str(name: &str) -> Result<Self, SchemaError> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let problem = match name {
            "" => "is empty",
            _ if !name.bytes().all(plain) || name.starts_with(|c: char| c.is_ascii_digit()) => {
                "has other characters than lower-case letters, digits and _, or begins with a digit"
            }
            _ if name.len() > MAX_BYTES => "is longer than 63 bytes",
            "public" | "information_schema" => "is PostgreSQL's: name one of its own",
            _ if name.starts_with("pg_") => "begins with pg_, which PostgreSQL keeps for itself",
            _ if RESERVED.contains(&name) => "is a reserved word of SQL",
            _ => return Ok(Self(name.to_string().into())),
        };
        Err(SchemaError { name: name.chars().take(80).collect(), problem: problem.into() })
    }
}

impl Schema {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A statement that was written for the schema `aftercommit`, for this one: the schema's name before a dot, alone between
    /// quotes, and where the schema itself is made, changed or granted. Settings of the session that begin with it follow.
    pub fn sql<'a>(&self, statement: &'a str) -> Cow<'a, str> {
        if self.0 == DEFAULT {
            return Cow::Borrowed(statement);
        }
        let mut sql = String::with_capacity(statement.len());
        let mut rest = statement;
        while let Some(at) = rest.find(DEFAULT) {
            let (before, after) = (&rest[..at], &rest[at + DEFAULT.len()..]);
            sql.push_str(before);
            sql.push_str(if is_schema(before, after) { &self.0 } else { DEFAULT });
            rest = after;
        }
        sql.push_str(rest);
        Cow::Owned(sql)
    }
}

/// Whether the word between the two is the schema's name.
fn is_schema(before: &str, after: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '/');
    if before.ends_with(part_of_word) || after.starts_with(part_of_word) {
        return false;
    }
    let qualifies = after.strip_prefix('.').is_some_and(|rest| rest.starts_with(|c: char| !c.is_whitespace()));
    let quoted = before.ends_with('\'') && after.starts_with('\'');
    qualifies || quoted || before.ends_with("schema ") || before.ends_with("schema if not exists ")
}

/// What this process publishes into.
static PUBLISHED: OnceLock<Schema> = OnceLock::new();

/// Tells, for the whole process and before its first event, which schema has the outbox. Defaults to `aftercommit`. The
/// programs do it themselves (`--schema`, `AFTERCOMMIT_SCHEMA`); a service that publishes calls it once when it starts.
///
/// # Errors
/// When the name cannot be that of a schema, or when events went to another one already.
pub fn set_schema(name: &str) -> Result<(), SchemaError> {
    let schema: Schema = name.parse()?;
    let set = PUBLISHED.get_or_init(|| schema.clone());
    if *set == schema {
        return Ok(());
    }
    let problem = format!("comes too late: this process publishes into {set}");
    Err(SchemaError { name: schema.0.into_owned(), problem: problem.into() })
}

/// What this process publishes into. Nobody can tell it another schema afterwards.
pub fn published() -> Schema {
    PUBLISHED.get_or_init(Schema::default).clone()
}

/// A statement that publishes.
#[cfg_attr(not(feature = "sqlx09"), allow(dead_code))]
pub(crate) struct PublishStatement {
    text: &'static str,
    /// For another schema.
    other: OnceLock<String>,
}

#[cfg_attr(not(feature = "sqlx09"), allow(dead_code))]
impl PublishStatement {
    pub(crate) const fn new(text: &'static str) -> Self {
        Self { text, other: OnceLock::new() }
    }

    /// For the schema of this process.
    pub(crate) fn sql(&'static self) -> &'static str {
        match PUBLISHED.get_or_init(Schema::default) {
            Schema(Cow::Borrowed(_)) => self.text,
            schema => self.other.get_or_init(|| schema.sql(self.text).into_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_need_quotes_are_refused_by_name() {
        for name in ["shop", "shop_2", "_x", "aftercommit", &"a".repeat(63)] {
            assert_eq!(name.parse::<Schema>().unwrap().name(), name);
        }
        for (name, told) in [
            ("", "is empty"),
            ("Shop", "lower-case"),
            ("sh op", "lower-case"),
            ("a\";drop schema public;--", "lower-case"),
            ("2shop", "digit"),
            ("ärger", "lower-case"),
            ("public", "PostgreSQL's"),
            ("pg_shop", "begins with pg_"),
            ("user", "reserved word"),
            (&"a".repeat(64), "63 bytes"),
        ] {
            let error = name.parse::<Schema>().unwrap_err().to_string();
            assert!(error.contains(told) && error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn a_statement_follows_the_schema_and_nothing_else_in_it_does() {
        let shop: Schema = "shop".parse().unwrap();
        for (statement, expected) in [
            ("select 1 from aftercommit.outbox o", "select 1 from shop.outbox o"),
            ("select 'aftercommit.outbox'::regclass", "select 'shop.outbox'::regclass"),
            ("where nspname = 'aftercommit'", "where nspname = 'shop'"),
            ("create schema if not exists aftercommit;", "create schema if not exists shop;"),
            ("grant usage on schema aftercommit to x", "grant usage on schema shop to x"),
            ("format('%saftercommit.%I', x)", "format('%saftercommit.%I', x)"),
            ("format('function aftercommit.%I', x)", "format('function shop.%I', x)"),
            ("set local aftercommit.handling = 'on'", "set local shop.handling = 'on'"),
            ("hint = 'run aftercommit migrate'", "hint = 'run aftercommit migrate'"),
            ("to aftercommit_relay", "to aftercommit_relay"),
            ("-- of aftercommit. And more", "-- of aftercommit. And more"),
            ("application_name like 'aftercommit-%'", "application_name like 'aftercommit-%'"),
        ] {
            assert_eq!(shop.sql(statement), expected);
            assert_eq!(Schema::default().sql(statement), statement);
        }
    }
}
