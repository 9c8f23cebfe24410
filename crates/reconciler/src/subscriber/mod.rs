//! What reconcilers look at beside a worker, in the subscriber's database: the stream and the consumer (consumer comparison), and the
//! outbox of the publisher (inbox comparison). What a subscriber has not handled is redriven to it alone.

mod consumer;
mod displaced;
mod earlier;
mod inbox;
mod messages;
mod outstanding;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::Error;
use aftercommit_core::jetstream;
use aftercommit_core::jetstream::consumer::{ConsumerSpec, Position};
use aftercommit_core::jetstream::moment::Moment;
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::jetstream::witness::Witness;
use aftercommit_core::owner::Owner;
use aftercommit_core::postgres::resend::{self, Known};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::start::{self, Started};
use aftercommit_core::postgres::{database_error, identity, reached};
use aftercommit_core::runner::job::{Done, Job, Run, Schedule};
use aftercommit_core::runner::{Mode, Runner};
use aftercommit_core::subscription::Subscription;

pub use consumer::ConsumerComparison;
pub use inbox::InboxComparison;

/// Adds to a runner on a subscribers' database the comparisons of these subscribers: of each inbox with its stream, and with
/// the publisher's outbox. `every` is the interval between their runs; only [`Mode::Repair`] changes anything.
///
/// Beside a worker: `with_comparisons(worker.own_reconcilers(), &nats, worker.subscriptions(), every, mode)`.
pub fn with_comparisons(
    runner: Runner,
    nats: &NatsConfig,
    subscriptions: impl IntoIterator<Item = Subscription>,
    every: Duration,
    mode: Mode,
) -> Runner {
    subscriptions.into_iter().fold(runner, |runner, subscription| {
        let consumer = ConsumerComparison::new(nats.clone(), subscription.clone());
        let inbox = InboxComparison::new(nats.clone(), subscription);
        runner.comparison(ConsumerComparison { interval: every, mode, ..consumer }).comparison(InboxComparison {
            interval: every,
            mode,
            ..inbox
        })
    })
}

const RETRY: Backoff = Backoff { first: Duration::from_secs(2), max: Duration::from_mins(1) };

/// What a comparison does in a run.
trait Compare: Send + Sync + 'static {
    fn compare(&self, run: &mut Run) -> impl Future<Output = Result<Done, Error>> + Send;
}

/// A comparison as the runner sees it.
struct ComparisonJob<L> {
    name: String,
    schedule: Schedule,
    comparison: L,
}

impl<L: Compare> Job for ComparisonJob<L> {
    fn name(&self) -> &str {
        &self.name
    }

    fn schedule(&self) -> Schedule {
        self.schedule
    }

    fn run<'a>(&'a self, run: &'a mut Run) -> BoxFuture<'a, Result<Done, Error>> {
        self.comparison.compare(run).boxed()
    }
}

/// From where on in the stream things are compared. What a subscriber takes on later, it has not missed before.
#[derive(Debug, Clone, Default, PartialEq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
struct Since(BTreeMap<String, u64>);

impl Since {
    /// Takes note of the names as they are now; new ones count from `sequence` on, the first ones from the beginning.
    fn update(&mut self, names: &[String], sequence: u64) {
        let from = if self.0.is_empty() { 0 } else { sequence };
        self.0.retain(|name, _| names.contains(name));
        for name in names {
            self.0.entry(name.clone()).or_insert(from);
        }
    }

    fn has(&self, name: &str, sequence: u64) -> bool {
        self.0.get(name).is_some_and(|since| sequence > *since)
    }
}

/// Runs statements on the subscriber's database.
async fn ask<T>(run: &Run, work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>) -> Result<T, Error> {
    run.connections.run(work).await.map_err(|error| failed(run, error))
}

fn failed(run: &Run, error: sqlx::Error) -> Error {
    database_error(format!("{} cannot be compared", run.name), error)
}

fn failed_to_send(subscriber: &str, error: sqlx::Error) -> Error {
    database_error(format!("events cannot be redriven to subscriber {subscriber}"), error)
}

/// Where the subscriber starts, when that is not the oldest event.
async fn started(run: &Run, spec: &ConsumerSpec) -> Result<Option<Started>, Error> {
    ask(run, async |session| start::of(session, &spec.name, &spec.stream).await).await
}

/// Refuses to compare this database with a consumer that feeds another one.
async fn is_ours(run: &Run, spec: &ConsumerSpec, theirs: Option<&Owner>) -> Result<(), Error> {
    if theirs.is_none() {
        return Ok(());
    }
    let ours = ask(run, async |session| identity::owner(session).await).await?;
    jetstream::consumer::is_of(spec, theirs, &ours)
}

/// Up to where the subscriber has passed the stream as it was at a moment. The consumer's own word counts only as far as the
/// stream is what it was: when the place to which the subscriber has come by its own account is not there any more, the
/// stream has lost its end, and the consumer may stand where others came in place of what was lost. From the last place
/// that still is there on, the worker reads the stream itself.
async fn passed(
    run: &Run,
    stream: &StreamReader,
    spec: &ConsumerSpec,
    consumer: &Position,
    moment: &Moment,
) -> Result<u64, Error> {
    let floor = consumer.ack_floor.min(moment.last);
    let rows = ask(run, async |session| reached::rows(session, &spec.name, &spec.stream).await).await?;
    for (n, row) in rows.iter().enumerate() {
        let place = Witness { sequence: row.sequence.cast_unsigned(), stored_at: row.stored_at };
        if stream.stands(place).await? {
            return Ok(if n == 0 { floor } else { floor.min(place.sequence) });
        }
    }
    Ok(if rows.is_empty() { floor } else { 0 })
}

/// Those of some events that the subscriber has neither done nor waiting.
async fn unhandled(run: &Run, subscriber: &str, events: &[Uuid]) -> Result<HashMap<Uuid, Known>, Error> {
    if events.is_empty() {
        return Ok(HashMap::new());
    }
    ask(run, async |session| resend::unhandled(session, subscriber, events).await).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_on_later_counts_from_then_on() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut since = Since::default();
        since.update(&names(&["a"]), 70);
        assert!(since.has("a", 1) && !since.has("b", 100));
        since.update(&names(&["a", "b"]), 80);
        assert!(since.has("a", 1) && !since.has("b", 80) && since.has("b", 81));
        since.update(&names(&["b"]), 90);
        assert!(!since.has("a", 100) && since.has("b", 81));
    }
}
