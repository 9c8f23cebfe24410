//! The consumer comparison: the stream, a subscriber's consumer, and its inbox.
//!
//! What the consumer counts as acked must be in the inbox, because acks follow the commit. The run keeps its place in the
//! subscriber's own database: when that is restored to an earlier time, the place goes back together with the inbox.

use std::time::Duration;

use aftercommit_core::jetstream::stored::StreamMessage;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::earlier::{self, Earlier};
use super::messages::{Messages, event_for};
use super::outstanding::{Outstanding, Place};
use super::{Compare, ComparisonJob, RETRY, Since, Subscription, ask, is_ours, passed, started, unhandled};
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::consumer::{self, Claim, Survey};
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::moment::Moment;
use aftercommit_core::jetstream::stream::{Extent, StreamReader};
use aftercommit_core::jetstream::witness::Witness;
use aftercommit_core::outbox_query::client::OutboxClient;
use aftercommit_core::postgres::finding::{NewFinding, State};
use aftercommit_core::postgres::resend::{self, Event, Known};
use aftercommit_core::postgres::start::Started;
use aftercommit_core::postgres::{identity, place};
use aftercommit_core::runner::job::{Done, Run, Schedule};
use aftercommit_core::runner::{Definition, Mode, Scope};

const MISSED: &str = "acked_not_handled";
const TWICE: &str = "handled_twice";
const DEAD: &str = "dead_letters_too_old";
const AHEAD: &str = "consumer_ahead";
const ABSENT: &str = "consumer_missing";
const RECREATED: &str = "consumer_recreated";
const SETTINGS: &str = "consumer_settings";
const STUCK: &str = "stuck";
/// Findings about the consumer: gone as soon as a run does not see them.
const STATES: [&str; 5] = [AHEAD, ABSENT, RECREATED, SETTINGS, STUCK];

/// Batches between two saved positions.
const SAVE_EVERY: u32 = 20;

/// Compares a subscriber's inbox with the stream, up to where its consumer counts everything as acked, and sends back to
/// the subscriber what it has not handled. It also looks at the consumer itself. Give it to a
/// [`Runner`](aftercommit_core::runner::Runner) on the subscriber's database with [`Runner::comparison`](aftercommit_core::runner::Runner::comparison).
#[derive(Debug, Clone)]
pub struct ConsumerComparison {
    /// How old a dead letter may be before it is a finding. Defaults to a day.
    pub dead_limit: Duration,
    /// From the end of a sweep over everything to the next; none for never. Defaults to a day. The other runs look at
    /// what is new.
    pub full_every: Option<Duration>,
    /// From the end of a run to the next. Defaults to 5 minutes.
    pub interval: Duration,
    /// What scheduled runs do about what they find. Defaults to [`Mode::Report`].
    pub mode: Mode,
    /// The NATS servers.
    pub nats: NatsConfig,
    /// Whether a repair also makes the consumer anew or corrects it, for which the NATS user needs the rights to create and
    /// delete consumers. Defaults to false.
    pub provision: bool,
    /// How long messages may wait unfetched before that is a finding. Defaults to 5 minutes.
    pub stuck_limit: Duration,
    /// The subscriber.
    pub subscription: Subscription,
}

impl ConsumerComparison {
    /// The defaults for a subscriber.
    pub fn new(nats: NatsConfig, subscription: Subscription) -> Self {
        Self {
            dead_limit: Duration::from_hours(24),
            full_every: Some(Duration::from_hours(24)),
            interval: Duration::from_mins(5),
            mode: Mode::Report,
            nats,
            provision: false,
            stuck_limit: Duration::from_mins(5),
            subscription,
        }
    }
}

/// Its name is `consumer:` and the subscriber's name.
impl From<ConsumerComparison> for Definition {
    fn from(comparison: ConsumerComparison) -> Self {
        let ConsumerComparison { interval, full_every, mode, .. } = comparison;
        let name = format!("consumer:{}", comparison.subscription.name());
        Self::job(ComparisonJob { name, schedule: Schedule { interval, full_every, mode, retry: RETRY }, comparison })
    }
}

impl Compare for ConsumerComparison {
    async fn compare(&self, run: &mut Run) -> Result<Done, Error> {
        let started = started(run, &self.subscription.spec).await?;
        let mut comparison = self.clone();
        comparison.subscription.spec.start = started.map(|started| started.sequence);
        let nats = self.subscription.connect(&self.nats).await?;
        let stream = &self.subscription.spec.stream;
        let reader = StreamReader::new(&nats, stream);
        let comparison = Comparing {
            comparison: &comparison,
            started,
            // Before the consumer: what that says may be about a stream that was written anew meanwhile.
            moment: reader.moment().await?,
            stream: reader,
            history: History::new(&nats, stream).await?,
            position: Position::of(run, stream),
            passed: 0,
            nats,
            run,
        };
        comparison.work().await
    }
}

/// Where the next run goes on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Position {
    stream: String,
    /// When the stream was created.
    created: Option<DateTime<Utc>>,
    /// When the consumer was.
    consumer: Option<String>,
    subjects: Since,
    /// Everything up to this sequence was looked at.
    acked: u64,
    /// A message at or before it: when it does not stand, the stream has lost its end since.
    anchor: Option<Witness>,
    /// A sweep over everything that has not ended: the run with which it began, and how far it is.
    sweep: Option<(i64, u64)>,
}

impl Position {
    fn of(run: &Run, stream: &str) -> Self {
        let position = run.position().filter(|position: &Self| position.stream == stream);
        position.unwrap_or_else(|| Self { stream: stream.into(), ..Self::default() })
    }
}

/// A run.
struct Comparing<'a> {
    comparison: &'a ConsumerComparison,
    /// Where the subscriber starts.
    started: Option<Started>,
    run: &'a mut Run,
    nats: Connection,
    stream: StreamReader,
    /// The stream when the run began. What was written anew since is not what this run is about.
    moment: Moment,
    history: History,
    position: Position,
    /// What lies in the stream at or before it the subscriber has passed.
    passed: u64,
}

/// The part of the stream that a run looks at.
struct Range {
    /// Everything up to here was looked at.
    behind: u64,
    /// The consumer's ack floor, in the stream.
    to: u64,
    /// The run with which the sweep began that this belongs to.
    sweep: Option<i64>,
}

/// What a batch of messages came to.
#[derive(Default)]
struct Page {
    findings: Vec<NewFinding>,
    /// The last message.
    anchor: Option<Witness>,
    stored_at: Option<DateTime<Utc>>,
    /// Where to go on.
    next: Option<u64>,
}

impl Comparing<'_> {
    async fn work(mut self) -> Result<Done, Error> {
        // This process's own clock may be wrong by days.
        let started = ask(self.run, async |session| place::now(session).await).await?;
        let context = self.nats.jetstream();
        let spec = &self.comparison.subscription.spec;
        // The consumer first: what it has seen lies in the stream as it is afterwards.
        let survey = consumer::survey(&context, spec).await?;
        is_ours(self.run, spec, survey.as_ref().and_then(|survey| survey.position.owner.as_ref())).await?;
        let extent = self.stream.extent().await?;
        let survey = self.consumer(survey, extent, started).await?;
        self.dead_letters().await?;
        let (name, subscriber) = (self.run.name.clone(), spec.name.clone());
        ask(self.run, async |session| resend::settle_handled(session, &name, MISSED, &subscriber).await).await?;
        let Some(survey) = survey else { return Ok(Done::default()) };
        self.position.consumer = Some(survey.position.created.clone());
        let range = self.range(&survey, extent).await?;
        self.position.subjects.update(&spec.subjects, range.to);
        // A consumer that begins anew has not come as far as earlier runs: that is no sweep over everything.
        let sweep = range.sweep.filter(|_| range.to >= self.position.acked);
        let to = range.to;
        let stored_at = self.compare(range, extent).await?;
        let all_is_acked = to == extent.last && survey.in_flight == 0;
        Ok(Done {
            reconciled_up_to: if all_is_acked { Some(started) } else { stored_at },
            swept_since: sweep,
            detail: Some(json!({ "stream_sequence": to })),
            ..Done::default()
        })
    }

    /// Writes down what is wrong with the consumer, and puts it right if that is wanted.
    async fn consumer(
        &mut self,
        survey: Option<Survey>,
        extent: Extent,
        now: DateTime<Utc>,
    ) -> Result<Option<Survey>, Error> {
        let problems = problems(self.comparison, survey.as_ref(), &self.position, extent, now);
        let item = self.comparison.subscription.name().to_string();
        for kind in STATES.iter().filter(|kind| problems.iter().all(|(found, _)| found != *kind)) {
            self.run.settle(kind, std::slice::from_ref(&item), State::Gone).await?;
        }
        let mut findings: Vec<NewFinding> = problems
            .into_iter()
            .map(|(kind, detail)| {
                // What a new consumer will not deliver, this run looks for; what it delivers again is in the inbox.
                let looked_for = kind == RECREATED && self.run.mode == Mode::Repair;
                let state = if looked_for { State::Repaired } else { State::Open };
                NewFinding { kind, item: item.clone(), detail, state, ..NewFinding::default() }
            })
            .collect();
        // Before the repair: should this process die in between, the findings are there.
        self.run.found(&findings).await?;
        let anew = findings.iter().any(|finding| finding.kind == AHEAD)
            || survey.as_ref().is_some_and(|survey| survey.unfit.is_some());
        let repaired = self.put_right(&mut findings, anew).await?;
        let done = findings.iter().filter(|finding| finding.state == State::Repaired).count();
        self.run.repaired(done as u64);
        match repaired {
            true => consumer::survey(&self.nats.jetstream(), &self.comparison.subscription.spec).await,
            false => Ok(survey),
        }
    }

    /// Makes the consumer what it should be, if that is wanted and would cure any of this, and returns whether it did.
    async fn put_right(&self, findings: &mut [NewFinding], anew: bool) -> Result<bool, Error> {
        let curable = |finding: &NewFinding| [AHEAD, ABSENT, SETTINGS].contains(&finding.kind);
        if !findings.iter().any(curable) || !self.comparison.provision || self.run.mode != Mode::Repair {
            return Ok(false);
        }
        let made = self.make(anew).await;
        fault::point("reconciler-consumer-made");
        match &made {
            Ok(()) => {
                findings.iter_mut().filter(|finding| curable(finding)).for_each(|cured| cured.state = State::Repaired);
            }
            Err(error) => {
                for finding in findings.iter_mut().filter(|finding| finding.kind != STUCK) {
                    finding.detail += &format!("; not repaired: {}", error.report());
                }
            }
        }
        self.run.write(findings).await?;
        Ok(made.is_ok())
    }

    /// Makes the consumer what the subscriber needs, from the beginning when `anew`.
    async fn make(&self, anew: bool) -> Result<(), Error> {
        let (context, spec) = (self.nats.jetstream(), &self.comparison.subscription.spec);
        let owner = ask(self.run, async |session| identity::owner(session).await).await?;
        if anew {
            consumer::delete(&context, spec).await?;
        }
        consumer::provision(&context, spec, &Claim { owner: Some(owner), adopt: false }).await.map(drop)
    }

    async fn dead_letters(&mut self) -> Result<(), Error> {
        let (subscriber, limit) = (self.comparison.subscription.name(), self.comparison.dead_limit);
        let letters = ask(self.run, async |session| resend::dead_longer(session, subscriber, limit).await).await?;
        let findings: Vec<NewFinding> = letters
            .into_iter()
            .map(|letter| NewFinding {
                kind: DEAD,
                item: letter.event_id.to_string(),
                event_id: Some(letter.event_id),
                key: letter.key,
                stream_seq: Some(letter.stream_seq),
                detail: format!("dead letter {} for {:.0} s: {}", letter.id, letter.for_seconds, letter.reason),
                ..NewFinding::default()
            })
            .collect();
        self.run.found(&findings).await
    }

    /// What this run has to look at.
    async fn range(&mut self, survey: &Survey, extent: Extent) -> Result<Range, Error> {
        let (subscription, moment) = (&self.comparison.subscription, &self.moment);
        let to = passed(self.run, &self.stream, &subscription.spec, &survey.position, moment).await?;
        self.passed = to;
        if !self.is_the_same(extent).await? {
            tracing::info!(
                reconciler = self.run.name,
                "the stream is not the one of the last run: looking at all of it"
            );
            let stream = self.position.stream.clone();
            self.position = Position { stream, consumer: self.position.consumer.take(), ..Position::default() };
        }
        self.position.created = Some(extent.created);
        let begins = self.run.scope == Scope::Full || self.position.anchor.is_none();
        let begins = begins.then(|| (self.run.id, extent.first.saturating_sub(1)));
        let sweep = self.position.sweep.or(begins);
        let behind = sweep.map_or(self.position.acked, |(_, behind)| behind);
        // What lies before its start it does not get.
        let started = self.started.filter(|started| started.stream_created == extent.created);
        let behind = behind.max(started.map_or(0, |started| started.sequence - 1));
        Ok(Range { behind, to, sweep: sweep.map(|(since, _)| since) })
    }

    /// Whether the stream still is the one that the position is about, and not shorter.
    async fn is_the_same(&self, extent: Extent) -> Result<bool, Error> {
        let Position { created, acked, anchor, .. } = &self.position;
        if created.is_some_and(|created| created != extent.created) || *acked > extent.last {
            return Ok(false);
        }
        match anchor {
            Some(anchor) => self.stream.stands(*anchor).await,
            None => Ok(true),
        }
    }

    /// Goes through the messages of the range, and returns when the last one was stored.
    async fn compare(&mut self, range: Range, extent: Extent) -> Result<Option<DateTime<Utc>>, Error> {
        let (mut next, mut stored_at) = (Some(range.behind + 1), None);
        let mut batches = 0;
        while let Some(first) = next.filter(|first| *first <= range.to) {
            let page = self.page(first, range.to).await?;
            if !page.findings.is_empty() {
                self.stream.is_as_at(&self.moment).await?;
                self.run.found(&page.findings).await?;
            }
            (next, stored_at) = (page.next, page.stored_at.or(stored_at));
            self.position.anchor = page.anchor.or(self.position.anchor);
            batches += 1;
            if batches % SAVE_EVERY == 0 {
                self.save(&range, next.map_or(range.to, |next| next - 1)).await?;
            }
        }
        if self.run.mode == Mode::Repair {
            self.repair().await?;
            let (name, run, first) = (self.run.name.clone(), self.run.id, extent.first);
            let settle =
                async |session: &mut _| resend::settle_lost(session, &name, MISSED, run, range.behind, first).await;
            ask(self.run, settle).await?;
        }
        self.position.acked = range.to;
        self.position.sweep = None;
        self.run.save_position(&self.position).await?;
        Ok(stored_at)
    }

    async fn save(&mut self, range: &Range, done: u64) -> Result<(), Error> {
        match range.sweep {
            Some(since) => self.position.sweep = Some((since, done)),
            None => self.position.acked = done,
        }
        self.run.save_position(&self.position).await?;
        fault::point("reconciler-consumer-saved");
        Ok(())
    }

    /// Sends back what this run and earlier ones have found.
    async fn repair(&mut self) -> Result<(), Error> {
        let client = OutboxClient::new(&self.nats, &self.position.stream).asking_once();
        loop {
            let mut outstanding = Outstanding::new();
            let place = |sequence: i64| Place::Stream(sequence.cast_unsigned());
            outstanding.add_open(self.run, MISSED, |finding| finding.stream_seq.map(place)).await?;
            fault::point("reconciler-consumer-repair");
            let relay = self.with_those_before(&client, &mut outstanding).await?;
            let whole = outstanding.is_whole();
            if !outstanding.is_empty() {
                self.stream.is_as_at(&self.moment).await?;
            }
            let Comparing { comparison, run, history, position, moment, .. } = &mut *self;
            let source = Messages {
                history,
                subjects: &position.subjects,
                subscription: &comparison.subscription,
                last: moment.last,
                relay: relay.then_some(&client),
            };
            let sent = outstanding.send(run, &comparison.subscription, MISSED, &source).await?;
            if whole || sent == 0 {
                return Ok(());
            }
        }
    }

    /// Adds what comes before these events in their keys and is not at its place in the stream, as the relay knows it. False
    /// when no relay answers: then the order is that of the stream alone.
    async fn with_those_before(&self, client: &OutboxClient, outstanding: &mut Outstanding) -> Result<bool, Error> {
        if outstanding.keys().is_empty() {
            return Ok(!outstanding.is_empty());
        }
        let subscription = &self.comparison.subscription;
        let horizon = earlier::horizon(self.run, subscription).await?;
        let earlier = Earlier { client, subscription, floor: self.passed, horizon };
        match earlier.add(self.run, outstanding).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Broker => {
                let reconciler = &self.run.name;
                tracing::warn!(reconciler, error = error.report(), "repairing in the stream's order: no relay answers");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The next messages, and which of their events the subscriber has not handled.
    async fn page(&mut self, first: u64, last: u64) -> Result<Page, Error> {
        let batch = self.history.batch(first..=last).await?;
        let mut page = Page { next: batch.next, ..Page::default() };
        page.stored_at = batch.messages.last().map(stored_at);
        let mut events = Vec::new();
        for message in &batch.messages {
            page.anchor = Some(Witness::of(message));
            events.extend(event_for(message, &self.comparison.subscription, &self.position.subjects));
        }
        self.run.scanned(events.len());
        let ids: Vec<Uuid> = events.iter().map(|event| event.event.id.as_uuid()).collect();
        let mut known = unhandled(self.run, self.comparison.subscription.name(), &ids).await?;
        fault::point("reconciler-consumer-page");
        if known.is_empty() {
            return Ok(page);
        }
        // What the stream has removed meanwhile the inbox may have forgotten meanwhile.
        let first = self.stream.extent().await?.first;
        for event in events {
            match known.remove(&event.event.id.as_uuid()) {
                Some(Known::Not) if event.sequence >= first => {
                    page.findings.push(missed(&event));
                }
                Some(Known::Times(times)) => page.findings.push(twice(&event, times)),
                _ => {}
            }
        }
        Ok(page)
    }
}

fn stored_at(message: &StreamMessage) -> DateTime<Utc> {
    std::time::SystemTime::from(message.time).into()
}

fn missed(event: &Event) -> NewFinding {
    let Event { event, sequence } = event;
    NewFinding {
        kind: MISSED,
        item: event.id.to_string(),
        event_id: Some(event.id.as_uuid()),
        outbox_id: Some(event.sequence).filter(|id| *id > 0),
        key: event.key.clone(),
        stream_seq: Some(sequence.cast_signed()),
        detail: format!("{}: message {sequence} counts as acked, and the inbox does not have it", event.event_type),
        state: State::Open,
    }
}

fn twice(event: &Event, times: i64) -> NewFinding {
    let detail = format!("the inbox has it {times} times: its primary key is gone or damaged");
    NewFinding { kind: TWICE, detail, ..missed(event) }
}

/// What is wrong with the consumer, by kind.
fn problems(
    comparison: &ConsumerComparison,
    survey: Option<&Survey>,
    position: &Position,
    extent: Extent,
    now: DateTime<Utc>,
) -> Vec<(&'static str, String)> {
    let Subscription { spec, remedy, .. } = &comparison.subscription;
    let delete = format!("`nats consumer rm {} {}`", spec.stream, spec.name);
    let harmless = "what it delivers again is in the inbox and runs no second time";
    let Some(survey) = survey else {
        return vec![(ABSENT, format!("there is no consumer, nothing is delivered: {remedy}; {harmless}"))];
    };
    let mut found = Vec::new();
    if position.consumer.as_ref().is_some_and(|created| consumer::is_successor(&survey.position.created, created)) {
        let created = &survey.position.created;
        found.push((RECREATED, format!("the consumer was made anew at {created}; {harmless}")));
    }
    if survey.position.delivered > extent.last {
        found.push((
            AHEAD,
            format!(
                "it has delivered up to message {}, and the stream ends at {}: the stream has lost its end, and messages \
                 that come into these places may not be delivered. {delete}, then {remedy}; {harmless}",
                survey.position.delivered, extent.last
            ),
        ));
    }
    if let Some(unfit) = &survey.unfit {
        found.push((SETTINGS, format!("it {unfit}, which cannot be changed: {delete}, then {remedy}; {harmless}")));
    } else if !survey.differences.is_empty() {
        found.push((SETTINGS, format!("{}: {remedy}", survey.differences.join(", "))));
    }
    let limit = TimeDelta::from_std(comparison.stuck_limit).unwrap_or(TimeDelta::MAX);
    let idle = now - survey.delivered_at.unwrap_or(extent.created);
    if survey.pending > 0 && (survey.paused || idle > limit) {
        let why = match (survey.paused, survey.requests) {
            (true, _) => "it is paused",
            (_, 0) => "no worker asks for messages",
            _ => "a worker asks, and too many messages are without ack",
        };
        let (pending, in_flight) = (survey.pending, survey.in_flight);
        found.push((
            STUCK,
            format!(
                "{pending} messages wait, {in_flight} are without ack, the last delivery was {} s ago: {why}",
                idle.num_seconds()
            ),
        ));
    }
    found
}
