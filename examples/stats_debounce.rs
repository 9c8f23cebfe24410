//! Many changes, one recomputation: a subscriber gathers the events of a key for a while and handles them at once.
//!
//! `cargo run --features testing --example stats_debounce` shows it, on servers that it starts for itself.

use std::time::Duration;

use aftercommit::testing::Environment;
use aftercommit::worker::{BatchError, BatchHandler, Delivery, Subscriber};
use aftercommit::{Event, outbox};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;

/// Something changed that the statistics of a shop depend on.
#[derive(Debug, Serialize, Deserialize)]
pub struct SaleRecorded {
    /// Which one.
    pub shop: i64,
}

impl Event for SaleRecorded {
    const TYPE: &'static str = "sale.recorded";

    // Each shop has a window of its own.
    fn key(&self) -> Option<String> {
        Some(format!("shop-{}", self.shop))
    }
}

/// Computes the statistics of a shop anew.
pub struct Recompute;

impl BatchHandler<SaleRecorded> for Recompute {
    async fn handle(&self, tx: &mut PgTransaction<'_>, sales: &[Delivery<SaleRecorded>]) -> Result<(), BatchError> {
        // All of one key: that is what debouncing promises.
        let Some(last) = sales.last() else { return Ok(()) };
        sqlx::query(
            "insert into stats (shop, sales, cents, recomputed) select $1, count(*), sum(cents), 1 from sale where shop = $1
             on conflict (shop) do update
                set sales = excluded.sales, cents = excluded.cents, recomputed = stats.recomputed + 1",
        )
        .bind(last.event.shop)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}

/// Any error.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Records a hundred sales, each in a transaction of its own, and returns how many sales the statistics tell of and how
/// often they were computed.
pub async fn hundred_sales() -> Result<(i64, i64), Error> {
    let environment = Environment::start().await?;
    let pool = environment.pool();
    sqlx::raw_sql(
        "create table sale (shop bigint, cents bigint);
         create table stats (shop bigint primary key, sales bigint, cents bigint, recomputed bigint)",
    )
    .execute(pool)
    .await?;
    let mut last = None;
    for cents in 1..=100_i64 {
        let mut tx = pool.begin().await?;
        sqlx::query("insert into sale values (7, $1)").bind(cents).execute(&mut *tx).await?;
        last = Some(outbox::publish(&mut tx, &SaleRecorded { shop: 7 }).await?);
        tx.commit().await?;
    }
    let stats = Subscriber::new("stats").on_batch::<SaleRecorded>(Recompute).debounce(Duration::from_secs(2));
    let relay = environment.relay();
    let worker = environment.worker(vec![stats]).await?;
    if let Some(last) = last {
        environment.handled("stats", last).await?;
    }
    worker.stop().await?;
    relay.stop().await?;
    Ok(sqlx::query_as("select sales, recomputed from stats where shop = 7").fetch_one(pool).await?)
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let (events, recomputed) = hundred_sales().await?;
    println!("{events} events, {recomputed} recompute");
    Ok(())
}
