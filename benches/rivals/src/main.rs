//! aftercommit beside what else a Rust service could use, each set up as its own documentation shows, on the same
//! private servers in the same run, in rounds that take turns.
//!
//! Not a figure of the product's own table: it says how far apart designs are, on one machine, with one workload.

mod arms;
mod handlers;
mod order;
mod report;
mod scratch;
mod stream;

use std::time::Duration;

use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use clap::Parser;

use crate::arms::Kind;
use crate::report::Report;
use crate::scratch::{Scratch, Servers};

/// A drain is cut off after so many events, or after `--seconds`.
const ENOUGH: u64 = 100_000;
/// What waits in each round of the small backlog.
const SMALL: u64 = 10_000;

/// Measures aftercommit beside other outboxes and job queues
#[derive(Parser)]
struct Options {
    /// How often each arm is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How long a drain may take before it is cut off
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Rows of the large backlog
    #[arg(long, default_value_t = 1_000_000)]
    backlog: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut report = Report::default();
    let postgres = Postgres::start(PostgresOptions::default()).await?;
    let nats = Nats::start(NatsOptions::default()).await?;
    let servers = Servers { database_url: postgres.url("postgres").parse()?, nats_url: nats.url() };
    for round in 0..options.rounds {
        for kind in in_turn(&Kind::OUTBOXES, round) {
            measure(&servers, *kind, Duration::from_secs(options.seconds), &mut report).await?;
        }
        for kind in in_turn(&Kind::WORKERS, round) {
            let scratch = Scratch::new(&servers, *kind).await?;
            report.add(*kind, "handler of one row, events/s", handlers::rate(&scratch).await?);
            scratch.remove().await?;
        }
        eprintln!("rivals: round {} of {} is done", round + 1, options.rounds);
    }
    large_backlog(&servers, &options, &mut report).await?;
    println!("{}", if options.json { report.json()? } else { report.table() });
    Ok(())
}

/// One round of one outbox.
async fn measure(servers: &Servers, kind: Kind, limit: Duration, report: &mut Report) -> anyhow::Result<()> {
    let scratch = Scratch::new(servers, kind).await?;
    scratch.seed(SMALL).await?;
    report.add(kind, "drain at 10 k, events/s", stream::drain(&scratch, SMALL, limit).await?);
    scratch.remove().await?;

    let scratch = Scratch::new(servers, kind).await?;
    report.add(kind, "p99 commit to stream at 200/s, ms", stream::p99(&scratch, 200, limit).await?);
    scratch.remove().await?;

    let scratch = Scratch::new(servers, kind).await?;
    let counts = order::under_writers(&scratch).await?;
    report.add(kind, "16 writers: committed", counts.committed);
    report.add(kind, "16 writers: lost", counts.lost);
    report.add(kind, "16 writers: never committed", counts.ghosts);
    report.add(kind, "16 writers: doubled in the stream", counts.doubled);
    report.add(kind, "16 writers: out of order", counts.out_of_order);
    scratch.remove().await
}

/// Each arm's backlog is written once; every round takes a part of it.
async fn large_backlog(servers: &Servers, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let part = ENOUGH.min(options.backlog / options.rounds as u64);
    let mut scratches = Vec::new();
    for kind in Kind::OUTBOXES {
        let scratch = Scratch::new(servers, kind).await?;
        scratch.seed(options.backlog).await?;
        scratches.push(scratch);
    }
    for round in 0..options.rounds {
        for scratch in in_turn(&scratches, round) {
            let rate = stream::drain(scratch, part, Duration::from_secs(options.seconds)).await?;
            report.add(scratch.kind, "drain at the large backlog, events/s", rate);
        }
    }
    for scratch in scratches {
        scratch.remove().await?;
    }
    Ok(())
}

/// Forwards in one round, backwards in the next, so that none has always the same neighbour.
fn in_turn<T>(arms: &[T], round: usize) -> Vec<&T> {
    let mut arms: Vec<&T> = arms.iter().collect();
    if round % 2 == 1 {
        arms.reverse();
    }
    arms
}
