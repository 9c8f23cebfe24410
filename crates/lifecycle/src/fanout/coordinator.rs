//! Who writes answers down and tells the end.

use std::marker::PhantomData;

use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::job::{self, Answer, Job, ParticipantStatus};
use aftercommit_worker::{Delivery, Handler, HandlerError};
use serde_json::json;
use sqlx::PgTransaction;

use super::end;
use super::kind::{Kind, Outcome};

/// The requester's subscriber: `Subscriber::new("tenant-deletions").on::<Outcome<TenantDeletion>>(Coordinator::new())`.
///
/// Answers that come twice, late, or of somebody who was not asked change nothing. The event [`Ended`](super::Ended) goes in the
/// transaction that wrote the last answer down.
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

impl<K: Kind> Handler<Outcome<K>> for Coordinator<K> {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Outcome<K>>) -> Result<(), HandlerError> {
        if let Some((job, _)) = write_down::<K>(tx, &delivery.event).await? {
            end::settle(tx, job).await?;
        }
        Ok(())
    }
}

/// Writes an answer down. Returns its job, locked, with all participants; none when the answer changes nothing.
pub(crate) async fn write_down<K: Kind>(
    tx: &mut PgTransaction<'_>,
    outcome: &Outcome<K>,
) -> Result<Option<(Job, Vec<ParticipantStatus>)>, HandlerError> {
    // One answer after the other: of two that are last at the same time neither would see the other.
    let Some(found) = job::lock(tx, outcome.job).await?.filter(|job| job.requested_type == K::REQUESTED) else {
        tracing::warn!(job = %outcome.job, participant = outcome.participant, "an answer to a job that is not here");
        return Ok(None);
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
        notes: &outcome.notes,
        error: outcome.error.as_deref(),
    };
    if !job::answer(tx, &answer).await? {
        return Ok(None);
    }
    let audited =
        serde_json::from_value::<K::Request>(found.request.clone()).is_ok_and(|request| K::is_audited(&request));
    if audited {
        let detail = json!({
            "job": found.id, "kind": found.kind, "request": found.request, "participant": outcome.participant,
            "round": outcome.round, "status": outcome.status, "counts": outcome.counts, "error": outcome.error,
        });
        let entry = Entry { who: &found.requested_by, action: "job answer", subscriber: None, event_id: None, detail };
        audit::write_in(tx, &entry).await?;
    }
    let all = job::participants(tx, outcome.job).await?;
    Ok(Some((found, all)))
}
