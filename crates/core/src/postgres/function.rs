//! Handlers that are SQL functions.

use std::fmt;

use sqlx::AssertSqlSafe;
use sqlx::error::DatabaseError;

use super::session::{Session, Tx};
use crate::trace::TraceContext;

/// The checked name of a function, with or without schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionName(Vec<String>);

impl FunctionName {
    /// Takes `name` or `schema.name`, each in lower case as PostgreSQL folds them.
    pub fn parse(text: &str) -> Result<Self, String> {
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

/// Calls the function for each event (CloudEvents JSON) in order, in one statement. Its name is looked up as the handler's
/// role would, everything else in `pg_catalog`. What a call publishes with `aftercommit.publish()` has the trace context
/// that stands at its event's place; where there is none at all, `contexts` is empty or full of none.
pub async fn call(
    tx: &mut Tx<'_>,
    function: &FunctionName,
    events: &[String],
    contexts: &[Option<TraceContext>],
) -> Result<(), sqlx::Error> {
    if contexts.iter().any(Option::is_some) {
        return call_traced(tx, function, events, contexts).await;
    }
    // Ordered in the subquery, so that the calls are made in that order. `is null`, because about a type of the
    // application's own, as the function's result may be, the driver would ask with a named statement.
    let statement = format!(
        "select {}(event) is null from (
            select text::pg_catalog.jsonb as event
              from pg_catalog.unnest($1::pg_catalog.text[]) with ordinality as e(text, n) order by n) as ordered",
        function.quoted()
    );
    sqlx::query(AssertSqlSafe(statement)).bind(events).execute(tx).await.map(|_| ())
}

/// The same, with the context of each call where `aftercommit.publish()` looks for it. A row's columns are computed from left
/// to right, and before the next row's. An `unnest` of several arrays is always PostgreSQL's own.
async fn call_traced(
    tx: &mut Tx<'_>,
    function: &FunctionName,
    events: &[String],
    contexts: &[Option<TraceContext>],
) -> Result<(), sqlx::Error> {
    let statement = format!(
        "select pg_catalog.set_config('aftercommit.traceparent', parent, true) is null,
                pg_catalog.set_config('aftercommit.tracestate', state, true) is null,
                {}(event) is null from (
            select text::pg_catalog.jsonb as event, parent, state
              from unnest($1::pg_catalog.text[], $2::pg_catalog.text[], $3::pg_catalog.text[])
                   with ordinality as e(text, parent, state, n) order by n) as ordered",
        function.quoted()
    );
    let parents: Vec<&str> =
        contexts.iter().map(|context| context.as_ref().map_or("", |context| &context.traceparent)).collect();
    let state = |context: &Option<TraceContext>| context.as_ref().and_then(|context| context.tracestate.clone());
    let states: Vec<String> = contexts.iter().map(|context| state(context).unwrap_or_default()).collect();
    sqlx::query(AssertSqlSafe(statement)).bind(events).bind(parents).bind(states).execute(tx).await.map(|_| ())
}

/// What keeps the function from being called with one jsonb; none when nothing does. For a session in which handlers run.
pub async fn obstacle(connection: &mut Session, function: &FunctionName) -> Result<Option<String>, sqlx::Error> {
    let found: Result<Option<(String, bool)>, _> = sqlx::query_as(
        "select p.prokind::pg_catalog.text, pg_catalog.has_function_privilege(p.oid, 'EXECUTE') from pg_catalog.pg_proc p
          where p.oid operator(pg_catalog.=) pg_catalog.to_regprocedure($1)::pg_catalog.oid",
    )
    .bind(format!("{}(pg_catalog.jsonb)", function.quoted()))
    .fetch_optional(connection)
    .await;
    let found = match found {
        Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| is_unusable(&code)) => {
            return Ok(Some("is in a schema that the role may not use".into()));
        }
        found => found?,
    };
    Ok(match found.as_ref().map(|(kind, may)| (kind.as_str(), may)) {
        None => Some(format!(
            "does not exist, or the role may not see it: create it with `create function {function}(event jsonb) returns \
             void ...`"
        )),
        Some(("f", true)) => None,
        Some(("f", false)) => Some(format!(
            "may not be called by the role: run `grant execute on function {function}(jsonb) to ...` as its owner"
        )),
        Some(("p", _)) => Some("is a procedure, which commits by itself: make it a function".into()),
        Some(_) => Some("is an aggregate or a window function: make it a plain function".into()),
    })
}

/// Whether an error is about the function itself, and not about what it calls: it or its schema is not there, is something
/// else, or may not be used.
pub fn is_about_the_function(error: &sqlx::Error, function: &FunctionName) -> bool {
    error.as_database_error().is_some_and(|error| {
        let code = error.code().is_some_and(|code| is_unusable(&code));
        code && function.0.iter().any(|part| error.message().contains(part))
    })
}

fn is_unusable(code: &str) -> bool {
    matches!(code, "42883" | "42809" | "42501" | "3F000")
}

/// Whether an error may be that a text cannot be jsonb: `\\u0000`, halves of surrogate pairs, numbers out of range, too many
/// levels.
pub fn is_about_the_json(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(is_about)
}

fn is_about(error: &dyn DatabaseError) -> bool {
    error.code().is_some_and(|code| matches!(&*code, "22P05" | "22P02" | "22003" | "54001" | "54000"))
}

/// Why PostgreSQL cannot hold a text as jsonb; none when it can.
pub async fn unreadable(connection: &mut Session, json: &str) -> Result<Option<String>, sqlx::Error> {
    let held: Result<bool, _> =
        sqlx::query_scalar("select $1::jsonb is not null").bind(json).fetch_one(connection).await;
    match held {
        Ok(_) => Ok(None),
        // Without its detail, which quotes the text.
        Err(sqlx::Error::Database(error)) if is_about(&*error) => Ok(Some(error.message().into())),
        Err(error) => Err(error),
    }
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
