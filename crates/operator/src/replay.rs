//! Running events again at one subscriber, or for the first time when it has missed them: from the stream, and from the
//! outbox what the stream does not hold any more.

use std::collections::{BTreeSet, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::stream::{Extent, StreamReader};
use aftercommit_core::jetstream::{consumer, stored};
use aftercommit_core::outbox_query::client::OutboxClient;
use aftercommit_core::outbox_query::reader::OutboxReader;
use aftercommit_core::outbox_query::wire::{Listed, Page};
use aftercommit_core::postgres::resend::{self, Event, Known, Order};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, identity};
use aftercommit_core::sending::Sending;
use aftercommit_core::subscription::Subscription;
use aftercommit_outbox::event::EventId;
use aftercommit_outbox::subject;

/// Differences between the clocks of the servers.
const CLOCKS: TimeDelta = TimeDelta::minutes(10);
/// How many of the events a [`Replayed`] names.
const NAMED: usize = 20;

/// Which events are meant; what is not set does not matter.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// By their ids.
    pub ids: Vec<EventId>,
    /// Of this type.
    pub event_type: Option<String>,
    /// With this key.
    pub key: Option<String>,
    /// Written at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Written before this time.
    pub until: Option<DateTime<Utc>>,
}

/// How to replay.
#[derive(Debug, Clone, Default)]
pub struct Replay {
    /// Which events.
    pub filter: Filter,
    /// Run also those once more that the subscriber has handled. Their inbox rows go in the transaction that sends them
    /// back, and the audit trail keeps each. Dead letters stay dead. Defaults to false.
    pub again: bool,
    /// The outbox's database, and the names under which it is published: to read there what the stream does not hold any
    /// more, when no relay answers or the NATS user may not ask it. Its role needs what a relay may read. Defaults to none:
    /// the publisher's relay is asked.
    pub outbox: Option<(PostgresConfig, Naming)>,
    /// Only what the stream holds, without asking the outbox. Defaults to false.
    pub stream_only: bool,
    /// Only tell what would be done. Defaults to false.
    pub dry_run: bool,
}

/// What was, or would be, replayed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Replayed {
    /// How many events.
    pub events: u64,
    /// The first 20 of them.
    pub first: Vec<Found>,
    /// Of the events that were named by id, those that were left out, because the subscriber is done with them or they wait
    /// to run already.
    pub left_out: Vec<EventId>,
    /// Of the events that were named by id, those that were not found: neither stream nor outbox has them, they do not fit the
    /// rest of the filter, or the consumer has not come to them yet.
    pub unknown: Vec<EventId>,
    /// How many events were left out because they were forgotten: there is nothing to handle. A dry run does not count those that
    /// only the outbox has.
    pub erased: u64,
}

/// An event that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// Its identity.
    pub event_id: EventId,
    /// Its type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// When it was written.
    pub time: DateTime<Utc>,
    /// Its message in the stream; none when it comes from the outbox.
    pub stream_sequence: Option<u64>,
}

impl Filter {
    fn fits(&self, id: Uuid, event_type: &str, key: Option<&str>, time: DateTime<Utc>) -> bool {
        (self.ids.is_empty() || self.ids.iter().any(|wanted| wanted.as_uuid() == id))
            && self.event_type.as_ref().is_none_or(|wanted| wanted == event_type)
            && self.key.as_deref().is_none_or(|wanted| key == Some(wanted))
            && self.since.is_none_or(|since| time >= since)
            && self.until.is_none_or(|until| time < until)
    }
}

/// Sends events back to a subscriber, in the order of the stream, where its active worker runs them before live events of
/// their keys: those that its consumer has passed, that fit the filter, and that the inbox does not have. Each batch goes in
/// a transaction of its own, with a line in the audit trail. `postgres` is the subscriber's database; `who` does it.
///
/// What is older than the stream's first message comes from the outbox, through the publisher's relay or from its database.
///
/// # Errors
/// When a server cannot be reached or does not answer, or the consumer does not exist or feeds another inbox. What was sent before an error stays
/// sent.
pub async fn replay(
    postgres: &PostgresConfig,
    nats: &NatsConfig,
    subscription: &Subscription,
    who: &str,
    replay: &Replay,
) -> Result<Replayed, Error> {
    let mut session = postgres::connect(postgres, "aftercommit").await?;
    let nats = subscription.connect(nats).await?;
    let spec = &subscription.spec;
    let found = consumer::locate(&nats.jetstream(), spec).await?;
    let consumer = found.ok_or_else(|| {
        let problem =
            format!("consumer {} of stream {} does not exist: {}", spec.name, spec.stream, subscription.remedy);
        Error::new(ErrorKind::NotReady, problem)
    })?;
    if consumer.owner.is_some() {
        let ours = identity::owner(&mut session).await;
        let ours = ours.map_err(|error| database_error("looking which database this is failed", error))?;
        consumer::is_of(spec, consumer.owner.as_ref(), &ours)?;
    }
    let extent = StreamReader::new(&nats, &spec.stream).extent().await?;
    let order =
        Order { subscriber: spec.name.clone(), stream: spec.stream.clone(), who: who.into(), again: replay.again };
    let history = History::new(&nats, &spec.stream).await?;
    let mut work = Work {
        session,
        subscription,
        replay,
        order,
        replayed: Replayed::default(),
        done: HashSet::new(),
        seen: HashSet::new(),
        left_out: BTreeSet::new(),
        erased: HashSet::new(),
    };
    let to = consumer.ack_floor.min(extent.last);
    let since = replay.filter.since.and_then(|since| since.checked_sub_signed(CLOCKS));
    let first = match since {
        Some(since) if extent.first <= to => history.since(extent.first, to, since).await?,
        _ => extent.first,
    };
    // When older messages than wanted are there, the outbox has nothing to add.
    if !replay.stream_only && first == extent.first && extent.first > 1 {
        let mut outbox = match &replay.outbox {
            None => Outbox::Relay(Box::new(OutboxClient::new(&nats, &spec.stream))),
            Some((postgres, naming)) => {
                Outbox::Database(OutboxReader::open(postgres, naming).await.map_err(at_the_outbox)?)
            }
        };
        work.outbox(&mut outbox, extent, to).await?;
    }
    work.stream(&history, first, to).await?;
    work.replayed.erased = work.erased.len() as u64;
    let (seen, left_out) = (work.seen, work.left_out);
    work.replayed.left_out = left_out.into_iter().map(EventId::from).collect();
    work.replayed.unknown = replay.filter.ids.iter().filter(|id| !seen.contains(&id.as_uuid())).copied().collect();
    Ok(work.replayed)
}

/// Who tells of the outbox.
enum Outbox {
    Relay(Box<OutboxClient>),
    Database(OutboxReader),
}

impl Outbox {
    async fn page(&mut self, up_to: u64, after: Option<Value>, types: &[String]) -> Result<Page, Error> {
        match self {
            Self::Relay(client) => client.page(up_to, after, types, false).await,
            Self::Database(library) => library.listed(up_to, after, types).await.map_err(at_the_outbox),
        }
    }

    async fn events(&mut self, ids: &[Uuid]) -> Result<Vec<Envelope>, Error> {
        match self {
            Self::Relay(client) => client.events(ids).await,
            Self::Database(library) => library.whole(ids).await.map_err(at_the_outbox),
        }
    }
}

fn at_the_outbox(error: Error) -> Error {
    Error::with_source(error.kind(), "the outbox's database (--outbox-database)", error)
}

struct Work<'a> {
    session: Session,
    subscription: &'a Subscription,
    replay: &'a Replay,
    order: Order,
    replayed: Replayed,
    /// Of what came from the outbox, the part that the stream may hold, too.
    done: HashSet<Uuid>,
    /// Of the events that were named by id, those that were found.
    seen: HashSet<Uuid>,
    /// Those of them that are not to run.
    left_out: BTreeSet<Uuid>,
    /// Those that were forgotten.
    erased: HashSet<Uuid>,
}

impl Work<'_> {
    /// What lies before the stream's first message.
    async fn outbox(&mut self, outbox: &mut Outbox, extent: Extent, to: u64) -> Result<(), Error> {
        let filter = &self.replay.filter;
        let mut token = None;
        loop {
            let page = outbox.page(to, token, &self.subscription.types).await?;
            if !page.more || page.behind >= extent.first {
                return Ok(());
            }
            token = Some(page.next);
            let fits =
                |event: &Listed| filter.fits(event.event_id, &event.event_type, event.key.as_deref(), event.time);
            let fitting: Vec<Listed> = page.events.into_iter().filter(fits).collect();
            let ids = self.wanted(fitting.iter().map(|event| event.event_id).collect()).await?;
            if page.to >= extent.first {
                self.done.extend(&ids);
            }
            if self.replay.dry_run {
                let wanted = fitting.into_iter().filter(|event| ids.contains(&event.event_id));
                let found: Vec<Found> = wanted
                    .map(|event| Found {
                        event_id: event.event_id.into(),
                        event_type: event.event_type,
                        key: event.key,
                        time: event.time,
                        stream_sequence: None,
                    })
                    .collect();
                self.replayed.events += found.len() as u64;
                self.name(found);
            } else if !ids.is_empty() {
                let events = outbox.events(&ids).await?;
                if let Some(other) = events.iter().find(|event| !fitting.iter().any(|listed| is(listed, event))) {
                    let problem = format!("event {} came from the outbox as another than it was listed", other.id);
                    return Err(Error::new(ErrorKind::Integrity, problem));
                }
                let (erased, events): (Vec<_>, Vec<_>) = events.into_iter().partition(Envelope::is_tombstone);
                self.erased(erased.iter().map(|event| event.id.as_uuid()));
                self.send(events.into_iter().map(|event| Event { event, sequence: 0 }).collect()).await?;
            }
        }
    }

    async fn stream(&mut self, history: &History, first: u64, to: u64) -> Result<(), Error> {
        let (filter, subjects) = (&self.replay.filter, &self.subscription.spec.subjects);
        let mut next = Some(first);
        while let Some(first) = next.filter(|first| *first <= to) {
            let batch = history.batch(first..=to).await?;
            let mut events = Vec::new();
            for message in &batch.messages {
                let is_for_it = subjects.iter().any(|filter| subject::matches(filter, &message.subject));
                let Some(event) = stored::event(message).ok().filter(|_| is_for_it) else { continue };
                let id = event.id.as_uuid();
                let fits = filter.fits(id, &event.event_type, event.key.as_deref(), event.time);
                if fits && event.is_tombstone() {
                    self.erased([id].into_iter());
                } else if fits && !self.done.contains(&id) {
                    events.push(Event { event, sequence: message.sequence });
                }
            }
            let wanted = self.wanted(events.iter().map(|event| event.event.id.as_uuid()).collect()).await?;
            events.retain(|event| wanted.contains(&event.event.id.as_uuid()));
            if self.replay.dry_run {
                self.replayed.events += events.len() as u64;
                self.name(events.iter().map(found).collect());
            } else {
                self.send(events).await?;
            }
            next = batch.next;
        }
        Ok(())
    }

    /// Events that were forgotten are not sent.
    fn erased(&mut self, ids: impl Iterator<Item = Uuid>) {
        for id in ids {
            self.erased.insert(id);
            if !self.replay.filter.ids.is_empty() {
                self.seen.insert(id);
            }
        }
    }

    /// Those that are to run.
    async fn wanted(&mut self, ids: Vec<Uuid>) -> Result<Vec<Uuid>, Error> {
        if !self.replay.filter.ids.is_empty() {
            self.seen.extend(&ids);
        }
        if self.replay.again || ids.is_empty() {
            return Ok(ids);
        }
        let known = resend::unhandled(&mut self.session, &self.order.subscriber, &ids).await.map_err(failed)?;
        let (wanted, left_out): (Vec<Uuid>, Vec<Uuid>) =
            ids.into_iter().partition(|id| known.get(id) == Some(&Known::Not));
        self.left_out.extend(left_out.into_iter().filter(|id| self.seen.contains(id)));
        Ok(wanted)
    }

    async fn send(&mut self, events: Vec<Event>) -> Result<(), Error> {
        if events.is_empty() {
            return Ok(());
        }
        let mut sending = Sending::begin(&mut self.session, self.order.clone()).await.map_err(failed)?;
        sending.send(&events).await.map_err(failed)?;
        self.replayed.events += sending.commit("replay").await.map_err(failed)?;
        self.name(events.iter().map(found).collect());
        Ok(())
    }

    fn name(&mut self, found: Vec<Found>) {
        let room = NAMED.saturating_sub(self.replayed.first.len());
        self.replayed.first.extend(found.into_iter().take(room));
    }
}

fn found(event: &Event) -> Found {
    let Event { event: Envelope { id, event_type, key, time, .. }, sequence } = event;
    Found {
        event_id: *id,
        event_type: event_type.clone(),
        key: key.clone(),
        time: *time,
        stream_sequence: Some(*sequence).filter(|sequence| *sequence > 0),
    }
}

/// Whether the whole event is the one of a page.
fn is(listed: &Listed, event: &Envelope) -> bool {
    (listed.id, listed.event_id, listed.time) == (event.sequence, event.id.as_uuid(), event.time)
        && (&listed.event_type, &listed.key) == (&event.event_type, &event.key)
}

fn failed(error: sqlx::Error) -> Error {
    database_error("replaying failed; what was sent before stays sent", error)
}
