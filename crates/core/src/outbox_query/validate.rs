//! What an answer must be to count as one to its query.
//!
//! The subject of the queries is served by relays alone where permissions say so. Where they do not, or a relay is
//! broken, anything may come: it is refused here, before anything is stored or run that was not asked for.

use std::collections::HashSet;

use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::wire::{Displaced, Page, Rest};
use crate::envelope::Envelope;
use aftercommit_outbox::subject::check_tokens;

/// So many whole events are taken in one answer at most. Relays send a tenth of that.
pub(super) const MOST_EVENTS: usize = 1_000;
/// So much of a text from outside gets into an error.
const TEXT: usize = 200;

/// Why there is nothing to go by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAnswer {
    /// What was asked is refused.
    #[error("{0}")]
    Refused(String),
    /// It does not match the query.
    #[error("the answer does not match the query: {0}")]
    Wrong(String),
}

fn wrong(why: impl Into<String>) -> InvalidAnswer {
    InvalidAnswer::Wrong(why.into())
}

/// The beginning of a text from outside, without what would disturb a log or a database.
fn told(text: &str) -> String {
    text.chars().take(TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Reads the last message of an answer.
pub fn last<T: DeserializeOwned>(payload: &[u8]) -> Result<T, InvalidAnswer> {
    let unreadable = |error: serde_json::Error| wrong(told(&error.to_string()));
    let last: Value = serde_json::from_slice(payload).map_err(unreadable)?;
    if let Some(why) = last.get("error").and_then(Value::as_str) {
        return Err(InvalidAnswer::Refused(told(why)));
    }
    serde_json::from_value(last).map_err(unreadable)
}

/// A page behind the token `after`, or with `digest` the digest of a range.
pub fn page(page: &Page, after: Option<&Value>, types: &[String], digest: bool) -> Result<(), InvalidAnswer> {
    if page.behind > page.to || i64::try_from(page.to).is_err() {
        return Err(wrong(format!("a range from {} to {}", page.behind, page.to)));
    }
    leads_on(after, &page.next, page.more)?;
    if !page.more && !page.events.is_empty() {
        return Err(wrong("events behind the end"));
    }
    if page.more && (digest != page.count.is_some() || digest != page.digest.is_some()) {
        return Err(wrong("a page instead of a digest, or the other way round"));
    }
    if digest && !page.events.is_empty() {
        return Err(wrong("a digest with events"));
    }
    let mut last = i64::MIN;
    for event in &page.events {
        if event.id <= last {
            return Err(wrong("events out of their order"));
        }
        last = event.id;
        if check_tokens(&event.event_type).is_err() || !(types.is_empty() || types.contains(&event.event_type)) {
            return Err(wrong(format!("an event of type {:?}", told(&event.event_type))));
        }
        storable(event.key.as_deref())?;
    }
    Ok(())
}

/// Events that are not where they should be, behind the token `after`.
pub fn displaced(displaced: &Displaced, after: Option<&Value>) -> Result<(), InvalidAnswer> {
    // Without events it is waited for those of the last second, from the same token.
    leads_on(after, &displaced.next, displaced.more && !displaced.events.is_empty())?;
    displaced.events.iter().try_for_each(|event| storable(event.key.as_deref()))
}

/// Whole events by their ids. What is left out is asked for again, so it must become less.
pub fn events(ids: &[Uuid], events: &[Envelope], rest: &Rest) -> Result<(), InvalidAnswer> {
    let mut open: HashSet<Uuid> = ids.iter().copied().collect();
    for event in events {
        if !open.remove(&event.id.as_uuid()) {
            return Err(wrong(format!("event {}, or that one twice", event.id)));
        }
        storable(event.key.as_deref())?;
    }
    match rest.left_out.iter().find(|id| !open.remove(id)) {
        Some(id) => Err(wrong(format!("event {id} left out, or that one twice"))),
        None => Ok(()),
    }
}

/// Whole events of some keys from an outbox id on.
pub fn of_keys(keys: &[String], from: i64, events: &[Envelope], rest: &Rest) -> Result<(), InvalidAnswer> {
    let mut seen = HashSet::new();
    for event in events {
        let is_of_them = event.key.as_ref().is_some_and(|key| keys.contains(key));
        if !is_of_them || event.sequence < from || !seen.insert(event.sequence) {
            return Err(wrong(format!("event {} of another key or place, or twice", event.id)));
        }
    }
    let last = seen.into_iter().max().unwrap_or(from);
    match rest.next {
        Some(next) if next <= last => Err(wrong(format!("going on from {next} behind {last}"))),
        _ => Ok(()),
    }
}

/// Behind the same token the same would come for ever. A token is kept in the subscriber's database.
fn leads_on(after: Option<&Value>, next: &Value, more: bool) -> Result<(), InvalidAnswer> {
    if more && after.unwrap_or(&Value::Null) == next {
        return Err(wrong("a token that leads nowhere"));
    }
    if next.to_string().contains("\\u0000") { Err(wrong("a token with a NUL")) } else { Ok(()) }
}

fn storable(key: Option<&str>) -> Result<(), InvalidAnswer> {
    if key.is_some_and(|key| key.contains('\0')) { Err(wrong("a key with a NUL")) } else { Ok(()) }
}
