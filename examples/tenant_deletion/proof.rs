//! What is there before and afterwards: every row of every table, every file, every message.

use std::collections::{BTreeMap, BTreeSet};

use aftercommit::fanout::Counts;
use async_nats::jetstream;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool};

use super::fleet::Fleet;
use super::services::{self, DELETED, Service};
use super::{Error, REQUESTER};

/// What a service has before the deletion.
#[derive(Debug, Default)]
pub struct Planted {
    /// Rows of the tenant that have to go, by table.
    pub goes: Counts,
    /// All other rows of each table: how many, and a digest of them.
    stays: BTreeMap<String, (i64, String)>,
}

/// All services, by name.
pub type Fleetwide = BTreeMap<String, Planted>;

/// Rows for which a condition holds, with a digest of all their columns.
async fn rows(pool: &PgPool, table: &str, condition: &str) -> Result<(i64, String), Error> {
    let sql = format!(
        "select count(*), coalesce(md5(string_agg(md5(t::text), '' order by t::text)), '') from {table} as t where {condition}"
    );
    Ok(sqlx::query_as(AssertSqlSafe(sql)).fetch_one(pool).await?)
}

/// Reads every table of every service. A table that the example does not know is an error.
pub async fn plant(fleet: &Fleet) -> Result<Fleetwide, Error> {
    let mut all = Fleetwide::new();
    for service in &services::ALL {
        let pool = fleet.pool(service.name)?;
        let known: BTreeSet<&str> = service.goes.iter().map(|(table, _)| *table).collect();
        let unknown: Vec<String> = tables(pool).await?.into_iter().filter(|t| !known.contains(t.as_str())).collect();
        if !unknown.is_empty() {
            return Err(format!("{} has tables that nobody looks at: {unknown:?}", service.name).into());
        }
        let mut planted = Planted::default();
        for (table, goes) in service.goes {
            let (count, _) = rows(pool, table, &format!("({goes})")).await?;
            planted.goes.insert((*table).into(), count.unsigned_abs());
            let stays = rows(pool, table, &format!("({goes}) is not true")).await?;
            planted.stays.insert((*table).into(), stays);
        }
        planted.goes.retain(|_, count| *count > 0);
        all.insert(service.name.into(), planted);
    }
    Ok(all)
}

async fn tables(pool: &PgPool) -> Result<Vec<String>, Error> {
    let sql =
        "select relname::text from pg_class where relkind in ('r', 'p') and relnamespace = 'public'::regnamespace";
    Ok(sqlx::query_scalar(sql).fetch_all(pool).await?)
}

/// What is wrong afterwards, and how many rows of the tenant are left.
pub async fn check_rows(fleet: &Fleet, planted: &Fleetwide) -> Result<(u64, Vec<String>), Error> {
    let (mut left, mut wrong) = (0, Vec::new());
    for Service { name, goes, .. } in &services::ALL {
        let pool = fleet.pool(name)?;
        for (table, goes) in *goes {
            let (count, _) = rows(pool, table, &format!("({goes})")).await?;
            left += count.unsigned_abs();
            if count > 0 {
                wrong.push(format!("{name}: {count} rows of the tenant are left in {table}"));
            }
            // Rows without a parent would not be counted above, and be too many here.
            let (all, before) = (rows(pool, table, "true").await?, planted.get(*name));
            let before = before.and_then(|planted| planted.stays.get(*table)).ok_or("a table is new")?;
            if all != *before {
                wrong.push(format!(
                    "{name}: {table} has {} rows, of which {} were to stay as they were",
                    all.0, before.0
                ));
            }
        }
    }
    let files = &fleet.seat("training")?.files;
    for tenant in 1..=services::TENANTS {
        let expected = if tenant == DELETED { 0 } else { 30 };
        let found = std::fs::read_dir(files.join(format!("tenant-{tenant}")))?.count();
        if tenant == DELETED {
            left += found as u64;
        }
        if found != expected {
            wrong.push(format!("training: the tenant {tenant} has {found} files, not {expected}"));
        }
    }
    Ok((left, wrong))
}

/// The events in a service's stream: their types and payloads. Each id may be there once.
async fn events(fleet: &Fleet, service: &str) -> Result<Vec<(String, Value)>, Error> {
    let seat = fleet.seat(service)?;
    let context = jetstream::new(async_nats::connect(&seat.nats.url).await?);
    let naming = seat.naming()?;
    let stream = context.get_stream(&naming.stream).await?;
    let state = stream.cached_info().state.clone();
    let (mut ids, mut events) = (BTreeSet::new(), Vec::new());
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await?;
        let id = message.headers.get("Nats-Msg-Id").map(ToString::to_string).ok_or("a message has no id")?;
        if !ids.insert(id) {
            return Err(format!("an event is twice in the stream of {service}").into());
        }
        let event_type = naming.prefix.event_type(&message.subject).ok_or("a message has a strange subject")?;
        events.push((event_type.into(), serde_json::from_slice(&message.payload)?));
    }
    Ok(events)
}

/// What is wrong about the messages of all streams, and how many there are: each service has answered with what was planted, the same
/// each time, and the end was told once, with all of it together.
pub async fn check_messages(fleet: &Fleet, planted: &Fleetwide, job: &str) -> Result<(usize, Vec<String>), Error> {
    let (mut read, mut wrong, mut total) = (0, Vec::new(), Counts::new());
    let of_job = |event: &Value| event["job"] == *job;
    for (service, planted) in planted {
        let events = events(fleet, service).await?;
        read += events.len();
        let answers: Vec<&Value> = events.iter().map(|(_, event)| event).filter(|event| of_job(event)).collect();
        if answers.is_empty() {
            wrong.push(format!("{service} has not answered"));
        }
        for answer in answers {
            let counts = counts(&answer["counts"])?;
            if answer["status"] != "done" || counts != planted.goes {
                wrong.push(format!("{service} answered {}: {counts:?}, not {:?}", answer["status"], planted.goes));
            }
        }
        planted.goes.iter().for_each(|(table, count)| *total.entry(table.clone()).or_default() += count);
    }
    let events = events(fleet, REQUESTER).await?;
    read += events.len();
    let ends: Vec<&Value> = events
        .iter()
        .filter(|(kind, event)| kind == "erasure.ended" && of_job(event))
        .map(|(_, event)| event)
        .collect();
    match ends.as_slice() {
        [end] if end["status"] == "completed" && counts(&end["counts"])? == total => {}
        ends => wrong.push(format!("the end was told {} times: {ends:?}, not once with {total:?}", ends.len())),
    }
    Ok((read, wrong))
}

/// Counts without zeros, by the bare names of the tables.
pub fn counts(counts: &Value) -> Result<Counts, Error> {
    let counts: Counts = serde_json::from_value(counts.clone())?;
    let bare = |name: String| name.rsplit('.').next().unwrap_or_default().to_string();
    Ok(counts.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| (bare(name), count)).collect())
}
