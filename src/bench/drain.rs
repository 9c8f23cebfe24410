//! How fast and at what cost a backlog goes into the stream (figures 1 and 2).

use super::Bench;
use super::arm::{Arm, Cost};
use super::child::{Child, run_arm};
use super::counts::Counts;
use super::figure::{Goal, Row, Series};
use super::scratch::Scratch;
use crate::error::Error;

/// What a drain gave.
struct Drained {
    /// Events a second.
    rate: f64,
    /// Processor time per event in microseconds; none where the system does not tell.
    cpu: Option<f64>,
}

/// Figures 1 and 2, from the same runs.
pub(super) async fn drain(bench: &Bench) -> Result<Vec<Row>, Error> {
    let mut counts = Counts::default();
    let arms = ["relay", "pure publish", "pure read"];
    let [relay, publish, read] = bench
        .rounds("drain", arms, async |arm| {
            bench
                .scratch(&bench.config.nats, async |scratch| {
                    scratch.fill(bench.events()).await?;
                    match arm {
                        0 => relay(scratch, bench.events(), &mut counts).await,
                        1 => publish(scratch, bench.events(), &mut counts).await,
                        _ => Ok(Drained::of(run_arm(Arm::Read, bench.events(), scratch).await?, bench.events())),
                    }
                })
                .await
        })
        .await?;
    let rate = |arm: &[Drained]| arm.iter().map(|drained| drained.rate).collect::<Vec<f64>>();
    let cpu = |arm: &[Drained]| arm.iter().filter_map(|drained| drained.cpu).collect::<Vec<f64>>();
    let floor: Vec<f64> = cpu(&publish).iter().zip(cpu(&read)).map(|(publish, read)| publish + read).collect();
    let speed = Row::ratio(
        1,
        "relay drain ÷ pure pipelined publish",
        Some(Goal::AtLeast(0.95)),
        Series::new("relay", "events/s", rate(&relay)),
        Series::new("pure publish", "events/s", rate(&publish)),
    );
    let cost = Row::ratio(
        2,
        "relay's CPU per event ÷ (pure read + pure publish)",
        Some(Goal::AtMost(1.3)),
        Series::new("relay", "µs/event", cpu(&relay)),
        Series::new("read and publish", "µs/event", floor),
    );
    Ok(vec![
        speed.beside(Series::new("pure read", "events/s", rate(&read))).counted(counts),
        cost.beside(Series::new("read", "µs/event", cpu(&read)))
            .beside(Series::new("publish", "µs/event", cpu(&publish)))
            .counted(counts),
    ])
}

impl Drained {
    fn of(cost: Cost, events: u64) -> Self {
        let events = events as f64;
        Self { rate: events / cost.seconds, cpu: cost.cpu_seconds.map(|cpu| cpu * 1e6 / events) }
    }
}

async fn relay(scratch: &Scratch, events: u64, counts: &mut Counts) -> Result<Drained, Error> {
    let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
    scratch.stored(events, Some(&mut relay)).await?;
    let cpu = relay.cpu().map(|cpu| cpu.as_secs_f64() * 1e6 / events as f64);
    relay.kill().await?;
    counts.add(scratch.counts().await?);
    Ok(Drained { rate: scratch.rate().await?, cpu })
}

async fn publish(scratch: &Scratch, events: u64, counts: &mut Counts) -> Result<Drained, Error> {
    let cost = run_arm(Arm::PublishChained, events, scratch).await?;
    counts.add(scratch.counts().await?);
    Ok(Drained { rate: scratch.rate().await?, ..Drained::of(cost, events) })
}
