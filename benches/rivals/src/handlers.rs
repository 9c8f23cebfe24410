//! The handler's side: how fast a worker runs a handler that writes one row.

use std::time::{Duration, Instant};

use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber, Worker};
use graphile_worker::{IntoTaskHandlerResult, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions};
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, PgTransaction};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::arms::Kind;
use crate::scratch::Scratch;
use crate::stream::settled;

const EVENTS: u64 = 20_000;
const LIMIT: Duration = Duration::from_secs(60);
const LANES: usize = 16;

#[derive(Clone, Deserialize, Serialize)]
struct Bench {
    n: i64,
}

impl aftercommit::Event for Bench {
    const TYPE: &'static str = "bench";
}

impl TaskHandler for Bench {
    const IDENTIFIER: &'static str = "bench";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        let pool = context.extensions().get::<PgPool>().ok_or("the pool is missing")?;
        sqlx::query("insert into effects (n) values ($1)")
            .bind(self.n)
            .execute(pool)
            .await
            .map(drop)
            .map_err(|error| error.to_string())
    }
}

/// Events per second between the first row and the last one.
pub async fn rate(scratch: &Scratch) -> anyhow::Result<f64> {
    sqlx::query("create table effects (n bigint not null, at timestamptz not null default clock_timestamp())")
        .execute(&scratch.pool)
        .await?;
    match scratch.kind {
        Kind::Aftercommit => aftercommit(scratch).await?,
        Kind::GraphileWorker => graphile(scratch).await?,
        other => anyhow::bail!("{} runs no handlers", other.name()),
    }
    let (rows, distinct, seconds): (i64, i64, f64) = sqlx::query_as(
        "select count(*), count(distinct n), extract(epoch from max(at) - min(at))::float8 from effects",
    )
    .fetch_one(&scratch.pool)
    .await?;
    anyhow::ensure!(
        (rows, distinct) == (EVENTS as i64, EVENTS as i64),
        "{}: {rows} rows of {distinct} events",
        scratch.kind.name()
    );
    Ok(rows as f64 / seconds)
}

async fn finished(scratch: &Scratch) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let rows: i64 = sqlx::query_scalar("select count(*) from effects").fetch_one(&scratch.pool).await?;
        if rows >= EVENTS as i64 {
            return Ok(());
        }
        anyhow::ensure!(began.elapsed() < LIMIT, "{}: only {rows} events are handled", scratch.kind.name());
        sleep(Duration::from_millis(50)).await;
    }
}

struct Insert;

impl Handler<Bench> for Insert {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Bench>) -> Result<(), HandlerError> {
        sqlx::query("insert into effects (n) values ($1)").bind(delivery.event.n).execute(&mut **tx).await?;
        Ok(())
    }
}

async fn aftercommit(scratch: &Scratch) -> anyhow::Result<()> {
    scratch.seed(EVENTS).await?;
    let relay = scratch.kind.start(scratch).await?;
    settled(scratch, EVENTS).await?;
    relay.await?;
    let stop = CancellationToken::new();
    let worker = Worker::new(scratch.postgres(), scratch.nats(), scratch.naming()?)
        .subscriber(Subscriber::new("effects").concurrency(LANES).on::<Bench>(Insert));
    worker.provision().await?;
    let worker = tokio::spawn(worker.run(stop.clone()));
    finished(scratch).await?;
    stop.cancel();
    Ok(worker.await??)
}

async fn graphile(scratch: &Scratch) -> anyhow::Result<()> {
    let worker = WorkerOptions::default()
        .concurrency(LANES)
        .schema("graphile_worker")
        .define_job::<Bench>()
        .pg_pool(scratch.pool.clone())
        .add_extension(scratch.pool.clone())
        .local_queue(LocalQueueConfig::default().with_size(500))
        .complete_job_batch_delay(Duration::from_millis(5))
        .listen_os_shutdown_signals(false)
        .init()
        .await?;
    sqlx::query(
        "select graphile_worker.add_job('bench', json_build_object('n', n, 'pad', repeat('x', 190))) \
         from generate_series(1, $1) n",
    )
    .bind(EVENTS as i64)
    .execute(&scratch.pool)
    .await?;
    sqlx::query("analyze").execute(&scratch.pool).await?;
    let worker = tokio::spawn(async move { worker.run().await });
    let outcome = finished(scratch).await;
    worker.abort();
    outcome
}
