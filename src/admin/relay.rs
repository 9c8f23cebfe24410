//! What an operator tells the relay: pause and resume, and what becomes of parked events.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind};
use crate::event::EventId;
use crate::postgres::audit::{self, Entry};
use crate::postgres::{self, database_error, parked, pause};
use crate::relay::LEASE;

/// Stops publishing, whichever relay leads, until [`resume`]. It is written down, so it survives restarts; the backlog
/// waits in the outbox. False when it was paused already. `who` does it, for the audit trail
/// ([`audit`](crate::admin::audit)); so in all of these functions.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn pause(config: &PostgresConfig, who: &str, reason: Option<&str>) -> Result<bool, Error> {
    let failed = |error| database_error("pausing the relay failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let done = pause::pause(&mut tx, LEASE, reason).await.map_err(failed)?;
    if done {
        let detail = serde_json::json!({ "reason": reason });
        let entry = Entry { who, action: "relay pause", subscriber: None, event_id: None, detail };
        audit::write(&mut tx, &entry).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)?;
    Ok(done)
}

/// Lets the relay publish again. False when it was not paused.
///
/// # Errors
/// As [`pause`].
pub async fn resume(config: &PostgresConfig, who: &str) -> Result<bool, Error> {
    let failed = |error| database_error("resuming the relay failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let done = pause::resume(&mut tx, LEASE).await.map_err(failed)?;
    if done {
        let detail = serde_json::json!({});
        let entry = Entry { who, action: "relay resume", subscriber: None, event_id: None, detail };
        audit::write(&mut tx, &entry).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)?;
    Ok(done)
}

/// An event that was set aside.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParkedEvent {
    /// Its position in the outbox.
    pub outbox_id: i64,
    /// Its identity.
    pub event_id: EventId,
    /// Its type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// JetStream's error number, 0 when the client refused it; none for an event that waits behind another.
    pub code: Option<i64>,
    /// Why it is set aside.
    pub reason: String,
    /// `parked`, or `released` while it is on its way out.
    pub state: String,
    /// Since when.
    pub parked_at: DateTime<Utc>,
}

/// The events that are set aside, in outbox order, up to `limit`.
///
/// # Errors
/// As [`pause`].
pub async fn parked(config: &PostgresConfig, limit: i64) -> Result<Vec<ParkedEvent>, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let events = parked::list(&mut connection, limit)
        .await
        .map_err(|error| database_error("reading the parked events failed", error))?;
    Ok(events
        .into_iter()
        .map(|event| ParkedEvent {
            outbox_id: event.outbox_id,
            event_id: event.event_id.into(),
            event_type: event.event_type,
            key: event.key,
            code: event.code,
            reason: event.reason,
            state: event.state,
            parked_at: event.parked_at,
        })
        .collect())
}

/// Lets the leading relay try a parked event again, and then what waits behind it, in order. Returns how many events
/// were let go.
///
/// # Errors
/// When the event is not parked, or waits behind another one; and as [`pause`].
pub async fn release(config: &PostgresConfig, who: &str, event: EventId) -> Result<i64, Error> {
    let_go(config, who, event, false).await
}

/// Gives a parked event up: it is never published. What waits behind it is let go, in order; returns how many.
///
/// # Errors
/// As [`release`].
pub async fn discard(config: &PostgresConfig, who: &str, event: EventId) -> Result<i64, Error> {
    let_go(config, who, event, true).await
}

async fn let_go(config: &PostgresConfig, who: &str, event: EventId, discard: bool) -> Result<i64, Error> {
    let failed = |error| database_error("releasing a parked event failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let released = parked::release(&mut tx, event.as_uuid(), discard).await.map_err(failed)?.ok_or_else(|| {
        Error::new(ErrorKind::Config, format!("event {event} is not parked by itself: see `aftercommit parked list`"))
    })?;
    let action = if discard { "parked discard" } else { "parked release" };
    let detail = serde_json::json!({ "released": released });
    let entry = Entry { who, action, subscriber: None, event_id: Some(event.as_uuid()), detail };
    audit::write(&mut tx, &entry).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(released)
}
