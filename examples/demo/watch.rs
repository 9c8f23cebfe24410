//! What is seen of the flow from outside: counts, latencies, who leads.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use uuid::Uuid;

use crate::Result;
use crate::servers::Servers;

/// Longer than a healthy NATS server needs to answer.
const ANSWER: Duration = Duration::from_millis(300);

pub struct Watch {
    pub bank: PgPool,
    pub projection: PgPool,
    pub nats: jetstream::Context,
    stream: String,
    /// Whether the server knows when transactions committed. If not, the latency is measured between statements.
    pub commit_times: bool,
    relayed: u64,
    /// The inbox pages that have been looked at and were full.
    pages_seen: i64,
    /// When the last event that has been looked at was handled, in microseconds.
    time_seen: i64,
}

/// How far the events are.
pub struct Counts {
    pub published: u64,
    pub relayed: u64,
    pub handled: u64,
}

/// Microseconds from the commit of an event to the commit of its handler, in ascending order.
pub struct Latencies(Vec<i64>);

impl Latencies {
    /// The latency in milliseconds below which `share` of all lie; none when there are none.
    pub fn percentile(&self, share: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        Some(self.0[(last as f64 * share).round() as usize] as f64 / 1000.0)
    }
}

impl Watch {
    pub async fn new(servers: &Servers) -> Result<Self> {
        let pool = |url: &str| PgPoolOptions::new().max_connections(2).connect_lazy(url);
        let (bank, projection) = (pool(&servers.places.bank_url)?, pool(&servers.places.projection_url)?);
        let commit_times: String = sqlx::query_scalar("show track_commit_timestamp").fetch_one(&bank).await?;
        Ok(Self {
            bank,
            projection,
            nats: servers.connect_nats().await?,
            stream: servers.places.stream.clone(),
            commit_times: commit_times == "on",
            relayed: 0,
            pages_seen: 0,
            time_seen: 0,
        })
    }

    pub async fn counts(&mut self) -> Result<Counts> {
        let handled: i64 = sqlx::query_scalar("select coalesce(sum(events), 0)::bigint from demo.branch")
            .fetch_one(&self.projection)
            .await?;
        // While NATS is down, the last figure stands.
        if let Ok(Ok(stream)) = tokio::time::timeout(ANSWER, self.nats.get_stream(&self.stream)).await {
            self.relayed = stream.cached_info().state.messages;
        }
        let published = self.published().await?;
        Ok(Counts { published: published as u64, relayed: self.relayed, handled: handled as u64 })
    }

    /// The outbox id of the last event committed. pgbench rolls nothing back, so it is their number too.
    pub async fn published(&self) -> Result<i64> {
        let query = sqlx::query_scalar("select coalesce(max(id), 0) from aftercommit.outbox");
        Ok(query.fetch_one(&self.bank).await?)
    }

    /// The highest outbox id that was applied to the projection.
    pub async fn applied(&self) -> Result<i64> {
        let query = sqlx::query_scalar("select coalesce(max(outbox_id), 0) from demo.branch");
        Ok(query.fetch_one(&self.projection).await?)
    }

    /// The process that leads the relays.
    pub async fn leading_relay(&self) -> Result<Option<u32>> {
        let holder: Option<String> = sqlx::query_scalar("select holder from aftercommit.lease where name = 'relay'")
            .fetch_optional(&self.bank)
            .await?;
        Ok(holder.as_deref().and_then(process))
    }

    /// The processes that are active workers.
    pub async fn active_workers(&self) -> Result<Vec<u32>> {
        let holders: Vec<String> =
            sqlx::query_scalar("select holder from aftercommit.lease").fetch_all(&self.projection).await?;
        Ok(holders.iter().filter_map(|holder| process(holder)).collect())
    }

    /// The latencies of what has been handled since the last call, more or less: rows that the inbox added at its end.
    pub async fn recent_latencies(&mut self) -> Result<Latencies> {
        const COMMITTED: &str = "select event_id, (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1e6)::bigint
                                   from aftercommit.inbox where ctid >= $1::text::tid limit 5000";
        const WRITTEN: &str = "select event_id, (extract(epoch from handled_at) * 1e6)::bigint
                                 from aftercommit.inbox where ctid >= $1::text::tid limit 5000";
        let mut handled: Vec<(Uuid, i64)> = sqlx::query_as(if self.commit_times { COMMITTED } else { WRITTEN })
            .bind(format!("({},0)", self.pages_seen))
            .fetch_all(&self.projection)
            .await?;
        handled.retain(|(_, time)| *time > self.time_seen);
        self.time_seen = handled.iter().map(|(_, time)| *time).max().unwrap_or(self.time_seen);
        self.pages_seen = sqlx::query_scalar(
            "select greatest(pg_relation_size('aftercommit.inbox') / current_setting('block_size')::bigint - 1, 0)",
        )
        .fetch_one(&self.projection)
        .await?;
        self.latencies(handled).await
    }

    /// The latencies of all events.
    pub async fn all_latencies(&self) -> Result<Latencies> {
        const COMMITTED: &str = "select event_id, (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1e6)::bigint
                                   from aftercommit.inbox";
        const WRITTEN: &str = "select event_id, (extract(epoch from handled_at) * 1e6)::bigint from aftercommit.inbox";
        let handled =
            sqlx::query_as(if self.commit_times { COMMITTED } else { WRITTEN }).fetch_all(&self.projection).await?;
        self.latencies(handled).await
    }

    async fn latencies(&self, handled: Vec<(Uuid, i64)>) -> Result<Latencies> {
        const COMMITTED: &str =
            "select event_id, (extract(epoch from pg_xact_commit_timestamp(xid::xid)) * 1e6)::bigint
                                   from aftercommit.outbox where event_id = any($1)";
        const WRITTEN: &str = "select event_id, (extract(epoch from created_at) * 1e6)::bigint
                                 from aftercommit.outbox where event_id = any($1)";
        let ids: Vec<Uuid> = handled.iter().map(|(id, _)| *id).collect();
        let published: Vec<(Uuid, i64)> =
            sqlx::query_as(if self.commit_times { COMMITTED } else { WRITTEN }).bind(ids).fetch_all(&self.bank).await?;
        let published: HashMap<Uuid, i64> = published.into_iter().collect();
        let mut latencies: Vec<i64> =
            handled.iter().filter_map(|(id, handled)| Some(handled - published.get(id)?)).collect();
        latencies.sort_unstable();
        Ok(Latencies(latencies))
    }
}

/// The process in `host:process:instance`.
fn process(holder: &str) -> Option<u32> {
    holder.rsplit(':').nth(1)?.parse().ok()
}
