//! Finds the events that an operator has redriven for the subscriber.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::postgres;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::redrive::{self, Waiting};

/// How often the table is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is looked at from its beginning although nothing is new: a row may become visible behind a later one.
const RESCAN: Duration = Duration::from_secs(30);
/// How long a look may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many rows one look brings.
const PAGE: i64 = 1000;
/// How many rows may be known at a time, without their events: as many as JetStream's messages without ack.
const MAX_KNOWN: usize = 100_000;

/// Looks at the table again and again. Rows are known from the moment they are handed on until they are done.
pub(super) struct Redrives {
    connections: Arc<Connections>,
    subscriber: String,
    looks: JoinSet<Result<Vec<Waiting>, sqlx::Error>>,
    due: Instant,
    rescan: Instant,
    /// The last row that was seen.
    after: i64,
    /// Whether the last look saw the end of the table.
    at_end: bool,
    begun: bool,
    known: usize,
    failures: u32,
    /// Rows that are not known were met: the whole table is looked at as soon as possible.
    urgent: bool,
}

impl Redrives {
    pub(super) fn new(connections: Arc<Connections>, subscriber: &str) -> Self {
        Self {
            connections,
            subscriber: subscriber.to_string(),
            looks: JoinSet::new(),
            due: Instant::now(),
            rescan: Instant::now(),
            after: 0,
            at_end: false,
            begun: false,
            known: 0,
            failures: 0,
            urgent: false,
        }
    }

    /// Whether all rows that waited at the beginning are known, so that live events cannot overtake them.
    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    /// There are rows that are not known.
    pub(super) fn look_now(&mut self) {
        self.urgent = true;
    }

    /// A row that was handed on is new.
    pub(super) fn added(&mut self) {
        self.known += 1;
    }

    /// A row is done.
    pub(super) fn done(&mut self) {
        self.known -= 1;
    }

    /// The result of the next look; some of its rows may be known. Cancelled, it goes on with the next call.
    pub(super) async fn next(&mut self) -> Vec<Waiting> {
        loop {
            if self.looks.is_empty() {
                // While the database is away, urgency does not help.
                if !self.urgent || self.failures > 0 {
                    tokio::time::sleep_until(self.due.into()).await;
                }
                if self.known >= MAX_KNOWN {
                    (self.begun, self.urgent) = (true, false);
                    self.due = Instant::now() + LOOK;
                    continue;
                }
                self.look();
            }
            let looked = self.looks.join_next().await;
            match looked.and_then(Result::ok) {
                Some(Ok(rows)) => {
                    self.seen(&rows);
                    return rows;
                }
                Some(Err(error)) => self.failed(&error),
                None => self.due = Instant::now() + LOOK,
            }
        }
    }

    fn look(&mut self) {
        if self.urgent || (self.at_end && (self.known == 0 || self.rescan <= Instant::now())) {
            (self.after, self.urgent) = (0, false);
            self.rescan = Instant::now() + RESCAN;
        }
        let (connections, subscriber, after) = (Arc::clone(&self.connections), self.subscriber.clone(), self.after);
        self.looks.spawn(async move {
            let look = connections.run(async |connection| redrive::waiting(connection, &subscriber, after, PAGE).await);
            let late = |_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()));
            tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(late)
        });
    }

    fn seen(&mut self, rows: &[Waiting]) {
        if self.failures > 0 {
            tracing::info!(subscriber = self.subscriber, "the table of redriven events can be read again");
        }
        self.failures = 0;
        self.after = rows.last().map_or(self.after, |row| row.id);
        self.at_end = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE);
        self.begun |= self.at_end;
        self.due = Instant::now() + if self.at_end { LOOK } else { Duration::ZERO };
    }

    fn failed(&mut self, error: &sqlx::Error) {
        if self.failures == 0 {
            let error = postgres::message(error);
            tracing::warn!(subscriber = self.subscriber, error, "the table of redriven events cannot be read, waiting");
        }
        self.failures = self.failures.saturating_add(1);
        self.due = Instant::now() + Backoff::RECONNECT.after(self.failures);
    }
}
