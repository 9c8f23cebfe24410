//! From an envelope to the typed handler that an event type has.

use std::any::type_name;
use std::panic::Location;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use sqlx::PgTransaction;

use aftercommit_core::envelope::Envelope;
use aftercommit_outbox::event::Event;

use super::batch::{BatchError, BatchHandler};
use super::handler::{Delivery, Handler, HandlerError};

/// A handler behind its event type.
pub(super) struct Route {
    pub(super) handler: &'static str,
    /// Whether it takes more than one event at a time.
    pub(super) in_batches: bool,
    pub(super) place: &'static Location<'static>,
    pub(super) run: RunHandler,
}

type RunHandler = Arc<
    dyn for<'a, 't> Fn(&'a mut PgTransaction<'t>, &'a [(&'a Envelope, Try)]) -> BoxFuture<'a, Result<(), BatchError>>
        + Send
        + Sync,
>;

/// Which try of an event this is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Try {
    pub(super) attempt: u32,
    pub(super) delivery_count: u64,
}

impl Route {
    #[track_caller]
    pub(super) fn new<E: Event, H: Handler<E>>(handler: H) -> Self {
        let handler = Arc::new(handler);
        Self {
            handler: type_name::<H>(),
            place: Location::caller(),
            in_batches: false,
            run: Arc::new(move |tx, events| {
                let handler = Arc::clone(&handler);
                Box::pin(async move {
                    for (n, delivery) in read_all::<E>(events)?.iter().enumerate() {
                        handler.handle(tx, delivery).await.map_err(|error| BatchError::at(n, error))?;
                    }
                    Ok(())
                })
            }),
        }
    }

    #[track_caller]
    pub(super) fn batch<E: Event, H: BatchHandler<E>>(handler: H) -> Self {
        let handler = Arc::new(handler);
        Self {
            handler: type_name::<H>(),
            place: Location::caller(),
            in_batches: true,
            run: Arc::new(move |tx, events| {
                let handler = Arc::clone(&handler);
                Box::pin(async move { handler.handle(tx, &read_all::<E>(events)?).await })
            }),
        }
    }
}

fn read_all<E: Event>(events: &[(&Envelope, Try)]) -> Result<Vec<Delivery<E>>, BatchError> {
    let read = |(n, (envelope, this)): (usize, &(&Envelope, Try))| {
        read::<E>(envelope, *this).map_err(|error| BatchError::at(n, error))
    };
    events.iter().enumerate().map(read).collect()
}

/// The typed event. What cannot be read now can never be read, so it is rejected.
fn read<E: Event>(envelope: &Envelope, this: Try) -> Result<Delivery<E>, HandlerError> {
    if envelope.version > E::VERSION {
        return Err(HandlerError::reject(format!(
            "the event has version {} of {}, this subscriber knows up to {}",
            envelope.version,
            E::TYPE,
            E::VERSION
        )));
    }
    let event = serde_json::from_slice(&envelope.payload).map_err(|error| {
        HandlerError::reject(format!("the payload cannot be read as {}: {}", E::TYPE, without_values(&error)))
    })?;
    Ok(Delivery {
        event,
        id: envelope.id,
        version: envelope.version,
        key: envelope.key.clone(),
        time: envelope.time,
        source: envelope.source.clone(),
        sequence: envelope.sequence,
        attempt: this.attempt,
        delivery_count: this.delivery_count,
        headers: envelope.headers.clone(),
    })
}

/// The message of a JSON error, unless it may quote the payload.
fn without_values(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if !error.is_data() || text.starts_with("missing field") || text.starts_with("duplicate field") {
        return text;
    }
    format!("a value of the wrong kind at line {} column {}", error.line(), error.column())
}
