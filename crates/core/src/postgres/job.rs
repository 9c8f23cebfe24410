//! Jobs that several participants answer. The statements run in transactions of whoever asks, works or counts, so they name the
//! schema of the process.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::maybe::Maybe;
use super::session::Session;
use super::time;
use aftercommit_outbox::schema::published;

/// What was done, by what it was done to, such as the rows deleted from each table.
pub type Counts = BTreeMap<String, u64>;

/// Adds counts to others.
pub fn add(total: &mut Counts, counts: &Counts) {
    for (name, count) in counts {
        let sum = total.entry(name.clone()).or_default();
        *sum = sum.saturating_add(*count);
    }
}

/// A job that is to be asked for.
#[derive(Debug)]
pub struct NewJob<'a> {
    /// Its id.
    pub id: Uuid,
    /// What is asked.
    pub kind: &'a str,
    /// The same request is the same job.
    pub request_key: &'a str,
    /// The request.
    pub request: &'a Value,
    /// Who asks.
    pub requested_by: &'a str,
    /// After so many seconds it is overdue.
    pub due_seconds: Option<f64>,
    /// Nobody begins before.
    pub begin_at: Option<DateTime<Utc>>,
    /// The types of its events: of the request, and of its end.
    pub types: (&'a str, &'a str),
    /// The job that ends only when this one has ended.
    pub parent: Option<Uuid>,
    /// Who registers while it runs is asked, too.
    pub joinable: bool,
    /// Who is asked.
    pub participants: &'a [String],
}

/// A job as it is on record.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct Job {
    /// Its id.
    pub id: Uuid,
    /// What is asked, such as `tenant.deletion` or `erasure.preview`.
    pub kind: String,
    /// What makes a request the same.
    pub request_key: String,
    /// The request.
    pub request: Value,
    /// Who asked.
    pub requested_by: String,
    /// When.
    #[sqlx(try_from = "time::Time")]
    pub requested_at: DateTime<Utc>,
    /// When it is overdue; none when nobody said.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub due_at: Option<DateTime<Utc>>,
    /// Nobody begins before; none to begin at once.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub begin_at: Option<DateTime<Utc>>,
    /// `running`, `completed`, `partial`, `failed` or `cancelled`.
    pub status: String,
    /// When it ended; none while it runs.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub ended_at: Option<DateTime<Utc>>,
    /// The type of the event that asks.
    #[serde(skip)]
    pub requested_type: String,
    /// The type of the event that tells the end.
    #[serde(skip)]
    pub ended_type: String,
    /// The job that ends only when this one has ended.
    pub parent: Option<Uuid>,
    /// Whether who registers while it runs is asked, too.
    pub joinable: bool,
}

/// A job that belongs to another one, which ends only when it has ended.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct ChildJob {
    /// Its id.
    pub id: Uuid,
    /// What is asked, such as `erasure.verification`.
    pub kind: String,
    /// As that of any job.
    pub status: String,
}

/// What a participant has answered.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct ParticipantStatus {
    /// Its name.
    pub participant: String,
    /// How often it was asked anew after it had failed, from 1.
    pub round: i32,
    /// `asked`, `done`, `failed` or `cancelled`.
    pub status: String,
    /// When it was asked last.
    #[sqlx(try_from = "time::Time")]
    pub asked_at: DateTime<Utc>,
    /// When it began, by its own database's clock.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended, by its own database's clock.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub ended_at: Option<DateTime<Utc>>,
    /// How many attempts it took; none while it has not answered.
    pub attempts: Option<i32>,
    /// How long it took in seconds, by its own database's clock; none while it has not ended.
    pub duration_seconds: Option<f64>,
    /// What it did.
    #[sqlx(json)]
    pub counts: Counts,
    /// What else it says, such as a table that it does not have.
    #[sqlx(json)]
    pub notes: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A participant's answer.
#[derive(Debug)]
pub struct Answer<'a> {
    /// The job.
    pub job: Uuid,
    /// Who answers.
    pub participant: &'a str,
    /// Which time it was asked.
    pub round: i32,
    /// `done`, `failed` or `cancelled`.
    pub status: &'a str,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
    /// How many attempts it took.
    pub attempts: i32,
    /// What it did.
    pub counts: &'a Counts,
    /// What else it says.
    pub notes: &'a [String],
    /// Why it failed.
    pub error: Option<&'a str>,
}

/// A statement for the schema of this process.
pub(super) fn ours(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(published().sql(sql).into_owned())
}

const JOB: &str =
    "select id, kind, request_key, request, requested_by, requested_at, due_at, begin_at, status, ended_at,
                          requested_type, ended_type, parent, joinable from aftercommit.job";

const PARTICIPANT: &str =
    "select participant, round, status, asked_at, started_at, ended_at, attempts, counts, notes, error,
                                  extract(epoch from ended_at - started_at)::float8 as duration_seconds
                             from aftercommit.job_participant";

const CHILDREN: &str = "select id, kind, status from aftercommit.job where parent = $1 order by requested_at, id";

/// Writes a job and its participants, unless the same request is there. Returns the job's id, and whether it is new.
pub async fn request(connection: &mut PgConnection, job: &NewJob<'_>) -> Result<(Uuid, bool), sqlx::Error> {
    let inserted: Option<Uuid> = sqlx::query_scalar(ours(
        "insert into aftercommit.job (id, kind, request_key, request, requested_by, due_at, requested_type, ended_type, parent,
                                      joinable, begin_at)
         values ($1, $2, $3, $4, $5, clock_timestamp() + make_interval(secs => $6), $7, $8, $9, $10, $11)
         on conflict (kind, request_key) do nothing returning id",
    ))
    .bind(job.id)
    .bind(job.kind)
    .bind(job.request_key)
    .bind(Json(job.request))
    .bind(job.requested_by)
    .bind(job.due_seconds)
    .bind(job.types.0)
    .bind(job.types.1)
    .bind(job.parent)
    .bind(job.joinable)
    .bind(job.begin_at)
    .persistent(false)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(id) = inserted else {
        let known = sqlx::query_scalar(ours("select id from aftercommit.job where kind = $1 and request_key = $2"));
        let known = known.bind(job.kind).bind(job.request_key).persistent(false).fetch_one(connection).await?;
        return Ok((known, false));
    };
    sqlx::query(ours("insert into aftercommit.job_participant (job, participant) select $1, unnest($2::text[])"))
        .bind(id)
        .bind(job.participants)
        .persistent(false)
        .execute(connection)
        .await?;
    Ok((id, true))
}

/// Locks a job, so that what is decided about it is decided one after the other. None when it is not there.
pub async fn lock(connection: &mut PgConnection, id: Uuid) -> Result<Option<Job>, sqlx::Error> {
    sqlx::query_as(ours(&format!("{JOB} where id = $1 for update")))
        .bind(id)
        .persistent(false)
        .fetch_optional(connection)
        .await
}

/// Its participants, by name.
pub async fn participants(connection: &mut PgConnection, job: Uuid) -> Result<Vec<ParticipantStatus>, sqlx::Error> {
    sqlx::query_as(ours(&format!("{PARTICIPANT} where job = $1 order by participant")))
        .bind(job)
        .persistent(false)
        .fetch_all(connection)
        .await
}

/// The jobs that belong to it, in the order in which they were asked for.
pub async fn children(connection: &mut PgConnection, job: Uuid) -> Result<Vec<ChildJob>, sqlx::Error> {
    sqlx::query_as(ours(CHILDREN)).bind(job).persistent(false).fetch_all(connection).await
}

/// Writes an answer down. False when it is not what is waited for: an earlier round's, a second one, or of somebody who was not asked.
pub async fn answer(connection: &mut PgConnection, answer: &Answer<'_>) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(ours(
        "update aftercommit.job_participant
            set status = $4, started_at = $5, ended_at = $6, attempts = $7, counts = $8, notes = $9,
                error = $10
          where job = $1 and participant = $2 and round = $3 and status = 'asked'",
    ))
    .bind(answer.job)
    .bind(answer.participant)
    .bind(answer.round)
    .bind(answer.status)
    .bind(answer.started_at)
    .bind(answer.ended_at)
    .bind(answer.attempts)
    .bind(Json(answer.counts))
    .bind(Json(answer.notes))
    .bind(answer.error)
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends a job that runs.
pub async fn end(connection: &mut PgConnection, job: Uuid, status: &str) -> Result<(), sqlx::Error> {
    sqlx::query(ours(
        "update aftercommit.job set status = $2, ended_at = clock_timestamp() where id = $1 and status = 'running'",
    ))
    .bind(job)
    .bind(status)
    .persistent(false)
    .execute(connection)
    .await
    .map(drop)
}

/// Asks participants anew that have failed; all of them when none is named. Returns who is asked, with the round.
pub async fn ask_again(
    connection: &mut PgConnection,
    job: Uuid,
    participant: Option<&str>,
) -> Result<Vec<(String, i32)>, sqlx::Error> {
    let asked: Vec<(String, i32)> = sqlx::query_as(ours(
        "update aftercommit.job_participant
            set status = 'asked', round = round + 1, asked_at = clock_timestamp(), error = null, ended_at = null
          where job = $1 and status = 'failed' and ($2::text is null or participant = $2)
         returning participant, round",
    ))
    .bind(job)
    .bind(participant)
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    if !asked.is_empty() {
        // With it run those that wait for its end.
        sqlx::query(ours(
            "with recursive above (id, parent) as (
                 select id, parent from aftercommit.job where id = $1
                 union select j.id, j.parent from aftercommit.job j join above a on j.id = a.parent)
             update aftercommit.job set status = 'running', ended_at = null where id in (select id from above)",
        ))
        .bind(job)
        .persistent(false)
        .execute(connection)
        .await?;
    }
    Ok(asked)
}

/// Who was asked more than so many seconds ago and has not answered: asked once more, in the same round.
pub async fn overdue(
    connection: &mut PgConnection,
    job: Uuid,
    seconds: f64,
) -> Result<Vec<(String, i32)>, sqlx::Error> {
    sqlx::query_as(ours(
        "update aftercommit.job_participant set asked_at = clock_timestamp()
          where job = $1 and status = 'asked' and asked_at < clock_timestamp() - make_interval(secs => $2)
         returning participant, round",
    ))
    .bind(job)
    .bind(seconds)
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// Jobs that run, are asked by events of this type, and have somebody who was asked more than so many seconds ago or has registered
/// since, behind this id, by id.
pub async fn waiting(
    connection: &mut PgConnection,
    requested_type: &str,
    seconds: f64,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(ours(
        "select id from aftercommit.job j
          where status = 'running' and requested_type = $1 and ($3::uuid is null or id > $3)
            and exists (select from aftercommit.job_participant p
                         where p.job = j.id and p.status = 'asked'
                           and (p.asked_at < clock_timestamp() - make_interval(secs => $2)
                                or j.joinable
                               and exists (select from aftercommit.participant r
                                            where r.kind = j.kind
                                              and not exists (select from aftercommit.job_participant o
                                                               where o.job = j.id and o.participant = r.name))))
          order by id limit $4",
    ))
    .bind(requested_type)
    .bind(seconds)
    .bind(after)
    .bind(limit)
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// How many jobs of each kind run, and how many of those are past the time they were due.
pub async fn running(session: &mut Session) -> Result<Vec<(String, i64, i64)>, sqlx::Error> {
    sqlx::query_as(
        "select kind, count(*), count(*) filter (where due_at < clock_timestamp())
           from aftercommit.job where status = 'running' group by kind order by kind",
    )
    .fetch_all(session)
    .await
}

/// Registers a participant for the jobs of a kind. False when it is registered.
pub async fn register(connection: &mut PgConnection, kind: &str, name: &str) -> Result<bool, sqlx::Error> {
    let sql = "insert into aftercommit.participant (kind, name) values ($1, $2) on conflict do nothing";
    let done = sqlx::query(ours(sql)).bind(kind).bind(name).persistent(false).execute(connection).await?;
    Ok(done.rows_affected() == 1)
}

/// Removes a participant from the register. False when it was not there. Jobs that run still wait for it.
pub async fn unregister(connection: &mut PgConnection, kind: &str, name: &str) -> Result<bool, sqlx::Error> {
    let sql = "delete from aftercommit.participant where kind = $1 and name = $2";
    let done = sqlx::query(ours(sql)).bind(kind).bind(name).persistent(false).execute(connection).await?;
    Ok(done.rows_affected() == 1)
}

/// Who is registered for the jobs of a kind, by name.
pub async fn registered(connection: &mut PgConnection, kind: &str) -> Result<Vec<String>, sqlx::Error> {
    let sql = "select name from aftercommit.participant where kind = $1 order by name";
    sqlx::query_scalar(ours(sql)).bind(kind).persistent(false).fetch_all(connection).await
}

/// Adds participants to a job: the one that is named, or all that are registered for its kind. Returns those that were not there.
pub async fn join(
    connection: &mut PgConnection,
    job: Uuid,
    name: Option<&str>,
) -> Result<Vec<(String, i32)>, sqlx::Error> {
    sqlx::query_as(ours(
        "insert into aftercommit.job_participant (job, participant)
         select $1, $2 where $2 is not null
         union select j.id, r.name from aftercommit.job j join aftercommit.participant r on r.kind = j.kind
                where j.id = $1 and $2 is null
         on conflict do nothing returning participant, round",
    ))
    .bind(job)
    .bind(name)
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// Which jobs are wanted; what is none does not matter.
#[derive(Debug, Clone, Copy, Default)]
pub struct WantedJobs<'a> {
    /// Those of this kind.
    pub kind: Option<&'a str>,
    /// Those with this status.
    pub status: Option<&'a str>,
    /// Those that run and are past the time they were due.
    pub overdue: bool,
}

/// The last `limit` of the wanted jobs, the newest first.
pub async fn list(session: &mut Session, wanted: WantedJobs<'_>, limit: i64) -> Result<Vec<Job>, sqlx::Error> {
    let sql = format!(
        "{JOB} where ($1::text is null or kind = $1) and ($2::text is null or status = $2)
                 and (not $4 or status = 'running' and due_at < clock_timestamp())
          order by requested_at desc limit $3"
    );
    sqlx::query_as(AssertSqlSafe(sql))
        .bind(wanted.kind)
        .bind(wanted.status)
        .bind(limit)
        .bind(wanted.overdue)
        .fetch_all(session)
        .await
}

/// A job with its participants and the jobs that belong to it; none when it is not there.
pub async fn show(
    session: &mut Session,
    id: Uuid,
) -> Result<Option<(Job, Vec<ParticipantStatus>, Vec<ChildJob>)>, sqlx::Error> {
    let job: Option<Job> =
        sqlx::query_as(AssertSqlSafe(format!("{JOB} where id = $1"))).bind(id).fetch_optional(&mut *session).await?;
    let Some(job) = job else { return Ok(None) };
    let sql = format!("{PARTICIPANT} where job = $1 order by participant");
    let participants = sqlx::query_as(AssertSqlSafe(sql)).bind(id).fetch_all(&mut *session).await?;
    let children = sqlx::query_as(CHILDREN).bind(id).fetch_all(session).await?;
    Ok(Some((job, participants, children)))
}
