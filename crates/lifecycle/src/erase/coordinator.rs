//! Who writes answers down, asks everybody to look once more, and tells what came of it.

use std::collections::BTreeMap;
use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres::job::{Counts, Job};
use aftercommit_outbox::event::Event;
use aftercommit_outbox::publish;
use aftercommit_worker::{Delivery, Handler, HandlerError};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;
use uuid::Uuid;

use super::{Act, Erasure, Outcome, Subject, Task};
use crate::fanout::coordinator::write_down;
use crate::fanout::{JobId, JobRequest, JobStatus, Jobs, end};

/// How long after the last answer everybody looks once more.
const VERIFY_AFTER: Duration = Duration::from_secs(60);

/// The requester's subscriber: `Subscriber::new("erasures").on::<erase::Outcome>(erase::Coordinator::new())`.
///
/// When all participants of an erasure have answered that it is done, it asks them to verify: that is a job that belongs to the
/// erasure, which ends when it has ended. Its end is told by [`Verified`].
#[derive(Debug)]
pub struct Coordinator {
    verify_after: Option<Duration>,
}

impl Default for Coordinator {
    fn default() -> Self {
        Self { verify_after: Some(VERIFY_AFTER) }
    }
}

impl Coordinator {
    /// It verifies a minute after the last answer.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long after the last answer everybody looks once more: longer than transactions of the services that still wrote rows of the
    /// subject. Defaults to 60 seconds.
    #[must_use]
    pub fn verify_after(self, wait: Duration) -> Self {
        Self { verify_after: Some(wait) }
    }

    /// Believes the answers: an erasure ends with the last one. Defaults to verifying.
    #[must_use]
    pub fn without_verification(self) -> Self {
        Self { verify_after: None }
    }
}

/// The event that tells the end of a verification: once, and once more when participants that had failed were asked anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// The erasure.
    pub job: Uuid,
    /// The job that verified it.
    pub verification: Uuid,
    /// Whose data.
    pub subject: Subject,
    /// `verified` when nothing is left, else `verification_failed`.
    pub status: String,
    /// Rows that came late and were swept: by service, and there by table.
    pub late: BTreeMap<String, Counts>,
    /// Who has not verified it.
    pub left: Vec<Left>,
}

/// A service that has not verified an erasure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The service.
    pub participant: String,
    /// What is left there, with its table, or why that is not known.
    pub reason: String,
}

impl Event for Verified {
    const TYPE: &'static str = "erasure.verified";

    fn key(&self) -> Option<String> {
        Some(self.job.to_string())
    }
}

impl Verified {
    /// What a verification that has ended says; none of any other job.
    pub(super) fn of(status: &JobStatus) -> Option<Self> {
        let task: Task = serde_json::from_value(status.job.request.clone()).ok()?;
        if task.act != Act::Verify {
            return None;
        }
        let mut verified = Self {
            job: status.job.parent?,
            verification: status.job.id,
            subject: task.subject,
            status: word(&status.job.status).into(),
            late: BTreeMap::new(),
            left: Vec::new(),
        };
        for one in &status.participants {
            let late: Counts =
                one.counts.iter().filter(|(_, count)| **count > 0).map(|(t, n)| (t.clone(), *n)).collect();
            if !late.is_empty() {
                verified.late.insert(one.participant.clone(), late);
            }
            if one.status != "done" {
                let reason = one.error.clone().unwrap_or_else(|| format!("it is {}", one.status));
                verified.left.push(Left { participant: one.participant.clone(), reason });
            }
        }
        Some(verified)
    }
}

/// How a verification stands, by the status of its job.
pub(super) fn word(status: &str) -> &'static str {
    match status {
        "running" => "verifying",
        "completed" => "verified",
        _ => "verification_failed",
    }
}

impl Handler<Outcome> for Coordinator {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Outcome>) -> Result<(), HandlerError> {
        let Some((job, all)) = write_down::<Erasure>(tx, &delivery.event).await? else { return Ok(()) };
        let done = job.status == "running" && all.iter().all(|participant| participant.status == "done");
        if let Some(wait) = self.verify_after.filter(|_| done) {
            let names = all.into_iter().map(|participant| participant.participant);
            verify(tx, &job, names.collect(), wait).await?;
        }
        for ended in end::settle(tx, job).await? {
            if let Some(verified) = Verified::of(&ended) {
                let (job, status) = (verified.job, &verified.status);
                if verified.left.is_empty() {
                    tracing::info!(%job, subject = %verified.subject, "the erasure is verified");
                } else {
                    let services: Vec<&str> = verified.left.iter().map(|left| left.participant.as_str()).collect();
                    tracing::error!(%job, status, services = services.join(", "), "an erasure is not verified");
                }
                publish(tx, &verified).await?;
            }
        }
        fault::point("erasure-counted");
        Ok(())
    }
}

/// Asks for the verification of an erasure, in the transaction that writes its last answer down.
async fn verify(
    tx: &mut PgTransaction<'_>,
    job: &Job,
    participants: Vec<String>,
    wait: Duration,
) -> Result<(), HandlerError> {
    let task: Task = serde_json::from_value(job.request.clone())?;
    if task.act != Act::Erase {
        return Ok(());
    }
    let request = JobRequest {
        key: job.id.to_string(),
        request: Task { act: Act::Verify, ..task },
        requested_by: job.requested_by.clone(),
        participants: participants.into(),
        due_after: None,
        begin_after: Some(wait),
        parent: Some(JobId(job.id)),
    };
    Jobs::<Erasure>::request(tx, request).await?;
    Ok(())
}
