//! G5: how long an event takes from its transaction to the stream, with and without a stranger's long transaction.

use std::time::Duration;

use crate::support::Outbox;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use chrono::{DateTime, Utc};
use tokio::time::Instant;

/// Events a second.
const RATE: u32 = 200;

/// Writes at a steady pace for so long; returns the latencies in milliseconds, sorted.
async fn latencies(outbox: &Outbox, length: Duration) -> Vec<f64> {
    let before = outbox.stored().await;
    let mut pace = tokio::time::interval(Duration::from_secs(1) / RATE);
    let end = Instant::now() + length;
    while Instant::now() < end {
        pace.tick().await;
        outbox.publish("paced", "{}", None).await;
    }
    let mut latencies: Vec<f64> = outbox
        .timed_messages()
        .await
        .into_iter()
        .skip(usize::try_from(before).unwrap())
        .map(|(written, stored): (DateTime<Utc>, DateTime<Utc>)| (stored - written).as_seconds_f64() * 1000.0)
        .collect();
    latencies.sort_by(f64::total_cmp);
    latencies
}

fn at(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// A measurement, not a check: what a machine under load does to a 99th percentile says nothing about the relay.
/// `cargo test --release --test relay latency:: -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes three minutes and wants a quiet machine"]
async fn a_writing_transaction_held_open_for_a_minute() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let relay = outbox.relay();
    latencies(&outbox, Duration::from_secs(3)).await;
    let minute = Duration::from_secs(60);
    let undisturbed = latencies(&outbox, minute).await;
    let mut held = outbox.pool.begin().await.unwrap();
    sqlx::query("select aftercommit.publish('held', '{}')").execute(&mut *held).await.unwrap();
    let beside = latencies(&outbox, minute).await;
    held.commit().await.unwrap();
    let again = latencies(&outbox, minute).await;
    for (name, run) in [("undisturbed", &undisturbed), ("beside it", &beside), ("undisturbed again", &again)] {
        println!("{name}: {} events, p50 {:.2} ms, p99 {:.2} ms", run.len(), at(run, 0.5), at(run, 0.99));
    }
    relay.stop().await.unwrap();
}
