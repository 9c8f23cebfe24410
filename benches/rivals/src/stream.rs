//! What came into the stream, by nats-server's own clock.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use async_nats::jetstream::consumer::{AckPolicy, pull};
use futures_util::TryStreamExt;
use serde::Deserialize;
use sqlx::AssertSqlSafe;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::scratch::Scratch;

/// An outbox that stores nothing new for so long is taken to be finished; outbox-core polls every 10 s.
const QUIET: Duration = Duration::from_secs(12);
const LOOK: Duration = Duration::from_millis(10);

/// An event as all arms write it.
#[derive(Deserialize)]
pub struct Event {
    pub n: u64,
    pub key: String,
    pub version: i64,
}

/// A message and when the server stored it.
pub struct Stored {
    pub event: Event,
    pub at: SystemTime,
}

/// How many messages the stream has ever got.
async fn last_sequence(scratch: &Scratch) -> anyhow::Result<u64> {
    Ok(scratch.context.get_stream(scratch.stream()).await?.cached_info().state.last_sequence)
}

/// Runs the relay until `events` more are stored, at most for `limit`, and returns events per second between the first
/// and the last of them.
pub async fn drain(scratch: &Scratch, events: u64, limit: Duration) -> anyhow::Result<f64> {
    let before = last_sequence(scratch).await?;
    let stop = scratch.kind.start(scratch).await?;
    let began = Instant::now();
    while last_sequence(scratch).await? < before + events && began.elapsed() < limit {
        sleep(LOOK).await;
    }
    stop.await?;
    let last = last_sequence(scratch).await?;
    anyhow::ensure!(last > before + 1, "{}: nothing came into the stream", scratch.kind.name());
    let stream = scratch.context.get_stream(scratch.stream()).await?;
    let first = stream.get_raw_message(before + 1).await?.time;
    let took = stream.get_raw_message(last).await?.time - first;
    Ok((last - before - 1) as f64 / took.as_seconds_f64())
}

/// Writes `rate` events per second for `length`, each in a transaction of its own, and returns the 99th percentile of
/// the time from the commit's return to the message in the stream, in milliseconds.
pub async fn p99(scratch: &Scratch, rate: u32, length: Duration) -> anyhow::Result<f64> {
    let stop = scratch.kind.start(scratch).await?;
    let mut clock = interval(Duration::from_secs(1) / rate);
    clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let insert = scratch.insert_one();
    let mut committed = HashMap::new();
    for n in 0..u64::from(rate) * length.as_secs() {
        clock.tick().await;
        let payload = serde_json::json!({ "n": n, "key": "k", "version": n, "pad": "x".repeat(190) });
        sqlx::query(AssertSqlSafe(insert.clone())).bind(payload).bind("k").execute(&scratch.pool).await?;
        committed.insert(n, SystemTime::now());
    }
    settled(scratch, committed.len() as u64).await?;
    stop.await?;
    let mut waits: Vec<f64> = messages(scratch)
        .await?
        .iter()
        .filter_map(|stored| Some((stored.at, *committed.get(&stored.event.n)?)))
        .map(|(at, committed)| at.duration_since(committed).unwrap_or_default().as_secs_f64() * 1000.0)
        .collect();
    anyhow::ensure!(!waits.is_empty(), "{}: nothing came into the stream", scratch.kind.name());
    waits.sort_by(f64::total_cmp);
    Ok(waits[(waits.len() * 99).div_ceil(100) - 1])
}

/// Waits until so many messages are stored, or until nothing has come for long.
pub async fn settled(scratch: &Scratch, events: u64) -> anyhow::Result<()> {
    let (mut stored, mut changed) = (0, Instant::now());
    while stored < events && changed.elapsed() < QUIET {
        sleep(LOOK).await;
        let now = last_sequence(scratch).await?;
        if now > stored {
            (stored, changed) = (now, Instant::now());
        }
    }
    Ok(())
}

/// Everything in the stream, in order.
pub async fn messages(scratch: &Scratch) -> anyhow::Result<Vec<Stored>> {
    let stream = scratch.context.get_stream(scratch.stream()).await?;
    let mut left = usize::try_from(stream.cached_info().state.messages)?;
    let consumer = stream.create_consumer(pull::Config { ack_policy: AckPolicy::None, ..Default::default() }).await?;
    let mut all = Vec::with_capacity(left);
    while left > 0 {
        let mut batch = consumer.fetch().max_messages(left.min(500)).messages().await?;
        while let Some(message) = batch.try_next().await.map_err(|error| anyhow::anyhow!(error))? {
            let at = message.info().map_err(|error| anyhow::anyhow!(error))?.published.into();
            all.push(Stored { event: serde_json::from_slice(&message.payload)?, at });
            left -= 1;
        }
    }
    Ok(all)
}
