//! Asks everybody about one event. Whoever does not answer is noted, and the others are asked all the same.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::ExplainConfig;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::search::{Found, Searcher, Wanted};
use aftercommit_core::jetstream::stream::{ConsumerPosition, Extent};
use aftercommit_core::postgres::explain::{self as facts, AtSubscriber, Parked, Repair, Written};
use aftercommit_core::postgres::failure::{self, Failure};
use aftercommit_core::postgres::forget::{self, Tombstone};
use aftercommit_core::postgres::relay_log::{self, State};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::status::{self, AtWork, Leader};
use aftercommit_core::postgres::worker_status::{self, Heard};
use aftercommit_core::postgres::{self, audit, database_error, pause};
use aftercommit_core::{jetstream, relay};

/// How far the clocks of PostgreSQL and NATS may be apart.
const CLOCKS: TimeDelta = TimeDelta::seconds(60);
/// Entries of the audit trail that are told.
const ENTRIES: i64 = 1000;

/// What everybody knows.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    pub(super) outbox: Option<Outbox>,
    pub(super) databases: Vec<Database>,
    pub(super) stream: Option<Stream>,
    pub(super) payload: Option<Vec<u8>>,
    pub(super) unknown: Vec<String>,
}

/// The publisher's side.
#[derive(Debug)]
pub(super) struct Outbox {
    pub(super) written: Option<Written>,
    pub(super) parked: Option<Parked>,
    pub(super) repair: Option<Repair>,
    pub(super) tombstone: Option<Tombstone>,
    pub(super) log: State,
    pub(super) leader: Option<Leader>,
    pub(super) paused: bool,
    bounds: (Option<i64>, Option<i64>),
}

/// A subscriber's side.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) here: Vec<AtSubscriber>,
    pub(super) at_work: Vec<AtWork>,
    pub(super) audit: Vec<audit::AuditEntry>,
    /// What the subscribers' instances said last.
    pub(super) heard: Vec<Heard>,
    /// The event's failed attempts that are on record.
    pub(super) failures: Vec<Failure>,
    /// What subscribers hold of the event themselves, when payloads are asked for.
    pub(super) payloads: Vec<(String, Vec<u8>)>,
}

/// The stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) message: Option<Found>,
    /// Where the databases say that the message is, or was.
    pub(super) said: Option<u64>,
    pub(super) consumers: Vec<ConsumerPosition>,
}

pub(super) async fn gather(config: &ExplainConfig, event: Uuid) -> Evidence {
    let mut evidence = Evidence::default();
    if config.publisher.url.is_empty() {
        evidence.unknown.push("outbox: not asked, because DATABASE_URL is not set".into());
    } else {
        match ask_publisher(config, event, &mut evidence).await {
            Ok(()) => {}
            Err(error) => evidence.unknown.push(format!("outbox: {}", error.report())),
        }
    }
    for (n, database) in (1..).zip(&config.subscribers) {
        match ask_database(database, event, config.payload).await {
            Ok(found) => evidence.databases.push(found),
            Err(error) => evidence.unknown.push(format!("subscriber database {n}: {}", error.report())),
        }
    }
    if let Err(error) = ask_nats(config, event, &mut evidence).await {
        evidence.unknown.push(format!("stream {}: {}", config.naming.stream, error.report()));
    }
    evidence
}

async fn ask_publisher(config: &ExplainConfig, event: Uuid, evidence: &mut Evidence) -> Result<(), Error> {
    let mut connection = postgres::connect(&config.publisher, "aftercommit-explain").await?;
    match outbox(&mut connection, &config.naming.stream, event).await {
        Ok(found) => evidence.outbox = Some(found),
        Err(error) => {
            let error = database_error("it cannot be read", error);
            evidence.unknown.push(format!("outbox: {}", error.report()));
        }
    }
    if config.payload && evidence.outbox.is_some() {
        evidence.payload = facts::payload(&mut connection, event).await.ok().flatten();
    }
    match self::database(&mut connection, event, config.payload).await {
        Ok(found) => evidence.databases.push(found),
        Err(error) => {
            let error = database_error("it cannot be read as a subscriber's", error);
            evidence.unknown.push(format!("publisher's database: {}", error.report()));
        }
    }
    Ok(())
}

async fn outbox(connection: &mut Session, stream: &str, event: Uuid) -> Result<Outbox, sqlx::Error> {
    let written = facts::written(connection, event).await?;
    let bounds = match &written {
        Some(written) => facts::bounds(connection, stream, written).await?,
        None => (None, None),
    };
    Ok(Outbox {
        written,
        parked: facts::parked(connection, event).await?,
        repair: facts::repair(connection, event).await?,
        tombstone: forget::tombstone(connection, event).await?,
        log: relay_log::newest(connection).await?,
        leader: status::leader(connection, relay::LEASE).await?,
        paused: pause::is_paused(connection, &[relay::LEASE]).await?,
        bounds,
    })
}

async fn ask_database(config: &PostgresConfig, event: Uuid, payload: bool) -> Result<Database, Error> {
    let mut connection = postgres::connect(config, "aftercommit-explain").await?;
    database(&mut connection, event, payload).await.map_err(|error| database_error("it cannot be read", error))
}

async fn database(connection: &mut Session, event: Uuid, payload: bool) -> Result<Database, sqlx::Error> {
    let wanted = audit::Wanted { event_id: Some(event), ..audit::Wanted::default() };
    Ok(Database {
        here: facts::at_subscribers(connection, event).await?,
        at_work: status::subscribers(connection).await?,
        audit: audit::list(connection, &wanted, ENTRIES).await?,
        heard: worker_status::list(connection, None).await?,
        failures: failure::of(connection, event).await?,
        payloads: if payload { facts::held_payloads(connection, event).await? } else { Vec::new() },
    })
}

async fn ask_nats(config: &ExplainConfig, event: Uuid, evidence: &mut Evidence) -> Result<(), Error> {
    let naming = &config.naming;
    let connection = jetstream::connect(&config.nats, "aftercommit-explain", "_INBOX_operator").await?;
    let searcher = Searcher::new(&connection, &naming.stream, &naming.prefix);
    let extent = searcher.reader().extent().await?;
    let mut consumers = searcher.reader().consumers().await?;
    consumers.retain(|consumer| consumer.durable);
    let said = said(evidence, &naming.stream, &consumers);
    let mut message = None;
    for sequence in &said {
        message = searcher.at(*sequence, event).await?;
        if message.is_some() {
            break;
        }
    }
    if message.is_none()
        && let Some(wanted) = wanted(evidence, event, &naming.source, extent)
    {
        let (found, range) = searcher.search(&wanted).await?;
        message = found;
        if message.is_none() && said.is_empty() {
            evidence.unknown.push(not_found(&naming.stream, range, extent, evidence));
        }
    }
    if config.payload && evidence.payload.is_none() {
        let event = message.as_ref().and_then(|message| message.event.as_ref());
        evidence.payload = event.map(|event| event.payload.to_vec());
    }
    evidence.stream = Some(Stream { message, said: said.last().copied(), consumers });
    Ok(())
}

/// Where databases say that the message is. An inbox does not say in which stream; the subscriber's consumer does.
fn said(evidence: &Evidence, stream: &str, consumers: &[ConsumerPosition]) -> BTreeSet<u64> {
    let parked = evidence.outbox.iter().filter_map(|outbox| outbox.parked.as_ref()?.sequence);
    let repaired = evidence.outbox.iter().filter_map(|outbox| outbox.repair.as_ref()?.sequence);
    let subscribers = evidence.databases.iter().flat_map(|database| &database.here);
    let subscribers = subscribers.filter_map(|here| {
        let letter = here.letter.as_ref().filter(|letter| letter.stream == stream).map(|letter| letter.stream_seq);
        let reads_here = consumers.iter().any(|consumer| consumer.name == here.subscriber);
        letter.or_else(|| here.done.as_ref().filter(|_| reads_here).map(|done| done.stream_seq))
    });
    parked
        .chain(repaired)
        .chain(subscribers)
        .filter_map(|sequence| u64::try_from(sequence).ok())
        .filter(|said| *said > 0)
        .collect()
}

/// What to look for in the stream; none when the event cannot be there yet.
fn wanted<'a>(evidence: &'a Evidence, event: Uuid, source: &'a str, extent: Extent) -> Option<Wanted<'a>> {
    let whole = extent.first..=extent.last;
    let Some((outbox, written)) = evidence.outbox.as_ref().and_then(|outbox| Some((outbox, outbox.written.as_ref()?)))
    else {
        let not_before = written_at(event).map(|at| at - CLOCKS);
        return Some(Wanted { id: event, event_type: None, outbox: None, not_before, range: whole });
    };
    let target = outbox.log.target.as_ref();
    let may_be_there = outbox.log.settled.holds(written.id, written.xid)
        || target.is_some_and(|target| target.holds(written.id, written.xid))
        || outbox.parked.is_some();
    let sequence = |bound: Option<i64>| bound.and_then(|bound| u64::try_from(bound).ok());
    let behind = sequence(outbox.bounds.0).unwrap_or(0);
    let up_to = sequence(outbox.bounds.1).filter(|up_to| {
        // What was published out of order lies anywhere behind.
        *up_to > behind && outbox.parked.is_none() && outbox.repair.is_none()
    });
    may_be_there.then(|| Wanted {
        id: event,
        event_type: Some(&written.event_type),
        outbox: Some((written.id, source)),
        not_before: Some(written.created_at - CLOCKS),
        range: extent.first.max(behind + 1)..=extent.last.min(up_to.unwrap_or(extent.last)),
    })
}

/// The time in a version 7 UUID.
fn written_at(event: Uuid) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = event.get_timestamp()?.to_unix();
    DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
}

fn not_found(
    stream: &str,
    range: Option<std::ops::RangeInclusive<u64>>,
    extent: Extent,
    evidence: &Evidence,
) -> String {
    let bounds = evidence.outbox.as_ref().map(|outbox| outbox.bounds);
    if let Some((_, Some(up_to))) = bounds
        && u64::try_from(up_to).is_ok_and(|up_to| up_to < extent.first)
    {
        return format!(
            "stream {stream}: it begins at sequence {}, and the event was at or before {up_to}",
            extent.first
        );
    }
    match range {
        Some(range) => format!(
            "stream {stream}: the event was looked for among the sequences {} to {} and not found; `nats stream get \
             {stream} SEQUENCE` shows others",
            range.start(),
            range.end()
        ),
        None => format!("stream {stream}: it has no messages where the event would be"),
    }
}
