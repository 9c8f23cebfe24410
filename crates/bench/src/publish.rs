//! What a publisher pays (figure 7).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::task::JoinSet;
use uuid::Uuid;

use crate::bench::{Bench, ended};
use crate::counts::{Counts, Place};
use crate::event::Measured;
use crate::figure::{Goal, Row, Series};
use crate::postgres::publish::{self as bench_publish, ACCOUNTS, Service, Way};
use crate::scratch::Scratch;
use aftercommit_core::error::Error;
use aftercommit_core::postgres;

/// Connections of the service.
const CONNECTIONS: u64 = 8;
const WAYS: [Way; 3] = [Way::OutboxReader, Way::ByHand, Way::PlainTable];

/// Figure 7: one event in each transaction, and a hundred.
pub(crate) async fn publish(bench: &Bench) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for (events, transactions, name) in [
        (1, bench.size(8000, 80), "transactions/s with outbox::publish ÷ with a plain INSERT"),
        (100, bench.size(800, 16), "events/s with publish_all of 100 ÷ with one multi-row INSERT"),
    ] {
        let mut counts = Counts::default();
        let measured = bench.scratch(&bench.config.nats, async |scratch| {
            let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
            bench_publish::create_service(&mut session).await?;
            let mut services = Vec::new();
            for _ in 0..CONNECTIONS {
                services.push(Service::connect(&scratch.postgres).await?);
            }
            let arms = ["the library", "a plain INSERT", "a table without checks"];
            let what = format!("publish {events}");
            let rounds = bench.rounds(&what, arms, async |arm| {
                bench_publish::clear_service(&mut session).await?;
                let started = Instant::now();
                let published = transact(&mut services, WAYS[arm], transactions, events).await?;
                let rate = (transactions * events) as f64 / started.elapsed().as_secs_f64();
                if WAYS[arm] != Way::PlainTable {
                    counts.add(written(scratch, &published).await?);
                }
                Ok(rate)
            });
            Box::pin(rounds).await
        });
        let [library, by_hand, plain] = Box::pin(measured).await?;
        let unit = if events == 1 { "transactions/s" } else { "events/s" };
        let row = Row::ratio(
            7,
            name,
            Some(Goal::AtLeast(0.95)),
            Series::new("the library", unit, library),
            Series::new("a plain INSERT", unit, by_hand),
        );
        let plain = Series::new("an INSERT into a table with the same columns and a primary key", unit, plain);
        rows.push(row.beside(plain).counted(counts));
    }
    Ok(rows)
}

/// So many transactions in all, spread over the connections. Returns the ids of the events.
async fn transact(services: &mut Vec<Service>, way: Way, transactions: u64, events: u64) -> Result<Vec<Uuid>, Error> {
    let next = Arc::new(AtomicU64::new(0));
    let mut working = JoinSet::new();
    for (key, mut service) in services.drain(..).enumerate() {
        let next = Arc::clone(&next);
        working.spawn(async move {
            let mut ids = Vec::new();
            loop {
                let transaction = next.fetch_add(1, Ordering::Relaxed);
                if transaction >= transactions {
                    return Ok::<_, Error>((service, ids));
                }
                let numbers = transaction * events..(transaction + 1) * events;
                let made: Vec<Measured> = numbers.map(|number| Measured::new(number, key.to_string())).collect();
                let account = (transaction.cast_signed() % ACCOUNTS) + 1;
                ids.extend(service.transact(way, account, &made).await?);
            }
        });
    }
    let mut published = Vec::new();
    while let Some(worked) = working.join_next().await {
        let (service, ids) = ended(worked)?;
        services.push(service);
        published.extend(ids);
    }
    Ok(published)
}

/// Whether the outbox has what was published, in its order.
async fn written(scratch: &Scratch, published: &[Uuid]) -> Result<Counts, Error> {
    let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    let found = crate::postgres::envelopes(&mut session, u64::MAX, "/bench").await?;
    let places: Vec<Place> = found
        .into_iter()
        .map(|event| Place { event_id: event.id.as_uuid(), outbox_id: event.sequence, key: event.key })
        .collect();
    Ok(Counts::compare(published, &places))
}
