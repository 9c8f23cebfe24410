//! Dead letters: events that a subscriber gave up on, and what becomes of them.
//!
//! All of this happens in the subscriber's database. A letter that is retried runs from what is stored here, at its
//! subscriber only; the stream and the other subscribers have no part in it.

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::IgnoredAny;

use super::audit::{self, AuditEntry, AuditFilter};
pub use super::filter::Filter;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::envelope::is_json;
use aftercommit_core::error::{Error, ErrorKind};
pub use aftercommit_core::postgres::dead_letter::DeadLetter;
use aftercommit_core::postgres::dead_letter::{self, Change, Selection};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error};
use aftercommit_outbox::check::headers_are_legal;

/// Letters that are dealt with in one transaction.
const BATCH: i64 = 1000;
/// Entries of the audit trail that are shown with a letter.
const SHOWN_ENTRIES: i64 = 100;

async fn selection(filter: &Filter, connection: &mut Session) -> Result<Selection, Error> {
    let (newest_id, now) = dead_letter::bounds(connection).await.map_err(reading)?;
    Ok(Selection {
        ids: Some(filter.ids.clone()).filter(|ids| !ids.is_empty()),
        events: filter.event_ids(),
        subscriber: filter.subscriber.clone(),
        event_type: filter.event_type.clone(),
        key: filter.key.clone(),
        error: filter.error.clone(),
        dead_before: filter.older_than.map(|when| when.resolve(now)),
        dead_after: filter.newer_than.map(|when| when.resolve(now)),
        newest_id,
    })
}

/// A dead letter with everything that is known of it. Serialised, it has all but the payload.
#[derive(Clone, PartialEq, Serialize)]
pub struct OpenedLetter {
    /// The letter.
    #[serde(flatten)]
    pub letter: DeadLetter,
    /// The publisher's own headers.
    pub headers: BTreeMap<String, String>,
    /// The payload, byte for byte.
    #[serde(skip)]
    pub payload: Vec<u8>,
    /// What operators did to the event at this subscriber, the oldest first; up to 100 entries.
    pub audit: Vec<AuditEntry>,
}

/// Shows neither payload nor headers.
impl fmt::Debug for OpenedLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedLetter").field("letter", &self.letter).finish_non_exhaustive()
    }
}

/// Dead letters with the same subscriber, type and reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// Who gave up.
    pub subscriber: String,
    /// The events' type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Why.
    pub reason: String,
    /// How many there are.
    pub letters: i64,
    /// When the first one of them became a dead letter.
    pub oldest: DateTime<Utc>,
    /// And the last one.
    pub newest: DateTime<Utc>,
}

/// Up to `limit` dead letters, in the order in which [`retry`] would send them.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn list(config: &PostgresConfig, filter: &Filter, limit: i64) -> Result<Vec<DeadLetter>, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let selection = self::selection(filter, &mut connection).await?;
    let letters = dead_letter::list(&mut connection, &selection, limit).await.map_err(reading)?;
    Ok(letters)
}

/// How many dead letters the filter finds.
///
/// # Errors
/// As [`list`].
pub async fn count(config: &PostgresConfig, filter: &Filter) -> Result<i64, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let selection = self::selection(filter, &mut connection).await?;
    dead_letter::count(&mut connection, &selection).await.map_err(reading)
}

/// The dead letters in groups, up to `limit` of them, the largest first.
///
/// # Errors
/// As [`list`].
pub async fn groups(config: &PostgresConfig, filter: &Filter, limit: i64) -> Result<Vec<Group>, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let selection = self::selection(filter, &mut connection).await?;
    let groups = dead_letter::groups(&mut connection, &selection, limit).await.map_err(reading)?;
    let groups = groups.into_iter().map(|group| {
        let dead_letter::Group { subscriber, event_type, reason, letters, oldest, newest } = group;
        Group { subscriber, event_type, reason, letters, oldest, newest }
    });
    Ok(groups.collect())
}

/// One dead letter with everything that is known of it.
///
/// # Errors
/// [`ErrorKind::NotReady`] when there is no such letter; and as [`list`].
pub async fn show(config: &PostgresConfig, id: i64) -> Result<OpenedLetter, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let found = dead_letter::one(&mut connection, id).await.map_err(reading)?;
    let (letter, content) = found.ok_or_else(|| no_letter(id))?;

    let wanted = AuditFilter { event: Some(letter.event_id), subscriber: Some(letter.subscriber.clone()), since: None };
    let audit = audit::read(&mut connection, &wanted, SHOWN_ENTRIES).await?;
    Ok(OpenedLetter { letter, headers: content.headers, payload: content.payload, audit })
}

/// Sends dead letters back to their subscribers, where the active worker runs them from what is stored here, those of
/// one key in the order of the stream. Returns the letters' ids. `who` does it, for the audit trail.
///
/// Up to 1,000 letters go in one transaction. When several retry at once, each letter is sent once. Letters that come
/// into being meanwhile, such as those whose retry fails again, are left alone.
///
/// # Errors
/// [`ErrorKind::Config`] when the filter is empty and [`Filter::all`] is not set; and as [`list`]. What was sent before
/// an error stays sent.
pub async fn retry(config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Vec<i64>, Error> {
    filter.check("dead letters")?;
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let selection = self::selection(filter, &mut connection).await?;
    let mut sent = Vec::new();
    loop {
        match dead_letter::retry(&mut connection, &selection, who, BATCH).await {
            Ok(ids) if ids.is_empty() => return Ok(sent),
            Ok(ids) => sent.extend(ids),
            Err(error) => return Err(interrupted("retrying", sent.len(), error)),
        }
    }
}

/// Gives dead letters up for good: their events are done at their subscribers, without effect. Returns the letters'
/// ids. The audit trail keeps who did it, and each event as a whole.
///
/// # Errors
/// As [`retry`].
pub async fn discard(config: &PostgresConfig, who: &str, filter: &Filter) -> Result<Vec<i64>, Error> {
    filter.check("dead letters")?;
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let selection = self::selection(filter, &mut connection).await?;
    let mut gone = Vec::new();
    loop {
        match dead_letter::discard(&mut connection, &selection, who, BATCH).await {
            Ok(ids) if ids.is_empty() => return Ok(gone),
            Ok(ids) => gone.extend(ids),
            Err(error) => return Err(interrupted("discarding", gone.len(), error)),
        }
    }
}

/// What to change in a dead letter. The key cannot be changed: it decides the order.
#[derive(Clone, Default)]
pub struct Edit {
    /// The new payload. Defaults to the old one.
    pub payload: Option<Vec<u8>>,
    /// Headers to add or to replace.
    pub set_headers: BTreeMap<String, String>,
    /// Headers to take away.
    pub remove_headers: Vec<String>,
    /// Whether to [`retry`] the letter in the same transaction. Defaults to false.
    pub retry: bool,
}

/// What an edit has changed, without what the event holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Edited {
    /// The payload's length before and after.
    pub payload_bytes: (i32, i32),
    /// The payload's SHA-256 in hexadecimal before and after.
    pub payload_sha256: (String, String),
    /// Names of headers that are new or have another value.
    pub headers_set: Vec<String>,
    /// Names of headers that are gone.
    pub headers_removed: Vec<String>,
    /// Whether the letter is on its way to its subscriber.
    pub retried: bool,
}

/// Changes what a dead letter holds. The audit trail keeps headers and payload as they were.
///
/// # Errors
/// [`ErrorKind::Config`] when there is nothing to change, a header is illegal, or the letter's media type is JSON and
/// the new payload is not; as [`show`].
pub async fn edit(config: &PostgresConfig, who: &str, id: i64, edit: &Edit) -> Result<Edited, Error> {
    let failed = |error| database_error("editing a dead letter failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let letter = dead_letter::one(&mut connection, id).await.map_err(reading)?;
    let (letter, _) = letter.ok_or_else(|| no_letter(id))?;
    check_edit(edit, &letter.content_type)?;
    let selection = self::selection(&Filter::id(id), &mut connection).await?;
    let change = Change {
        payload: edit.payload.as_deref(),
        set_headers: &edit.set_headers,
        remove_headers: &edit.remove_headers,
    };
    let mut tx = connection.begin().await.map_err(failed)?;
    let changed = dead_letter::edit(&mut tx, id, change, who).await.map_err(failed)?.ok_or_else(|| no_letter(id))?;
    let retried = edit.retry && !dead_letter::retry(&mut tx, &selection, who, 1).await.map_err(failed)?.is_empty();
    tx.commit().await.map_err(failed)?;
    let (before, after) = &changed.headers;
    Ok(Edited {
        headers_set: after.iter().filter(|(name, value)| before.get(*name) != Some(value)).map(name).collect(),
        headers_removed: before.iter().filter(|(name, _)| !after.contains_key(*name)).map(name).collect(),
        payload_bytes: changed.payload_bytes,
        payload_sha256: changed.payload_sha256,
        retried,
    })
}

fn name((name, _): (&String, &String)) -> String {
    name.clone()
}

fn check_edit(edit: &Edit, content_type: &str) -> Result<(), Error> {
    if edit.payload.is_none() && edit.set_headers.is_empty() && edit.remove_headers.is_empty() {
        return Err(Error::new(ErrorKind::Config, "there is nothing to change: give a payload or a header"));
    }
    headers_are_legal(&edit.set_headers).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
    match &edit.payload {
        Some(payload) if is_json(content_type) => {
            serde_json::from_slice::<IgnoredAny>(payload).map(drop).map_err(|error| {
                Error::with_source(
                    ErrorKind::Config,
                    format!("the payload is not JSON, as the letter's media type {content_type} says"),
                    error,
                )
            })
        }
        _ => Ok(()),
    }
}

fn no_letter(id: i64) -> Error {
    Error::new(
        ErrorKind::NotReady,
        format!("there is no dead letter {id} in this database: see `aftercommit dead list` and `aftercommit audit`"),
    )
}

fn reading(error: sqlx::Error) -> Error {
    database_error("reading the dead letters failed", error)
}

fn interrupted(doing: &str, done: usize, error: sqlx::Error) -> Error {
    database_error(format!("{doing} dead letters failed after {done} of them, which stay done"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_checked_before_anything_is_written() {
        let json = |payload: &[u8]| Edit { payload: Some(payload.to_vec()), ..Edit::default() };
        assert!(check_edit(&Edit::default(), "application/json").is_err());
        assert!(check_edit(&json(b"{"), "application/json").is_err());
        assert!(check_edit(&json(b"{"), "application/pdf").is_ok());
        assert!(check_edit(&json(b"{}"), "application/json").is_ok());
        let header =
            |name: &str| Edit { set_headers: BTreeMap::from([(name.to_string(), "x".to_string())]), ..Edit::default() };
        assert!(check_edit(&header("X-Fixed"), "application/json").is_ok());
        assert!(check_edit(&header("ce-partitionkey"), "application/json").is_err(), "the key decides the order");
    }
}
