//! Loss and order: 16 writers, each transaction locking the row of a key and writing its next version, some rolled back,
//! some open longer than others, while the relay runs.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::AssertSqlSafe;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::scratch::Scratch;
use crate::stream::{messages, settled};

const WRITERS: u64 = 16;
const EACH: u64 = 250;
const KEYS: u64 = 100;

/// What came of it.
#[derive(Default)]
pub struct Counts {
    pub committed: f64,
    /// Committed, and not in the stream.
    pub lost: f64,
    /// In the stream, and rolled back.
    pub ghosts: f64,
    /// In the stream more than once.
    pub doubled: f64,
    /// Behind a later version of their key.
    pub out_of_order: f64,
}

pub async fn under_writers(scratch: &Scratch) -> anyhow::Result<Counts> {
    sqlx::query("create table keys as select 'k' || n as key, 0::bigint as version from generate_series(0, $1) n")
        .bind(i64::try_from(KEYS)?)
        .execute(&scratch.pool)
        .await?;
    sqlx::query("create unique index on keys (key)").execute(&scratch.pool).await?;
    let stop = scratch.kind.start(scratch).await?;
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(write(scratch.pool.clone(), scratch.insert_one(), writer));
    }
    let mut committed = HashSet::new();
    while let Some(numbers) = writers.join_next().await {
        committed.extend(numbers??);
    }
    settled(scratch, committed.len() as u64).await?;
    // What is doubled may still come.
    sleep(Duration::from_millis(500)).await;
    stop.await?;
    let mut counts = Counts { committed: committed.len() as f64, ..Counts::default() };
    let mut seen = HashSet::new();
    let mut versions: HashMap<String, i64> = HashMap::new();
    for stored in messages(scratch).await? {
        let event = stored.event;
        if !committed.contains(&event.n) {
            counts.ghosts += 1.0;
        }
        if !seen.insert(event.n) {
            counts.doubled += 1.0;
            continue;
        }
        let version = versions.entry(event.key).or_default();
        if event.version < *version {
            counts.out_of_order += 1.0;
        }
        *version = event.version.max(*version);
    }
    counts.lost = committed.difference(&seen).count() as f64;
    Ok(counts)
}

/// Every tenth transaction is rolled back, every seventh stays open for some milliseconds.
async fn write(pool: sqlx::PgPool, insert: String, writer: u64) -> anyhow::Result<Vec<u64>> {
    let mut committed = Vec::new();
    for turn in 0..EACH {
        let n = writer * EACH + turn;
        // A walk over the keys that differs from writer to writer.
        let key = format!("k{}", (n * 7919 + writer * 104_729) % KEYS);
        let mut tx = pool.begin().await?;
        let version: i64 = sqlx::query_scalar("update keys set version = version + 1 where key = $1 returning version")
            .bind(&key)
            .fetch_one(&mut *tx)
            .await?;
        let payload = serde_json::json!({ "n": n, "key": key, "version": version, "pad": "x".repeat(190) });
        sqlx::query(AssertSqlSafe(insert.clone())).bind(payload).bind(&key).execute(&mut *tx).await?;
        if n % 7 == 0 {
            sleep(Duration::from_millis(n % 20)).await;
        }
        if n % 10 == 0 {
            tx.rollback().await?;
        } else {
            tx.commit().await?;
            committed.push(n);
        }
    }
    Ok(committed)
}
