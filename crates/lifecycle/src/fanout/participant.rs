//! Who works and answers.

use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, causes};
use aftercommit_core::fault;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::job::{self, Counts};
use aftercommit_core::postgres::job_work::{self, JobWork};
use aftercommit_core::postgres::{describe, is_outage};
use aftercommit_outbox::publish;
use aftercommit_worker::{Delivery, Handler, HandlerError};
use chrono::Utc;
use serde_json::Value;
use sqlx::{Connection, PgConnection, PgPool, PgTransaction};

use super::kind::{Kind, Outcome, Requested};
use super::request::JobId;

/// How many attempts a participant makes before it answers that it failed.
const ATTEMPTS: u32 = 5;
/// How long steps that each commit go on before the message comes again: less than a subscriber's time limit, which is a minute
/// unless it says otherwise.
const TURN: Duration = Duration::from_secs(15);
/// How long a rest between two steps is at most.
const LONGEST_REST: Duration = Duration::from_secs(5);

/// What a participant does for a job: one step, or several that each commit.
pub trait Work<K: Kind>: Send + Sync + 'static {
    /// Does one step in this transaction. `position` is what the step before returned as [`Step::next`]; none at the beginning.
    ///
    /// A step may be repeated when it did not commit, never when it did.
    ///
    /// # Errors
    /// As a [`Handler`]: any error is tried again, [`HandlerError::reject`] answers at once that it failed.
    fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        request: &K::Request,
        position: Option<Value>,
    ) -> impl Future<Output = Result<Step, HandlerError>> + Send;

    /// Runs before the first step of a round, in its transaction. Defaults to nothing.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn begin(
        &self,
        _tx: &mut PgTransaction<'_>,
        _job: JobId,
        _request: &K::Request,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send {
        async { Ok(()) }
    }

    /// Whether a participant that is asked anew begins at the beginning, because its steps find out themselves what is left to do.
    /// Defaults to false: it goes on where it failed.
    fn starts_over(&self) -> bool {
        false
    }
}

/// What a step did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    /// What it did, by what it was done to; added to what the steps before did.
    pub counts: Counts,
    /// What else the answer shall say, such as a table that is not there. Each note is told once.
    pub notes: Vec<String>,
    /// Where the next step begins; none when all is done.
    pub next: Option<Value>,
}

impl Step {
    /// The last one.
    pub fn done(counts: impl IntoIterator<Item = (impl Into<String>, u64)>) -> Self {
        let counts = counts.into_iter().map(|(name, count)| (name.into(), count)).collect();
        Self { counts, ..Self::default() }
    }

    /// Says this, too.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// There is more, from this position on.
    pub fn more(self, position: impl Into<Value>) -> Self {
        Self { next: Some(position.into()), ..self }
    }
}

/// A participant of the jobs of a kind: `Subscriber::new("pos-deletions").on::<Requested<TenantDeletion>>(Participant::new("pos", DeleteRows))`.
///
/// Work and answer are committed together, in the participant's own database. When the last attempt has failed, it answers that, and
/// can be asked anew. A request that comes again is answered again and changes nothing, whether it was done or had failed.
#[derive(Debug)]
pub struct Participant<K, W> {
    name: String,
    work: W,
    attempts: u32,
    steps: Option<Steps>,
    rest: f64,
    kind: PhantomData<fn() -> K>,
}

/// Where steps commit by themselves.
enum Steps {
    Pool(PgPool),
    Database(Connections),
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Steps")
    }
}

impl<K: Kind, W: Work<K>> Participant<K, W> {
    /// With this name, which the request has among its participants. All steps run in one transaction.
    pub fn new(name: impl Into<String>, work: W) -> Self {
        Self { name: name.into(), work, attempts: ATTEMPTS, steps: None, rest: 0.0, kind: PhantomData }
    }

    /// Each step commits by itself, on a connection of this pool to the participant's database: for work that is too large for one
    /// transaction. What is committed stays, whatever happens to the process, and the next attempt goes on there.
    #[must_use]
    pub fn each_step_commits(self, pool: PgPool) -> Self {
        Self { steps: Some(Steps::Pool(pool)), ..self }
    }

    /// The same on a connection to this database, which is made when it is needed.
    ///
    /// # Errors
    /// When the configuration is wrong.
    #[doc(hidden)]
    pub fn each_step_commits_in(self, postgres: &PostgresConfig) -> Result<Self, Error> {
        let connections = Connections::new(postgres, "aftercommit-worker")?;
        Ok(Self { steps: Some(Steps::Database(connections)), ..self })
    }

    /// How long it rests after each step that commits, as a multiple of how long the step took, 5 seconds at most: for work that is not
    /// urgent, beside an application whose slowest answers count. With 100 the work takes a hundredth of the time. Defaults to 0.
    #[must_use]
    pub fn rest(self, times: f64) -> Self {
        Self { rest: if times.is_finite() { times.max(0.0) } else { 0.0 }, ..self }
    }

    /// How many attempts it makes before it answers that it failed; less than the subscriber's own, which then never counts.
    /// Defaults to 5.
    #[must_use]
    pub fn attempts(self, attempts: u32) -> Self {
        Self { attempts: attempts.max(1), ..self }
    }

    /// Steps until the work is done, all in this transaction.
    async fn all_steps(
        &self,
        tx: &mut PgTransaction<'_>,
        requested: &Requested<K>,
        round: i32,
    ) -> Result<JobWork, HandlerError> {
        let mut work = self.begin(tx, requested, round).await?;
        if !is_answered(&work, round) && work.position.is_none() {
            self.work.begin(tx, JobId(requested.job), &requested.request).await?;
        }
        while !is_answered(&work, round) {
            let step = self.work.step(tx, &requested.request, work.position.take()).await?;
            add(&mut work, step);
            let ended = work.position.is_none();
            job_work::save(tx, requested.job, &self.name, &work, ended).await?;
            if ended {
                work.ended_at = Some(Utc::now());
            }
        }
        Ok(work)
    }

    async fn begin(
        &self,
        connection: &mut PgConnection,
        requested: &Requested<K>,
        round: i32,
    ) -> Result<JobWork, sqlx::Error> {
        let over = self.work.starts_over();
        job_work::begin(connection, requested.job, &self.name, round, over).await
    }

    /// The same with a transaction for each step. After some time the message comes again, which costs no attempt: so work may take
    /// longer than the subscriber's limit for one handler, whose transaction stays open meanwhile.
    async fn step_by_step(&self, steps: &Steps, requested: &Requested<K>, round: i32) -> Result<JobWork, HandlerError> {
        let began = Instant::now();
        loop {
            let step_began = Instant::now();
            let work = match steps {
                Steps::Pool(pool) => {
                    let mut tx = pool.begin().await?;
                    let work = self.one_step(&mut tx, requested, round).await?;
                    tx.commit().await?;
                    work
                }
                Steps::Database(connections) => {
                    let mut session = connections.take_for_others().await?;
                    let mut tx = session.begin().await?;
                    let work = self.one_step(tx.for_others(), requested, round).await?;
                    tx.commit().await?;
                    // One on which something failed is closed instead.
                    connections.give_back(session);
                    work
                }
            };
            fault::point("job-stepped");
            match work {
                work if is_answered(&work, round) => return Ok(work),
                _ if began.elapsed() > TURN => return Err(HandlerError::snooze(Duration::from_millis(1))),
                _ => {}
            }
            let rest = (step_began.elapsed().as_secs_f64() * self.rest).min(LONGEST_REST.as_secs_f64());
            if rest > 0.0 {
                tokio::time::sleep(Duration::from_secs_f64(rest)).await;
            }
        }
    }

    /// The next step, in a transaction of its own; nothing when all of it is done.
    async fn one_step(
        &self,
        tx: &mut PgTransaction<'_>,
        requested: &Requested<K>,
        round: i32,
    ) -> Result<JobWork, HandlerError> {
        // The row is locked: nobody else takes a step of this job.
        let mut work = self.begin(tx, requested, round).await?;
        if is_answered(&work, round) {
            return Ok(work);
        }
        if work.position.is_none() {
            self.work.begin(tx, JobId(requested.job), &requested.request).await?;
        }
        let step = self.work.step(tx, &requested.request, work.position.take()).await?;
        add(&mut work, step);
        let ended = work.position.is_none();
        job_work::save(tx, requested.job, &self.name, &work, ended).await?;
        fault::point("job-step");
        if ended {
            work.ended_at = Some(Utc::now());
        }
        Ok(work)
    }

    /// Answers that it failed, unless another instance did the work meanwhile. The row is locked until that is committed.
    async fn answer_failure(
        &self,
        tx: &mut PgTransaction<'_>,
        requested: &Requested<K>,
        round: i32,
        attempt: u32,
        error: String,
    ) -> Result<(), HandlerError> {
        let mut work = self.begin(tx, requested, round).await?;
        if !is_answered(&work, round) {
            let (job, participant) = (requested.job, &self.name);
            tracing::warn!(%job, participant, attempt, error, "answering that it failed");
            job_work::fail(tx, job, participant, round, &error).await?;
            work.error = Some(error);
        }
        self.answer(tx, requested, round, attempt, work).await
    }

    async fn answer(
        &self,
        tx: &mut PgTransaction<'_>,
        requested: &Requested<K>,
        round: i32,
        attempt: u32,
        work: JobWork,
    ) -> Result<(), HandlerError> {
        let (status, error) = match (work.ended_at, work.started_at) {
            (Some(_), Some(_)) => ("done", None),
            (Some(_), None) => ("cancelled", None),
            (None, _) => ("failed", work.error),
        };
        let outcome = Outcome::<K> {
            job: requested.job,
            participant: self.name.clone(),
            round,
            status: status.into(),
            counts: work.counts,
            notes: work.notes,
            error,
            attempts: i32::try_from(attempt).unwrap_or(i32::MAX),
            started_at: work.started_at,
            ended_at: work.ended_at.unwrap_or_else(Utc::now),
            kind: PhantomData,
        };
        publish(tx, &outcome).await?;
        fault::point("job-answered");
        Ok(())
    }
}

/// Whether a request of this round changes nothing any more: the work has ended, or the round was answered as failed.
fn is_answered(work: &JobWork, round: i32) -> bool {
    work.ended_at.is_some() || work.failed >= round
}

/// Adds what a step did.
fn add(work: &mut JobWork, step: Step) {
    job::add(&mut work.counts, &step.counts);
    let new: Vec<String> = step.notes.into_iter().filter(|note| !work.notes.contains(note)).collect();
    work.notes.extend(new);
    work.position = step.next;
}

/// What to answer about an error: none when it is to be tried again, because attempts are left or a server is away.
fn verdict(error: HandlerError, last: bool) -> Result<String, HandlerError> {
    match error {
        HandlerError::Reject { reason } => Ok(reason),
        HandlerError::Retry { error, after } => {
            let outage = causes(&*error).any(|cause| cause.downcast_ref().is_some_and(is_outage));
            if last && !outage { Ok(describe(&*error)) } else { Err(HandlerError::Retry { error, after }) }
        }
        other => Err(other),
    }
}

impl<K: Kind, W: Work<K>> Handler<Requested<K>> for Participant<K, W> {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Requested<K>>) -> Result<(), HandlerError> {
        let requested = &delivery.event;
        let Some((_, round)) = requested.participants.iter().find(|(name, _)| *name == self.name) else {
            return Ok(());
        };
        let (round, attempt) = (*round, delivery.attempt);
        if requested.cancel {
            if job_work::cancel(tx, requested.job, &self.name, round).await? {
                let work = self.begin(tx, requested, round).await?;
                self.answer(tx, requested, round, attempt, work).await?;
            }
            return Ok(());
        }
        if let Some(wait) = requested.not_before.and_then(|time| (time - Utc::now()).to_std().ok()) {
            return Err(HandlerError::snooze(wait));
        }
        let worked = match &self.steps {
            Some(steps) => self.step_by_step(steps, requested, round).await,
            None => {
                // What fails takes only its own doing with it, so that the failure can be answered.
                let mut inner = tx.begin().await?;
                match self.all_steps(&mut inner, requested, round).await {
                    Ok(work) => {
                        inner.commit().await?;
                        Ok(work)
                    }
                    Err(error) => {
                        inner.rollback().await?;
                        Err(error)
                    }
                }
            }
        };
        match worked {
            Ok(work) => self.answer(tx, requested, round, attempt, work).await,
            Err(error) => {
                let error = verdict(error, attempt >= self.attempts)?;
                self.answer_failure(tx, requested, round, attempt, error).await
            }
        }
    }
}
