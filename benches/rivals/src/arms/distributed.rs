//! distributed: its repository's tables, its outbox dispatcher, its NATS bus. The batch of 100 is the one of its
//! documentation; the poll every 25 ms instead of every second is in its favour.

use std::sync::Arc;
use std::time::Duration;

use distributed::bus::NatsBus;
use distributed::{BusPublisher, OutboxDispatcher, OutboxDrainRunner, PostgresRepository};
use sqlx::PgPool;
use tokio::sync::oneshot;

use super::Stop;
use crate::scratch::Scratch;

pub const INSERT: &str = "insert into outbox_messages \
     (message_id, event_type, payload, payload_codec, payload_codec_version, status, created_at, next_available_at) \
     select gen_random_uuid()::text, 'bench', convert_to(payload::text, 'utf8'), 'bytes', 1, 'pending', \
     clock_timestamp(), clock_timestamp() from events";

pub async fn migrate(scratch: &Scratch) -> anyhow::Result<()> {
    PostgresRepository::connect_and_migrate(scratch.database_url.as_str()).await?;
    Ok(())
}

pub async fn start(scratch: &Scratch) -> anyhow::Result<Stop> {
    let pool = PgPool::connect(scratch.database_url.as_str()).await?;
    let repository = PostgresRepository::new(pool.clone());
    let bus = NatsBus::connect(scratch.nats_url.as_str()).namespace(scratch.kind.short()).await?;
    let publisher = BusPublisher::new(Arc::new(bus));
    let dispatcher =
        OutboxDispatcher::new(repository.outbox_store(), publisher, "rivals", Duration::from_secs(30), 5);
    let runner = OutboxDrainRunner::new(dispatcher)
        .with_batch_size(100)
        .with_poll_interval(Duration::from_millis(25));
    let (stop, stopping) = oneshot::channel::<()>();
    let runner = tokio::spawn(runner.run(async move {
        let _ = stopping.await;
    }));
    Ok(Box::pin(async move {
        drop(stop);
        runner.await??;
        pool.close().await;
        Ok(())
    }))
}
