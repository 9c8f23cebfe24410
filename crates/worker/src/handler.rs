//! What a subscriber does with an event.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::future::Future;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgTransaction;

use aftercommit_core::envelope::traceparent;
use aftercommit_outbox::event::{Event, EventId};

/// Handles events of one type.
///
/// The transaction is open and already holds the inbox row of the event: what the handler writes through it commits
/// together with that row, or not at all. A handler may run more than once for one event (after a failure, or when an
/// event that ran beside it in the same transaction failed), but only one run commits, so effects belong into the
/// transaction.
///
/// ```
/// use aftercommit::Event;
/// use aftercommit::worker::{Delivery, Handler, HandlerError};
/// use sqlx::PgTransaction;
///
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64, cents: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// struct CountRevenue;
///
/// impl Handler<OrderPlaced> for CountRevenue {
///     async fn handle(
///         &self,
///         tx: &mut PgTransaction<'_>,
///         delivery: &Delivery<OrderPlaced>,
///     ) -> Result<(), HandlerError> {
///         if delivery.event.cents < 0 {
///             return Err(HandlerError::reject("an order cannot have a negative total"));
///         }
///         sqlx::query("update revenue set cents = cents + $1")
///             .bind(delivery.event.cents)
///             .execute(&mut **tx)
///             .await?; // an error here means: try again later
///         Ok(())
///     }
/// }
/// ```
pub trait Handler<E: Event>: Send + Sync + 'static {
    /// Applies one event.
    ///
    /// # Errors
    /// See [`HandlerError`] for what each means.
    fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        delivery: &Delivery<E>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// Why an event was not handled, and what shall happen next.
///
/// `?` on any error means [`HandlerError::retry`]. That is why this type is no [`std::error::Error`] itself.
///
/// Errors of an outage cost no attempt: when a [`sqlx::Error`] that says "connection lost", "server shutting down" or
/// "disk full" is the error or one of its sources, the event waits and is tried again until the outage is over.
#[derive(Debug)]
#[non_exhaustive]
pub enum HandlerError {
    /// Try again; after the subscriber's last attempt the event becomes a dead letter.
    Retry {
        /// What failed.
        error: Box<dyn StdError + Send + Sync>,
        /// How long to wait, at most a year. The subscriber's backoff decides when there is none.
        after: Option<Duration>,
    },
    /// The event can never be handled: it becomes a dead letter now.
    Reject {
        /// Why, for the operator. It is logged, so it must hold no payload.
        reason: String,
    },
    /// Not yet: come again after this time, at most a year. Costs no attempt.
    Snooze(Duration),
    /// A service that the handler needs is not available: try again for as long as that takes. Costs no attempt.
    Unavailable {
        /// Which service is not available, and why.
        error: Box<dyn StdError + Send + Sync>,
        /// How long to wait. The subscriber's backoff decides when there is none.
        after: Option<Duration>,
    },
}

impl HandlerError {
    /// Try again after the subscriber's backoff. Takes any error, also text and `anyhow::Error`.
    pub fn retry(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Retry { error: error.into(), after: None }
    }

    /// Try again after `wait`, at most a year, whatever the subscriber's backoff says.
    pub fn retry_after(wait: Duration, error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Retry { error: error.into(), after: Some(wait) }
    }

    /// Give up on this event now: it becomes a dead letter with this reason.
    pub fn reject(reason: impl Into<String>) -> Self {
        Self::Reject { reason: reason.into() }
    }

    /// A service that the handler needs is not available: the event waits, with its key, and is tried again by the
    /// subscriber's backoff for as long as that takes. Costs no attempt.
    pub fn unavailable(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable { error: error.into(), after: None }
    }

    /// Not yet: come again after `wait`, at most a year. Costs no attempt.
    pub fn snooze(wait: Duration) -> Self {
        Self::Snooze(wait)
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retry(error)
    }
}

/// An event as a handler gets it.
#[derive(Clone)]
#[non_exhaustive]
pub struct Delivery<E> {
    /// The event.
    pub event: E,
    /// Its identity, the same for all subscribers.
    pub id: EventId,
    /// The version of the payload's shape, at most [`Event::VERSION`].
    pub version: u32,
    /// The ordering key.
    pub key: Option<String>,
    /// When it was written.
    pub time: DateTime<Utc>,
    /// The service that published it.
    pub source: String,
    /// Its position in the publisher's outbox.
    pub sequence: i64,
    /// Which attempt of this subscriber this is; the first is 1. Outages and snoozing do not count.
    pub attempt: u32,
    /// How often JetStream has delivered the message to this subscriber, for comparison with `nats consumer info`.
    pub delivery_count: u64,
    /// The publisher's headers.
    pub headers: BTreeMap<String, String>,
}

impl<E> Delivery<E> {
    /// The W3C trace context of the publisher.
    pub fn traceparent(&self) -> Option<&str> {
        traceparent(&self.headers)
    }
}

impl<E: Event> Delivery<E> {
    /// The event's type.
    pub fn event_type(&self) -> &'static str {
        E::TYPE
    }

    /// A first delivery of `event` with a new id, for calling a handler in a test.
    pub fn new(event: E) -> Self {
        Self {
            id: EventId::new(),
            version: E::VERSION,
            key: event.key(),
            time: Utc::now(),
            source: "/test".into(),
            sequence: 0,
            attempt: 1,
            delivery_count: 1,
            headers: BTreeMap::new(),
            event,
        }
    }
}

/// Shows what identifies the event, never its payload or headers.
impl<E> std::fmt::Debug for Delivery<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery").field("id", &self.id).field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_error_means_retry() {
        fn handler() -> Result<(), HandlerError> {
            "x".parse::<u32>()?;
            Ok(())
        }
        assert!(matches!(handler(), Err(HandlerError::Retry { after: None, .. })));
        assert!(matches!(HandlerError::retry("plain text"), HandlerError::Retry { .. }));
    }
}
