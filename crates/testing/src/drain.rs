//! Delivers committed events without NATS.

use std::collections::BTreeMap;
use std::ops::Index;
use std::sync::Arc;

use sqlx::PgPool;

use aftercommit_core::config::Naming;
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::outbox_event::OutboxEvent;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::walk::Walk;
use aftercommit_core::postgres::window;
use aftercommit_core::postgres::{database_error, testing};
use aftercommit_worker::drain::drain as drain_subscriber;
pub use aftercommit_worker::drain::{Dead, Failed, Outcome};
use aftercommit_worker::{Queues, Registry};

/// Rows per query.
const PAGE_ROWS: usize = 1000;
/// What PostgreSQL's list of connections shows.
const APPLICATION: &str = "aftercommit-drain";

/// What became of the delivered events, by subscriber: `drained["receipts"].handled`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drained {
    outcomes: BTreeMap<String, Outcome>,
}

impl Drained {
    /// The outcomes with the names of their subscribers.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Outcome)> {
        self.outcomes.iter().map(|(name, outcome)| (name.as_str(), outcome))
    }

    /// Asserts that every attempt succeeded: nothing failed, died, was snoozed or waits.
    ///
    /// # Panics
    /// When something did, naming subscriber, event and reason.
    #[track_caller]
    #[expect(clippy::panic, reason = "an assertion")]
    pub fn assert_all_handled(&self) {
        let problems: Vec<String> = self.iter().flat_map(|(name, outcome)| problems(name, outcome)).collect();
        if !problems.is_empty() {
            panic!("not all events were handled at once:\n  {}", problems.join("\n  "));
        }
    }
}

/// The outcome of a subscriber that was drained. Panics for any other name.
impl Index<&str> for Drained {
    type Output = Outcome;

    fn index(&self, subscriber: &str) -> &Outcome {
        &self.outcomes[subscriber]
    }
}

fn problems(name: &str, outcome: &Outcome) -> Vec<String> {
    let failed = outcome.failed.iter().map(|Failed { id, attempt, error, .. }| {
        format!("subscriber {name}, event {id}: attempt {attempt} failed: {error}")
    });
    let dead = outcome
        .dead
        .iter()
        .map(|Dead { id, reason, .. }| format!("subscriber {name}, event {id}: became a dead letter: {reason}"));
    let snoozed =
        outcome.snoozed.iter().map(|(id, wait)| format!("subscriber {name}, event {id}: snoozed for {wait:?}"));
    let waiting = outcome.waiting.iter().map(|id| format!("subscriber {name}, event {id}: waits behind its key"));
    failed.chain(dead).chain(snoozed).chain(waiting).collect()
}

/// Delivers every event that is committed in the outbox of this database to the subscribers, as relay and worker would,
/// but now and without NATS; returns what became of them.
///
/// Outbox, inbox, transactions, batches, retries and dead letters are the real ones. What differs from the worker:
/// - One transaction runs at a time, so that a test is the same each time.
/// - A failed attempt is followed by the next one at once, until the event is handled or a dead letter.
/// - A snoozed event is reported and not waited for; its key waits with it until the next call.
/// - The events go in the order of the outbox. What handlers publish is delivered by the next call.
/// - An outage is an error.
///
/// What the inbox knows as done is not run again. Each subscriber is leased for the time, so a worker that runs it in
/// the same database must be stopped before.
///
/// It opens connections of its own, with the pool's options and straight to PostgreSQL, so events that the test has not
/// committed are not delivered, and a handler waits for locks that the test still holds.
///
/// ```no_run
/// # use aftercommit::{Event, testing, worker::{Delivery, Handler, HandlerError, Subscriber}};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// # async fn example(pool: sqlx::PgPool) -> Result<(), aftercommit::Error> {
/// let drained = testing::drain(&pool, [Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt)]).await?;
/// assert_eq!(drained["receipts"].handled.len(), 1);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When the subscribers contradict each other, the schema is missing, PostgreSQL or something that a handler needs is
/// away, or a worker runs one of the subscribers.
pub async fn drain(pool: &PgPool, subscribers: impl Into<Registry>) -> Result<Drained, Error> {
    drain_into(pool, pool, subscribers).await
}

/// The same when the subscribers have a database of their own.
///
/// # Errors
/// Those of [`drain`].
pub async fn drain_into(outbox: &PgPool, inbox: &PgPool, subscribers: impl Into<Registry>) -> Result<Drained, Error> {
    let subscribers = subscribers.into().served(&Queues::All)?;
    let events = Connections::beside(outbox, APPLICATION)
        .run(async |connection| committed(connection).await)
        .await
        .map_err(|error| database_error("reading the outbox failed", error))?;
    let connections = Arc::new(Connections::beside(inbox, APPLICATION));
    let mut drained = Drained::default();
    for subscriber in subscribers {
        let name = subscriber.name().to_string();
        drained.outcomes.insert(name, drain_subscriber(subscriber, &connections, &events).await?);
    }
    Ok(drained)
}

/// All that is committed, as one window of the relay.
async fn committed(connection: &mut Session) -> Result<Vec<Arc<Envelope>>, sqlx::Error> {
    let (nothing, now) = (Mark::nothing(), testing::now(connection).await?);
    let source = Naming::default().source;
    let mut events = Vec::new();
    let mut walk = Walk::new(nothing, now, 0);
    loop {
        let page: Vec<OutboxEvent> = walk.next(connection, PAGE_ROWS).await?;
        if page.is_empty() {
            return Ok(events);
        }
        for row in page {
            events.push(Arc::new(window::envelope(connection, row, &source).await?));
        }
    }
}
