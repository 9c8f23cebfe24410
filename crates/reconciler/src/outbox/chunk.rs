//! The comparison of what lies between two places of the relay's log: in the stream, and in the outbox.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, Stream};
use futures_util::{FutureExt, TryStreamExt};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::seen::Seen;
use super::verdict::{self, Claimed, Oddity, Verdict};
use aftercommit_core::config::Naming;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::stored::{self, StreamMessage};
use aftercommit_core::jetstream::sweep::Sweep;
use aftercommit_core::postgres::compare::{self, Absent};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::finding::NewFinding;
use aftercommit_core::postgres::place::Place;
use aftercommit_core::postgres::{database_error, window};

/// Batches of messages that are looked up at the same time, while the next one is read.
const LOOK_UPS: usize = 3;
/// Ids of the outbox that are read at a time.
const IDS: i64 = 10_000;
/// Rows that are reported at a time.
const PAGE: usize = 1000;

pub(super) const MISSING: &str = "missing_from_stream";
pub(super) const DIFFERS: &str = "differs";
pub(super) const GHOST: &str = "ghost";
pub(super) const FOREIGN: &str = "foreign";
pub(super) const FORGOTTEN: &str = "forgotten";

/// What lies between two places, and what is needed to look at it.
pub(super) struct Chunk {
    pub(super) connections: Arc<Connections>,
    pub(super) history: History,
    /// The name of the consumer with which the stream is read.
    pub(super) consumer: String,
    pub(super) naming: Naming,
    /// Whether only this outbox writes to the stream.
    pub(super) exclusive: bool,
    pub(super) max_age: Option<Duration>,
    pub(super) from: Place,
    pub(super) to: Place,
    /// The part of the stream to be read.
    pub(super) messages: RangeInclusive<u64>,
}

/// Messages whose rows were looked up.
#[derive(Debug, Default)]
pub(super) struct LookedUp {
    pub(super) messages: usize,
    /// The rows of the outbox that they are.
    pub(super) rows: Vec<i64>,
    /// Those that should not be there.
    pub(super) findings: Vec<NewFinding>,
    /// Those among them that have an event's id and are made of something else: outbox id and sequence.
    pub(super) forged: Vec<(i64, i64)>,
    /// Of which of these events say that they replace them.
    pub(super) replaced: Vec<(i64, i64)>,
}

/// An event that should be in the stream and is not.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Missing {
    pub(super) row: Absent,
    /// Where an earlier repair, or a release, had put it.
    pub(super) seen: Option<u64>,
}

/// What a page of the comparison came to.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) scanned: usize,
    /// The rows that were not found and have been judged.
    pub(super) judged: Vec<i64>,
    pub(super) missing: Vec<Missing>,
    /// Missing, and nothing more can be done now.
    pub(super) waiting: Vec<Absent>,
    /// Earlier repairs that are in the stream.
    pub(super) verified: Vec<Uuid>,
    /// Where the next page begins; none at the end.
    pub(super) next: Option<i64>,
}

impl Chunk {
    /// Reads the stream's part, and looks up some batches of it at the same time. They come in any order.
    pub(super) async fn read(self: &Arc<Self>) -> Result<impl Stream<Item = Result<LookedUp, Error>> + use<>, Error> {
        let sweep = Sweep::begin(&self.history, &self.consumer, self.messages.clone()).await?;
        let batches =
            stream::try_unfold(sweep, async |mut sweep| Ok(sweep.batch().await?.map(|messages| (messages, sweep))));
        let chunk = Arc::clone(self);
        let looked_up = batches.map_ok(move |messages| {
            let chunk = Arc::clone(&chunk);
            // A task, because most of the time goes into decoding, for which there may be more than one processor.
            AbortOnDropHandle::new(tokio::spawn(async move { chunk.look_up(&messages).await })).map(|ended| {
                ended.unwrap_or_else(|_| Err(Error::new(ErrorKind::NotReady, "looking up messages was broken off")))
            })
        });
        Ok(looked_up.try_buffer_unordered(LOOK_UPS))
    }

    async fn look_up(&self, messages: &[StreamMessage]) -> Result<LookedUp, Error> {
        let mut found = LookedUp { messages: messages.len(), ..LookedUp::default() };
        let mut claimed = Vec::with_capacity(messages.len());
        for message in messages {
            match stored::event(message) {
                Ok(event) if event.source == self.naming.source => {
                    claimed.push(Claimed { sequence: message.sequence, subject: message.subject.to_string(), event })
                }
                _ if self.exclusive => found.findings.push(foreign(message.sequence, &message.subject)),
                _ => {}
            }
        }
        let ids: Vec<i64> = claimed.iter().map(|claimed| claimed.event.sequence).collect();
        let length = |claimed: &Claimed| i32::try_from(claimed.event.payload.len()).unwrap_or(i32::MAX);
        let lengths: Vec<i32> = claimed.iter().map(length).collect();
        let originals = self.ask(async |session| compare::originals(session, &ids, &lengths).await).await?;
        let horizon = match originals.iter().any(Option::is_none) {
            true => Some(self.ask(async |session| compare::horizon(session).await).await?),
            false => None,
        };
        for (claimed, original) in claimed.iter().zip(&originals) {
            match verdict::message(claimed, original.as_ref(), horizon.as_ref(), &self.naming) {
                Ok(true) => {
                    let id = claimed.event.sequence;
                    found.rows.push(id);
                    found.replaced.extend(claimed.event.replaces.iter().map(|forgery| (id, forgery.cast_signed())));
                }
                Ok(false) => {}
                // Beside other writers it reads beyond both ends; the chunk with that sequence tells it, once.
                Err(_) if claimed.sequence <= self.from.sequence || claimed.sequence > self.to.sequence => {}
                Err(oddity) => {
                    if oddity == Oddity::Forgotten {
                        found.rows.push(claimed.event.sequence);
                    }
                    // Under another subject it is still the event.
                    if matches!(oddity, Oddity::Differs { what } if what != "subject") {
                        found.forged.push((claimed.event.sequence, claimed.sequence.cast_signed()));
                    }
                    found.findings.push(odd(claimed, &oddity));
                }
            }
        }
        Ok(found)
    }

    /// A page of the rows behind `after` that are in none of the messages.
    pub(super) async fn rows(&self, seen: &Seen, after: i64) -> Result<Page, Error> {
        let (from, to) = (&self.from.mark, &self.to.mark);
        let ids = self.ask(async |session| window::ids(session, from, to, after, IDS).await).await?;
        let mut page = Page { scanned: ids.len(), next: ids.last().copied(), ..Page::default() };
        let absent: Vec<i64> = ids.into_iter().filter(|id| !seen.contains(*id)).collect();
        for ids in absent.chunks(PAGE) {
            self.judge(ids, &mut page).await?;
        }
        page.judged = absent;
        Ok(page)
    }

    /// The same for events behind `after` that were published into this part of the stream out of order.
    pub(super) async fn repairs(&self, seen: &Seen, after: i64) -> Result<Page, Error> {
        let (behind, up_to) = (self.from.sequence, self.to.sequence);
        let placed = self.ask(async |session| compare::placed(session, behind, up_to, after, IDS).await).await?;
        let mut page = Page { next: placed.last().map(|(id, _)| *id), ..Page::default() };
        let (there, gone): (Vec<_>, Vec<_>) = placed.into_iter().partition(|(id, _)| seen.contains(*id));
        page.verified = there.into_iter().map(|(_, event_id)| event_id).collect();
        let gone: Vec<i64> = gone.into_iter().map(|(id, _)| id).collect();
        for ids in gone.chunks(PAGE) {
            self.judge(ids, &mut page).await?;
        }
        Ok(page)
    }

    async fn judge(&self, ids: &[i64], page: &mut Page) -> Result<(), Error> {
        let rows = self.ask(async |session| compare::absent(session, ids).await).await?;
        judge(rows, self.max_age, self.to.sequence, &self.connections, &self.history, page).await
    }

    async fn ask<T>(
        &self,
        work: impl AsyncFnOnce(&mut aftercommit_core::postgres::session::Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        self.connections.run(work).await.map_err(failed)
    }
}

/// Sorts rows that were not found in the stream up to `sequence`.
pub(super) async fn judge(
    rows: Vec<Absent>,
    max_age: Option<Duration>,
    sequence: u64,
    connections: &Connections,
    history: &History,
    page: &mut Page,
) -> Result<(), Error> {
    for row in rows {
        match verdict::row(&row, max_age) {
            Verdict::Missing { seen } => page.missing.push(Missing { row, seen }),
            Verdict::Queued | Verdict::Refused => page.waiting.push(row),
            Verdict::Parked | Verdict::Expired => {}
            // Whoever compares that part looks at it.
            Verdict::Elsewhere(at) if at > sequence => {}
            Verdict::Elsewhere(at) => {
                if !is_at(connections, history, &row, at).await? {
                    page.missing.push(Missing { row, seen: Some(at) });
                }
            }
        }
    }
    Ok(())
}

/// Whether the message there is this event, and not one that only has its ids.
async fn is_at(connections: &Connections, history: &History, row: &Absent, sequence: u64) -> Result<bool, Error> {
    let message = history.one(sequence).await?;
    let Some(event) = message.and_then(|message| stored::event(&message).ok()) else { return Ok(false) };
    let ids = (event.id.as_uuid(), event.sequence);
    if ids != (row.event_id, row.id) {
        return Ok(false);
    }
    let known = connections.run(async |session| window::known(session, &[ids.0], &[ids.1]).await).await;
    let known = known.map_err(failed)?;
    Ok(known.get(&ids).is_some_and(|known| known.is(event.digest())))
}

fn failed(error: sqlx::Error) -> Error {
    database_error("the outbox cannot be compared with its stream", error)
}

fn foreign(sequence: u64, subject: &str) -> NewFinding {
    NewFinding {
        kind: FOREIGN,
        item: sequence.to_string(),
        stream_seq: Some(sequence.cast_signed()),
        detail: format!("a message on {subject} is not from this outbox"),
        ..NewFinding::default()
    }
}

fn odd(claimed: &Claimed, oddity: &Oddity) -> NewFinding {
    let event = &claimed.event;
    let (kind, detail) = match oddity {
        Oddity::Differs { what } => (DIFFERS, format!("the message has another {what} than the event in the outbox")),
        Oddity::Ghost => (GHOST, "the outbox does not have this event".into()),
        Oddity::Forgotten => (
            FORGOTTEN,
            format!("the event was forgotten, and this message has its payload: `aftercommit forget {}`", event.id),
        ),
    };
    NewFinding {
        kind,
        item: format!("{}@{}", event.id, claimed.sequence),
        event_id: Some(event.id.as_uuid()),
        outbox_id: Some(event.sequence),
        key: event.key.clone(),
        stream_seq: Some(claimed.sequence.cast_signed()),
        detail,
        ..NewFinding::default()
    }
}
