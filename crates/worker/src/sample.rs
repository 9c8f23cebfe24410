//! What JetStream and the database say of the subscribers, looked at every few seconds by every instance.

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

/// What was seen of one subscriber; in words where it could not be seen.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    consumer: Result<Option<Load>, String>,
    tables: Result<Counts, String>,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            consumer: Err("its consumer was not looked at yet".into()),
            tables: Err("its tables were not looked at yet".into()),
        }
    }
}

impl Sample {
    /// Events that JetStream has not delivered yet, among them those that it shall deliver again now.
    pub(super) fn pending(&self) -> Option<u64> {
        self.consumer().map(|load| load.pending)
    }

    /// Events that were delivered and not answered.
    pub(super) fn in_flight(&self) -> Option<u64> {
        self.consumer().map(|load| load.in_flight)
    }

    /// Events with failed attempts that are still to be retried.
    pub(super) fn failing(&self) -> Option<u64> {
        self.tables().map(|counts| counts.failing)
    }

    pub(super) fn dead_letters(&self) -> Option<u64> {
        self.tables().map(|counts| counts.dead_letters)
    }

    /// Events that an operator has sent back.
    pub(super) fn redrive(&self) -> Option<u64> {
        self.tables().map(|counts| counts.redrive)
    }

    fn consumer(&self) -> Option<&Load> {
        self.consumer.as_ref().ok().and_then(Option::as_ref)
    }

    fn tables(&self) -> Option<&Counts> {
        self.tables.as_ref().ok()
    }

    /// What keeps events from coming.
    pub(super) fn obstacles(&self) -> impl Iterator<Item = String> {
        [self.consumer_obstacle(), self.tables.as_ref().err().cloned()].into_iter().flatten()
    }

    fn consumer_obstacle(&self) -> Option<String> {
        match &self.consumer {
            Err(problem) => Some(problem.clone()),
            Ok(None) => Some("its consumer does not exist".into()),
            Ok(Some(load)) if load.paused => {
                Some("its consumer is paused in JetStream (`nats consumer resume`)".into())
            }
            Ok(Some(load)) if load.full => {
                Some("JetStream delivers no more before some of the events without ack are done".into())
            }
            Ok(Some(_)) => None,
        }
    }
}

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
