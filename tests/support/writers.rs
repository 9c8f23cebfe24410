//! Transactions of the kind that real services make, and worse.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aftercommit::testing::eventually;
use sqlx::{PgPool, Row};
use tokio::task::JoinHandle;

use super::SOON;

/// Writers that make life hard for a relay: transactions of random length, most of them on a few keys under row locks,
/// with savepoints released and rolled back, some rolled back as a whole, some adding events without a key.
pub struct Writers {
    stop: Arc<AtomicBool>,
    pub commits: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    pub async fn start(pool: &PgPool, writers: usize, keys: i32) -> Self {
        sqlx::raw_sql(
            "create table if not exists aggregate (key int primary key, version int not null);
             create table if not exists rolled_back (event_id uuid primary key)",
        )
        .execute(pool)
        .await
        .unwrap();
        sqlx::query("insert into aggregate select n, 0 from generate_series(1, $1) n on conflict do nothing")
            .bind(keys)
            .execute(pool)
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let commits = Arc::new(AtomicU64::new(0));
        let tasks = (0..writers)
            .map(|writer| {
                let (pool, stop, commits) = (pool.clone(), stop.clone(), commits.clone());
                let mut random = Random(writer as u64 + 1);
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        // A server that is down for a moment fails the transaction; then nothing of it may come out.
                        if write_once(&pool, &mut random, keys).await.is_ok() {
                            commits.fetch_add(1, Ordering::Relaxed);
                        } else {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    }
                })
            })
            .collect();
        Self { stop, commits, tasks }
    }

    /// Waits for so many commits more.
    pub async fn more(&self, commits: u64) {
        let enough = self.commits.load(Ordering::Relaxed) + commits;
        eventually(SOON, "the writers commit", async || self.commits.load(Ordering::Relaxed) >= enough)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

async fn write_once(pool: &PgPool, random: &mut Random, keys: i32) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    if random.one_in(4) {
        // The transaction gets its id long before it has the lock of its key.
        sqlx::query("select pg_current_xact_id()").execute(&mut *tx).await?;
    }
    let mut touched: Vec<i32> = (0..=random.below(2)).map(|_| random.below(keys as u64) as i32 + 1).collect();
    touched.sort_unstable();
    touched.dedup();
    for key in touched {
        let version: i32 = sqlx::query("update aggregate set version = version + 1 where key = $1 returning version")
            .bind(key)
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?;
        if random.one_in(3) {
            sqlx::query("savepoint inner_work").execute(&mut *tx).await?;
            write(&mut tx, "noise.undone", None, 0).await?;
            sqlx::query("rollback to savepoint inner_work").execute(&mut *tx).await?;
        }
        if random.one_in(3) {
            sqlx::query("savepoint inner_work").execute(&mut *tx).await?;
            write(&mut tx, "key.changed", Some(key), version).await?;
            sqlx::query("release savepoint inner_work").execute(&mut *tx).await?;
        } else {
            write(&mut tx, "key.changed", Some(key), version).await?;
        }
        if random.one_in(8) {
            tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        }
    }
    if random.one_in(3) {
        write(&mut tx, "noise.kept", None, 0).await?;
    }
    if random.one_in(6) { tx.rollback().await } else { tx.commit().await }
}

async fn write(
    tx: &mut sqlx::PgTransaction<'_>,
    event_type: &str,
    key: Option<i32>,
    version: i32,
) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.publish($1, jsonb_build_object('version', $2::int), $3)")
        .bind(event_type)
        .bind((version > 0).then_some(version))
        .bind(key.map(|key| format!("key-{key}")))
        .execute(&mut **tx)
        .await
        .map(drop)
}

/// A small generator with a seed, so that a writer does the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // The constants of Knuth's MMIX generator; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}
