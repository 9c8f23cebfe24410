//! Handlers that are SQL functions.

use std::fmt;

use sqlx::AssertSqlSafe;

use super::session::{Session, Tx};

/// The checked name of a function, with or without schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FunctionName(Vec<String>);

impl FunctionName {
    /// Takes `name` or `schema.name`, each in lower case as PostgreSQL folds them.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<String> = text.split('.').map(str::to_string).collect();
        let legal = |part: &String| {
            let mut bytes = part.bytes();
            part.len() <= 63
                && bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
                && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if parts.len() > 2 || !parts.iter().all(legal) {
            return Err(format!(
                "{text:?} is not a function name: use schema.name with lower-case letters, digits and '_'"
            ));
        }
        Ok(Self(parts))
    }

    /// The name in double quotes, for SQL.
    fn quoted(&self) -> String {
        self.0.iter().map(|part| format!("\"{part}\"")).collect::<Vec<_>>().join(".")
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

/// Calls the function for each event (CloudEvents JSON) in order, in one statement.
pub(crate) async fn call(tx: &mut Tx<'_>, function: &FunctionName, events: &[String]) -> Result<(), sqlx::Error> {
    // Ordered in the subquery, so that the calls are made in that order. `is null`, because about a type of the
    // application's own, as the function's result may be, the driver would ask with a named statement.
    let statement = format!(
        "select {}(event) is null from (
            select text::jsonb as event from unnest($1::text[]) with ordinality as e(text, n) order by n) as ordered",
        function.quoted()
    );
    sqlx::query(AssertSqlSafe(statement)).bind(events).execute(tx).await.map(|_| ())
}

/// Whether the function is there and takes one jsonb.
pub(crate) async fn check(connection: &mut Session, function: &FunctionName) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select to_regprocedure($1) is not null")
        .bind(format!("{}(jsonb)", function.quoted()))
        .fetch_one(connection)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_quoted() {
        assert_eq!(FunctionName::parse("demo.apply_2").unwrap().quoted(), r#""demo"."apply_2""#);
        assert_eq!(FunctionName::parse("apply").unwrap().to_string(), "apply");
        let long = "x".repeat(64);
        for bad in ["", ".", "a.", "a.b.c", "A", "a-b", "a b", "a\"b", "1a", "a(jsonb)", "a;drop", long.as_str()] {
            assert!(FunctionName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
