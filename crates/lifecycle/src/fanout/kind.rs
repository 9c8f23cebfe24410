//! What is asked, and the events of it.

use std::marker::PhantomData;
use std::time::Duration;

use aftercommit_core::postgres::job::Counts;
use aftercommit_outbox::event::Event;
use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A kind of job, such as the deletion of a tenant. Requester and participants share it.
///
/// ```
/// use aftercommit::fanout::Kind;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct DeleteTenant {
///     tenant: i64,
/// }
///
/// struct TenantDeletion;
///
/// impl Kind for TenantDeletion {
///     const NAME: &'static str = "tenant.deletion";
///     const REQUESTED: &'static str = "tenant.deletion.requested";
///     const OUTCOME: &'static str = "tenant.deletion.outcome";
///     const ENDED: &'static str = "tenant.deletion.ended";
///     type Request = DeleteTenant;
/// }
/// ```
pub trait Kind: Send + Sync + 'static {
    /// Its name, in tables and in `aftercommit job list`.
    const NAME: &'static str;
    /// The type of the event that asks the participants.
    const REQUESTED: &'static str;
    /// The type of the event by which a participant answers.
    const OUTCOME: &'static str;
    /// The type of the event that tells the end.
    const ENDED: &'static str;
    /// What participants need to know.
    type Request: Serialize + DeserializeOwned + Send + Sync + 'static;

    /// The name under which a request is on record, for a kind that asks for several things. Defaults to [`NAME`](Self::NAME).
    fn name_of(_request: &Self::Request) -> &'static str {
        Self::NAME
    }

    /// Whether [`Overdue`](super::Overdue) asks again who does not answer, so long after the request. Defaults to always.
    fn asks_again(_request: &Self::Request, _age: Duration) -> bool {
        true
    }

    /// Whether the request and each answer to it leave a row in the audit trail. Defaults to false.
    fn is_audited(_request: &Self::Request) -> bool {
        false
    }
}

/// Asks participants; also when some are asked anew, and when a job is cancelled.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Requested<K: Kind> {
    /// The job.
    pub job: Uuid,
    /// Who is asked, each with the round: how often it was asked anew after it had failed, from 1.
    pub participants: Vec<(String, i32)>,
    /// Whoever has not begun need not do it any more.
    pub cancel: bool,
    /// Not to begin before this time, so that it can be cancelled until then; none to begin at once.
    pub not_before: Option<DateTime<Utc>>,
    /// What is asked.
    pub request: K::Request,
    #[serde(skip)]
    pub(super) kind: PhantomData<K>,
}

impl<K: Kind> Event for Requested<K> {
    const TYPE: &'static str = K::REQUESTED;

    fn key(&self) -> Option<String> {
        Some(key(self.job, self.cancel))
    }
}

/// The key of what asks: what is cancelled must not wait behind what waits to begin.
pub(super) fn key(job: Uuid, cancel: bool) -> String {
    if cancel { format!("{job}-cancel") } else { job.to_string() }
}

/// A participant's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Outcome<K: Kind> {
    /// The job.
    pub job: Uuid,
    /// Who answers.
    pub participant: String,
    /// Which time it was asked.
    pub round: i32,
    /// `done`, `failed` or `cancelled`.
    pub status: String,
    /// What it did, as far as it is committed.
    pub counts: Counts,
    /// What else it says, such as a table that it does not have.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many attempts it took.
    pub attempts: i32,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
    #[serde(skip)]
    pub(super) kind: PhantomData<K>,
}

impl<K: Kind> Event for Outcome<K> {
    const TYPE: &'static str = K::OUTCOME;

    fn key(&self) -> Option<String> {
        Some(self.job.to_string())
    }
}

/// A job has ended: once, and once more when participants that had failed were asked anew.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Ended<K: Kind> {
    /// The job.
    pub job: Uuid,
    /// `completed`, `partial`, `failed` or `cancelled`.
    pub status: String,
    /// Participants that have done it, of how many.
    pub completed: (u64, u64),
    /// The names of those that failed.
    pub failed: Vec<String>,
    /// What all of them did together.
    pub counts: Counts,
    #[serde(skip)]
    pub(super) kind: PhantomData<K>,
}

impl<K: Kind> Event for Ended<K> {
    const TYPE: &'static str = K::ENDED;

    fn key(&self) -> Option<String> {
        Some(self.job.to_string())
    }
}
