//! When a job ends, and with it the one that waits for it.

use aftercommit_core::postgres::job::{self, ChildJob, Counts, Job, ParticipantStatus};
use aftercommit_outbox::{RawEvent, publish_raw};
use serde_json::json;
use sqlx::PgTransaction;

use super::error::JobError;
use super::request::JobStatus;

/// Ends a job, which is locked, when nobody is asked any more and no job that belongs to it runs; then the one that it belongs to.
/// Returns those that ended.
pub(crate) async fn settle(tx: &mut PgTransaction<'_>, job: Job) -> Result<Vec<JobStatus>, JobError> {
    let (mut next, mut ended) = (Some(job), Vec::new());
    while let Some(mut job) = next.take() {
        let all = job::participants(tx, job.id).await?;
        let children = job::children(tx, job.id).await?;
        let Some(status) = status(&all, &children).filter(|_| job.status == "running") else { break };
        job::end(tx, job.id, status).await?;
        job.status = status.into();
        tell(tx, &job, &all).await?;
        // From the child to what it belongs to, never the other way round: so nobody waits in a circle.
        next = match job.parent {
            Some(parent) => job::lock(tx, parent).await?,
            None => None,
        };
        let status = JobStatus::of(job, all, children);
        let (job, completed) = (&status.job, &status.completed);
        tracing::info!(job = %job.id, kind = job.kind, status = job.status, completed, "the job has ended");
        ended.push(status);
    }
    Ok(ended)
}

/// Publishes [`Ended`](super::Ended), as it is as JSON: the row has all of it, so the kind's type is not needed.
async fn tell(tx: &mut PgTransaction<'_>, job: &Job, all: &[ParticipantStatus]) -> Result<(), JobError> {
    let names = |status| all.iter().filter(move |one| one.status == status).map(|one| one.participant.as_str());
    let failed: Vec<&str> = names("failed").collect();
    let mut counts = Counts::new();
    all.iter().for_each(|participant| job::add(&mut counts, &participant.counts));
    let body = json!({
        "job": job.id, "status": job.status, "completed": (names("done").count(), all.len()), "failed": failed, "counts": counts,
    });
    let event = RawEvent::json(&job.ended_type, &body).map_err(JobError::event)?;
    publish_raw(tx, event.key(job.id.to_string())).await.map_err(JobError::event)?;
    Ok(())
}

/// What a job is by its participants and the jobs that belong to it, each of which counts as one more. None while one of them runs.
fn status(all: &[ParticipantStatus], children: &[ChildJob]) -> Option<&'static str> {
    let own = all.iter().map(|participant| participant.status.as_str());
    let below = children.iter().map(|child| child.status.as_str());
    let (mut done, mut failed, mut cancelled) = (0, 0, 0);
    for status in own.chain(below) {
        match status {
            "asked" | "running" => return None,
            "done" | "completed" => done += 1,
            "cancelled" => cancelled += 1,
            // A part of it is done.
            "partial" => (done, failed) = (done + 1, failed + 1),
            _ => failed += 1,
        }
    }
    Some(match (done, failed, cancelled) {
        (_, 0, 0) => "completed",
        (0, 0, _) => "cancelled",
        (0, _, _) => "failed",
        _ => "partial",
    })
}

#[cfg(test)]
mod tests {
    use chrono::Utc;
    use uuid::Uuid;

    use super::*;

    fn participant(status: &str) -> ParticipantStatus {
        ParticipantStatus {
            participant: "a".into(),
            round: 1,
            status: status.into(),
            asked_at: Utc::now(),
            started_at: None,
            ended_at: None,
            attempts: None,
            duration_seconds: None,
            counts: Counts::new(),
            notes: Vec::new(),
            error: None,
        }
    }

    fn child(status: &str) -> ChildJob {
        ChildJob { id: Uuid::nil(), kind: "check".into(), status: status.into() }
    }

    #[test]
    fn a_job_is_what_its_participants_and_children_are() {
        for (own, below, expected) in [
            (vec!["done", "done"], vec![], Some("completed")),
            (vec!["cancelled"], vec![], Some("cancelled")),
            (vec!["failed"], vec![], Some("failed")),
            (vec!["failed", "cancelled"], vec![], Some("failed")),
            (vec!["done", "failed"], vec![], Some("partial")),
            (vec!["done", "cancelled"], vec![], Some("partial")),
            (vec!["done", "asked"], vec![], None),
            (vec!["done"], vec!["running"], None),
            (vec!["done"], vec!["completed"], Some("completed")),
            (vec!["done"], vec!["failed"], Some("partial")),
            (vec!["done"], vec!["partial"], Some("partial")),
            (vec!["done"], vec!["cancelled"], Some("partial")),
            (vec!["failed"], vec!["failed"], Some("failed")),
        ] {
            let all: Vec<_> = own.iter().copied().map(participant).collect();
            let children: Vec<_> = below.iter().copied().map(child).collect();
            assert_eq!(status(&all, &children), expected, "{own:?} {below:?}");
        }
    }
}
