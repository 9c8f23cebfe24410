//! What a lane reports of events, and what becomes of one whose handler failed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::fault;
use crate::postgres::dead_letter::{self, DeadLetter};
use crate::postgres::{self, inbox};

use super::handler::HandlerError;
use super::lane::Lane;
use super::load::Queued;
use super::pace::Ran;
use super::progress::Outcome;
use super::scheduler::Place;
use super::trouble::describe;

/// What became of an event.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// Handled, now or before.
    Done,
    /// Given up.
    Dead(String),
    /// It failed: not before this time has passed.
    Failed(Duration),
    /// It asked for it: not before this time has passed.
    Later(Duration),
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
pub(super) enum Wait {
    /// As for servers of our own: soon, and again and again.
    Soon,
    /// As the subscriber's backoff says.
    Backoff,
    Exactly(Duration),
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct Report {
    pub(super) verdicts: Vec<(Place, Verdict)>,
    /// The subscriber's database, or where it sends all of its events, is away, for this reason.
    pub(super) outage: Option<String>,
    /// Another instance has taken over.
    pub(super) fenced: bool,
    /// What the last transaction took that no outage prevented.
    pub(super) ran: Option<Ran>,
}

/// The lane cannot go on with its batch.
pub(super) enum Halt {
    Outage(String),
    Unreachable(String),
    Fenced,
}

impl Lane {
    /// What becomes of an event whose handler failed.
    pub(super) async fn decide(&self, queued: &Queued, error: HandlerError, took: Duration) -> Result<Verdict, Halt> {
        match error {
            HandlerError::Snooze(wait) => {
                self.progress.count(Outcome::Snoozed);
                Ok(Verdict::Later(wait))
            }
            HandlerError::Reject { reason } => self.give_up(queued, &postgres::clip(&reason), true).await,
            HandlerError::Retry { after, .. } | HandlerError::Unavailable { after, .. } => {
                let text = describe(&error);
                if queued.failures.load(Ordering::Relaxed) + 1 >= self.subscriber.settings.max_attempts {
                    return self.give_up(queued, &text, true).await;
                }
                let attempts = self.count_failure(queued, &text).await?;
                let wait = after.unwrap_or_else(|| self.subscriber.settings.backoff.after(attempts));
                tracing::warn!(
                    subscriber = self.subscriber.name,
                    event_id = %queued.event.id,
                    event_type = queued.event.event_type,
                    attempt = attempts,
                    delivery_count = queued.deliveries.max(1),
                    latency_ms = took.as_millis(),
                    retry_in = ?wait,
                    error = text,
                    "event failed"
                );
                Ok(Verdict::Failed(wait))
            }
        }
    }

    async fn count_failure(&self, queued: &Queued, error: &str) -> Result<u32, Halt> {
        let id = queued.event.id.as_uuid();
        let counted = self.connections.run(async |connection| {
            inbox::count_failure(connection, &self.tenure, &self.subscriber.name, id, error).await
        });
        let attempts = self.own(counted).await.map_err(Halt::Outage)?;
        fault::point("worker-failure-counted");
        self.progress.count(Outcome::Retry);
        attempts.map(|attempts| attempts.unsigned_abs()).ok_or(Halt::Fenced)
    }

    pub(super) async fn give_up(&self, queued: &Queued, reason: &str, attempted: bool) -> Result<Verdict, Halt> {
        let letter = DeadLetter {
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
            attempt = queued.failures.load(Ordering::Relaxed) + 1,
            delivery_count = queued.deliveries.max(1),
            error = reason,
            "event became a dead letter"
        );
        Ok(Verdict::Dead(reason.to_string()))
    }
}
