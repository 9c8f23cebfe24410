//! Which figures there are, and all of them in turn.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::bench::{Bench, BenchConfig};
use crate::machine::Machine;
use crate::report::Report;
use crate::{backlog, capture, drain, held, idle, latency, publish, retained, worker};
use aftercommit_core::error::Error;

/// The numbers of all figures.
pub(crate) const FIGURES: std::ops::RangeInclusive<u8> = 1..=14;

/// Measures, telling on standard error what it is at. Cancelled through `interrupted` it removes what it made.
///
/// # Errors
/// When a server cannot be reached or a figure cannot be set up. A figure that cannot be measured with what there is
/// says so in its row instead.
pub(crate) async fn run(config: BenchConfig, interrupted: CancellationToken) -> Result<Report, Error> {
    let started = Instant::now();
    let machine = Machine::look(&config).await?;
    let bench = Bench { config, interrupted };
    let mut rows = Vec::new();
    if bench.wants(&[1, 2]) {
        rows.extend(drain::drain(&bench).await?);
    }
    if bench.wants(&[3, 12]) {
        rows.extend(backlog::backlog(&bench).await?);
    }
    if bench.wants(&[4]) {
        rows.extend(held::snapshot(&bench).await?);
    }
    if bench.wants(&[5]) {
        rows.extend(held::writer(&bench).await?);
        rows.extend(retained::retained(&bench).await?);
    }
    if bench.wants(&[8]) {
        rows.extend(drain::synced(&bench).await?);
    }
    if bench.wants(&[11]) {
        rows.extend(drain::several(&bench).await?);
    }
    if bench.wants(&[6]) {
        rows.extend(Box::pin(latency::latency(&bench)).await?);
    }
    if bench.wants(&[7]) {
        rows.extend(Box::pin(publish::publish(&bench)).await?);
    }
    if bench.wants(&[9]) {
        rows.extend(Box::pin(worker::inbox(&bench)).await?);
    }
    if bench.wants(&[10]) {
        rows.extend(Box::pin(worker::function(&bench)).await?);
    }
    if bench.wants(&[13]) {
        rows.extend(Box::pin(idle::idle(&bench)).await?);
    }
    if bench.wants(&[14]) {
        rows.extend(Box::pin(capture::capture(&bench)).await?);
    }
    rows.retain(|row| bench.wants(&[row.figure]));
    rows.sort_by_key(|row| row.figure);
    let Bench { config, .. } = bench;
    Ok(Report { machine, rounds: config.rounds(), quick: config.quick, took: started.elapsed(), rows })
}
