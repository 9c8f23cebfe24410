//! What a lane reports of events, and what becomes of one whose handler failed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres;
use aftercommit_core::postgres::attempt::{self, Record, Waits};
use aftercommit_core::postgres::dead_letter::{self, NewDeadLetter};
use aftercommit_core::postgres::failure;
use aftercommit_core::text::cut;

use crate::executor::Lane;
use crate::executor::load::Queued;
use crate::executor::lost_session::Loss;
use crate::handler::HandlerError;
use crate::pace::Ran;
use crate::progress::Outcome;
use crate::scheduler::Place;
use crate::subscriber::MAX_WAIT;
use crate::transaction_error::describe;

/// How much of an error is logged: the whole of it is in the database, and an event may fail many times.
pub(crate) const LOGGED: usize = 500;

/// What became of an event.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// Handled, now or before.
    Done,
    /// Given up.
    Dead(String),
    /// It failed: not before this time has passed.
    Failed(Duration),
    /// It asked for it: not before this time has passed.
    Later(Duration),
    /// It is under suspicion: not before this time has passed, and then alone.
    Suspect(Duration),
    /// Events of its key that were sent back come first, and are not known here yet.
    Held,
    /// Something that its handler needs is away.
    Interrupted {
        reason: String,
        /// What the handler said of when to try again.
        wait: Wait,
    },
    /// It did not come to a decision.
    NotRun,
}

/// How long to wait for the end of an outage.
#[derive(Debug, PartialEq)]
pub(crate) enum Wait {
    /// As for servers of our own: soon, and again and again.
    Soon,
    Exactly(Duration),
}

/// What became of a batch.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) verdicts: Vec<(Place, Verdict)>,
    /// The subscriber's database, or where it sends all of its events, is away, for this reason.
    pub(crate) outage: Option<String>,
    /// Another instance has taken over.
    pub(crate) fenced: bool,
    /// What the last transaction took that no outage prevented.
    pub(crate) ran: Option<Ran>,
    /// What is on record of events now.
    pub(crate) records: Vec<(Place, Record)>,
    /// Sessions that ended while events ran, of which the database could not be asked. Their events have no verdict yet.
    pub(crate) losses: Vec<Loss>,
    /// The lanes of losses of which it was asked.
    pub(crate) looked_into: Vec<i64>,
    /// The database has answered a question about a loss.
    pub(crate) answered: bool,
}

impl Report {
    /// Takes note of why a lane cannot go on.
    pub(crate) fn halted(&mut self, result: Result<(), Halt>) {
        match result {
            Ok(()) => {}
            Err(Halt::Outage(reason)) => self.outage = Some(format!("the database is away: {reason}")),
            Err(Halt::Unreachable(reason)) => self.outage = Some(reason),
            Err(Halt::Fenced) => self.fenced = true,
        }
    }
}

/// The lane cannot go on with its batch.
pub(crate) enum Halt {
    Outage(String),
    Unreachable(String),
    Fenced,
}

impl Lane {
    /// What becomes of an event whose handler failed.
    pub(crate) async fn decide(&self, queued: &Queued, error: HandlerError, took: Duration) -> Result<Verdict, Halt> {
        match error {
            HandlerError::Snooze(wait) => {
                self.postpone(queued, (Waits::Snooze, wait), "snoozed").await?;
                self.progress.count(Outcome::Snoozed);
                Ok(Verdict::Later(wait))
            }
            HandlerError::Reject { reason } => self.give_up(queued, &postgres::clip(&reason), true).await,
            HandlerError::Retry { after, .. } | HandlerError::Unavailable { after, .. } => {
                let text = describe(&error);
                let attempt = queued.failures.load(Ordering::Relaxed) + 1;
                if attempt >= self.subscriber.settings.max_attempts {
                    return self.give_up(queued, &text, true).await;
                }
                let wait = after.unwrap_or_else(|| self.subscriber.settings.backoff.after(attempt));
                let attempts = self.count_failure(queued, &text, wait).await?;
                self.keep_failure(queued, attempts, &text, wait).await;
                tracing::warn!(
                    subscriber = self.subscriber.name,
                    event_id = %queued.event.id,
                    event_type = queued.event.event_type,
                    attempt = attempts,
                    delivery_count = queued.deliveries.max(1),
                    latency_ms = took.as_millis(),
                    retry_in = ?wait,
                    error = cut(&text, LOGGED),
                    "event failed"
                );
                Ok(Verdict::Failed(wait))
            }
        }
    }

    async fn count_failure(&self, queued: &Queued, error: &str, wait: Duration) -> Result<u32, Halt> {
        let (id, wait) = (queued.event.id.as_uuid(), wait.min(MAX_WAIT));
        let counted = self.connections.run(async |connection| {
            attempt::count_failure(connection, &self.tenure, &self.subscriber.name, id, error, wait).await
        });
        let attempts = self.own(counted).await.map_err(Halt::Outage)?;
        fault::point("worker-failure-counted");
        self.progress.count(Outcome::Retry);
        attempts.map(|attempts| attempts.unsigned_abs()).ok_or(Halt::Fenced)
    }

    /// Writes down how long the event waits without an attempt.
    pub(crate) async fn postpone(
        &self,
        queued: &Queued,
        (waits, wait): (Waits, Duration),
        why: &str,
    ) -> Result<(), Halt> {
        let (id, wait) = (queued.event.id.as_uuid(), (waits, wait.min(MAX_WAIT)));
        let written = self.connections.run(async |connection| {
            attempt::postpone(connection, &self.tenure, &self.subscriber.name, id, wait, why).await
        });
        if self.own(written).await.map_err(Halt::Outage)? { Ok(()) } else { Err(Halt::Fenced) }
    }

    /// Keeps the error of an attempt for who asks. It is counted already, and goes on when this does not succeed.
    async fn keep_failure(&self, queued: &Queued, attempts: u32, error: &str, wait: Duration) {
        let (name, id, attempts) = (&self.subscriber.name, queued.event.id.as_uuid(), attempts.cast_signed());
        let kept = self
            .connections
            .run(async |connection| failure::write(connection, name, id, attempts, error, wait.min(MAX_WAIT)).await);
        if let Err(error) = self.own(kept).await {
            tracing::debug!(subscriber = name, event_id = %queued.event.id, error, "a failed attempt's error is not kept");
        }
    }

    pub(crate) async fn give_up(&self, queued: &Queued, reason: &str, attempted: bool) -> Result<Verdict, Halt> {
        let letter = NewDeadLetter {
            subscriber: &self.subscriber.name,
            stream: &queued.stream,
            stream_seq: queued.stream_seq,
            event: &queued.event,
            reason,
            attempted,
        };
        let written =
            self.connections.run(async |connection| dead_letter::insert(connection, &self.tenure, &letter).await);
        if !self.own(written).await.map_err(Halt::Outage)? {
            return Err(Halt::Fenced);
        }
        fault::point("worker-given-up");
        self.progress.count(Outcome::Dead);
        tracing::error!(
            subscriber = self.subscriber.name,
            event_id = %queued.event.id,
            event_type = queued.event.event_type,
            attempt = queued.failures.load(Ordering::Relaxed) + u32::from(attempted),
            delivery_count = queued.deliveries.max(1),
            error = cut(reason, LOGGED),
            "event became a dead letter"
        );
        Ok(Verdict::Dead(reason.to_string()))
    }
}
