//! What an operator tells the relay: pause and resume, and what becomes of a parked event.

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::relay::LEASE;
use aftercommit_outbox::event::EventId;

use super::parked::{self, Filter, LetGo};
pub use super::parked::{ParkedEvent, list as parked};
use super::pause::{self, Pausing, Target};

/// Stops publishing, whichever relay leads, until [`resume`]. It is written down, so it survives restarts; the backlog
/// waits in the outbox. A relay that is paused already gets another reason, if one is given. `who` does it, for the audit trail
/// ([`audit`](crate::audit)); so in all of these functions.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn pause(config: &PostgresConfig, who: &str, reason: Option<&str>) -> Result<Pausing, Error> {
    pause::pause(config, &target("relay pause", who), reason, false).await
}

/// Lets the relay publish again. False when it was not paused.
///
/// # Errors
/// As [`pause`].
pub async fn resume(config: &PostgresConfig, who: &str) -> Result<bool, Error> {
    Ok(pause::resume(config, &target("relay resume", who)).await?.0)
}

fn target<'a>(action: &'a str, who: &'a str) -> Target<'a> {
    Target { name: LEASE, subscriber: None, action, who }
}

/// Lets the leading relay try a parked event again, and then what waits behind it, in order. Returns how many events
/// were let go. [`parked::release`] does it for many.
///
/// # Errors
/// When the event is not parked, or waits behind another one; and as [`pause`].
pub async fn release(config: &PostgresConfig, who: &str, event: EventId) -> Result<i64, Error> {
    one(event, parked::release(config, who, &Filter::event(event)).await?)
}

/// Gives a parked event up: it is never published. What waits behind it is let go, in order; returns how many.
///
/// # Errors
/// As [`release`].
pub async fn discard(config: &PostgresConfig, who: &str, event: EventId) -> Result<i64, Error> {
    one(event, parked::discard(config, who, &Filter::event(event)).await?)
}

fn one(event: EventId, done: LetGo) -> Result<i64, Error> {
    if done.events.is_empty() {
        let problem = format!("event {event} is not parked by itself: see `aftercommit parked list`");
        return Err(Error::new(ErrorKind::Config, problem));
    }
    Ok(done.released)
}
