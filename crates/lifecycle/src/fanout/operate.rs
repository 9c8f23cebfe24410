//! What an operator does with jobs, without the Rust types of their kinds.

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::job::{self, Job, WantedJobs};
use aftercommit_core::postgres::{self, database_error};
use aftercommit_outbox::{set_pooled, set_schema};
use serde_json::json;
use uuid::Uuid;

use super::error::{JobError, JobErrorKind};
use super::request::{self, JobId, JobStatus};

const APPLICATION: &str = "aftercommit";

/// The last `limit` of the wanted jobs, the newest first.
///
/// # Errors
/// When the database cannot be asked.
pub async fn list(config: &PostgresConfig, wanted: WantedJobs<'_>, limit: i64) -> Result<Vec<Job>, Error> {
    let mut session = postgres::connect(config, APPLICATION).await?;
    let jobs = job::list(&mut session, wanted, limit).await;
    jobs.map_err(|error| database_error("reading the jobs failed", error))
}

/// How a job stands.
///
/// # Errors
/// [`ErrorKind::NotReady`] when there is no such job.
pub async fn show(config: &PostgresConfig, id: JobId) -> Result<JobStatus, Error> {
    let mut session = postgres::connect(config, APPLICATION).await?;
    let found = job::show(&mut session, id.0).await.map_err(|error| database_error("reading the job failed", error))?;
    let (found, participants, children) = found.ok_or_else(|| unknown(id))?;
    Ok(JobStatus::of(found, participants, children))
}

/// Asks participants anew that have failed: one, or all of them. Returns who is asked.
///
/// # Errors
/// [`ErrorKind::NotReady`] when there is no such job, or nobody has failed.
pub async fn retry(
    config: &PostgresConfig,
    who: &str,
    id: JobId,
    participant: Option<&str>,
) -> Result<Vec<String>, Error> {
    act(config, who, id, Act::Retry(participant)).await
}

/// Asks all that have not begun not to begin. Returns who is asked.
///
/// # Errors
/// [`ErrorKind::NotReady`] when there is no such job, or it has ended.
pub async fn cancel(config: &PostgresConfig, who: &str, id: JobId) -> Result<Vec<String>, Error> {
    act(config, who, id, Act::Cancel).await
}

#[derive(Clone, Copy)]
enum Act<'a> {
    Retry(Option<&'a str>),
    Cancel,
}

fn unknown(id: JobId) -> Error {
    JobError::new(JobErrorKind::Unknown, format!("there is no job {id}")).into()
}

async fn act(config: &PostgresConfig, who: &str, id: JobId, act: Act<'_>) -> Result<Vec<String>, Error> {
    set_schema(config.schema.name())
        .map_err(|error| Error::with_source(ErrorKind::Config, "the job's event cannot be written", error))?;
    let failed = |error| database_error("the job cannot be changed", error);
    let mut session = postgres::connect(config, APPLICATION).await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let found = job::lock(tx.for_others(), id.0).await.map_err(failed)?.ok_or_else(|| unknown(id))?;
    if config.pooled {
        set_pooled(true);
    }
    let names = match act {
        Act::Retry(participant) => request::retry(tx.for_others(), found, participant).await?,
        Act::Cancel => request::cancel(tx.for_others(), found).await?,
    };
    let action = if matches!(act, Act::Cancel) { "job cancel" } else { "job retry" };
    let detail = json!({ "job": id, "participants": names });
    let entry = Entry { who, action, subscriber: None, event_id: None, detail };
    audit::write(&mut tx, &entry).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(names)
}

impl std::str::FromStr for JobId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}
