//! What a service does about a subject.

use std::fmt::Write as _;

use aftercommit_core::postgres::job::Counts;
use aftercommit_core::postgres::job_work;
use aftercommit_worker::HandlerError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgTransaction;

use super::{Act, Erasure, Subject, Task};
use crate::fanout::{JobId, Participant, Step, Work};

/// What a service has of a subject.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preview {
    /// What there is, by what it is, such as rows by table.
    pub counts: Counts,
    /// What else there is to say, such as a table that is not there.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl Preview {
    /// Of counts.
    pub fn of(counts: impl IntoIterator<Item = (impl Into<String>, u64)>) -> Self {
        Self { counts: counts.into_iter().map(|(name, count)| (name.into(), count)).collect(), notes: Vec::new() }
    }

    /// Says this, too.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Whether there is nothing.
    pub fn is_zero(&self) -> bool {
        self.counts.values().all(|count| *count == 0)
    }

    /// What there is, for people.
    fn told(&self) -> String {
        let mut text = String::new();
        for (name, count) in self.counts.iter().filter(|(_, count)| **count > 0) {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{name} {count}");
        }
        text
    }
}

/// What a service does about a subject. [`Tables`](super::Tables) is one for rows of tables; what is elsewhere, such as files, needs
/// one of its own.
///
/// All of it runs in transactions of the service's database. An error is an error: whoever returns empty counts instead says that
/// there is nothing.
pub trait Eraser: Send + Sync + 'static {
    /// The service's name among the participants.
    fn name(&self) -> &str;

    /// Counts what [`step`](Self::step) would delete. It changes nothing.
    ///
    /// # Errors
    /// As a [`Handler`](aftercommit_worker::Handler): any error is tried again, [`HandlerError::reject`] answers at once that it failed.
    fn preview(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
    ) -> impl Future<Output = Result<Preview, HandlerError>> + Send;

    /// Deletes some of it, children first, and says how much. `position` is what the step before returned as [`Step::next`], none at
    /// the beginning and when the participant is asked anew: then what is left goes.
    ///
    /// # Errors
    /// As [`preview`](Self::preview). What the step did is rolled back.
    fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> impl Future<Output = Result<Step, HandlerError>> + Send;

    /// Counts what is left after an erasure; all of it must be 0. Defaults to [`preview`](Self::preview).
    ///
    /// # Errors
    /// As [`preview`](Self::preview).
    fn verify(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
    ) -> impl Future<Output = Result<Preview, HandlerError>> + Send {
        self.preview(tx, subject)
    }
}

/// A service as a participant of erasures, for all three acts:
/// `Subscriber::new("orders-erasures").on::<erase::Requested>(erase::participant(eraser).each_step_commits(pool))`.
pub fn participant<E: Eraser>(eraser: E) -> Participant<Erasure, Erasing<E>> {
    Participant::new(eraser.name().to_string(), Erasing(eraser))
}

/// The work of a [`participant`].
#[derive(Debug)]
pub struct Erasing<E>(E);

/// Where a verification is.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    /// Rows came late: they are deleted from this position on.
    Sweep(Option<Value>),
    /// They are deleted: nothing may be left.
    Check,
}

impl<E: Eraser> Work<Erasure> for Erasing<E> {
    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        task: &Task,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        match task.act {
            Act::Preview => Ok(found(self.0.preview(tx, &task.subject).await?)),
            Act::Erase => self.0.step(tx, &task.subject, position).await,
            Act::Verify => self.verify(tx, &task.subject, position).await,
        }
    }

    async fn begin(&self, tx: &mut PgTransaction<'_>, job: JobId, task: &Task) -> Result<(), HandlerError> {
        if task.act == Act::Erase {
            job_work::erase_subject(tx, &task.subject.kind, &task.subject.id, job.0).await?;
        }
        Ok(())
    }

    fn starts_over(&self) -> bool {
        true
    }
}

fn found(preview: Preview) -> Step {
    Step { counts: preview.counts, notes: preview.notes, next: None }
}

impl<E: Eraser> Erasing<E> {
    async fn verify(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let at = match position.map(serde_json::from_value::<Phase>).transpose()? {
            Some(Phase::Sweep(at)) => at,
            phase => {
                let left = self.0.verify(tx, subject).await?;
                if left.is_zero() {
                    return Ok(found(left));
                }
                if phase.is_some() {
                    return Err(HandlerError::reject(format!("after the erasure there is still {}", left.told())));
                }
                None
            }
        };
        let mut step = self.0.step(tx, subject, at).await?;
        let phase = step.next.take().map_or(Phase::Check, |next| Phase::Sweep(Some(next)));
        step.next = Some(serde_json::to_value(phase)?);
        Ok(step)
    }
}
