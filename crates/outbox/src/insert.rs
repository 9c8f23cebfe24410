//! The statements that write events, for every driver.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::check::{self, NewEvent};
use crate::error::PublishError;
use crate::event::{Event, EventId};
use crate::raw::RawEvent;
use crate::schema::PublishStatement;

/// One event: the usual case. For one row, arrays take PostgreSQL a tenth longer than plain parameters.
pub(crate) static ONE: PublishStatement = PublishStatement::new(
    "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         values ($1, $2, $3, $4, $5, $6, $7)",
);

/// Any number of events, as arrays, so that their number never meets the limit on bind parameters. `unnest` keeps their
/// order, and the outbox ids follow it. It runs in the service's transaction, so it names the schema of each type; an
/// `unnest` of several arrays is always PostgreSQL's own.
pub(crate) static MANY: PublishStatement = PublishStatement::new(
    "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         select * from unnest($1::pg_catalog.uuid[], $2::pg_catalog.text[], $3::integer[], $4::pg_catalog.text[],
                              $5::pg_catalog.jsonb[], $6::pg_catalog.bytea[], $7::pg_catalog.text[])",
);

/// The payload bytes that go into one statement. PostgreSQL takes up to 1 GB in one value; far less keeps the memory
/// of both sides small and costs no time.
const STATEMENT_BYTES: usize = 64 << 20;

/// The events in their order, cut into what fits into one statement each: all of them unless they are tens of megabytes.
pub fn statements(mut events: &[NewEvent]) -> impl Iterator<Item = &[NewEvent]> {
    std::iter::from_fn(move || {
        if events.is_empty() {
            return None;
        }
        let (now, later) = events.split_at(statement_length(events));
        events = later;
        Some(now)
    })
}

/// How many of the events fit into one statement; at least one.
fn statement_length(events: &[NewEvent]) -> usize {
    let mut bytes = 0;
    let fitting = events.iter().take_while(|event| {
        bytes += event.payload.len();
        bytes <= STATEMENT_BYTES
    });
    fitting.count().max(1)
}

/// Events of one type that may all be written; none may when one is refused.
pub(crate) fn admitted<'e, E: Event>(events: impl IntoIterator<Item = &'e E>) -> Result<Vec<NewEvent>, PublishError> {
    events.into_iter().map(|event| check::admit(RawEvent::of(event)?)).collect()
}

/// Tells the log that these are written, and their caller who they are.
pub(crate) fn written(events: &[NewEvent]) -> Vec<EventId> {
    let tell = |event: &NewEvent| {
        tracing::debug!(event_id = %event.event_id, event_type = event.event_type, "event written to the outbox");
        event.event_id.into()
    };
    events.iter().map(tell).collect()
}

/// The parameters of [`MANY`].
pub(crate) struct Columns<'a> {
    pub event_ids: Vec<Uuid>,
    pub types: Vec<&'a str>,
    pub versions: Vec<i32>,
    pub keys: Vec<Option<&'a str>>,
    pub(crate) headers: Vec<&'a BTreeMap<String, String>>,
    pub payloads: Vec<&'a [u8]>,
    pub(crate) content_types: Vec<&'a str>,
}

impl<'a> Columns<'a> {
    pub fn of(events: &'a [NewEvent]) -> Self {
        fn column<'a, T>(events: &'a [NewEvent], field: impl Fn(&'a NewEvent) -> T) -> Vec<T> {
            events.iter().map(field).collect()
        }
        Self {
            event_ids: column(events, |event| event.event_id),
            types: column(events, |event| event.event_type.as_str()),
            versions: column(events, |event| event.version),
            keys: column(events, |event| event.key.as_deref()),
            headers: column(events, |event| &event.headers),
            payloads: column(events, |event| event.payload.as_slice()),
            content_types: column(events, |event| event.content_type.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_takes_what_fits_and_at_least_one() {
        let event = |bytes| NewEvent {
            event_id: uuid::Uuid::nil(),
            event_type: "a".into(),
            version: 1,
            key: None,
            headers: BTreeMap::new(),
            payload: vec![0; bytes],
            content_type: "a".into(),
        };
        let events = [event(STATEMENT_BYTES / 2), event(STATEMENT_BYTES / 2), event(1)];
        assert_eq!(statement_length(&events), 2);
        assert_eq!(statement_length(&events[2..]), 1);
        assert_eq!(statement_length(&[event(STATEMENT_BYTES + 1)]), 1);
        assert_eq!(statements(&events).map(<[NewEvent]>::len).collect::<Vec<_>>(), [2, 1]);
    }
}
