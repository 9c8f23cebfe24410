//! What an operator does about subjects.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::job::{self, Counts, ParticipantStatus};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, erasure};
use aftercommit_outbox::{set_pooled, set_schema};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use super::coordinator::{Left, Verified, word};
use super::{Act, Asked, Erasure, Request, Subject, Task};
use crate::fanout::{JobId, JobStatus, Kind};

const APPLICATION: &str = "aftercommit";
/// How often is looked whether a job has ended.
const LOOK: Duration = Duration::from_millis(500);

/// How an erasure, or a preview of one, stands. As JSON it is what `aftercommit erase status --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ErasureStatus {
    /// The job.
    pub job: JobId,
    /// Whose data.
    pub subject: Subject,
    /// What is asked.
    pub act: Act,
    /// `running`, `completed`, `partial`, `failed` or `cancelled`.
    pub status: String,
    /// Who asked.
    pub requested_by: String,
    /// When.
    pub requested_at: DateTime<Utc>,
    /// When it is overdue; none when nobody said.
    pub due_at: Option<DateTime<Utc>>,
    /// When it ended; none while it runs.
    pub ended_at: Option<DateTime<Utc>>,
    /// Services that have answered that it is done, of how many, such as `11/12`.
    pub services_completed: String,
    /// How many have failed.
    pub services_failed: u64,
    /// How many have not answered.
    pub services_silent: u64,
    /// What is deleted, as far as services have told it, with what came late; none of a preview.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_items_deleted: Option<u64>,
    /// What all services found; none of an erasure, and null while one of them has not said it.
    pub total_items_found: Option<u64>,
    /// Each service.
    pub participants: Vec<ErasureParticipant>,
    /// Whether nothing is left; none of a preview, and while it has not begun.
    pub verification: Option<Verification>,
}

/// What a service has said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ErasureParticipant {
    /// Its name.
    pub participant: String,
    /// `asked`, `done`, `failed` or `cancelled`.
    pub status: String,
    /// What it found or deleted, by table; none when that is not known.
    pub counts: Option<Counts>,
    /// Their sum; none when that is not known.
    pub total: Option<u64>,
    /// What else it says.
    pub notes: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many attempts it took.
    pub attempts: Option<i32>,
    /// How often it was asked anew after it had failed, from 1.
    pub round: i32,
    /// How long it took, in seconds.
    pub duration_seconds: Option<f64>,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
}

/// Whether nothing is left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// The job that verifies.
    pub job: JobId,
    /// `verifying`, `verified` or `verification_failed`.
    pub status: String,
    /// Rows that came late and were swept: by service, and there by table.
    pub late: BTreeMap<String, Counts>,
    /// Who has not verified it, and why; while it runs those that have not answered.
    pub left: Vec<Left>,
}

impl ErasureParticipant {
    fn of(act: Act, one: ParticipantStatus) -> Self {
        // What failed has deleted what it says; what failed to count has said nothing.
        let known = one.status == "done" || one.status == "failed" && act == Act::Erase;
        Self {
            total: known.then(|| one.counts.values().sum()),
            counts: known.then_some(one.counts),
            participant: one.participant,
            status: one.status,
            notes: one.notes,
            error: one.error,
            attempts: one.attempts,
            round: one.round,
            duration_seconds: one.duration_seconds,
            started_at: one.started_at,
            ended_at: one.ended_at,
        }
    }
}

impl ErasureStatus {
    fn of(status: JobStatus, verification: Option<JobStatus>) -> Result<Self, Error> {
        let id = status.job.id;
        let task: Task = serde_json::from_value(status.job.request.clone()).map_err(|_| {
            Error::new(ErrorKind::NotReady, format!("the job {id} is no erasure: see `aftercommit job show {id}`"))
        })?;
        let verification = verification.and_then(|status| Verification::of(&status));
        let late: u64 = verification.iter().flat_map(|found| found.late.values()).flat_map(Counts::values).sum();
        let silent = status.participants.iter().filter(|one| one.status == "asked").count();
        let participants: Vec<_> =
            status.participants.into_iter().map(|one| ErasureParticipant::of(task.act, one)).collect();
        let erases = task.act != Act::Preview;
        let found: Option<u64> = participants.iter().map(|one| one.total).sum();
        Ok(Self {
            job: JobId(id),
            subject: task.subject,
            act: task.act,
            status: status.job.status,
            requested_by: status.job.requested_by,
            requested_at: status.job.requested_at,
            due_at: status.job.due_at,
            ended_at: status.job.ended_at,
            services_completed: status.completed,
            services_failed: status.failed,
            services_silent: silent as u64,
            total_items_deleted: erases.then_some(status.total + late),
            total_items_found: found.filter(|_| !erases),
            participants,
            verification,
        })
    }

    /// Whether all of it is done: counted, or erased and verified.
    pub fn is_completed(&self) -> bool {
        self.status == "completed"
    }
}

impl Verification {
    fn of(status: &JobStatus) -> Option<Self> {
        let Verified { verification, late, left, .. } = Verified::of(status)?;
        Some(Self { job: JobId(verification), status: word(&status.job.status).into(), late, left })
    }
}

fn failed(error: sqlx::Error) -> Error {
    database_error("reading the erasure failed", error)
}

/// Asks for an erasure, see [`Request::ask`].
///
/// # Errors
/// [`ErrorKind::NotReady`] when a guard refuses, [`ErrorKind::Config`] when the request cannot be.
pub async fn ask(config: &PostgresConfig, request: Request) -> Result<Asked, Error> {
    let mut session = connect(config).await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let asked = request.ask(tx.for_others()).await?;
    tx.commit().await.map_err(failed)?;
    Ok(asked)
}

/// Asks what would be deleted, see [`Request::preview`].
///
/// # Errors
/// [`ErrorKind::Config`] when the request cannot be.
pub async fn preview(config: &PostgresConfig, request: Request) -> Result<JobId, Error> {
    let mut session = connect(config).await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let job = request.preview(tx.for_others()).await?;
    tx.commit().await.map_err(failed)?;
    Ok(job)
}

async fn connect(config: &PostgresConfig) -> Result<Session, Error> {
    set_schema(config.schema.name())
        .map_err(|error| Error::with_source(ErrorKind::Config, "the request's event cannot be written", error))?;
    if config.pooled {
        set_pooled(true);
    }
    postgres::connect(config, APPLICATION).await
}

/// The last erasure of a subject; none when nobody asked for one.
///
/// # Errors
/// When the database cannot be asked.
pub async fn last(config: &PostgresConfig, subject: &Subject) -> Result<Option<JobId>, Error> {
    let mut session = connect(config).await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let known = erasure::last(tx.for_others(), Erasure::NAME, &json!(subject)).await.map_err(failed)?;
    Ok(known.map(|known| JobId(known.id)))
}

/// How an erasure stands, or a preview.
///
/// # Errors
/// [`ErrorKind::NotReady`] when there is no such job, or it is no erasure.
pub async fn status(config: &PostgresConfig, id: JobId) -> Result<ErasureStatus, Error> {
    let mut session = postgres::connect(config, APPLICATION).await?;
    read(&mut session, id).await
}

async fn read(session: &mut Session, id: JobId) -> Result<ErasureStatus, Error> {
    let found = job::show(session, id.0).await.map_err(failed)?;
    let (found, participants, children) =
        found.ok_or_else(|| Error::new(ErrorKind::NotReady, format!("there is no job {id}")))?;
    let mut verification = None;
    for child in &children {
        if child.kind == "erasure.verification"
            && let Some((found, participants, children)) = job::show(session, child.id).await.map_err(failed)?
        {
            verification = Some(JobStatus::of(found, participants, children));
        }
    }
    ErasureStatus::of(JobStatus::of(found, participants, children), verification)
}

/// Waits until a job has ended, or until the time is up, and says how it stands then.
///
/// # Errors
/// As [`status`].
pub async fn wait(config: &PostgresConfig, id: JobId, limit: Duration) -> Result<ErasureStatus, Error> {
    let began = Instant::now();
    loop {
        let status = status(config, id).await?;
        if status.status != "running" || began.elapsed() >= limit {
            return Ok(status);
        }
        tokio::time::sleep(LOOK.min(limit.saturating_sub(began.elapsed()))).await;
    }
}
