//! How fast and at what cost a backlog goes into the stream (figures 1, 2, 8 and 11).

use crate::arm::Arm;
use crate::bench::Bench;
use crate::child::{Child, run_arm};
use crate::cost::Cost;
use crate::counts::Counts;
use crate::figure::{Goal, Row, Series};
use crate::scratch::Scratch;
use aftercommit_core::config::NatsConfig;
use aftercommit_core::error::Error;

/// Relays that stand by each other in figure 11.
const RELAYS: usize = 4;

/// What a drain gave.
struct Drained {
    /// Events a second.
    rate: f64,
    /// Processor time per event in microseconds; none where the system does not tell.
    cpu: Option<f64>,
}

impl Drained {
    fn of(cost: Cost, events: u64) -> Self {
        let events = events as f64;
        Self { rate: events / cost.seconds, cpu: cost.cpu_seconds.map(|cpu| cpu * 1e6 / events) }
    }
}

fn rates(arm: &[Drained]) -> Vec<f64> {
    arm.iter().map(|drained| drained.rate).collect()
}

fn cpu(arm: &[Drained]) -> Vec<f64> {
    arm.iter().filter_map(|drained| drained.cpu).collect()
}

/// Runs each arm on a copy of the same backlog of `events`.
async fn drains<T, const N: usize>(
    bench: &Bench,
    nats: &NatsConfig,
    what: &str,
    events: u64,
    arms: [&str; N],
    mut measure: impl AsyncFnMut(usize, &Scratch) -> Result<T, Error>,
) -> Result<[Vec<T>; N], Error> {
    bench.say(&format!("{what}: writing {events} events"));
    bench
        .scratch(nats, async |filled| {
            filled.fill(events).await?;
            bench
                .rounds(what, arms, async |arm| {
                    bench.copy(filled, nats, async |scratch| measure(arm, scratch).await).await
                })
                .await
        })
        .await
}

/// Figures 1 and 2, from the same runs.
pub(crate) async fn drain(bench: &Bench) -> Result<Vec<Row>, Error> {
    let (mut counts, events) = (Counts::default(), bench.events());
    let arms = ["relay", "pure publish", "pure read"];
    let [relay, publish, read] =
        drains(bench, &bench.config.nats, "drain", events, arms, async |arm, scratch| match arm {
            0 => relays(scratch, 1, events, &mut counts).await,
            1 => publish(scratch, Arm::PublishChained, events, &mut counts).await,
            _ => Ok(Drained::of(run_arm(Arm::Read, events, scratch).await?, events)),
        })
        .await?;
    let floor: Vec<f64> = cpu(&publish).iter().zip(cpu(&read)).map(|(publish, read)| publish + read).collect();
    let speed = Row::ratio(
        1,
        "relay drain ÷ pure pipelined publish",
        Some(Goal::AtLeast(0.95)),
        Series::new("relay", "events/s", rates(&relay)),
        Series::new("pure publish", "events/s", rates(&publish)),
    );
    let cost = Row::ratio(
        2,
        "relay's CPU per event ÷ (pure read + pure publish)",
        Some(Goal::AtMost(1.3)),
        Series::new("relay", "µs/event", cpu(&relay)),
        Series::new("read and publish", "µs/event", floor),
    );
    Ok(vec![
        speed.beside(Series::new("pure read", "events/s", rates(&read))).counted(counts),
        cost.beside(Series::new("read", "µs/event", cpu(&read)))
            .beside(Series::new("publish", "µs/event", cpu(&publish)))
            .counted(counts),
    ])
}

/// Figure 8: on a server that writes to its disk before it answers.
pub(crate) async fn synced(bench: &Bench) -> Result<Vec<Row>, Error> {
    let name = "sync_interval: always: relay drain ÷ the best pure publish";
    let goal = Some(Goal::AtLeast(0.85));
    let Some(nats) = &bench.config.nats_sync else {
        return Ok(vec![Row::not_measured(8, name, goal, "no server with sync_interval: always was named")]);
    };
    let (mut counts, events) = (Counts::default(), bench.size(100_000, 1000));
    // One by one it takes seconds for a thousand.
    let few = bench.size(2000, 1000);
    let arms = ["relay", "pure publish in batches", "pure pipelined publish"];
    let [relay, batches, chained] = drains(bench, nats, "synced drain", events, arms, async |arm, scratch| match arm {
        0 => relays(scratch, 1, events, &mut counts).await,
        1 => publish(scratch, Arm::PublishBatches, events, &mut counts).await,
        _ => publish(scratch, Arm::PublishChained, few, &mut counts).await,
    })
    .await?;
    let best: Vec<f64> = rates(&batches).iter().zip(rates(&chained)).map(|(one, other)| one.max(other)).collect();
    let row = Row::ratio(
        8,
        name,
        goal,
        Series::new("relay", "events/s", rates(&relay)),
        Series::new("best pure publish", "events/s", best),
    );
    let row = row.beside(Series::new("in batches", "events/s", rates(&batches)));
    Ok(vec![row.beside(Series::new("pipelined", "events/s", rates(&chained))).counted(counts)])
}

/// Figure 11: further relays stand by and are not in the way.
pub(crate) async fn several(bench: &Bench) -> Result<Vec<Row>, Error> {
    let (mut counts, events) = (Counts::default(), bench.events());
    let [four, one] =
        drains(bench, &bench.config.nats, "several relays", events, ["four", "one"], async |arm, scratch| {
            relays(scratch, if arm == 0 { RELAYS } else { 1 }, events, &mut counts).await
        })
        .await?;
    let row = Row::ratio(
        11,
        "four relays on one outbox ÷ one relay",
        Some(Goal::AtLeast(0.95)),
        Series::new("four relays", "events/s", rates(&four)),
        Series::new("one relay", "events/s", rates(&one)),
    );
    Ok(vec![row.counted(counts)])
}

/// Lets so many relays drain a backlog. The processor time is that of all of them.
async fn relays(scratch: &Scratch, relays: usize, events: u64, counts: &mut Counts) -> Result<Drained, Error> {
    let mut relays: Vec<Child> =
        (0..relays).map(|_| Child::start("aftercommit-relay", &[], scratch)).collect::<Result<_, _>>()?;
    if let Some(relay) = relays.first_mut() {
        relay.until_stored(events, scratch).await?;
    }
    let cpu: Option<f64> = relays.iter().map(|relay| Some(relay.cpu()?.as_secs_f64())).sum();
    for relay in relays {
        relay.kill().await?;
    }
    counts.add(scratch.counts(events).await?);
    Ok(Drained { rate: scratch.rate().await?, cpu: cpu.map(|cpu| cpu * 1e6 / events as f64) })
}

async fn publish(scratch: &Scratch, arm: Arm, events: u64, counts: &mut Counts) -> Result<Drained, Error> {
    let cost = run_arm(arm, events, scratch).await?;
    counts.add(scratch.counts(events).await?);
    Ok(Drained { rate: scratch.rate().await?, ..Drained::of(cost, events) })
}
