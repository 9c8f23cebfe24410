//! The inbox comparison: the publisher's outbox and a subscriber's inbox, whatever became of the stream between them.
//!
//! The two are in different databases. The leading relay tells what of the outbox lies at or before the consumer's ack
//! floor, in ranges with a digest of the ids, and only where the inbox has another digest the ids themselves. What is not
//! handled comes whole from the outbox, too, so it does not matter whether the stream still has it.

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::earlier::{self, Earlier};
use super::outstanding::{Item, Outstanding, Place, Source};
use super::{Compare, ComparisonJob, RETRY, Since, Subscription, ask, is_ours, passed, unhandled};
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::moment::Moment;
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::jetstream::{consumer, stored};
use aftercommit_core::outbox_query::client::OutboxClient;
use aftercommit_core::outbox_query::wire::{Listed, Moved};
use aftercommit_core::postgres::finding::NewFinding;
use aftercommit_core::postgres::resend::{self, Event, Known};
use aftercommit_core::runner::job::{Done, Run, Schedule, written};
use aftercommit_core::runner::{Definition, Mode, Scope};

pub(super) const MISSED: &str = "not_handled";
/// The newest place in the outbox.
pub(super) const NEWEST: u64 = i64::MAX.cast_unsigned();
/// So many ranges that differ for good are remembered.
const SETTLED: usize = 256;
/// Events that are asked for together.
const EVENTS: usize = 100;

/// Compares the publisher's outbox with a subscriber's inbox, up to where the subscriber's consumer counts everything as
/// acked, and sends back to the subscriber what it has not handled. Give it to a [`Runner`](aftercommit_core::runner::Runner) on the
/// subscriber's database with [`Runner::comparison`](aftercommit_core::runner::Runner::comparison). The publisher's relay must run, and the NATS user may ask it; see docs/reconciliation.md.
#[derive(Debug, Clone)]
pub struct InboxComparison {
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

impl InboxComparison {
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

/// Its name is `inbox:` and the subscriber's name.
impl From<InboxComparison> for Definition {
    fn from(comparison: InboxComparison) -> Self {
        let InboxComparison { interval, full_every, mode, .. } = comparison;
        let name = format!("inbox:{}", comparison.subscription.name());
        Self::job(ComparisonJob { name, schedule: Schedule { interval, full_every, mode, retry: RETRY }, comparison })
    }
}

/// Where the next run goes on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Position {
    stream: String,
    types: Since,
    /// What lies before this token of the outbox was compared.
    compared: Option<Value>,
    /// What was missing in the stream before this one was dealt with.
    pub(super) displaced: Option<Value>,
    /// Of ranges that differ for good, because the inbox has some of their events elsewhere or has forgotten them: where
    /// they end, and how both sides looked when everything that counts was handled.
    #[serde(default)]
    settled: BTreeMap<u64, u64>,
    /// A sweep over everything that has not ended: the run with which it began, and how far it is.
    sweep: Option<(i64, Option<Value>)>,
}

impl Compare for InboxComparison {
    async fn compare(&self, run: &mut Run) -> Result<Done, Error> {
        let Subscription { spec, types, .. } = &self.subscription;
        let nats = self.subscription.connect(&self.nats).await?;
        let context = nats.jetstream();
        let stream = StreamReader::new(&nats, &spec.stream);
        // The stream first: what the consumer says behind it may be about another one.
        let moment = stream.moment().await?;
        let found = consumer::locate(&context, spec).await?;
        // The consumer comparison says that it is missing.
        let Some(consumer) = found else { return Ok(Done::default()) };
        is_ours(run, spec, consumer.owner.as_ref()).await?;
        let floor = passed(run, &stream, spec, &consumer, &moment).await?;
        let (name, subscriber) = (run.name.clone(), spec.name.clone());
        ask(run, async |session| resend::settle_handled(session, &name, MISSED, &subscriber).await).await?;
        let horizon = earlier::horizon(run, &self.subscription).await?;

        let position = run.position().filter(|position: &Position| position.stream == spec.stream);
        let mut position = position.unwrap_or_else(|| Position { stream: spec.stream.clone(), ..Position::default() });
        let wanted = if types.is_empty() { vec!["*".to_string()] } else { types.clone() };
        position.types.update(&wanted, floor);
        let begins = run.scope == Scope::Full || position.compared.is_none();
        let sweep = position.sweep.take().or_else(|| begins.then_some((run.id, None)));
        let token = sweep.as_ref().map_or_else(|| position.compared.clone(), |(_, token)| token.clone());
        let mut comparison = Comparing {
            comparison: self,
            client: OutboxClient::new(&nats, &spec.stream),
            history: History::new(&nats, &spec.stream).await?,
            stream,
            moment,
            floor,
            horizon,
            pending: HashSet::new(),
            stage: Stage::Ranges,
            token,
            range: None,
            pages: 0,
            edge: None,
            complete_to: None,
            too_old: 0,
            sweep: sweep.map(|(since, _)| since),
            position,
            run,
        };
        comparison.pending().await?;
        comparison.work().await
    }
}

/// What a run does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What lies before the ack floor.
    Ranges,
    /// The range that the ack floor lies in.
    Edge,
    Ended,
}

/// A run.
pub(super) struct Comparing<'a> {
    pub(super) comparison: &'a InboxComparison,
    pub(super) run: &'a mut Run,
    pub(super) client: OutboxClient,
    stream: StreamReader,
    /// The stream when the run began. What was written anew since is not what this run is about.
    moment: Moment,
    history: History,
    /// What lies in the stream at or before it the subscriber has passed.
    floor: u64,
    /// The inbox may have forgotten events that were written before.
    horizon: DateTime<Utc>,
    /// Events that the stream has behind the floor, out of their order, or that the relay is about to put there.
    pending: HashSet<Uuid>,
    stage: Stage,
    pub(super) token: Option<Value>,
    /// The range that is gone through page by page.
    range: Option<Range>,
    /// Pages of ranges that were looked at.
    pages: u64,
    /// In the range that the floor lies in: what to ask behind, and where it ends.
    edge: Option<(Option<Value>, u64)>,
    complete_to: Option<DateTime<Utc>>,
    too_old: u64,
    sweep: Option<i64>,
    pub(super) position: Position,
}

/// A part of the stream whose events are not just those that the inbox has of it.
struct Range {
    behind: u64,
    to: u64,
    /// How many events the outbox has of it, and their digest.
    theirs: (u64, Option<String>),
    /// Whether the inbox has all that count, once each.
    handled: bool,
    /// Whether a page of it has come.
    begun: bool,
}

/// What one step came to.
#[derive(Default)]
struct Page {
    /// What is not handled.
    findings: Vec<NewFinding>,
    /// Whether the position can be saved here.
    rest: bool,
}

impl Comparing<'_> {
    async fn work(mut self) -> Result<Done, Error> {
        while let Some(page) = self.next().await? {
            if !page.findings.is_empty() {
                self.stream.is_as_at(&self.moment).await?;
                self.run.found(&page.findings).await?;
            }
            if page.rest {
                self.save().await?;
            }
        }
        self.position.compared = self.token.clone();
        if self.run.mode == Mode::Repair {
            self.position.displaced = self.repair().await?;
        }
        Ok(Done {
            reconciled_up_to: self.complete_to,
            swept_since: self.sweep,
            position: Some(written(&self.position)),
            detail: Some(json!({ "stream_sequence": self.floor, "too_old": self.too_old, "pages": self.pages })),
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

    /// Sends back what this run and earlier ones have found, and what was missing in the stream. Returns up to where that
    /// is dealt with.
    async fn repair(&mut self) -> Result<Option<Value>, Error> {
        let mut again = false;
        loop {
            let mut outstanding = Outstanding::new();
            outstanding.add_open(self.run, MISSED, |finding| finding.outbox_id.map(Place::Outbox)).await?;
            let displaced = self.out_of_order(&mut outstanding, again).await?;
            fault::point("reconciler-inbox-repair");
            let (floor, horizon) = (self.floor, self.horizon);
            let Comparing { comparison, run, client, stream, moment, .. } = &mut *self;
            let earlier = Earlier { client, subscription: &comparison.subscription, floor, horizon };
            earlier.add(run, &mut outstanding).await?;
            let whole = outstanding.is_whole();
            if !outstanding.is_empty() {
                // What lies before the floor was compared, what lies behind it was asked for: both of the same stream.
                stream.is_as_at(moment).await?;
            }
            let source = Rows { client, types: &comparison.subscription.types };
            let sent = outstanding.send(run, &comparison.subscription, MISSED, &source).await?;
            if whole || sent == 0 {
                return Ok(displaced);
            }
            again = true;
        }
    }

    /// The next step; none at the end.
    async fn next(&mut self) -> Result<Option<Page>, Error> {
        loop {
            let page = match self.stage {
                Stage::Ranges => self.range().await?,
                Stage::Edge => self.edge().await?,
                Stage::Ended => return Ok(None),
            };
            if let Some(page) = page {
                return Ok(Some(page));
            }
            self.stage = match self.stage {
                Stage::Ranges => Stage::Edge,
                Stage::Edge | Stage::Ended => Stage::Ended,
            };
        }
    }

    /// The next range whose digest is as it should be, or the next page of another one.
    async fn range(&mut self) -> Result<Option<Page>, Error> {
        let types = &self.comparison.subscription.types;
        if self.range.is_none() {
            let range = self.client.page(self.floor, self.token.clone(), types, true).await?;
            if !range.more {
                self.complete_to = range.complete_to;
                self.token = Some(range.next).filter(|token| !token.is_null());
                return Ok(None);
            }
            let count = range.count.unwrap_or_default();
            let found = Range {
                behind: range.behind,
                to: range.to,
                theirs: (count, range.digest),
                handled: true,
                begun: false,
            };
            let ours = self.ours(&found).await?;
            let same = (count, found.theirs.1.as_deref()) == (ours.0, Some(ours.1.to_string().as_str()));
            if same || self.position.settled.get(&found.to) == Some(&self.look(&found, ours)) {
                self.token = Some(range.next);
                self.run.scanned(usize::try_from(count).unwrap_or(usize::MAX));
                return Ok(Some(Page { rest: true, ..Page::default() }));
            }
            self.range = Some(found);
        }
        let page = self.client.page(self.floor, self.token.clone(), types, false).await?;
        if !page.more || self.range.as_ref().is_some_and(|range| page.behind >= range.to) {
            if self.range.as_ref().is_some_and(|range| !range.begun) {
                let problem =
                    "the outbox tells of a range, and nothing of what is in it; it may have gone back meanwhile";
                return Err(Error::new(ErrorKind::NotReady, problem));
            }
            // This is of the next range.
            self.settle().await?;
            return Ok(Some(Page { rest: true, ..Page::default() }));
        }
        self.pages += 1;
        if let Some(range) = self.range.as_mut() {
            range.begun = true;
        }
        self.token = Some(page.next);
        self.judge(page.events, page.to).await.map(Some)
    }

    async fn ours(&self, range: &Range) -> Result<(u64, u128), Error> {
        let (subscriber, behind, to) = (self.comparison.subscription.name(), range.behind, range.to);
        ask(self.run, async |session| resend::digest(session, subscriber, behind, to).await).await
    }

    /// What both sides of a range come to, and what else decides about what counts.
    fn look(&self, range: &Range, ours: (u64, u128)) -> u64 {
        let retention = self.comparison.subscription.inbox_retention;
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        hasher.hash_one((range.behind, &range.theirs, ours, retention, &self.position.types))
    }

    /// Takes note of how a range looks that was gone through, if nothing of it is missing or waits.
    async fn settle(&mut self) -> Result<(), Error> {
        let Some(range) = self.range.take().filter(|range| range.handled) else { return Ok(()) };
        let ours = self.ours(&range).await?;
        let look = self.look(&range, ours);
        self.position.settled.insert(range.to, look);
        while self.position.settled.len() > SETTLED {
            self.position.settled.pop_first();
        }
        Ok(())
    }

    /// The next page of the range that the ack floor lies in. Of its events the stream must have those that are not handled.
    /// It is looked at by each run, until the floor has passed it.
    async fn edge(&mut self) -> Result<Option<Page>, Error> {
        let types = &self.comparison.subscription.types;
        let (token, end) = match self.edge.take() {
            Some(edge) => edge,
            None => {
                let range = self.client.page(NEWEST, self.token.clone(), types, true).await?;
                self.vouch().await?;
                if !range.more || range.behind >= self.floor || range.to > self.moment.last {
                    return Ok(None);
                }
                fault::pass("reconciler-inbox-edge").await;
                self.delivered_later(self.floor + 1, range.to).await?;
                fault::pass("reconciler-inbox-waiting").await;
                (self.token.clone(), range.to)
            }
        };
        let page = self.client.page(NEWEST, token, types, false).await?;
        if !page.more || page.behind >= end {
            return Ok(None);
        }
        // The relay may have gone on since the range was asked for; then it has become longer.
        if page.to > end {
            self.vouch().await?;
            if page.to > self.moment.last {
                return Ok(None);
            }
            self.delivered_later(end + 1, page.to).await?;
        }
        self.edge = Some((Some(page.next), end.max(page.to)));
        self.judge(page.events, page.to).await.map(Some)
    }

    /// From here on the stream has to stay as it is now; until here it has stayed as it was.
    async fn vouch(&mut self) -> Result<(), Error> {
        let moment = self.stream.moment().await?;
        self.stream.is_as_at(&self.moment).await?;
        self.moment = moment;
        Ok(())
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
        let known = unhandled(self.run, self.comparison.subscription.name(), &ids).await?;
        if let Some(range) = self.range.as_mut().filter(|_| !known.is_empty()) {
            range.handled = false;
        }
        fault::point("reconciler-inbox-page");
        let mut page = Page::default();
        for event in due {
            if known.get(&event.event_id) == Some(&Known::Not) && !self.pending.contains(&event.event_id) {
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
}

/// The outbox as a source of events.
struct Rows<'a> {
    client: &'a OutboxClient,
    /// Those that the subscriber handles; none for all.
    types: &'a [String],
}

impl Source for Rows<'_> {
    async fn fetch(&self, items: &[Item]) -> Result<(Vec<Event>, usize), Error> {
        let ids: Vec<Uuid> = items.iter().take(EVENTS).map(|item| item.event_id).collect();
        let events = self.client.events(&ids).await?;
        if let Some(other) = events.iter().find(|event| !items.iter().any(|item| item.is(event))) {
            let problem = format!("event {} came from the outbox with another key or place than before", other.id);
            return Err(Error::new(ErrorKind::Integrity, problem));
        }
        let events = events.into_iter().filter(|event| self.types.is_empty() || self.types.contains(&event.event_type));
        Ok((events.map(|event| Event { event, sequence: 0 }).collect(), ids.len()))
    }
}

fn missed(event: &Listed) -> NewFinding {
    NewFinding {
        kind: MISSED,
        item: event.event_id.to_string(),
        event_id: Some(event.event_id),
        outbox_id: Some(event.id),
        key: event.key.clone(),
        detail: format!("{}: the consumer has passed it, and the inbox does not have it", event.event_type),
        ..NewFinding::default()
    }
}
