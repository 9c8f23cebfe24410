//! The outbox comparison: the outbox and its stream. It runs beside the relay, in the publisher's database.
//!
//! It works between two places of the relay's log, so that what it compares is exactly the same on both sides, whatever
//! the relay does meanwhile. What the relay will put right by itself it leaves alone: everything behind the log's base,
//! and a stream that has lost its end.

mod chunk;
mod listed;
mod seen;
mod verdict;

use std::collections::{BTreeSet, HashSet};
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;
use uuid::Uuid;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::{Naming, NatsConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::stored;
use aftercommit_core::jetstream::stream::{Extent, StreamReader};
use aftercommit_core::jetstream::{self};
use aftercommit_core::postgres::compare::{self, Absent};
use aftercommit_core::postgres::finding::{self, NewFinding, State};
use aftercommit_core::postgres::place::{self, Place};
use aftercommit_core::postgres::relay_log::{self, Base};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::window::{self, Watch};
use aftercommit_core::postgres::{database_error, repair};
use aftercommit_core::runner::job::{Done, Job, Run, Schedule};
use aftercommit_core::runner::{Definition, Mode, Scope};
use chunk::{Chunk, DIFFERS, FOREIGN, FORGOTTEN, GHOST, MISSING, Missing, Page};
use listed::Listed;
use seen::Seen;

/// The name of this comparison's reconciler.
const NAME: &str = "outbox";

/// So many messages lie between two saved positions, unless the relay's log has none so near.
const CHUNK: u64 = 1_000_000;
/// Around the part of a shared stream, where places are not exact.
const MARGIN: u64 = 1000;
/// So many messages of a kind that should not be there are written down one by one in a run; the rest is counted.
const NAMED: u64 = 1000;
/// So many messages that only say they are an event are remembered between two places.
const FORGED: usize = 100_000;
/// Differences between the clocks of the two servers.
const CLOCKS: Duration = Duration::from_mins(10);
/// How many messages are looked at for one of ours, in a stream that has others.
const NEAR: usize = 100;
/// How long a run on demand waits for a relay that does not publish.
const IDLE_RELAY: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(100);
const RETRY: Backoff = Backoff { first: Duration::from_secs(2), max: Duration::from_mins(1) };

/// Compares the outbox with its stream, and has the leading relay publish again what is missing there. Give it to a
/// [`Runner`](aftercommit_core::runner::Runner) on the publisher's database with
/// [`Runner::comparison`](aftercommit_core::runner::Runner::comparison).
#[derive(Debug, Clone)]
pub struct OutboxComparison {
    /// From the end of a sweep over everything to the next; none for never. Defaults to a day. The other runs look at
    /// what is new.
    pub full_every: Option<Duration>,
    /// From the end of a run to the next. Defaults to 5 minutes.
    pub interval: Duration,
    /// What scheduled runs do about what they find. Defaults to [`Mode::Report`].
    pub mode: Mode,
    /// Stream, subjects and source.
    pub naming: Naming,
    /// The NATS servers.
    pub nats: NatsConfig,
    /// How long an event may be parked before it is a finding. Defaults to an hour.
    pub parked_limit: Duration,
    /// Whether others write to the stream, too. Defaults to false.
    pub shared: bool,
}

impl OutboxComparison {
    /// The defaults for an outbox and its stream.
    pub fn new(nats: NatsConfig, naming: Naming) -> Self {
        Self {
            full_every: Some(Duration::from_hours(24)),
            interval: Duration::from_mins(5),
            mode: Mode::Report,
            naming,
            nats,
            parked_limit: Duration::from_hours(1),
            shared: false,
        }
    }
}

impl OutboxComparison {
    /// The name of the consumer with which it reads the stream. Outboxes that share a stream have one each.
    fn consumer(&self) -> String {
        let mut name = String::from("aftercommit-reconciler");
        if self.shared {
            name.push('-');
            for byte in self.naming.source.bytes() {
                match char::from(byte) {
                    plain if plain.is_ascii_alphanumeric() => name.push(plain),
                    _ => name.push_str(&format!("_{byte:02x}")),
                }
            }
        }
        name
    }
}

/// Its name is `outbox`.
impl From<OutboxComparison> for Definition {
    fn from(comparison: OutboxComparison) -> Self {
        Self::job(comparison)
    }
}

impl Job for OutboxComparison {
    fn name(&self) -> &str {
        NAME
    }

    fn schedule(&self) -> Schedule {
        Schedule { interval: self.interval, full_every: self.full_every, mode: self.mode, retry: RETRY }
    }

    fn run<'a>(&'a self, run: &'a mut Run) -> BoxFuture<'a, Result<Done, Error>> {
        self.compare(run).boxed()
    }
}

/// Where the next run goes on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Position {
    stream: String,
    /// Everything before it has been looked at.
    new: Option<Place>,
    /// A sweep that has not ended.
    sweep: Option<Sweep>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sweep {
    /// The run with which it began.
    since: i64,
    place: Place,
    /// What the outbox lists, beside what the stream was found to hold; none in a sweep that an older version began.
    #[serde(default)]
    listed: Option<Listed>,
}

impl Position {
    fn of(run: &Run, stream: &str) -> Self {
        let position = run.position().filter(|position: &Self| position.stream == stream);
        position.unwrap_or_else(|| Self { stream: stream.into(), ..Self::default() })
    }
}

impl OutboxComparison {
    async fn compare(&self, run: &mut Run) -> Result<Done, Error> {
        let nats = jetstream::connect(&self.nats, "aftercommit-reconciler", "_INBOX_relay").await?;
        let mut comparison = Comparing {
            comparison: self,
            stream: StreamReader::new(&nats, &self.naming.stream),
            history: History::new(&nats, &self.naming.stream).await?,
            position: Position::of(run, &self.naming.stream),
            odd: Odd::default(),
            queued: 0,
            run,
        };
        comparison.work().await
    }
}

/// Messages that should not be there.
#[derive(Debug, Default)]
struct Odd {
    differs: u64,
    ghosts: u64,
    foreign: u64,
    forgotten: u64,
}

/// A run.
struct Comparing<'a> {
    comparison: &'a OutboxComparison,
    run: &'a mut Run,
    stream: StreamReader,
    history: History,
    position: Position,
    odd: Odd,
    /// Repairs that this run has queued.
    queued: u64,
}

impl Comparing<'_> {
    async fn work(&mut self) -> Result<Done, Error> {
        let stream = &self.comparison.naming.stream;
        let Some(first) = self.ask(async |session| place::first(session, stream).await).await? else {
            // Nothing has been published yet.
            return Ok(Done::default());
        };
        let mut swept_since = None;
        if self.run.scope == Scope::Full || self.position.new.is_none() {
            let sweep = match self.position.sweep.take() {
                Some(sweep) => sweep,
                None => self.begin_sweep(first).await?,
            };
            swept_since = Some(sweep.since);
            self.position.sweep = Some(sweep);
        }
        let mut up_to = self.advance(swept_since.is_some()).await?;
        if self.run.mode == Mode::Repair {
            self.repair_earlier_findings(&up_to, swept_since.unwrap_or(0)).await?;
            fault::point("reconciler-outbox-waits");
            if self.queued > 0 && !self.run.scheduled && self.wait_for_relay().await? {
                up_to = self.advance(false).await?;
            }
        }
        self.report_parked().await?;
        let Odd { differs, ghosts, foreign, forgotten } = self.odd;
        let detail = json!({ "stream_sequence": up_to.sequence, "outbox_id": up_to.mark.last_id,
                             "queued": self.queued, "differs": differs, "ghosts": ghosts, "foreign": foreign,
                             "forgotten": forgotten });
        Ok(Done {
            reconciled_up_to: self.reconciled_up_to(&up_to).await?,
            swept_since,
            detail: Some(detail),
            ..Done::default()
        })
    }

    /// Compares everything up to the newest state of the relay's log, and returns that place.
    async fn advance(&mut self, sweeping: bool) -> Result<Place, Error> {
        let stream = self.comparison.naming.stream.clone();
        let newest = self.ask(async |session| relay_log::newest(session).await).await?;
        if let Some(base) = newest.base.as_ref().filter(|base| base.stream == stream) {
            self.as_the_log_says(base).await?;
        }
        let sweep = self.position.sweep.as_ref().filter(|_| sweeping).map(|sweep| &sweep.place);
        let mut place = sweep.or(self.position.new.as_ref()).cloned().unwrap_or_else(Place::beginning);
        loop {
            if let Some(back) = self.ask(async |session| place::gone_back(session, &stream, &place).await).await? {
                tracing::info!(
                    sequence = back.sequence,
                    "the relay has gone back in the stream, and so does the comparison"
                );
                // What it publishes again is no longer missing, whatever an earlier run has found.
                self.ask(async |session| compare::forget_behind(session, NAME, MISSING, &back.mark).await).await?;
                place = back;
            }
            let next = self.ask(async |session| place::next(session, &stream, &place, CHUNK, newest.seq).await).await?;
            let Some(next) = next else { break };
            if next.mark != place.mark || next.sequence > place.sequence {
                let seen = self.chunk(&place, &next).await?;
                if sweeping {
                    self.list(&seen).await?;
                }
            }
            place = next;
            match &mut self.position.sweep {
                Some(sweep) if sweeping => sweep.place = place.clone(),
                _ => self.position.new = Some(place.clone()),
            }
            self.save().await?;
            fault::point("reconciler-outbox-chunk");
        }
        if sweeping {
            self.report_unlisted(&place).await?;
            self.position.sweep = None;
            self.position.new = Some(place.clone());
            self.save().await?;
        }
        Ok(place)
    }

    async fn save(&mut self) -> Result<(), Error> {
        self.run.save_position(&self.position).await
    }

    /// Compares what lies between two places, and returns the rows that were found in the stream there, or missed.
    async fn chunk(&mut self, from: &Place, to: &Place) -> Result<Seen, Error> {
        let info = self.stream.info().await?;
        let max_age = Some(info.config.max_age).filter(|max_age| !max_age.is_zero());
        let before = self.stream.extent().await?;
        let chunk = Arc::new(Chunk {
            connections: Arc::clone(&self.run.connections),
            history: self.history.clone(),
            consumer: self.comparison.consumer(),
            naming: self.comparison.naming.clone(),
            exclusive: !self.comparison.shared,
            max_age,
            from: from.clone(),
            to: to.clone(),
            messages: self.messages(from, to, before),
        });
        let (mut seen, mut forged, mut replaced) = (Seen::default(), BTreeSet::new(), HashSet::new());
        let mut looked_up = pin!(chunk.read().await?);
        while let Some(found) = looked_up.try_next().await? {
            found.rows.iter().for_each(|id| seen.insert(*id));
            self.run.scanned(found.messages);
            forged.extend(found.forged.into_iter().take(FORGED.saturating_sub(forged.len())));
            replaced.extend(found.replaced);
            report_odd(self.run, &mut self.odd, found.findings).await?;
            fault::point("reconciler-outbox-read");
        }
        // What was not found because the stream has lost its end is the relay's to publish.
        let after = self.stream.extent().await?;
        if after.created != before.created || after.last < to.sequence {
            return Err(lost_its_end());
        }
        // It may have published that again meanwhile, some of it behind our back; then it has gone back in its log before.
        if self
            .ask(async |session| place::gone_back(session, &self.comparison.naming.stream, to).await)
            .await?
            .is_some()
        {
            return Err(lost_its_end());
        }
        fault::point("reconciler-outbox-compared");
        let (run, queued) = (&mut *self.run, &mut self.queued);
        let stream = &self.comparison.naming.stream;
        let (mut next, mut judged) = (Some(0), Vec::new());
        while let Some(after) = next {
            let mut page = chunk.rows(&seen, after).await?;
            next = page.next;
            judged.append(&mut page.judged);
            report_page(run, stream, to, page, queued).await?;
        }
        let mut next = Some(0);
        while let Some(after) = next {
            let page = chunk.repairs(&seen, after).await?;
            next = page.next;
            report_page(run, stream, to, page, queued).await?;
        }
        forged.retain(|forgery| !replaced.contains(forgery));
        if run.mode == Mode::Repair && !forged.is_empty() {
            let forged: Vec<(i64, i64)> = forged.into_iter().collect();
            let done = run
                .connections
                .run(async |session| repair::replace(session, &forged).await)
                .await
                .map_err(|error| database_error("repairs cannot be queued", error))?;
            *queued += done;
            run.repaired(done);
        }
        judged.into_iter().for_each(|id| seen.insert(id));
        Ok(seen)
    }

    fn messages(&self, from: &Place, to: &Place, stream: Extent) -> RangeInclusive<u64> {
        match self.comparison.shared {
            false => stream.first.max(from.sequence + 1)..=to.sequence,
            true => {
                let first = (from.sequence + 1).saturating_sub(MARGIN);
                stream.first.max(first)..=stream.last.min(to.sequence + MARGIN)
            }
        }
    }

    /// Of the beginning, leaves out the part of the stream that is older than the outbox. Their clocks may differ by days, so
    /// what is left out has to end with an event that comes before the first row; else everything is read.
    async fn skip_old(&mut self, first: Place) -> Result<Place, Error> {
        if first.seq >= 0 {
            return Ok(first);
        }
        let horizon = self.ask(async |session| compare::horizon(session).await).await?;
        let Some((id, written)) = horizon.first else { return Ok(first) };
        let Extent { first: begin, last, .. } = self.stream.extent().await?;
        let sequence = self.history.since(begin, last, written - CLOCKS).await?.saturating_sub(1);
        match self.last_event(begin, sequence).await? {
            Some(last) if last < id => Ok(Place { sequence, ..first }),
            _ => Ok(first),
        }
    }

    /// The outbox id of our last event in this part of the stream, if it is near its end.
    async fn last_event(&self, begin: u64, end: u64) -> Result<Option<i64>, Error> {
        for sequence in (begin..=end).rev().take(NEAR) {
            if let Some(message) = self.history.one(sequence).await?
                && let Ok(event) = stored::event(&message)
                && event.source == self.comparison.naming.source
            {
                return Ok(Some(event.sequence));
            }
        }
        Ok(None)
    }

    /// Checks that the stream is the one that the log speaks of, and not shorter. If not, the leading relay finds that
    /// out and goes back; until then there is nothing to compare.
    async fn as_the_log_says(&mut self, base: &Base) -> Result<(), Error> {
        let extent = self.stream.extent().await?;
        if extent.last < base.sequence {
            return Err(lost_its_end());
        }
        if extent.created == base.created || base.sequence == 0 {
            return Ok(());
        }
        // A stream that was moved is another one with the same messages.
        let message = self.history.one(base.sequence).await?;
        let Some(event) = message.and_then(|message| stored::event(&message).ok()) else { return Err(lost_its_end()) };
        let ids = (event.id.as_uuid(), event.sequence);
        let known = self.ask(async |session| window::known(session, &[ids.0], &[ids.1]).await).await?;
        match known.get(&ids) {
            Some(known) if known.is(event.digest()) => Ok(()),
            _ => Err(lost_its_end()),
        }
    }

    /// Queues what runs from `since` on found and did not repair. What a sweep did not find again is there by now.
    async fn repair_earlier_findings(&mut self, at: &Place, since: i64) -> Result<(), Error> {
        let mut after = 0;
        loop {
            let ids = self.ask(async |session| finding::open(session, NAME, MISSING, since, after, 1000).await).await?;
            let Some(last) = ids.last() else { return Ok(()) };
            after = *last;
            let rows = self.ask(async |session| compare::absent(session, &ids).await).await?;
            // What has a row in the queue was dealt with.
            let rows = rows.into_iter().filter(|row| row.repair.is_none());
            let missing = rows.map(|row| Missing { row, seen: None }).collect();
            let page = Page { missing, ..Page::default() };
            report_page(self.run, &self.comparison.naming.stream, at, page, &mut self.queued).await?;
        }
    }

    /// Waits until the leading relay has published what is queued, and has written down where. False when none does.
    async fn wait_for_relay(&mut self) -> Result<bool, Error> {
        let (mut last, mut moved) = (None, Instant::now());
        loop {
            let now = self
                .ask(async |session| {
                    let progress = repair::progress(session).await?;
                    Ok((progress, relay_log::newest(session).await?.base.map_or(0, |base| base.sequence)))
                })
                .await?;
            let ((queued, sequence), base) = now;
            if queued == 0 && sequence <= base {
                return Ok(true);
            }
            if last != Some(now) {
                (last, moved) = (Some(now), Instant::now());
            } else if moved.elapsed() > IDLE_RELAY {
                tracing::warn!(queued, "repairs are queued, and no relay publishes them");
                return Ok(false);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn report_parked(&mut self) -> Result<(), Error> {
        let limit = self.comparison.parked_limit;
        let parked = self.ask(async |session| compare::parked_longer(session, limit).await).await?;
        let findings: Vec<NewFinding> = parked
            .into_iter()
            .map(|event| NewFinding {
                kind: "parked_too_long",
                item: event.event_id.to_string(),
                event_id: Some(event.event_id),
                outbox_id: Some(event.outbox_id),
                key: event.key,
                detail: format!("parked for {:.0} s: {}", event.for_seconds, event.reason),
                ..NewFinding::default()
            })
            .collect();
        self.run.found(&findings).await
    }

    /// Everything that was committed before is held by the place.
    async fn reconciled_up_to(&mut self, place: &Place) -> Result<Option<chrono::DateTime<chrono::Utc>>, Error> {
        self.ask(async |session| {
            let now = place::now(session).await?;
            match Watch::new(&place.mark).look(session).await?.news {
                false => Ok(Some(now)),
                true => place::marked_at(session, place).await,
            }
        })
        .await
    }

    async fn ask<T>(&self, work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>) -> Result<T, Error> {
        let failed = |error| database_error("the outbox cannot be compared with its stream", error);
        self.run.connections.run(work).await.map_err(failed)
    }
}

fn lost_its_end() -> Error {
    Error::new(
        ErrorKind::NotReady,
        "the stream does not end where the relay's log says: the leading relay looks into it, and is waited for",
    )
}

async fn report_odd(run: &mut Run, odd: &mut Odd, findings: Vec<NewFinding>) -> Result<(), Error> {
    let (mut named, mut counted) = (Vec::new(), 0);
    for finding in findings {
        let count = match finding.kind {
            DIFFERS => &mut odd.differs,
            GHOST => &mut odd.ghosts,
            FOREIGN => &mut odd.foreign,
            FORGOTTEN => &mut odd.forgotten,
            _ => continue,
        };
        *count += 1;
        if *count <= NAMED { named.push(finding) } else { counted += 1 }
    }
    run.differences(counted);
    run.found(&named).await
}

/// Writes down what is missing, and queues its repair when it is to be repaired.
async fn report_page(run: &mut Run, stream: &str, at: &Place, page: Page, queued: &mut u64) -> Result<(), Error> {
    run.scanned(page.scanned);
    let verified: Vec<String> = page.verified.iter().map(Uuid::to_string).collect();
    run.settle(MISSING, &verified, State::Repaired).await?;
    for missing in page.missing.chunks(1000) {
        // Before the repair: should this process die in between, the finding is there.
        let found: Vec<NewFinding> = missing.iter().map(|missing| absent(&missing.row, State::Open)).collect();
        run.found(&found).await?;
        fault::point("reconciler-outbox-found");
        if run.mode != Mode::Repair {
            continue;
        }
        let ids: Vec<i64> = missing.iter().map(|missing| missing.row.id).collect();
        let seen: Vec<Option<i64>> = missing.iter().map(|missing| missing.seen.map(u64::cast_signed)).collect();
        let name = run.name.clone();
        let done = run
            .connections
            .run(async |session| repair::queue(session, (&name, MISSING), stream, at, &ids, &seen).await)
            .await
            .map_err(|error| database_error("repairs cannot be queued", error))?;
        fault::point("reconciler-outbox-queued");
        *queued += done;
        run.repaired(done);
    }
    let waits = |row: &Absent| row.repair.as_ref().is_some_and(|(state, _)| state == "queued");
    let state = |row| if waits(row) { State::Repairing } else { State::Open };
    let waiting: Vec<NewFinding> = page.waiting.iter().map(|row| absent(row, state(row))).collect();
    run.found(&waiting).await
}

fn absent(row: &Absent, state: State) -> NewFinding {
    let refused = row.repair.as_ref().is_some_and(|(state, _)| state == "refused");
    let why = if refused { "; the stream does not take it" } else { "" };
    NewFinding {
        kind: MISSING,
        item: row.event_id.to_string(),
        event_id: Some(row.event_id),
        outbox_id: Some(row.id),
        key: row.key.clone(),
        stream_seq: None,
        detail: format!("{}, {} s old, is not in the stream{why}", row.event_type, row.age.as_secs()),
        state,
    }
}
