//! What a requester does: ask, look, ask anew, cancel.

use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::job::{self, ChildJob, Job, NewJob, ParticipantStatus};
use aftercommit_outbox::{RawEvent, publish, publish_raw};
use chrono::Utc;
use serde::Serialize;
use serde_json::json;
use sqlx::PgTransaction;
use uuid::Uuid;

use super::error::{JobError, JobErrorKind};
use super::kind::{Kind, Requested, key};

/// The longest name of a participant, in bytes.
const MAX_NAME: usize = 100;

/// A job's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct JobId(pub Uuid);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A job that is to be asked for.
#[derive(Debug, Clone)]
pub struct JobRequest<R> {
    /// What makes a request the same: asked again with this key, it is the job that is there.
    pub key: String,
    /// What participants need to know.
    pub request: R,
    /// Who asks, for the record.
    pub requested_by: String,
    /// Who must answer. Each has a name of its own.
    pub participants: Participants,
    /// After this time it is overdue. None: never.
    pub due_after: Option<Duration>,
    /// Participants begin after this time, so that it can be cancelled until then. None: at once.
    pub begin_after: Option<Duration>,
    /// A job that runs and ends only when this one has ended. None: it stands for itself.
    pub parent: Option<JobId>,
}

/// Who must answer a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Participants {
    /// These, each with a name of its own.
    Named(Vec<String>),
    /// All that are [registered](Jobs::register) for the kind; who registers while the job runs and somebody has not answered yet is
    /// asked by [`Overdue`](super::Overdue).
    Registered,
}

impl<N: Into<String>> FromIterator<N> for Participants {
    fn from_iter<I: IntoIterator<Item = N>>(names: I) -> Self {
        Self::Named(names.into_iter().map(Into::into).collect())
    }
}

impl<N: Into<String>> From<Vec<N>> for Participants {
    fn from(names: Vec<N>) -> Self {
        names.into_iter().collect()
    }
}

impl<N: Into<String>, const C: usize> From<[N; C]> for Participants {
    fn from(names: [N; C]) -> Self {
        names.into_iter().collect()
    }
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The job.
    pub job: JobId,
    /// False when the same request was there: nothing was written and nobody is asked.
    pub new: bool,
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobStatus {
    /// The job.
    #[serde(flatten)]
    pub job: Job,
    /// Participants that have done it, of how many, such as `11/12`.
    #[serde(rename = "services_completed")]
    pub completed: String,
    /// How many have failed.
    #[serde(rename = "services_failed")]
    pub failed: u64,
    /// What all that have answered did together.
    #[serde(rename = "total_items")]
    pub total: u64,
    /// Each participant.
    pub participants: Vec<ParticipantStatus>,
    /// The jobs that belong to it: it ends when they have ended.
    pub children: Vec<ChildJob>,
}

impl JobStatus {
    /// Of a job, its participants and the jobs that belong to it.
    pub fn of(job: Job, participants: Vec<ParticipantStatus>, children: Vec<ChildJob>) -> Self {
        let count = |status| participants.iter().filter(|participant| participant.status == status).count();
        let completed = format!("{}/{}", count("done"), participants.len());
        let total = participants.iter().flat_map(|participant| participant.counts.values()).sum();
        Self { completed, failed: count("failed") as u64, total, job, participants, children }
    }
}

/// The jobs of a kind, in the requester's database.
#[derive(Debug)]
pub struct Jobs<K>(PhantomData<K>);

impl<K: Kind> Jobs<K> {
    /// Writes the job, a row for each participant, and the event that asks them, in the caller's transaction. The same key again is the
    /// job that is there; then nothing is written.
    ///
    /// # Errors
    /// [`Request`](JobErrorKind::Request) when the request cannot be, [`Event`](JobErrorKind::Event) when it cannot be published.
    pub async fn request(tx: &mut PgTransaction<'_>, request: JobRequest<K::Request>) -> Result<Asked, JobError> {
        check(&request.key)?;
        let (participants, joinable) = match request.participants {
            Participants::Named(names) => (names, false),
            Participants::Registered => (job::registered(tx, K::NAME).await?, true),
        };
        check_names(&participants)?;
        if let Some(parent) = request.parent {
            // Locked, so that it does not end meanwhile.
            let found = job::lock(tx, parent.0).await?;
            let found =
                found.ok_or_else(|| JobError::new(JobErrorKind::Unknown, format!("there is no job {parent}")))?;
            if found.status != "running" {
                let problem = format!("nothing was asked: job {parent}, to which it would belong, is {}", found.status);
                return Err(JobError::new(JobErrorKind::State, problem));
            }
        }
        let body = serde_json::to_value(&request.request)
            .map_err(|error| JobError::new(JobErrorKind::Request, format!("the request is no JSON: {error}")))?;
        let new = NewJob {
            id: Uuid::now_v7(),
            kind: K::name_of(&request.request),
            request_key: &request.key,
            request: &body,
            requested_by: &request.requested_by,
            due_seconds: request.due_after.map(|due| due.as_secs_f64()),
            begin_at: request.begin_after.map(|wait| Utc::now() + wait),
            types: (K::REQUESTED, K::ENDED),
            parent: request.parent.map(|parent| parent.0),
            joinable,
            participants: &participants,
        };
        let begin_at = new.begin_at;
        let (id, new) = job::request(tx, &new).await?;
        if new {
            if K::is_audited(&request.request) {
                let detail = json!({
                    "job": id, "kind": K::name_of(&request.request), "request": body, "participants": participants,
                    "parent": request.parent,
                });
                let who = &request.requested_by;
                let entry = Entry { who, action: "job request", subscriber: None, event_id: None, detail };
                audit::write_in(tx, &entry).await?;
            }
            let event = Requested::<K> {
                job: id,
                participants: participants.into_iter().map(|name| (name, 1)).collect(),
                cancel: false,
                not_before: begin_at,
                request: request.request,
                kind: PhantomData,
            };
            publish(tx, &event).await.map_err(JobError::event)?;
        }
        Ok(Asked { job: JobId(id), new })
    }

    /// Registers a participant for [`Participants::Registered`]. False when it was registered.
    ///
    /// # Errors
    /// [`Request`](JobErrorKind::Request) when it cannot be the name of a participant.
    pub async fn register(tx: &mut PgTransaction<'_>, name: &str) -> Result<bool, JobError> {
        check_names(&[name.into()])?;
        Ok(job::register(tx, K::NAME, name).await?)
    }

    /// Removes a participant from the register. False when it was not there. Jobs that run still wait for it.
    ///
    /// # Errors
    /// When the database cannot be asked.
    pub async fn unregister(tx: &mut PgTransaction<'_>, name: &str) -> Result<bool, JobError> {
        Ok(job::unregister(tx, K::NAME, name).await?)
    }

    /// Who is registered, by name.
    ///
    /// # Errors
    /// When the database cannot be asked.
    pub async fn registered(tx: &mut PgTransaction<'_>) -> Result<Vec<String>, JobError> {
        Ok(job::registered(tx, K::NAME).await?)
    }

    /// Adds a participant to a job that runs, and asks it. False when it takes part already.
    ///
    /// # Errors
    /// [`Unknown`](JobErrorKind::Unknown) when there is no such job, [`State`](JobErrorKind::State) when all have answered,
    /// [`Request`](JobErrorKind::Request) when it cannot be the name of a participant.
    pub async fn join(tx: &mut PgTransaction<'_>, job: JobId, name: &str) -> Result<bool, JobError> {
        check_names(&[name.into()])?;
        let found = locked::<K>(tx, job).await?;
        if !job::participants(tx, job.0).await?.iter().any(|participant| participant.status == "asked") {
            let problem = format!("nothing was done: all participants of job {job} have answered");
            return Err(JobError::new(JobErrorKind::State, problem));
        }
        let joined = job::join(tx, job.0, Some(name)).await?;
        let new = !joined.is_empty();
        if new {
            ask(tx, found, joined, false).await?;
        }
        Ok(new)
    }

    /// How a job stands.
    ///
    /// # Errors
    /// [`Unknown`](JobErrorKind::Unknown) when it is not there.
    pub async fn status(tx: &mut PgTransaction<'_>, job: JobId) -> Result<JobStatus, JobError> {
        let found = locked::<K>(tx, job).await?;
        Ok(JobStatus::of(found, job::participants(tx, job.0).await?, job::children(tx, job.0).await?))
    }

    /// Asks participants anew that have failed: one, or all of them. Returns who is asked. What a participant did before it failed
    /// stays done and counted.
    ///
    /// # Errors
    /// [`Unknown`](JobErrorKind::Unknown) when there is no such job, [`State`](JobErrorKind::State) when nobody has failed.
    pub async fn retry(
        tx: &mut PgTransaction<'_>,
        job: JobId,
        participant: Option<&str>,
    ) -> Result<Vec<String>, JobError> {
        let found = locked::<K>(tx, job).await?;
        retry(tx, found, participant).await
    }

    /// Asks all that have not begun not to begin. Whoever has begun goes on: what is done cannot be undone. Returns who is asked.
    ///
    /// # Errors
    /// [`Unknown`](JobErrorKind::Unknown) when there is no such job, [`State`](JobErrorKind::State) when it has ended.
    pub async fn cancel(tx: &mut PgTransaction<'_>, job: JobId) -> Result<Vec<String>, JobError> {
        let found = locked::<K>(tx, job).await?;
        cancel(tx, found).await
    }
}

/// See [`Jobs::retry`].
pub(super) async fn retry(
    tx: &mut PgTransaction<'_>,
    job: Job,
    participant: Option<&str>,
) -> Result<Vec<String>, JobError> {
    let asked = job::ask_again(tx, job.id, participant).await?;
    if asked.is_empty() {
        let id = job.id;
        return Err(JobError::new(
            JobErrorKind::State,
            match participant {
                Some(name) => format!("nothing was done: {name} has not failed in job {id}"),
                None => format!("nothing was done: no participant of job {id} has failed"),
            },
        ));
    }
    ask(tx, job, asked, false).await
}

/// See [`Jobs::cancel`].
pub(super) async fn cancel(tx: &mut PgTransaction<'_>, job: Job) -> Result<Vec<String>, JobError> {
    if job.status != "running" {
        let problem = format!("nothing was done: job {} has ended, it is {}", job.id, job.status);
        return Err(JobError::new(JobErrorKind::State, problem));
    }
    let participants = job::participants(tx, job.id).await?;
    let asked = participants.into_iter().filter(|participant| participant.status == "asked");
    let asked: Vec<_> = asked.map(|participant| (participant.participant, participant.round)).collect();
    if asked.is_empty() {
        let id = job.id;
        let problem = format!(
            "nothing was done: all participants of job {id} have answered, it waits for jobs that belong to it"
        );
        return Err(JobError::new(JobErrorKind::State, problem));
    }
    ask(tx, job, asked, true).await
}

/// The job of this kind, locked.
pub(super) async fn locked<K: Kind>(tx: &mut PgTransaction<'_>, id: JobId) -> Result<Job, JobError> {
    let found = job::lock(tx, id.0).await?.filter(|job| job.requested_type == K::REQUESTED);
    found.ok_or_else(|| JobError::new(JobErrorKind::Unknown, format!("there is no job {id} of the kind {}", K::NAME)))
}

/// Publishes what asks these participants, as [`Requested`] is as JSON: the row has all of it, so the kind's type is not needed.
pub(super) async fn ask(
    tx: &mut PgTransaction<'_>,
    job: Job,
    asked: Vec<(String, i32)>,
    cancel: bool,
) -> Result<Vec<String>, JobError> {
    // Whoever is asked once more, or joins, still waits.
    let not_before = job.begin_at.filter(|_| !cancel);
    let body = json!({
        "job": job.id, "participants": asked, "cancel": cancel, "not_before": not_before, "request": job.request,
    });
    let event = RawEvent::json(job.requested_type, &body).map_err(JobError::event)?;
    publish_raw(tx, event.key(key(job.id, cancel))).await.map_err(JobError::event)?;
    Ok(asked.into_iter().map(|(name, _)| name).collect())
}

fn refuse(problem: impl Into<String>) -> Result<(), JobError> {
    Err(JobError::new(JobErrorKind::Request, problem))
}

fn check(key: &str) -> Result<(), JobError> {
    if key.is_empty() || key.len() > 500 {
        return refuse("the key of a request must have 1 to 500 bytes");
    }
    Ok(())
}

fn check_names(participants: &[String]) -> Result<(), JobError> {
    if participants.is_empty() {
        return refuse("a job needs at least one participant, named or registered");
    }
    let mut names = BTreeSet::new();
    for name in participants {
        if name.is_empty() || name.len() > MAX_NAME {
            return refuse(format!("a participant's name must have 1 to {MAX_NAME} bytes"));
        }
        if !names.insert(name) {
            return refuse(format!("the participant {name:?} is named twice"));
        }
    }
    Ok(())
}
