//! Who writes answers down and tells the end.

use std::marker::PhantomData;

use aftercommit_core::postgres::job::{self, Answer, Counts};
use aftercommit_outbox::publish;
use aftercommit_worker::{Delivery, Handler, HandlerError};
use sqlx::PgTransaction;

use super::kind::{Ended, Kind, Outcome};
use super::request::JobStatus;

/// The requester's subscriber: `Subscriber::new("tenant-deletions").on::<Outcome<TenantDeletion>>(Coordinator::new())`.
///
/// Answers that come twice, late, or of somebody who was not asked change nothing. The event [`Ended`] goes in the transaction that
/// wrote the last answer down.
#[derive(Debug)]
pub struct Coordinator<K>(PhantomData<fn() -> K>);

impl<K> Coordinator<K> {
    /// For the jobs of a kind.
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

impl<K> Default for Coordinator<K> {
    fn default() -> Self {
        Self::new()
    }
}

/// What a job is when nobody is asked any more.
fn status(done: usize, failed: usize, cancelled: usize) -> &'static str {
    match (done, failed, cancelled) {
        (_, 0, 0) => "completed",
        (0, 0, _) => "cancelled",
        (0, _, _) => "failed",
        _ => "partial",
    }
}

impl<K: Kind> Handler<Outcome<K>> for Coordinator<K> {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Outcome<K>>) -> Result<(), HandlerError> {
        let outcome = &delivery.event;
        // One answer after the other: of two that are last at the same time neither would see the other.
        let Some(found) = job::lock(tx, outcome.job).await?.filter(|job| job.kind == K::NAME) else {
            tracing::warn!(job = %outcome.job, participant = outcome.participant, "an answer to a job that is not here");
            return Ok(());
        };
        let answer = Answer {
            job: outcome.job,
            participant: &outcome.participant,
            round: outcome.round,
            status: &outcome.status,
            started_at: outcome.started_at,
            ended_at: outcome.ended_at,
            attempts: outcome.attempts,
            counts: &outcome.counts,
            error: outcome.error.as_deref(),
        };
        if !job::answer(tx, &answer).await? {
            return Ok(());
        }
        let all = job::participants(tx, outcome.job).await?;
        let count = |status| all.iter().filter(|participant| participant.status == status).count();
        if count("asked") > 0 {
            return Ok(());
        }
        let status = status(count("done"), count("failed"), count("cancelled"));
        job::end(tx, outcome.job, status).await?;
        let failed = all.iter().filter(|participant| participant.status == "failed");
        let mut counts = Counts::new();
        all.iter().for_each(|participant| job::add(&mut counts, &participant.counts));
        let ended = Ended::<K> {
            job: outcome.job,
            status: status.into(),
            completed: (count("done") as u64, all.len() as u64),
            failed: failed.map(|participant| participant.participant.clone()).collect(),
            counts,
            kind: PhantomData,
        };
        publish(tx, &ended).await?;
        let completed = JobStatus::of(found, all).completed;
        tracing::info!(job = %outcome.job, kind = K::NAME, status, completed, "the job has ended");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_what_its_participants_are() {
        for (counts, expected) in [
            ((3, 0, 0), "completed"),
            ((0, 0, 3), "cancelled"),
            ((0, 3, 0), "failed"),
            ((0, 1, 2), "failed"),
            ((1, 2, 0), "partial"),
            ((1, 0, 2), "partial"),
            ((1, 1, 1), "partial"),
        ] {
            assert_eq!(status(counts.0, counts.1, counts.2), expected, "{counts:?}");
        }
    }
}
