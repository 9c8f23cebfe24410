//! What an erasure costs others who have rows in the same tables, and whether its process grows.

use std::process::Command;
use std::time::{Duration, Instant};

use aftercommit::fanout::JobId;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use super::fleet::Fleet;
use super::{Error, REQUESTER, show};

/// As the tables of the orders are in the deletion, without rows.
const TABLES: &str = "
create table orders (id bigint primary key, tenant_id bigint not null);
create index on orders (tenant_id);
create table order_lines (id bigint primary key, order_id bigint not null references orders);
create index on order_lines (order_id);
create table line_adjustments (id bigint primary key, line_id bigint not null references order_lines);
create index on line_adjustments (line_id);
";

/// A fifth of the rows are orders, three fifths their lines, a fifth adjustments of lines. `$1` are orders that are there, `$2` orders
/// that are made, of the tenant `$3`, or of five when it is null.
const PLANT: &str = "
with made as (insert into orders select n, coalesce($3, n % 5 + 1) from generate_series($1::bigint + 1, $1 + $2::bigint) n),
     lines as (insert into order_lines select 3 * $1 + n, $1 + (n - 1) % $2 + 1 from generate_series(1, 3 * $2) n)
insert into line_adjustments select $1 + n, 3 * $1 + n from generate_series(1, $2) n";

/// Ids from here on are those of the tenants that are deleted, and from twice of it those of the application.
const FAR: i64 = 1_000_000_000;

/// How many rows there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Of the tenant that is deleted.
    pub tenant: i64,
    /// Of five others together.
    pub others: i64,
}

impl Default for Size {
    fn default() -> Self {
        Self { tenant: 100_000, others: 1_000_000 }
    }
}

/// What a round has shown.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// The 99th of a hundred of the application's transactions beside the erasure, by the same without.
    pub ratio: f64,
    /// How long the erasure took.
    pub took: Duration,
    /// The memory of the participant's process before the erasure, at most meanwhile, and afterwards, in MB.
    pub memory: [f64; 3],
}

/// Measures some rounds, each with a tenant of its own, and prints them and the median.
pub async fn measure(program: fn() -> Result<Command, Error>, size: Size, rounds: usize) -> Result<Vec<Round>, Error> {
    let mut fleet = Fleet::of(program, true, [("orders", TABLES)]).await?;
    let pool = PgPoolOptions::new().max_connections(2).connect(&fleet.seat("orders")?.database.url).await?;
    plant(&pool, 0, size.others, None).await?;
    fleet.seat_mut("orders")?.chunk = Some(1000);
    // As one that has days for it and works beside customers.
    fleet.seat_mut("orders")?.rest = Some(100.0);
    fleet.start("orders")?;
    fleet.start(REQUESTER)?;
    let (mut measured, mut application) = (Vec::new(), Application { pool: pool.clone(), next: 2 * FAR });
    for n in 0..rounds as i64 {
        let tenant = 1000 + n;
        plant(&pool, FAR + n * size.tenant, size.tenant, Some(tenant)).await?;
        sqlx::raw_sql("analyze; checkpoint").execute(&pool).await?;
        // Once before and once behind, so that what the erasure leaves behind does not only count on one side.
        let before = if n % 2 == 0 { Some(application.runs(2000).await?) } else { None };
        let round = erase(&mut fleet, &mut application, tenant).await?;
        let without = match before {
            Some(times) => times,
            None => application.runs(2000).await?,
        };
        let round = Round { ratio: late(round.1).as_secs_f64() / late(without).as_secs_f64(), ..round.0 };
        println!(
            "round {}: erased in {:.1?}, others' p99 {:.2} times as long, memory {:.1} MB before, {:.1} at most, {:.1} afterwards",
            n + 1,
            round.took,
            round.ratio,
            round.memory[0],
            round.memory[1],
            round.memory[2]
        );
        measured.push(round);
    }
    let mut ratios: Vec<f64> = measured.iter().map(|round| round.ratio).collect();
    ratios.sort_by(f64::total_cmp);
    println!(
        "{} rows of a tenant beside {}: others' p99 {:.2} times as long, the median of {rounds}",
        size.tenant,
        size.others,
        ratios[rounds / 2]
    );
    Ok(measured)
}

/// Rows of a tenant, or of five when none is named.
async fn plant(pool: &PgPool, first: i64, rows: i64, tenant: Option<i64>) -> Result<(), Error> {
    sqlx::query(PLANT).bind(first).bind(rows / 5).bind(tenant).execute(pool).await?;
    Ok(())
}

/// One deletion, with what the application's transactions took meanwhile.
async fn erase(fleet: &mut Fleet, application: &mut Application, tenant: i64) -> Result<(Round, Vec<Duration>), Error> {
    let known = "insert into tenants (id, name) values ($1, 'tenant ' || $1)";
    sqlx::query(known).bind(tenant).execute(fleet.pool(REQUESTER)?).await?;
    let admin = "insert into admins values ($1, 'admin')";
    sqlx::query(admin).bind(tenant).execute(fleet.pool(REQUESTER)?).await?;
    let before = fleet.memory("orders")?;
    fleet.ask(tenant)?;
    let job: JobId = fleet.reply().await?.job.parse()?;
    while show::progress(fleet.pool("orders")?, job).await?.is_none() {
        tokio::time::sleep(super::TICK).await;
    }
    let (began, mut times, mut most) = (Instant::now(), Vec::new(), before);
    while show::progress(fleet.pool("orders")?, job).await?.is_some_and(|(_, ended)| !ended) {
        times.extend(application.runs(50).await?);
        most = most.max(fleet.memory("orders")?);
    }
    let took = began.elapsed();
    if times.len() < 500 {
        return Err(format!("only {} transactions ran beside the erasure", times.len()).into());
    }
    let left: i64 = sqlx::query_scalar("select count(*) from orders where tenant_id = $1")
        .bind(tenant)
        .fetch_one(fleet.pool("orders")?)
        .await?;
    if left > 0 {
        return Err(format!("{left} rows are left").into());
    }
    Ok((Round { ratio: 0.0, took, memory: [before, most, fleet.memory("orders")?] }, times))
}

/// What the service does for the other tenants meanwhile.
struct Application {
    pool: PgPool,
    next: i64,
}

impl Application {
    /// How long each of some transactions took: an order with two lines.
    async fn runs(&mut self, times: usize) -> Result<Vec<Duration>, Error> {
        let mut took = Vec::new();
        for _ in 0..times {
            let (id, began) = (self.next, Instant::now());
            self.next += 1;
            let mut tx = self.pool.begin().await?;
            sqlx::query("insert into orders values ($1, $1 % 5 + 1)").bind(id).execute(&mut *tx).await?;
            let lines = "insert into order_lines select 3 * $1 + n, $1 from generate_series(1, 2) n";
            sqlx::query(lines).bind(id).execute(&mut *tx).await?;
            sqlx::query("update orders set tenant_id = tenant_id where id = $1").bind(id).execute(&mut *tx).await?;
            tx.commit().await?;
            took.push(began.elapsed());
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        Ok(took)
    }
}

/// The 99th of a hundred.
fn late(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() * 99 / 100]
}
