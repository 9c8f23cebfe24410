//! What a large backlog costs: time per page and memory (figures 3 and 12).

use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::bench::wait_until;
use crate::child::Child;
use crate::counts::Counts;
use crate::figure::{Goal, Row, Series};
use crate::scratch::Scratch;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::outbox_event::OutboxEvent;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::walk::Walk;
use aftercommit_core::postgres::{self, database_error};

const LARGE: u64 = 10_000_000;
const SMALL: u64 = 10_000;
/// Rows per page, as the relay reads them.
const PAGE_ROWS: usize = 1000;
/// Pages that a round reads, evenly over the backlog.
const PAGES: i64 = 100;
const MEBIBYTE: f64 = 1_048_576.0;

/// Figures 3 and 12, on the same backlogs.
pub(crate) async fn backlog(bench: &Bench) -> Result<Vec<Row>, Error> {
    let large = bench.size(LARGE, 2 * SMALL);
    bench.say(&format!("backlog: writing {large} events"));
    bench
        .scratch(&bench.config.nats, async |big| {
            big.fill(large).await?;
            bench
                .scratch(&bench.config.nats, async |small| {
                    small.fill(SMALL).await?;
                    let mut rows = Vec::new();
                    if bench.wants(&[3]) {
                        rows.push(pages(bench, big, small).await?);
                    }
                    if bench.wants(&[12]) {
                        rows.extend(memory(bench, big, small).await?);
                    }
                    Ok(rows)
                })
                .await
        })
        .await
}

/// Figure 3: the time for a page that is in PostgreSQL's cache.
async fn pages(bench: &Bench, big: &Scratch, small: &Scratch) -> Result<Row, Error> {
    let [large, small] = bench
        .rounds("pages", ["large backlog", "small backlog"], async |arm| {
            let scratch = if arm == 0 { big } else { small };
            let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
            let target = crate::postgres::whole(&mut session).await?;
            let last_start = target.last_id - PAGE_ROWS as i64;
            let mut took = Duration::ZERO;
            for page in 0..PAGES {
                let after = last_start * page / (PAGES - 1);
                // The first time brings it into the cache.
                read(&mut session, &target, after).await?;
                let started = Instant::now();
                read(&mut session, &target, after).await?;
                took += started.elapsed();
            }
            Ok(took.as_secs_f64() * 1e3 / PAGES as f64)
        })
        .await?;
    Ok(Row::ratio(
        3,
        "time per page at 10 million rows of backlog ÷ at 10 thousand",
        Some(Goal::AtMost(1.2)),
        Series::new("10 million", "ms/page", large),
        Series::new("10 thousand", "ms/page", small),
    ))
}

async fn read(session: &mut Session, target: &Mark, after: i64) -> Result<(), Error> {
    Walk::<OutboxEvent>::new(Mark::nothing(), target.clone(), after)
        .next(session, PAGE_ROWS)
        .await
        .map(drop)
        .map_err(|error| database_error("reading a page failed", error))
}

/// Figure 12: the most memory that a relay holds while it works a backlog off.
async fn memory(bench: &Bench, big: &Scratch, small: &Scratch) -> Result<Vec<Row>, Error> {
    let mut counts = Counts::default();
    // Each round takes some more of the large backlog, which stays large.
    let step = bench.size(200_000, SMALL);
    let mut published = 0;
    let [large, small] = bench
        .rounds("memory", ["large backlog", "small backlog"], async |arm| match arm {
            0 => {
                let peak = peak(big, published + step).await?;
                published = big.stream.extent().await?.last;
                Ok(peak)
            }
            _ => {
                bench
                    .copy(small, &bench.config.nats, async |small| {
                        let peak = peak(small, SMALL).await?;
                        counts.add(small.counts(SMALL).await?);
                        Ok(peak)
                    })
                    .await
            }
        })
        .await?;
    counts.add(big.counts(published).await?);
    let known = |peaks: Vec<Option<f64>>| peaks.into_iter().flatten().collect::<Vec<f64>>();
    let large = Series::new("10 million", "MiB", known(large));
    let small = Series::new("10 thousand", "MiB", known(small));
    let most = Row::absolute(
        12,
        "most memory of the relay at 10 million rows of backlog",
        Some(Goal::AtMost(64.0)),
        large.clone(),
    );
    let flat = Row::ratio(12, "the same ÷ at 10 thousand", Some(Goal::AtMost(1.2)), large, small);
    Ok(vec![most.counted(counts), flat.counted(counts)])
}

/// The most memory that a relay held until so many messages were in the stream, in MiB.
async fn peak(scratch: &Scratch, messages: u64) -> Result<Option<f64>, Error> {
    let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
    relay.until_stored(messages, scratch).await?;
    let memory = relay.memory();
    relay.kill().await?;
    settled(scratch).await?;
    Ok(memory.map(|memory| memory.peak as f64 / MEBIBYTE))
}

/// What the killed relay had sent may still be on its way into the stream.
async fn settled(scratch: &Scratch) -> Result<(), Error> {
    let mut before = None;
    wait_until("the stream is at rest", Duration::from_secs(30), async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let last = scratch.stream.extent().await?.last;
        Ok(before.replace(last) == Some(last))
    })
    .await
}
