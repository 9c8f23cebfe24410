//! Who asks for an erasure, and what is looked at before anybody is asked.

use std::time::Duration;

use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::describe;
use aftercommit_core::postgres::erasure::{self, Known};
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, PgTransaction, Row};

use super::{Act, Erasure, Subject, Task};
use crate::fanout::{JobError, JobErrorKind, JobId, JobRequest, Jobs, Kind, Participants};

/// The longest id of a subject, in bytes.
const MAX_ID: usize = 200;

/// An erasure that is to be asked for, with its guards. Its SQL is code of the service: never build it from what a user typed.
///
/// ```no_run
/// # async fn request(tx: &mut sqlx::PgTransaction<'_>) -> Result<(), aftercommit::fanout::JobError> {
/// use aftercommit::erase::{Request, Subject};
///
/// let asked = Request::new(Subject::new("tenant", 42), "ann@example.org")
///     .participants(["orders", "bills"])
///     .named("Acme", "select name from tenants where id = $1::bigint")
///     .none_left("other admins", "select count(*) from admins where tenant = $1::bigint and not asks")
///     .ask(tx)
///     .await?;
/// assert!(asked.new, "it was asked for before: {}", asked.status);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Request {
    subject: Subject,
    requested_by: String,
    participants: Participants,
    key: Option<String>,
    name: Option<(String, String)>,
    guards: Vec<(String, String)>,
    force: bool,
    again: bool,
    due_after: Option<Duration>,
    begin_after: Option<Duration>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Asked {
    /// The job, or the one that was there.
    pub job: JobId,
    /// False when nothing was done, because the subject is erased already, or is being erased.
    pub new: bool,
    /// How that job stands, such as `running` or `completed`.
    pub status: String,
}

impl Request {
    /// For a subject, by whom it is asked for, which stays on record.
    pub fn new(subject: Subject, requested_by: impl Into<String>) -> Self {
        Self {
            subject,
            requested_by: requested_by.into(),
            participants: Participants::Registered,
            key: None,
            name: None,
            guards: Vec::new(),
            force: false,
            again: false,
            due_after: None,
            begin_after: None,
        }
    }

    /// Who must answer. Defaults to all that are [registered](Jobs::register).
    #[must_use]
    pub fn participants(self, participants: impl Into<Participants>) -> Self {
        Self { participants: participants.into(), ..self }
    }

    /// What makes requests the same. Defaults to the subject: another request for it is the same, until the job is cancelled.
    #[must_use]
    pub fn key(self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// The name that the subject must have: the text that `sql` says for its id, `$1`, a text. It is compared and kept nowhere.
    #[must_use]
    pub fn named(self, name: impl Into<String>, sql: impl Into<String>) -> Self {
        Self { name: Some((name.into(), sql.into())), ..self }
    }

    /// Refuses while `sql` counts something for the subject's id, `$1`, a text, such as other administrators: `what` says what it
    /// counts. [`force`](Self::force) passes over it.
    #[must_use]
    pub fn none_left(mut self, what: impl Into<String>, sql: impl Into<String>) -> Self {
        self.guards.push((what.into(), sql.into()));
        self
    }

    /// Passes over what [`none_left`](Self::none_left) counts; the audit trail says so. Never over the name. Defaults to false.
    #[must_use]
    pub fn force(self, force: bool) -> Self {
        Self { force, ..self }
    }

    /// Erases a subject once more that is erased, because there are rows of it again. Defaults to false.
    #[must_use]
    pub fn again(self, again: bool) -> Self {
        Self { again, ..self }
    }

    /// After this time it is overdue. Defaults to never.
    #[must_use]
    pub fn due_after(self, due: Duration) -> Self {
        Self { due_after: Some(due), ..self }
    }

    /// Participants begin after this time, so that it can be cancelled until then. Defaults to at once.
    #[must_use]
    pub fn begin_after(self, wait: Duration) -> Self {
        Self { begin_after: Some(wait), ..self }
    }

    /// Asks, in the caller's transaction, unless the subject is erased or being erased.
    ///
    /// # Errors
    /// [`Refused`](JobErrorKind::Refused) when a guard refuses, [`Request`](JobErrorKind::Request) when the request cannot be.
    pub async fn ask(self, tx: &mut PgTransaction<'_>) -> Result<Asked, JobError> {
        check(&self.subject)?;
        let subject = json!(self.subject);
        let known = erasure::last(tx, Erasure::NAME, &subject).await?;
        let done = |known: &Known| known.status != "cancelled" && !(self.again && known.status != "running");
        if let Some(known) = known.as_ref().filter(|known| done(known)) {
            return Ok(Asked { job: JobId(known.id), new: false, status: known.status.clone() });
        }
        self.check_name(tx).await?;
        let forced = self.check_guards(tx).await?;
        let key = self.key.unwrap_or_else(|| match &known {
            None => format!("{}/{}", self.subject.kind, self.subject.id),
            // Two that come at the same time are the same.
            Some(known) => format!("{}/{}/{}", self.subject.kind, self.subject.id, known.id),
        });
        let request = JobRequest {
            key,
            request: Task { subject: self.subject, act: Act::Erase },
            requested_by: self.requested_by.clone(),
            participants: self.participants,
            due_after: self.due_after,
            begin_after: self.begin_after,
            parent: None,
        };
        let asked = Jobs::<Erasure>::request(tx, request).await?;
        if !asked.new {
            let status = Jobs::<Erasure>::status(tx, asked.job).await?.job.status;
            return Ok(Asked { job: asked.job, new: false, status });
        }
        if !forced.is_empty() {
            let detail = json!({ "job": asked.job, "subject": subject, "forced": forced });
            let who = &self.requested_by;
            let entry = Entry { who, action: "erasure force", subscriber: None, event_id: None, detail };
            audit::write_in(tx, &entry).await?;
        }
        Ok(Asked { job: asked.job, new: true, status: "running".into() })
    }

    /// Asks the participants what they would delete, in the caller's transaction: each call is a job of its own. The guards are not
    /// looked at.
    ///
    /// # Errors
    /// [`Request`](JobErrorKind::Request) when the request cannot be.
    pub async fn preview(self, tx: &mut PgTransaction<'_>) -> Result<JobId, JobError> {
        check(&self.subject)?;
        let request = JobRequest {
            key: self.key.unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
            request: Task { subject: self.subject, act: Act::Preview },
            requested_by: self.requested_by,
            participants: self.participants,
            due_after: None,
            begin_after: None,
            parent: None,
        };
        Ok(Jobs::<Erasure>::request(tx, request).await?.job)
    }

    async fn check_name(&self, tx: &mut PgTransaction<'_>) -> Result<(), JobError> {
        let Some((name, sql)) = &self.name else { return Ok(()) };
        let subject = &self.subject;
        let rows = sqlx::query(AssertSqlSafe(sql.clone()))
            .bind(&subject.id)
            .persistent(false)
            .fetch_all(&mut **tx)
            .await
            .map_err(|error| asked_wrong(&format!("the query for the name of a {}", subject.kind), error))?;
        let refuse =
            |problem: String| Err(JobError::new(JobErrorKind::Refused, format!("nothing was asked: {problem}")));
        match rows.as_slice() {
            [] => refuse(format!("there is no {subject}")),
            [row] => match row.try_get_unchecked::<Option<String>, _>(0)? {
                Some(is) if is == *name => Ok(()),
                _ => refuse(format!("{subject} has another name than {name:?}")),
            },
            _ => refuse(format!("the query for the name of {subject} found several rows")),
        }
    }

    /// What was passed over, with how many there are.
    async fn check_guards(&self, tx: &mut PgTransaction<'_>) -> Result<Map<String, Value>, JobError> {
        let mut forced = Map::new();
        for (what, sql) in &self.guards {
            let counted = format!("select (guarded.n)::pg_catalog.int8 from ({sql}) as guarded (n)");
            let count: Option<i64> = sqlx::query_scalar(AssertSqlSafe(counted))
                .bind(&self.subject.id)
                .persistent(false)
                .fetch_one(&mut **tx)
                .await
                .map_err(|error| asked_wrong(&format!("the query for {what}"), error))?;
            match count {
                Some(0) => {}
                Some(count) if self.force => {
                    forced.insert(what.clone(), count.into());
                }
                Some(count) => {
                    let subject = &self.subject;
                    let problem = format!("nothing was asked: {subject} has {what}: {count}; force it if it is meant");
                    return Err(JobError::new(JobErrorKind::Refused, problem));
                }
                None => {
                    let problem = format!("nothing was asked: the query for {what} counts nothing, it says NULL");
                    return Err(JobError::new(JobErrorKind::Refused, problem));
                }
            }
        }
        Ok(forced)
    }
}

/// A query of a guard failed.
fn asked_wrong(query: &str, error: sqlx::Error) -> JobError {
    let told = describe(&error);
    let problem = format!("nothing was asked: {query} failed: {told} (name tables with their schema)");
    JobError::new(JobErrorKind::Database, problem)
}

fn check(subject: &Subject) -> Result<(), JobError> {
    let refuse = |problem: String| Err(JobError::new(JobErrorKind::Request, problem));
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-' | b'.');
    if subject.kind.is_empty() || subject.kind.len() > 50 || !subject.kind.bytes().all(plain) {
        return refuse(format!(
            "the kind of subject {:?} must have 1 to 50 lower-case letters, digits, '_', '-' and '.'",
            subject.kind
        ));
    }
    if subject.id.trim() != subject.id
        || subject.id.is_empty()
        || subject.id.len() > MAX_ID
        || subject.id.contains('\0')
    {
        return refuse(format!("the id of a subject must have 1 to {MAX_ID} bytes, and no spaces around it"));
    }
    Ok(())
}
