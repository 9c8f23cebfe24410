//! Looks every few seconds, in every instance, what JetStream and the database say of the subscribers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::progress::Progress;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::consumer::{self, ConsumerSpec, Load};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::database_error;
use aftercommit_core::postgres::status::{self, Counts};

/// The pause between two looks, at least.
const EVERY: Duration = Duration::from_secs(3);
/// The pause lasts so many times as long as the look took, so that huge tables do not keep the database busy.
const REST: u32 = 20;
/// A look that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(10);

/// A subscriber and its consumer.
pub(super) type Watched = (Arc<Progress>, ConsumerSpec);

/// Looks again and again.
pub(super) async fn run(nats: Connection, connections: Arc<Connections>, watched: Vec<Watched>) {
    tokio::join!(look_at_consumers(&nats, &watched), look_at_tables(&connections, &watched));
}

async fn look_at_consumers(nats: &Connection, watched: &[Watched]) {
    loop {
        join_all(watched.iter().map(async |(progress, spec)| {
            let seen = consumer(nats, spec).await;
            progress.sampled(|sample| sample.consumer = seen);
        }))
        .await;
        tokio::time::sleep(EVERY).await;
    }
}

async fn look_at_tables(connections: &Connections, watched: &[Watched]) {
    let mut failed = false;
    loop {
        let began = Instant::now();
        let seen = tables(connections, watched).await;
        if let Err(error) = &seen
            && !failed
        {
            tracing::warn!(error = error.report(), "the subscribers' tables cannot be read");
        }
        failed = seen.is_err();
        for (n, (progress, _)) in watched.iter().enumerate() {
            let counts = match &seen {
                Ok(counts) => counts.get(n).copied().ok_or_else(|| "its tables could not be counted".into()),
                Err(error) => Err(error.report()),
            };
            progress.sampled(|sample| sample.tables = counts);
        }
        let pause = if failed { EVERY } else { EVERY.max(began.elapsed() * REST) };
        tokio::time::sleep(pause).await;
    }
}

async fn consumer(nats: &Connection, spec: &ConsumerSpec) -> Result<Option<Load>, String> {
    let context = nats.jetstream();
    match tokio::time::timeout(DEADLINE, consumer::load(&context, spec)).await {
        Ok(Ok(load)) => Ok(load),
        Ok(Err(error)) => Err(nats.complaint().unwrap_or_else(|| error.report())),
        Err(_) => Err("NATS does not answer".into()),
    }
}

async fn tables(connections: &Connections, watched: &[Watched]) -> Result<Vec<Counts>, Error> {
    let names: Vec<&str> = watched.iter().map(|(progress, _)| progress.subscriber.as_str()).collect();
    let look = connections.run(async |connection| status::counts(connection, &names).await);
    match tokio::time::timeout(DEADLINE, look).await {
        Ok(counts) => counts.map_err(|error| database_error("reading the subscribers' tables failed", error)),
        Err(_) => Err(Error::new(ErrorKind::Database, format!("no answer in {DEADLINE:?}"))),
    }
}
