//! Forgetting what events hold: in the outbox, in dead letters and whatever else has copies, and in the stream.
//!
//! The tables become tombstones first, a bounded transaction at a time. Then the leading relay publishes the tombstones, so that
//! subscribers forget what they have, and the messages of the stream are overwritten. Relay and workers go on meanwhile: an event
//! that the relay had read before counts as published before its message is looked for, and a copy that a worker writes later
//! becomes a tombstone as it is written.

use std::collections::HashSet;
use std::time::Duration;

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::erase::Eraser;
use aftercommit_core::jetstream::stored;
use aftercommit_core::postgres::forget::Late;
pub use aftercommit_core::postgres::forget::{Found, Request, Selection, Tombstone};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, forget as sql};
use aftercommit_core::{fault, jetstream};
use chrono::TimeDelta;
use serde::Serialize;
use sqlx::PgTransaction;
use tokio::time::Instant;
use uuid::Uuid;

/// How often it is looked whether something that is waited for has happened.
const LOOK: Duration = Duration::from_millis(200);
/// Events whose ids are read at a time.
const PAGE: i64 = 10_000;
/// How often the log says how far the stream has been gone through, and the place is kept.
const TELL: Duration = Duration::from_secs(5);
/// How far the clocks of PostgreSQL and NATS may be apart.
const CLOCKS: TimeDelta = TimeDelta::hours(1);

/// Where and how to forget.
#[derive(Debug, Clone)]
pub struct ForgetConfig {
    /// The database: an outbox's, a subscriber's, or both in one.
    pub postgres: PostgresConfig,
    /// NATS. Not asked where the database publishes nothing.
    pub nats: NatsConfig,
    /// The names under which the outbox is published.
    pub naming: Naming,
    /// How long to wait for the relay, and for transactions that were open, without any progress. Defaults to 30 seconds.
    pub patience: Duration,
}

impl ForgetConfig {
    /// With the default patience.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        Self { postgres, nats, naming, patience: Duration::from_secs(30) }
    }
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Forgotten {
    /// The request's number.
    pub request: i64,
    /// Events that are tombstones now.
    pub events: u64,
    /// Messages of the stream that were erased; none when that was not come to, or this database publishes nothing.
    pub messages: Option<u64>,
    /// Of the events that were named, those that neither this database nor the stream has. They have tombstones all the same.
    pub unknown: Vec<Uuid>,
    /// What it waits for, in words; none when it has ended.
    pub waits_for: Option<String>,
}

/// Counts what a selection finds in the tables, and changes nothing. What only the stream has is not counted.
///
/// # Errors
/// When the database cannot be asked.
pub async fn find(postgres: &PostgresConfig, selection: &Selection) -> Result<Found, Error> {
    let mut session = connect(postgres).await?;
    sql::find(&mut session, selection).await.map_err(failed)
}

/// Forgets events. A request that is broken off, however that happens, is gone on with by [`resume`].
///
/// # Errors
/// [`ErrorKind::Config`] when the selection is empty or nobody says who wants it and why, and when the stream refuses deletions;
/// then nothing was changed. Otherwise when a server cannot be reached; what was forgotten stays so.
pub async fn forget(config: &ForgetConfig, who: &str, why: &str, selection: &Selection) -> Result<Forgotten, Error> {
    check(who, why, selection)?;
    let mut work = Work::open(config).await?;
    let begun = async {
        let mut tx = work.session.begin().await?;
        let request = sql::begin(&mut tx, who, why, selection).await?;
        tx.commit().await.map(|()| request)
    };
    let request = begun.await.map_err(failed)?;
    fault::point("forget-begun");
    work.go_on(request).await
}

/// Goes on with all requests that have not ended: those of processes that died, and those that [`within`] has begun.
///
/// # Errors
/// As [`forget`].
pub async fn resume(config: &ForgetConfig) -> Result<Vec<Forgotten>, Error> {
    let mut session = connect(&config.postgres).await?;
    let open = sql::open(&mut session).await.map_err(failed)?;
    if open.is_empty() {
        return Ok(Vec::new());
    }
    let mut work = Work::open(config).await?;
    let mut all = Vec::new();
    for request in open {
        all.push(work.go_on(request.id).await?);
    }
    Ok(all)
}

/// Forgets in the caller's transaction, as part of a deletion: the tables of this database have tombstones with its commit. Who
/// runs [`resume`], or `aftercommit forget --resume`, erases the stream afterwards. Returns the request's number. The session's role
/// needs the rights of the role `eraser`.
///
/// # Errors
/// As [`forget`].
pub async fn within(tx: &mut PgTransaction<'_>, who: &str, why: &str, selection: &Selection) -> Result<i64, Error> {
    check(who, why, selection)?;
    sql::begin_within(tx, who, why, selection, true).await.map_err(failed)
}

fn check(who: &str, why: &str, selection: &Selection) -> Result<(), Error> {
    let Selection { events, key, key_prefix, event_type } = selection;
    let refuse = |problem: &str| Err(Error::new(ErrorKind::Config, format!("nothing is forgotten: {problem}")));
    if events.is_empty() && key.is_none() && key_prefix.is_none() && event_type.is_none() {
        return refuse("name events, a key, the beginning of keys, or a type");
    }
    if [key, key_prefix, event_type].into_iter().flatten().any(|text| text.is_empty() || text.contains('\0')) {
        return refuse("a key, the beginning of keys and a type have at least one character, and no NUL");
    }
    if who.trim().is_empty() || why.trim().is_empty() {
        return refuse("say who wants it and why: both stay on record");
    }
    Ok(())
}

async fn connect(postgres: &PostgresConfig) -> Result<Session, Error> {
    postgres::connect(postgres, "aftercommit-forget").await
}

fn failed(error: sqlx::Error) -> Error {
    database_error("forgetting failed; what was forgotten stays so, `aftercommit forget --resume` goes on", error)
}

/// The database, and the stream where it publishes to one.
struct Work<'a> {
    config: &'a ForgetConfig,
    session: Session,
    stream: Option<Eraser>,
}

impl<'a> Work<'a> {
    async fn open(config: &'a ForgetConfig) -> Result<Self, Error> {
        let session = connect(&config.postgres).await?;
        let mut work = Self { config, session, stream: None };
        work.find_stream().await?;
        Ok(work)
    }

    /// The stream that a relay publishes to, as its log says; none as long as no relay has published anything.
    async fn find_stream(&mut self) -> Result<(), Error> {
        let naming = &self.config.naming;
        let Some(stream) = sql::stream(&mut self.session).await.map_err(failed)? else { return Ok(()) };
        if stream != naming.stream {
            let problem = format!(
                "nothing is forgotten: this outbox is published to stream {stream} and not to {}: give --stream {stream}",
                naming.stream
            );
            return Err(Error::new(ErrorKind::Config, problem));
        }
        let connection = jetstream::connect(&self.config.nats, "aftercommit-forget", "_INBOX_eraser").await?;
        self.stream = Some(Eraser::new(&connection, &stream).await?);
        Ok(())
    }

    async fn go_on(&mut self, id: i64) -> Result<Forgotten, Error> {
        while !sql::more(&mut self.session, id).await.map_err(failed)? {
            fault::point("forget-more");
        }
        fault::point("forget-tables");
        let unknown = sql::unknown(&mut self.session, id).await.map_err(failed)?;
        let mut forgotten = Forgotten { request: id, events: 0, messages: None, unknown, waits_for: None };
        let through = self.late(id).await?;
        let (events, in_outbox) = self.events(id).await?;
        forgotten.events = events.len() as u64;
        if !through {
            let what = "transactions that were open when the tables were gone through: see pg_stat_activity";
            forgotten.waits_for = Some(what.into());
            return Ok(forgotten);
        }
        fault::point("forget-late");
        let left = self.at_the_relay(id).await?;
        if left > 0 {
            forgotten.waits_for = Some(format!(
                "a relay, which has {left} events to publish: start one, or `aftercommit relay resume` when it is paused"
            ));
            return Ok(forgotten);
        }
        fault::point("forget-published");
        if self.stream.is_none() && in_outbox {
            // The first relay has come to these events meanwhile.
            self.find_stream().await?;
        }
        let messages = self.erase(id, events, &mut forgotten.unknown).await?;
        sql::end(&mut self.session, id, messages).await.map_err(failed)?;
        tracing::info!(request = id, events = forgotten.events, messages, "events were forgotten");
        forgotten.messages = self.stream.is_some().then_some(messages);
        Ok(forgotten)
    }

    /// The events of a request, and whether the outbox has one of them.
    async fn events(&mut self, id: i64) -> Result<(HashSet<Uuid>, bool), Error> {
        let (mut events, mut in_outbox, mut after) = (HashSet::new(), false, Uuid::nil());
        loop {
            let page = sql::events(&mut self.session, id, after, PAGE).await.map_err(failed)?;
            let Some((last, _)) = page.last() else { return Ok((events, in_outbox)) };
            after = *last;
            in_outbox |= page.iter().any(|(_, in_outbox)| *in_outbox);
            events.extend(page.into_iter().map(|(event, _)| event));
        }
    }

    /// Waits for transactions that ran when the tables were gone through, and goes through them once more. False when one does not end.
    async fn late(&mut self, id: i64) -> Result<bool, Error> {
        let begun = Instant::now();
        loop {
            match sql::late(&mut self.session, id).await.map_err(failed)? {
                Late::Done => return Ok(true),
                Late::More => fault::point("forget-late-more"),
                Late::Waits if begun.elapsed() > self.config.patience => return Ok(false),
                Late::Waits => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Waits until the relay has nothing of these events in its hands but tombstones, and has published those. Returns how many
    /// it has not, when it gets no further.
    async fn at_the_relay(&mut self, id: i64) -> Result<i64, Error> {
        let request = sql::request(&mut self.session, id).await.map_err(failed)?;
        let mut queued = request.is_some_and(|request| request.published_at.is_some());
        let (mut least, mut moved) = (i64::MAX, Instant::now());
        loop {
            let left = match queued {
                true => sql::at_the_relay(&mut self.session, id).await.map_err(failed)?,
                false => {
                    let left = sql::publish(&mut self.session, id).await.map_err(failed)?;
                    if left == 0 {
                        fault::point("forget-queued");
                        (queued, least, moved) = (true, i64::MAX, Instant::now());
                        continue;
                    }
                    left
                }
            };
            if left == 0 {
                return Ok(0);
            }
            if left < least {
                (least, moved) = (left, Instant::now());
            } else if moved.elapsed() > self.config.patience {
                return Ok(left);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Erases all messages of these events but tombstones, and of others that the request means, which the outbox has removed.
    async fn erase(&mut self, id: i64, events: HashSet<Uuid>, unknown: &mut Vec<Uuid>) -> Result<u64, Error> {
        let Some(stream) = &self.stream else { return Ok(0) };
        let request = sql::request(&mut self.session, id).await.map_err(failed)?;
        let request = request.ok_or_else(|| Error::new(ErrorKind::Integrity, format!("request {id} is gone")))?;
        let source = &self.config.naming.source;
        let extent = stream.extent().await?;
        let begins = match sql::not_before(&mut self.session, id).await.map_err(failed)? {
            Some(time) => stream.since(extent, time - CLOCKS).await?,
            None => extent.first,
        };
        // Where a process was that died over it, unless the stream is another one since.
        let place = request.stream_to.map_or(0, i64::cast_unsigned);
        let begins = if place <= extent.last { begins.max(place + 1) } else { begins };
        let (mut next, mut erased, mut told) = (Some(begins), 0, Instant::now());
        while let Some(first) = next.filter(|first| *first <= extent.last) {
            let batch = stream.batch(first..=extent.last).await?;
            let (mut sequences, mut others) = (Vec::new(), Vec::new());
            for message in &batch.messages {
                let Ok(event) = stored::event(message) else { continue };
                let event_id = event.id.as_uuid();
                unknown.retain(|unknown| *unknown != event_id);
                if event.is_tombstone() {
                    continue;
                }
                let earlier = event.source == *source && event.sequence <= request.last_id;
                if events.contains(&event_id) {
                    sequences.push(message.sequence);
                } else if earlier && request.means(&event.event_type, event.key.as_deref()) {
                    others.push((event_id, message.sequence));
                }
            }
            if !others.is_empty() {
                let ids: Vec<Uuid> = others.iter().map(|(event_id, _)| *event_id).collect();
                let there = sql::in_outbox(&mut self.session, &ids).await.map_err(failed)?;
                others.retain(|(event_id, _)| !there.contains(event_id));
                let ids: Vec<Uuid> = others.iter().map(|(event_id, _)| *event_id).collect();
                sql::found(&mut self.session, id, &ids).await.map_err(failed)?;
                sequences.extend(others.iter().map(|(_, sequence)| *sequence));
            }
            erased += stream.erase(&sequences).await?;
            if !sequences.is_empty() {
                fault::point("forget-erased");
            }
            next = batch.next;
            if told.elapsed() > TELL {
                let at = next.unwrap_or(extent.last);
                tracing::info!(request = id, at, last = extent.last, erased, "erasing the stream");
                sql::keep_place(&mut self.session, id, at - 1).await.map_err(failed)?;
                told = Instant::now();
            }
        }
        Ok(erased)
    }
}
