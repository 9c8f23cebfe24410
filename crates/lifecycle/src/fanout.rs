//! Fan-out jobs: one request that several participants answer, each once, durably.
//!
//! A tenant's deletion concerns twelve services. Called one after the other from memory, a restart loses how far it was, a timeout looks
//! like a failure, and what was rolled back is counted. Here the request, the job and a row for each participant are written in one
//! transaction of the requester ([`Jobs::request`]); each participant works in its own database and publishes its answer in the
//! transaction of the work ([`Participant`]); the requester's [`Coordinator`], an ordinary subscriber, writes answers down and
//! publishes the end once.
//!
//! Nobody calls anybody: participants may be away for days. The tables `job`, `job_participant` and `job_work` are part of the
//! schema.

pub(crate) mod coordinator;
pub(crate) mod end;
mod error;
mod kind;
pub mod operate;
mod overdue;
mod participant;
mod request;

pub use aftercommit_core::postgres::job::{ChildJob, Counts, Job, ParticipantStatus, WantedJobs};
pub use coordinator::Coordinator;
pub use error::{JobError, JobErrorKind};
pub use kind::{Ended, Kind, Outcome, Requested};
pub use overdue::Overdue;
pub use participant::{Participant, Step, Work};
pub use request::{Asked, JobId, JobRequest, JobStatus, Jobs, Participants};
