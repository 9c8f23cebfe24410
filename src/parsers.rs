//! What reads what others write, for the fuzz targets and the tests of input: no part of the public interface.

use serde_json::Value;
use uuid::Uuid;

use aftercommit_core::config::{NatsConfig, PostgresConfig};
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::{monitoring, publisher};
use aftercommit_core::outbox_query::validate;
use aftercommit_core::outbox_query::wire::{Displaced, Page, Query, Rest};
use aftercommit_core::postgres::place::Place;
use aftercommit_outbox::check::{self, NewEvent};
use aftercommit_outbox::subject::SubjectPrefix;
use aftercommit_outbox::{PublishError, RawEvent};
use aftercommit_relay::RelayConfig;

/// The sequence under which the server says to have stored a message.
pub fn stored_under(answer: &[u8]) -> Option<u64> {
    match publisher::read(answer) {
        publisher::Answer::Stored { sequence, .. } => Some(sequence),
        _ => None,
    }
}

/// A query to the relay, as it is written again.
pub fn query(text: &[u8]) -> Option<Value> {
    serde_json::to_value(serde_json::from_slice::<Query>(text).ok()?).ok()
}

/// A place within a token, as it is written again.
pub fn place(text: &[u8]) -> Option<Value> {
    serde_json::to_value(serde_json::from_slice::<Place>(text).ok()?).ok()
}

/// The outbox ids of a page that is taken for an answer, and how the next page is asked for.
pub fn page(answer: &[u8], after: Option<&Value>, types: &[String], digest: bool) -> Option<(Vec<i64>, Value, bool)> {
    let page: Page = validate::last(answer).ok()?;
    validate::page(&page, after, types, digest).ok()?;
    Some((page.events.iter().map(|event| event.id).collect(), page.next, page.more))
}

/// Where an answer about displaced events that is taken for one leads on to, and whether it has any.
pub fn displaced(answer: &[u8], after: Option<&Value>) -> Option<(Value, bool)> {
    let displaced: Displaced = validate::last(answer).ok()?;
    validate::displaced(&displaced, after).ok()?;
    Some((displaced.next, displaced.more && !displaced.events.is_empty()))
}

/// What is to be asked again when this is taken for an answer to a query for whole events.
pub fn events(ids: &[Uuid], events: &[Envelope], last: &[u8]) -> Option<Vec<Uuid>> {
    let rest: Rest = validate::last(last).ok()?;
    validate::events(ids, events, &rest).ok()?;
    Some(rest.left_out)
}

/// Where to go on when this is taken for an answer to a query for the events of some keys.
pub fn of_keys(keys: &[String], from: i64, events: &[Envelope], last: &[u8]) -> Option<Option<i64>> {
    let rest: Rest = validate::last(last).ok()?;
    validate::of_keys(keys, from, events, &rest).ok()?;
    Some(rest.next)
}

/// Whether this is an answer of nats-server's monitoring port.
pub fn is_monitoring(answer: &str) -> bool {
    monitoring::parse(answer, "n1").is_some()
}

/// Reads a URL of PostgreSQL.
///
/// # Errors
/// When it is none.
pub fn postgres_url(url: &str) -> Result<(), Error> {
    aftercommit_core::postgres::options(&PostgresConfig::new(url), "test").map(drop)
}

/// Reads URLs of NATS.
///
/// # Errors
/// When they are none.
pub fn nats_urls(urls: &str) -> Result<(), Error> {
    aftercommit_core::jetstream::check(&NatsConfig { url: urls.into(), ..NatsConfig::default() })
}

/// A message: its subject and its headers.
pub type Message = (String, Vec<(String, String)>);

/// The message that the relay would publish of an event that a publisher may write, and the event.
///
/// # Errors
/// When it may not be written.
pub fn message(event: RawEvent) -> Result<(Envelope, Message), PublishError> {
    let NewEvent { event_id, event_type, version, key, headers, payload, content_type } = check::admit(event)?;
    let event = Envelope {
        id: event_id.into(),
        event_type,
        version: version.unsigned_abs(),
        key,
        source: "/fuzz".into(),
        time: chrono::DateTime::UNIX_EPOCH,
        sequence: 1,
        headers,
        content_type,
        payload: payload.into(),
        replaces: Vec::new(),
    };
    let (subject, headers, _) = publisher::Messages::new(SubjectPrefix::default()).message(&event).into_parts();
    let all = headers.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
    let all = all.map(|(name, value)| (name.to_string(), value.as_str().to_string())).collect();
    Ok((event, (subject.to_string(), all)))
}

/// Reads a relay's command line, without the program's name.
pub fn relay_arguments(arguments: &[&str]) -> Option<RelayConfig> {
    crate::cli::relay::config_of(arguments)
}
