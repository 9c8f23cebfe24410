//! outbox-core with outbox-postgres: tables, trigger and manager as their documentation shows them, defaults, and the
//! smallest transport to JetStream: one awaited publish per event, as the trait has it.

use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::jetstream;
use async_trait::async_trait;
use outbox_core::prelude::{Event, OutboxConfig, OutboxError, OutboxManagerBuilder, Transport};
use outbox_postgres::PostgresOutbox;
use serde_json::Value;

use super::Stop;
use crate::scratch::Scratch;

pub const INSERT: &str = "insert into outbox_events (event_type, payload) select 'bench', payload from events";

const TABLES: &[&str] = &[
    "create type status as enum ('Pending', 'Processing', 'Sent')",
    "create table outbox_events (id uuid primary key default gen_random_uuid(), idempotency_token text, \
     event_type text not null, payload jsonb not null, status status not null default 'Pending', \
     created_at timestamptz not null default now(), locked_until timestamptz not null default '-infinity')",
    "create index on outbox_events (locked_until, status) where status in ('Pending', 'Processing')",
    "create unique index on outbox_events (idempotency_token)",
    "create function notify_outbox_event() returns trigger language plpgsql as \
     $$ begin perform pg_notify('outbox_event', 'ping'); return new; end $$",
    "create trigger outbox_events_notify after insert or update on outbox_events \
     for each row execute function notify_outbox_event()",
];

struct JetStream {
    context: jetstream::Context,
    subject: String,
}

#[async_trait]
impl Transport<Value> for JetStream {
    async fn publish(&self, event: Event<Value>) -> Result<(), OutboxError> {
        let failed = |error: &dyn std::fmt::Display| OutboxError::BrokerError(error.to_string());
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", event.id.as_uuid().to_string());
        let payload = serde_json::to_vec(&event.payload).map_err(|error| failed(&error))?;
        let ack = self.context.publish_with_headers(self.subject.clone(), headers, payload.into()).await;
        ack.map_err(|error| failed(&error))?.await.map_err(|error| failed(&error))?;
        Ok(())
    }
}

pub async fn migrate(scratch: &Scratch) -> anyhow::Result<()> {
    for statement in TABLES {
        sqlx::query(*statement).execute(&scratch.pool).await?;
    }
    Ok(())
}

pub async fn start(scratch: &Scratch) -> anyhow::Result<Stop> {
    let pool = sqlx_0_8::PgPool::connect(scratch.database_url.as_str()).await?;
    let config = Arc::new(OutboxConfig::<Value>::default());
    let transport = JetStream { context: scratch.context.clone(), subject: scratch.subject() };
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let manager = OutboxManagerBuilder::new()
        .storage(Arc::new(PostgresOutbox::new(pool.clone(), config.clone())))
        .publisher(Arc::new(transport))
        .config(config)
        .shutdown_rx(stopping)
        .build()?;
    let manager = tokio::spawn(manager.run());
    Ok(Box::pin(async move {
        stop.send_replace(true);
        manager.await??;
        pool.close().await;
        Ok(())
    }))
}
