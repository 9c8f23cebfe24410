//! What transactions cost that stay open: a snapshot while a backlog is relayed, and a writer while events come in (figures
//! 4 and 5).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::bench::Bench;
use crate::child::Child;
use crate::counts::Counts;
use crate::figure::{Goal, Row, Series};
use crate::scratch::Scratch;
use aftercommit_core::error::Error;
use aftercommit_core::postgres;
use aftercommit_core::postgres::session::Session;

/// Rows that are relayed while a snapshot is held.
const ROWS: u64 = 1_000_000;
/// Rows of the control, which takes ten times as long for each.
const CONTROL_ROWS: u64 = 250_000;
/// Rows per page, as the relay reads them.
const PAGE_ROWS: u64 = 1000;
/// So many pages at either end are taken together.
const PAGES: u64 = 50;

/// Events a second while latency is measured.
pub(crate) const RATE: u32 = 200;
/// The writing transaction is open for at least so long.
const HELD: Duration = Duration::from_mins(1);
const KEYS: u64 = 100;

/// Time per page at the end and at the beginning of a backlog, in milliseconds.
struct Ends {
    first: f64,
    last: f64,
}

/// Figure 4.
pub(crate) async fn snapshot(bench: &Bench) -> Result<Vec<Row>, Error> {
    let mut counts = Counts::default();
    let (rows, control_rows) = (bench.size(ROWS, 10_000), bench.size(CONTROL_ROWS, 10_000));
    let pages = bench.size(PAGES, 2);
    bench.say(&format!("held snapshot: writing {rows} events"));
    let [relay, control] = bench
        .scratch(&bench.config.nats, async |filled| {
            filled.fill(rows).await?;
            bench
                .rounds("held snapshot", ["relay", "SKIP LOCKED"], async |arm| match arm {
                    0 => {
                        bench
                            .copy(filled, &bench.config.nats, async |scratch| {
                                relay(scratch, rows, pages, &mut counts).await
                            })
                            .await
                    }
                    _ => {
                        bench
                            .scratch(&bench.config.nats, async |scratch| queue(scratch, control_rows, pages).await)
                            .await
                    }
                })
                .await
        })
        .await?;
    let ends = |arm: &[Ends]| -> (Vec<f64>, Vec<f64>) { arm.iter().map(|ends| (ends.last, ends.first)).unzip() };
    let ((last, first), (control_last, control_first)) = (ends(&relay), ends(&control));
    let name = "last pages ÷ first pages while a snapshot is held and a million rows are relayed";
    let ours = Row::ratio(
        4,
        name,
        Some(Goal::AtMost(1.2)),
        Series::new("last pages", "ms/page", last),
        Series::new("first pages", "ms/page", first),
    );
    let control = Row::ratio(
        4,
        "the same of a queue that deletes with SKIP LOCKED, a quarter of the rows",
        None,
        Series::new("last pages", "ms/page", control_last),
        Series::new("first pages", "ms/page", control_first),
    );
    Ok(vec![ours.counted(counts), control])
}

async fn relay(scratch: &Scratch, rows: u64, pages: u64, counts: &mut Counts) -> Result<Ends, Error> {
    let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    let held = crate::postgres::hold_snapshot(&mut session).await?;
    let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
    relay.until_stored(rows, scratch).await?;
    relay.kill().await?;
    crate::postgres::commit(held).await?;
    counts.add(scratch.counts(rows).await?);
    let per_page = |seconds: f64| seconds * 1e3 / pages as f64;
    let span = pages * PAGE_ROWS;
    Ok(Ends {
        first: per_page(scratch.seconds_between(1, span).await?),
        last: per_page(scratch.seconds_between(rows - span + 1, rows).await?),
    })
}

async fn queue(scratch: &Scratch, rows: u64, pages: u64) -> Result<Ends, Error> {
    let mut holder = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    crate::postgres::make_queue(&mut session, rows).await?;
    let held = crate::postgres::hold_snapshot(&mut holder).await?;
    let mut took = Vec::new();
    loop {
        let started = Instant::now();
        if crate::postgres::take_from_queue(&mut session).await? == 0 {
            break;
        }
        took.push(started.elapsed().as_secs_f64() * 1e3);
    }
    crate::postgres::commit(held).await?;
    let pages = usize::try_from(pages).unwrap_or(usize::MAX).min(took.len());
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    Ok(Ends { first: mean(&took[..pages]), last: mean(&took[took.len() - pages..]) })
}

/// Figure 5: undisturbed, beside an open transaction, undisturbed again; each third in spans of equal length.
pub(crate) async fn writer(bench: &Bench) -> Result<Vec<Row>, Error> {
    let spans = bench.config.rounds();
    let length =
        bench.size(Duration::from_secs(10).max(HELD / u32::try_from(spans).unwrap_or(1)), Duration::from_secs(1));
    let (undisturbed, beside, counts) = bench
        .scratch(&bench.config.nats, async |scratch| {
            let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
            let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
            let mut holder = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
            bench.say("held transaction: warming up");
            write(&mut session, bench.size(Duration::from_secs(5), length)).await?;
            let mut committed = Vec::new();
            for span in 0..spans / 2 {
                bench.say(&format!("held transaction: undisturbed, span {} of {spans}", span + 1));
                committed.push((false, write(&mut session, length).await?));
            }
            let held = crate::postgres::hold_writing(&mut holder).await?;
            for span in 0..spans {
                bench.say(&format!("held transaction: beside it, span {} of {spans}", span + 1));
                committed.push((true, write(&mut session, length).await?));
            }
            crate::postgres::commit(held).await?;
            for span in spans / 2..spans {
                bench.say(&format!("held transaction: undisturbed, span {} of {spans}", span + 1));
                committed.push((false, write(&mut session, length).await?));
            }
            let all = crate::postgres::event_ids(&mut session, u64::MAX).await?.len() as u64;
            relay.until_stored(all, scratch).await?;
            relay.kill().await?;
            let stored: HashMap<Uuid, DateTime<Utc>> = scratch
                .arrived()
                .await?
                .into_iter()
                .map(|arrival| (arrival.event.id.as_uuid(), arrival.stored))
                .collect();
            let of = |held: bool| -> Vec<Vec<f64>> {
                let spans = committed.iter().filter(|(beside, _)| *beside == held);
                spans.map(|(_, span)| latencies(span, &stored)).collect()
            };
            Ok((of(false), of(true), scratch.counts(all).await?))
        })
        .await?;
    let series = |arm: &str, spans: &[Vec<f64>], share: f64| {
        Series::new(arm, "ms", spans.iter().filter_map(|span| at(span, share)).collect())
    };
    let row = Row::ratio(
        5,
        "p99 from commit to stream beside a writing transaction open for a minute ÷ undisturbed",
        Some(Goal::AtMost(1.2)),
        series("p99 beside it", &beside, 0.99),
        series("p99 undisturbed", &undisturbed, 0.99),
    );
    let row = row.beside(series("p50 beside it", &beside, 0.5)).beside(series("p50 undisturbed", &undisturbed, 0.5));
    Ok(vec![row.counted(counts).note(format!("{RATE} events/s in spans of {length:?}"))])
}

/// Commits events at a steady pace for so long; returns when each commit returned.
pub(crate) async fn write(session: &mut Session, length: Duration) -> Result<Vec<(Uuid, DateTime<Utc>)>, Error> {
    let mut pace = tokio::time::interval(Duration::from_secs(1) / RATE);
    let mut committed = Vec::new();
    let end = Instant::now() + length;
    while Instant::now() < end {
        pace.tick().await;
        let id = crate::postgres::publish(session, committed.len() as u64 % KEYS).await?;
        committed.push((id, Utc::now()));
    }
    Ok(committed)
}

/// From the return of each commit until the server stored the event, in milliseconds, sorted. The server may be the
/// quicker one: then it is less than nothing.
pub(crate) fn latencies(committed: &[(Uuid, DateTime<Utc>)], stored: &HashMap<Uuid, DateTime<Utc>>) -> Vec<f64> {
    let latency = |(id, commit): &(Uuid, DateTime<Utc>)| Some((*stored.get(id)? - *commit).as_seconds_f64() * 1e3);
    let mut latencies: Vec<f64> = committed.iter().filter_map(latency).collect();
    latencies.sort_by(f64::total_cmp);
    latencies
}

/// The value below which this share of sorted values lies.
pub(crate) fn at(sorted: &[f64], share: f64) -> Option<f64> {
    sorted.get((sorted.len().saturating_sub(1) as f64 * share).round() as usize).copied()
}
