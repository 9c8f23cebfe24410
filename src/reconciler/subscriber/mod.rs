//! What reconcilers look at beside a worker, in the subscriber's database: the stream and the consumer (leg B), and the
//! outbox of the publisher (leg C). What a subscriber has not handled is sent back to it alone.

mod consumer;
mod displaced;
mod earlier;
mod inbox;
mod messages;
mod sending;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::job::{Done, Job, Run, Schedule};
use crate::backoff::Backoff;
use crate::config::{Naming, NatsConfig};
use crate::error::Error;
use crate::jetstream::consumer::{ConsumerSpec, Position};
use crate::jetstream::stream::StreamReader;
use crate::jetstream::witness::{Moment, Witness};
use crate::jetstream::{self, Connection};
use crate::owner::Owner;
use crate::postgres::resend::{self, Known};
use crate::postgres::session::Session;
use crate::postgres::start::{self, Started};
use crate::postgres::{database_error, identity, reached};

pub use consumer::ConsumerLeg;
pub use inbox::InboxLeg;
pub(crate) use sending::Sending;

/// A subscriber as its reconcilers see it: what it reads and what it remembers. See
/// [`crate::worker::Subscriber::subscription`].
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Stream, name and subjects of the consumer.
    pub(crate) spec: ConsumerSpec,
    /// The event types that it handles; none for all.
    pub(crate) types: Vec<String>,
    /// How long the inbox remembers an event that is done, at least.
    pub(crate) inbox_retention: Duration,
    /// What to do when the consumer is missing or wrong.
    pub(crate) remedy: String,
}

impl Subscription {
    /// The subscriber's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The subscriber of a consumer as that is, without its definition: its settings cannot be compared then, and its
    /// inbox is taken to remember what [`crate::worker::Subscriber::inbox_retention`] defaults to.
    ///
    /// # Errors
    /// When NATS cannot be reached, or there is no such consumer.
    pub async fn discover(nats: &NatsConfig, naming: &Naming, name: &str) -> Result<Self, Error> {
        let connection = jetstream::connect(nats, "aftercommit-reconciler", "_INBOX_worker").await?;
        let context = connection.jetstream();
        let (stream, name) = (naming.stream.clone(), name.to_string());
        let mut spec = ConsumerSpec { stream, name, subjects: Vec::new(), ack_wait: Duration::ZERO, start: None };
        let remedy = "name its definition with --config worker.toml";
        let Some(survey) = jetstream::consumer::survey(&context, &spec).await? else {
            let problem = format!("stream {} has no consumer {}: {remedy}", spec.stream, spec.name);
            return Err(Error::new(crate::error::ErrorKind::NotReady, problem));
        };
        spec.ack_wait = survey.position.ack_wait;
        spec.subjects = if survey.subjects.is_empty() { vec![">".into()] } else { survey.subjects };
        let types = spec.subjects.iter().map(|subject| naming.prefix.event_type(subject));
        let types = types.map(|event_type| event_type.filter(|event_type| *event_type != ">").map(str::to_string));
        Ok(Self {
            types: types.collect::<Option<Vec<_>>>().unwrap_or_default(),
            spec,
            inbox_retention: Duration::from_hours(30 * 24),
            remedy: "run `aftercommit provision --config worker.toml`, or the service with --provision".into(),
        })
    }

    pub(crate) async fn connect(&self, nats: &NatsConfig) -> Result<Connection, Error> {
        jetstream::connect(nats, "aftercommit-reconciler", "_INBOX_worker").await
    }
}

const RETRY: Backoff = Backoff { first: Duration::from_secs(2), max: Duration::from_mins(1) };

/// What a leg does in a run.
trait Compare: Send + Sync + 'static {
    fn compare(&self, run: &mut Run) -> impl Future<Output = Result<Done, Error>> + Send;
}

/// A leg as the runner sees it.
struct LegJob<L> {
    name: String,
    schedule: Schedule,
    leg: L,
}

impl<L: Compare> Job for LegJob<L> {
    fn name(&self) -> &str {
        &self.name
    }

    fn schedule(&self) -> Schedule {
        self.schedule
    }

    fn run<'a>(&'a self, run: &'a mut Run) -> BoxFuture<'a, Result<Done, Error>> {
        self.leg.compare(run).boxed()
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
    database_error(format!("events cannot be sent back to subscriber {subscriber}"), error)
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
