//! The statements as queries of diesel, for its connections that wait and for those that do not.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroU32;

use ::diesel::pg::Pg;
use ::diesel::query_builder::{AstPass, QueryFragment, QueryId};
use ::diesel::result::{DatabaseErrorInformation, DatabaseErrorKind, Error};
use ::diesel::serialize::{self, IsNull, Output, ToSql};
use ::diesel::sql_types::{Array, Binary, Integer, Jsonb, Nullable, Text, Uuid as SqlUuid};
use ::diesel::{QueryResult, RunQueryDsl};
use uuid::Uuid;

use crate::check::NewEvent;
use crate::error::{Problem, PublishError, PublishErrorKind, Refusal};
use crate::insert::{Columns, MANY, ONE};

/// [`ONE`]. `pooled` when a pooler in transaction mode may stand in between: then diesel keeps no prepared statement.
pub(crate) struct InsertOne<'a> {
    pooled: bool,
    event_id: Uuid,
    event_type: &'a str,
    version: i32,
    key: Option<&'a str>,
    headers: Headers<'a>,
    payload: &'a [u8],
    content_type: &'a str,
}

impl<'a> InsertOne<'a> {
    pub(crate) fn of(event: &'a NewEvent, pooled: bool) -> Self {
        Self {
            pooled,
            event_id: event.event_id,
            event_type: &event.event_type,
            version: event.version,
            key: event.key.as_deref(),
            headers: Headers(&event.headers),
            payload: &event.payload,
            content_type: &event.content_type,
        }
    }
}

impl QueryFragment<Pg> for InsertOne<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let mut walk = Walk::of(ONE.sql(), self.pooled, out);
        walk.bind::<SqlUuid, _>(&self.event_id)?;
        walk.bind::<Text, _>(self.event_type)?;
        walk.bind::<Integer, _>(&self.version)?;
        walk.bind::<Nullable<Text>, _>(&self.key)?;
        walk.bind::<Jsonb, _>(&self.headers)?;
        walk.bind::<Binary, _>(self.payload)?;
        walk.bind::<Text, _>(self.content_type)
    }
}

impl QueryId for InsertOne<'_> {
    type QueryId = InsertOne<'static>;
}

impl<Connection> RunQueryDsl<Connection> for InsertOne<'_> {}

/// [`MANY`], as [`InsertOne`].
pub(crate) struct InsertMany<'a> {
    pooled: bool,
    event_ids: Vec<Uuid>,
    types: Vec<&'a str>,
    versions: Vec<i32>,
    keys: Vec<Option<&'a str>>,
    headers: Vec<Headers<'a>>,
    payloads: Vec<&'a [u8]>,
    content_types: Vec<&'a str>,
}

impl<'a> InsertMany<'a> {
    pub(crate) fn of(events: &'a [NewEvent], pooled: bool) -> Self {
        let Columns { event_ids, types, versions, keys, headers, payloads, content_types } = Columns::of(events);
        let headers = headers.into_iter().map(Headers).collect();
        Self { pooled, event_ids, types, versions, keys, headers, payloads, content_types }
    }
}

impl QueryFragment<Pg> for InsertMany<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let mut walk = Walk::of(MANY.sql(), self.pooled, out);
        walk.bind::<Array<SqlUuid>, _>(&self.event_ids)?;
        walk.bind::<Array<Text>, _>(&self.types)?;
        walk.bind::<Array<Integer>, _>(&self.versions)?;
        walk.bind::<Array<Nullable<Text>>, _>(&self.keys)?;
        walk.bind::<Array<Jsonb>, _>(&self.headers)?;
        walk.bind::<Array<Binary>, _>(&self.payloads)?;
        walk.bind::<Array<Text>, _>(&self.content_types)
    }
}

impl QueryId for InsertMany<'_> {
    type QueryId = InsertMany<'static>;
}

impl<Connection> RunQueryDsl<Connection> for InsertMany<'_> {}

/// A statement's way through diesel. diesel writes the names of parameters itself, in the order in which they are
/// bound, so it is given what stands between them.
struct Walk<'a, 'b> {
    sql: std::str::Split<'static, char>,
    out: AstPass<'a, 'b, Pg>,
}

impl<'a, 'b> Walk<'a, 'b> {
    fn of(sql: &'static str, pooled: bool, mut out: AstPass<'a, 'b, Pg>) -> Self {
        if pooled {
            out.unsafe_to_cache_prepared();
        }
        let mut sql = sql.split('$');
        out.push_sql(sql.next().unwrap_or_default());
        Self { sql, out }
    }

    fn bind<T, U: ToSql<T, Pg> + ?Sized>(&mut self, value: &'b U) -> QueryResult<()>
    where
        Pg: ::diesel::sql_types::HasSqlType<T>,
    {
        self.out.push_bind_param::<T, U>(value)?;
        let behind = self.sql.next().unwrap_or_default();
        self.out.push_sql(behind.trim_start_matches(|c: char| c.is_ascii_digit()));
        Ok(())
    }
}

#[derive(Debug)]
struct Headers<'a>(&'a BTreeMap<String, String>);

impl ToSql<Jsonb, Pg> for Headers<'_> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        // The version of the format, then JSON.
        out.write_all(&[1])?;
        serde_json::to_writer(out, self.0)?;
        Ok(IsNull::No)
    }
}

/// Refuses to publish where diesel knows of no transaction, at this depth of them.
pub(crate) fn within(depth: QueryResult<Option<NonZeroU32>>, event_type: &str) -> Result<(), PublishError> {
    match depth {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(PublishError::invalid(
            event_type,
            Problem::new("transaction", "is not open: publish within the closure that is given to `transaction`"),
        )),
        Err(error) => Err(PublishError::driver(event_type, PublishErrorKind::Unavailable, error)),
    }
}

pub(crate) fn failed(event_type: &str, error: Error) -> PublishError {
    use DatabaseErrorKind::{ClosedConnection, UnableToSendCommand};
    match error {
        Error::DatabaseError(UnableToSendCommand | ClosedConnection, _) | Error::BrokenTransactionManager => {
            PublishError::driver(event_type, PublishErrorKind::Unavailable, error)
        }
        Error::DatabaseError(kind, told) => PublishError::refused(
            event_type,
            &Refusal {
                code: code(kind, &*told),
                message: told.message(),
                constraint: told.constraint_name(),
                stale_plan: told.message() == "cached plan must not change result type",
            },
        ),
        error => PublishError::driver(event_type, PublishErrorKind::Database, error),
    }
}

/// What PostgreSQL's messages in English begin and end with, and their SQLSTATE. For all that diesel has no kind of its own
/// for, and that it matters to tell apart.
const MESSAGES: [(&str, &str, &str); 11] = [
    ("deadlock detected", "", "40P01"),
    ("canceling statement due to lock timeout", "", "55P03"),
    ("could not obtain lock on ", "", "55P03"),
    ("terminating connection", "", "57P01"),
    ("could not extend file ", "", "53100"),
    ("relation \"", ".outbox\" does not exist", "42P01"),
    ("column ", " of relation \"outbox\" does not exist", "42703"),
    ("permission denied", "", "42501"),
    ("new row violates row-level security policy", "", "42501"),
    ("prepared statement ", " already exists", "42P05"),
    ("prepared statement ", " does not exist", "26000"),
];

/// The SQLSTATE, which diesel keeps to itself, as far as it can be told; else empty.
fn code(kind: DatabaseErrorKind, told: &dyn DatabaseErrorInformation) -> &'static str {
    match kind {
        DatabaseErrorKind::UniqueViolation => "23505",
        DatabaseErrorKind::ForeignKeyViolation => "23503",
        DatabaseErrorKind::NotNullViolation => "23502",
        DatabaseErrorKind::CheckViolation => "23514",
        DatabaseErrorKind::ExclusionViolation => "23P01",
        DatabaseErrorKind::RestrictViolation => "23001",
        DatabaseErrorKind::SerializationFailure => "40001",
        DatabaseErrorKind::ReadOnlyTransaction => "25006",
        _ => {
            let fits = |(first, last, _): &&(&str, &str, &str)| {
                told.message().starts_with(first) && told.message().ends_with(last)
            };
            MESSAGES.iter().find(fits).map_or("", |(_, _, code)| code)
        }
    }
}

#[cfg(test)]
mod tests {
    use ::diesel::debug_query;

    use super::*;

    fn event() -> NewEvent {
        crate::check::admit(crate::RawEvent::new("a", "text/plain", "x")).unwrap()
    }

    #[test]
    fn diesel_sends_the_statements_of_all_drivers() {
        let events = [event(), event()];
        for pooled in [false, true] {
            let one = InsertOne::of(&events[0], pooled);
            let many = InsertMany::of(&events, pooled);
            assert!(debug_query::<Pg, _>(&one).to_string().starts_with(ONE.sql()));
            assert!(debug_query::<Pg, _>(&many).to_string().starts_with(MANY.sql()));
            assert_eq!(one.is_safe_to_cache_prepared(&Pg).unwrap(), !pooled);
            assert_eq!(many.is_safe_to_cache_prepared(&Pg).unwrap(), !pooled);
        }
    }

    #[test]
    fn what_diesel_does_not_tell_is_known_by_the_message() {
        let refused = |message: &str| {
            failed("a", Error::DatabaseError(DatabaseErrorKind::Unknown, Box::new(message.to_string())))
        };
        for (message, kind) in [
            ("deadlock detected", PublishErrorKind::Conflict),
            ("canceling statement due to lock timeout", PublishErrorKind::Conflict),
            ("cached plan must not change result type", PublishErrorKind::Conflict),
            ("terminating connection due to administrator command", PublishErrorKind::Unavailable),
            ("relation \"aftercommit.outbox\" does not exist", PublishErrorKind::Database),
        ] {
            assert_eq!(refused(message).kind(), kind, "{message}");
        }
        let missing = refused("column \"key\" of relation \"outbox\" does not exist").to_string();
        assert!(missing.contains("[42703]") && missing.contains("aftercommit migrate"), "{missing}");
        // What is not known may quote a payload.
        let unknown = refused("invalid input syntax for type integer: \"hush\"");
        assert_eq!(unknown.to_string(), "event \"a\" was not written: invalid input syntax for type integer: …");
    }
}
