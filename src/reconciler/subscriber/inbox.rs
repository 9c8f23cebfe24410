//! Leg C: the publisher's outbox and a subscriber's inbox, whatever became of the stream between them.
//!
//! The two are in different databases. The leading relay tells what of the outbox lies at or before the consumer's ack
//! floor, in ranges with a digest of the ids, and only where the inbox has another digest the ids themselves. What is not
//! handled comes whole from the outbox, too, so it does not matter whether the stream still has it.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::sending::Sending;
use super::{Compare, LegJob, RETRY, Since, Subscription, ask, failed_to_send, unhandled};
use crate::config::NatsConfig;
use crate::envelope::Envelope;
use crate::error::Error;
use crate::fault;
use crate::jetstream::history::History;
use crate::jetstream::outbox_client::OutboxClient;
use crate::jetstream::outbox_service::{Listed, Moved};
use crate::jetstream::stream::StreamReader;
use crate::jetstream::{self, consumer, stored};
use crate::postgres::finding::Finding;
use crate::postgres::place;
use crate::postgres::resend::{self, Event, Known, Order};
use crate::reconciler::job::{Done, Run, Schedule, written};
use crate::reconciler::{Mode, Runner, Scope};

const MISSED: &str = "not_handled";
/// The newest place in the outbox.
const NEWEST: u64 = i64::MAX.cast_unsigned();
/// Earlier findings that are looked at together.
const FINDINGS: i64 = 500;
/// Keys that are asked for together.
const KEYS: usize = 100;
/// Differences between the clocks of the two databases.
const CLOCKS: TimeDelta = TimeDelta::minutes(10);

/// Compares the publisher's outbox with a subscriber's inbox, up to where the subscriber's consumer counts everything as
/// acked, and sends back to the subscriber what it has not handled. Give it to a [`Runner`] on the subscriber's database
/// with [`Runner::inbox`]. The publisher's relay must run, and the NATS user may ask it; see docs/reconciliation.md.
#[derive(Debug, Clone)]
pub struct InboxLeg {
    /// From the end of a sweep over everything to the next; none for never. Defaults to a day. The other runs look at
    /// what is new.
    pub full_every: Option<Duration>,
    /// From the end of a run to the next. Defaults to 5 minutes.
    pub interval: Duration,
    /// What scheduled runs do about what they find. Defaults to [`Mode::Report`].
    pub mode: Mode,
    /// The NATS servers.
    pub nats: NatsConfig,
    /// The subscriber.
    pub subscription: Subscription,
}

impl InboxLeg {
    /// The defaults for a subscriber.
    pub fn new(nats: NatsConfig, subscription: Subscription) -> Self {
        Self {
            full_every: Some(Duration::from_hours(24)),
            interval: Duration::from_mins(5),
            mode: Mode::Report,
            nats,
            subscription,
        }
    }
}

impl Runner {
    /// Adds the comparison of the publisher's outbox with a subscriber's inbox. Its name is `inbox:` and the subscriber's
    /// name.
    #[must_use]
    pub fn inbox(self, leg: InboxLeg) -> Self {
        let InboxLeg { interval, full_every, mode, .. } = leg;
        let name = format!("inbox:{}", leg.subscription.name());
        self.job(LegJob { name, schedule: Schedule { interval, full_every, mode, retry: RETRY }, leg })
    }
}

/// Where the next run goes on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Position {
    stream: String,
    types: Since,
    /// What lies before this token of the outbox was compared.
    compared: Option<Value>,
    /// What was missing in the stream before this one was dealt with.
    displaced: Option<Value>,
    /// A sweep over everything that has not ended: the run with which it began, and how far it is.
    sweep: Option<(i64, Option<Value>)>,
}

impl Compare for InboxLeg {
    async fn compare(&self, run: &mut Run) -> Result<Done, Error> {
        let Subscription { spec, types, inbox_retention, .. } = &self.subscription;
        let nats = self.subscription.connect(&self.nats).await?;
        let found = consumer::locate(&jetstream::context(&nats.client), spec).await?;
        // Leg B says that it is missing.
        let Some(consumer) = found else { return Ok(Done::default()) };
        let stream = StreamReader::new(&nats, &spec.stream);
        let extent = stream.extent().await?;
        let floor = consumer.ack_floor.min(extent.last);
        let (name, subscriber) = (run.name.clone(), spec.name.clone());
        ask(run, async |session| resend::settle_handled(session, &name, MISSED, &subscriber).await).await?;
        let now = ask(run, async |session| place::now(session).await).await?;
        let retention = TimeDelta::from_std(*inbox_retention).unwrap_or(TimeDelta::MAX);

        let position = run.position().filter(|position: &Position| position.stream == spec.stream);
        let mut position = position.unwrap_or_else(|| Position { stream: spec.stream.clone(), ..Position::default() });
        let wanted = if types.is_empty() { vec!["*".to_string()] } else { types.clone() };
        position.types.update(&wanted, floor);
        let begins = run.scope == Scope::Full || position.compared.is_none();
        let sweep = position.sweep.take().or_else(|| begins.then_some((run.id, None)));
        let token = sweep.as_ref().map_or_else(|| position.compared.clone(), |(_, token)| token.clone());
        let mut leg = Leg {
            leg: self,
            client: OutboxClient::new(&nats, &spec.stream),
            history: History::new(&nats, &spec.stream).await?,
            stream,
            floor,
            horizon: now.checked_sub_signed(retention).map_or(DateTime::UNIX_EPOCH, |horizon| horizon + CLOCKS),
            pending: HashSet::new(),
            stage: if run.mode == Mode::Repair { Stage::Earlier(0) } else { Stage::Ranges },
            token,
            range: None,
            edge: None,
            complete_to: None,
            too_old: 0,
            displaced: position.displaced.clone(),
            sweep: sweep.map(|(since, _)| since),
            position,
            run,
        };
        leg.pending().await?;
        leg.work().await
    }
}

/// What a run does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What earlier runs have only reported, behind an outbox id.
    Earlier(i64),
    /// What lies before the ack floor.
    Ranges,
    /// The range that the ack floor lies in.
    Edge,
    /// What was missing in the stream.
    Displaced,
    Ended,
}

/// A run.
struct Leg<'a> {
    leg: &'a InboxLeg,
    run: &'a mut Run,
    client: OutboxClient,
    stream: StreamReader,
    history: History,
    /// The consumer's ack floor, in the stream.
    floor: u64,
    /// The inbox may have forgotten events that were written before.
    horizon: DateTime<Utc>,
    /// Events that the stream has behind the floor, out of their order, or that the relay is about to put there.
    pending: HashSet<Uuid>,
    stage: Stage,
    token: Option<Value>,
    /// The range that is gone through page by page ends at this sequence.
    range: Option<u64>,
    /// In the range that the floor lies in: what to ask behind, and where it ends.
    edge: Option<(Option<Value>, u64)>,
    complete_to: Option<DateTime<Utc>>,
    too_old: u64,
    displaced: Option<Value>,
    sweep: Option<i64>,
    position: Position,
}

/// What one step came to.
#[derive(Default)]
struct Page {
    /// Not handled, in the order of the outbox.
    missed: Vec<Uuid>,
    /// The same whole, where they had to be read anyway.
    events: Vec<Envelope>,
    findings: Vec<Finding>,
    /// Whether the position can be saved here.
    rest: bool,
}

impl Leg<'_> {
    async fn work(mut self) -> Result<Done, Error> {
        while let Some(page) = self.next().await? {
            if self.run.mode == Mode::Repair && !(page.missed.is_empty() && page.events.is_empty()) {
                self.send(page).await?;
                break;
            }
            self.run.found(&page.findings).await?;
            if page.rest {
                self.save().await?;
            }
        }
        self.position.compared = self.token.clone();
        if self.run.mode == Mode::Repair {
            self.position.displaced = self.displaced.clone();
        }
        Ok(Done {
            reconciled_up_to: self.complete_to,
            swept_since: self.sweep,
            position: Some(written(&self.position)),
            detail: Some(json!({ "stream_sequence": self.floor, "too_old": self.too_old })),
        })
    }

    async fn save(&mut self) -> Result<(), Error> {
        match self.sweep {
            Some(since) => self.position.sweep = Some((since, self.token.clone())),
            None => self.position.compared = self.token.clone(),
        }
        self.run.save_position(&self.position).await?;
        self.position.sweep = None;
        fault::point("reconciler-inbox-saved");
        Ok(())
    }

    /// Sends back everything from `page` to the end in one transaction, so that no live event gets in between.
    async fn send(&mut self, page: Page) -> Result<(), Error> {
        let order = Order {
            subscriber: self.leg.subscription.name().into(),
            stream: self.position.stream.clone(),
            who: format!("reconciler {} run {}", self.run.name, self.run.id),
            again: false,
        };
        let failed = |error| failed_to_send(&order.subscriber, error);
        let connections = self.run.connections.clone();
        let mut session = connections.take().await.map_err(failed)?;
        let mut sending = Sending::begin(&mut session, order.clone()).await.map_err(failed)?;
        let (mut page, mut sent) = (Some(page), 0);
        while let Some(Page { missed, mut events, findings, .. }) = page {
            if !missed.is_empty() {
                events.extend(self.client.events(&missed).await?);
            }
            let events: Vec<Event> = events.into_iter().map(|event| Event { event, sequence: 0 }).collect();
            sending.send(&events).await.map_err(failed)?;
            sent += events.len() as u64;
            self.run.found(&findings).await?;
            page = self.next().await?;
        }
        sending.commit("reconcile repair").await.map_err(failed)?;
        connections.give_back(session);
        self.run.repaired(sent);
        let (name, subscriber) = (self.run.name.clone(), order.subscriber.clone());
        ask(self.run, async |session| resend::mark_repairing(session, &name, MISSED, &subscriber).await).await
    }

    /// The next step; none at the end.
    async fn next(&mut self) -> Result<Option<Page>, Error> {
        loop {
            let page = match self.stage {
                Stage::Earlier(after) => self.earlier(after).await?,
                Stage::Ranges => self.range().await?,
                Stage::Edge => self.edge().await?,
                Stage::Displaced if self.run.mode == Mode::Repair => self.out_of_order().await?,
                Stage::Displaced | Stage::Ended => return Ok(None),
            };
            if let Some(page) = page {
                return Ok(Some(page));
            }
            self.stage = match self.stage {
                Stage::Earlier(_) => Stage::Ranges,
                Stage::Ranges => Stage::Edge,
                Stage::Edge => Stage::Displaced,
                Stage::Displaced | Stage::Ended => Stage::Ended,
            };
        }
    }

    async fn earlier(&mut self, after: i64) -> Result<Option<Page>, Error> {
        let name = self.run.name.clone();
        let open = ask(self.run, async |session| resend::open(session, &name, MISSED, after, FINDINGS).await).await?;
        let Some((last, _)) = open.last() else { return Ok(None) };
        self.stage = Stage::Earlier(*last);
        let missed: Vec<Uuid> = open.into_iter().map(|(_, event_id)| event_id).collect();
        self.pending.extend(&missed);
        Ok(Some(Page { missed, ..Page::default() }))
    }

    /// The next range whose digest is as it should be, or the next page of another one.
    async fn range(&mut self) -> Result<Option<Page>, Error> {
        let types = &self.leg.subscription.types;
        if self.range.is_none() {
            let range = self.client.page(self.floor, self.token.clone(), types, true).await?;
            if !range.more {
                self.complete_to = range.complete_to;
                self.token = Some(range.next).filter(|token| !token.is_null());
                return Ok(None);
            }
            let (subscriber, behind, to) = (self.leg.subscription.name(), range.behind, range.to);
            let ours = ask(self.run, async |session| resend::digest(session, subscriber, behind, to).await).await?;
            let count = range.count.unwrap_or_default();
            if (count, range.digest) == (ours.0, Some(ours.1.to_string())) {
                self.token = Some(range.next);
                self.run.scanned(usize::try_from(count).unwrap_or(usize::MAX));
                return Ok(Some(Page { rest: true, ..Page::default() }));
            }
            self.range = Some(to);
        }
        let page = self.client.page(self.floor, self.token.clone(), types, false).await?;
        if !page.more || self.range.is_some_and(|end| page.behind >= end) {
            // This is of the next range.
            self.range = None;
            return Ok(Some(Page { rest: true, ..Page::default() }));
        }
        self.token = Some(page.next);
        self.judge(page.events, page.to).await.map(Some)
    }

    /// The next page of the range that the ack floor lies in. Of its events the stream must have those that are not handled.
    /// It is looked at by each run, until the floor has passed it.
    async fn edge(&mut self) -> Result<Option<Page>, Error> {
        let types = &self.leg.subscription.types;
        let (token, end) = match self.edge.take() {
            Some(edge) => edge,
            None => {
                let range = self.client.page(NEWEST, self.token.clone(), types, true).await?;
                let last = self.stream.extent().await?.last;
                if !range.more || range.behind >= self.floor || range.to > last {
                    return Ok(None);
                }
                self.delivered_later(self.floor + 1, range.to).await?;
                (self.token.clone(), range.to)
            }
        };
        let page = self.client.page(NEWEST, token, types, false).await?;
        if !page.more || page.behind >= end {
            return Ok(None);
        }
        // The relay may have gone on since the range was asked for; then it has become longer.
        if page.to > end {
            self.delivered_later(end + 1, page.to).await?;
        }
        self.edge = Some((Some(page.next), end.max(page.to)));
        self.judge(page.events, page.to).await.map(Some)
    }

    /// Takes note of what the stream has between two sequences: the consumer will deliver it.
    async fn delivered_later(&mut self, first: u64, last: u64) -> Result<(), Error> {
        let mut next = Some(first);
        while let Some(first) = next {
            let batch = self.history.batch(first..=last).await?;
            let events = batch.messages.iter().filter_map(|message| stored::event(message).ok());
            self.pending.extend(events.map(|event| event.id.as_uuid()));
            next = batch.next;
        }
        Ok(())
    }

    async fn judge(&mut self, events: Vec<Listed>, to: u64) -> Result<Page, Error> {
        self.run.scanned(events.len());
        let all = self.position.types.has("*", to);
        let due = events.into_iter().filter(|event| all || self.position.types.has(&event.event_type, to));
        let (due, old): (Vec<Listed>, Vec<Listed>) = due.partition(|event| event.time >= self.horizon);
        self.too_old += old.len() as u64;
        let ids: Vec<Uuid> = due.iter().map(|event| event.event_id).collect();
        let known = unhandled(self.run, self.leg.subscription.name(), &ids).await?;
        fault::point("reconciler-inbox-page");
        let mut page = Page::default();
        for event in due {
            if known.get(&event.event_id) == Some(&Known::Not) && !self.pending.contains(&event.event_id) {
                page.missed.push(event.event_id);
                page.findings.push(missed(&event));
            }
        }
        Ok(page)
    }

    /// Takes note of what is not where the order of the outbox would have it, and not lost for that.
    async fn pending(&mut self) -> Result<(), Error> {
        let mut after = None;
        loop {
            let displaced = self.client.displaced(after).await?;
            after = Some(displaced.next);
            let waits = |event: &Moved| match event.state.as_str() {
                "queued" => true,
                "published" => event.sequence.is_some_and(|sequence| sequence > self.floor),
                _ => false,
            };
            self.pending.extend(displaced.events.iter().filter(|event| waits(event)).map(|event| event.event_id));
            if !displaced.more {
                return Ok(());
            }
        }
    }

    /// Events that were missing in the stream and that the subscriber has not handled, with everything of their keys that
    /// comes before them and is not handled: they run from here in their order, and their copies in the stream find them
    /// done.
    async fn out_of_order(&mut self) -> Result<Option<Page>, Error> {
        let moved = self.client.displaced(self.displaced.clone()).await?;
        if moved.events.is_empty() {
            return Ok(None);
        }
        self.displaced = Some(moved.next);
        let ids: Vec<Uuid> = moved.events.iter().map(|event| event.event_id).collect();
        let known = unhandled(self.run, self.leg.subscription.name(), &ids).await?;
        let open: Vec<Moved> =
            moved.events.into_iter().filter(|event| known.get(&event.event_id) == Some(&Known::Not)).collect();
        let mut page = Page::default();
        if open.is_empty() {
            return Ok(Some(page));
        }
        // The last one of each key.
        let mut keys: BTreeMap<&str, i64> = BTreeMap::new();
        for event in &open {
            if let Some(key) = &event.key {
                let last = keys.entry(key).or_insert(event.id);
                *last = event.id.max(*last);
            }
        }
        let lowest = open.iter().map(|event| event.id).min().unwrap_or_default();
        let from = self.first_behind_the_floor().await?.map_or(lowest, |first| first.min(lowest));
        let mut found = self.of_keys(&keys, from).await?;
        let alone: Vec<Uuid> = open.iter().filter(|event| event.key.is_none()).map(|event| event.event_id).collect();
        if !alone.is_empty() {
            found.extend(self.client.events(&alone).await?);
        }
        let types = &self.leg.subscription.types;
        found.retain(|event| types.is_empty() || types.contains(&event.event_type));
        let ids: Vec<Uuid> = found.iter().map(|event| event.id.as_uuid()).collect();
        let unhandled = unhandled(self.run, self.leg.subscription.name(), &ids).await?;
        found.retain(|event| unhandled.get(&event.id.as_uuid()) == Some(&Known::Not));
        let missing: HashSet<Uuid> = open.iter().map(|event| event.event_id).collect();
        page.findings = found.iter().filter(|event| missing.contains(&event.id.as_uuid())).map(displaced).collect();
        page.events = found;
        Ok(Some(page))
    }

    /// The lowest outbox id that does not lie before the floor, more or less.
    async fn first_behind_the_floor(&self) -> Result<Option<i64>, Error> {
        let mut token = self.token.clone();
        loop {
            let page = self.client.page(NEWEST, token, &[], false).await?;
            if let Some(first) = page.events.first() {
                return Ok(Some(first.id));
            }
            if !page.more {
                return Ok(None);
            }
            token = Some(page.next);
        }
    }

    /// The events of some keys from an outbox id on, up to one for each.
    async fn of_keys(&self, keys: &BTreeMap<&str, i64>, from: i64) -> Result<Vec<Envelope>, Error> {
        let mut found = Vec::new();
        let names: Vec<String> = keys.keys().map(ToString::to_string).collect();
        for names in names.chunks(KEYS) {
            let last_of = |key: &str| keys.get(key).copied().unwrap_or_default();
            let last = names.iter().map(|key| last_of(key)).max().unwrap_or_default();
            let mut next = Some(from);
            while let Some(from) = next.filter(|from| *from <= last) {
                let (events, more) = self.client.of_keys(names, from, NEWEST).await?;
                let due = |event: &Envelope| event.key.as_deref().is_some_and(|key| event.sequence <= last_of(key));
                found.extend(events.into_iter().filter(due));
                next = more;
            }
        }
        Ok(found)
    }
}

fn missed(event: &Listed) -> Finding {
    Finding {
        kind: MISSED,
        item: event.event_id.to_string(),
        event_id: Some(event.event_id),
        outbox_id: Some(event.id),
        key: event.key.clone(),
        detail: format!("{}: the consumer has passed it, and the inbox does not have it", event.event_type),
        ..Finding::default()
    }
}

fn displaced(event: &Envelope) -> Finding {
    Finding {
        kind: MISSED,
        item: event.id.to_string(),
        event_id: Some(event.id.as_uuid()),
        outbox_id: Some(event.sequence),
        key: event.key.clone(),
        detail: format!("{}: it was missing in the stream, and runs from the outbox in its order", event.event_type),
        ..Finding::default()
    }
}
