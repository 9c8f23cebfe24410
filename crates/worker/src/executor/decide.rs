//! What becomes of an event whose handler failed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres;
use aftercommit_core::postgres::attempt::{self, Waits};
use aftercommit_core::postgres::dead_letter::{self, NewDeadLetter};
use aftercommit_core::postgres::failure;
use aftercommit_core::text::cut;

use super::Executor;
use crate::handler::HandlerError;
use crate::item::Queued;
use crate::progress::EventOutcome;
use crate::subscriber::MAX_WAIT;
use crate::transaction_error::describe;
use crate::verdict::{Halt, LOGGED, Verdict};

impl Executor {
    /// What becomes of an event whose handler failed.
    pub(super) async fn decide(&self, queued: &Queued, error: HandlerError, took: Duration) -> Result<Verdict, Halt> {
        match error {
            HandlerError::Snooze(wait) => {
                self.postpone(queued, (Waits::Snooze, wait), "snoozed").await?;
                self.progress.count(EventOutcome::Snoozed);
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
        self.progress.count(EventOutcome::Retry);
        attempts.map(|attempts| attempts.unsigned_abs()).ok_or(Halt::Fenced)
    }

    /// Writes down how long the event waits without an attempt.
    pub(super) async fn postpone(
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

    /// Writes the error of an attempt for operators. The attempt is counted already, so a failure of this is no failure of
    /// the event.
    async fn keep_failure(&self, queued: &Queued, attempts: u32, error: &str, wait: Duration) {
        let (name, id, attempts) = (&self.subscriber.name, queued.event.id.as_uuid(), attempts.cast_signed());
        let kept = self
            .connections
            .run(async |connection| failure::write(connection, name, id, attempts, error, wait.min(MAX_WAIT)).await);
        if let Err(error) = self.own(kept).await {
            tracing::debug!(subscriber = name, event_id = %queued.event.id, error, "the error of a failed attempt was not written");
        }
    }

    pub(super) async fn give_up(&self, queued: &Queued, reason: &str, attempted: bool) -> Result<Verdict, Halt> {
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
        self.progress.count(EventOutcome::Dead);
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
