//! One look at everything: does it work, what is stuck, what is to be done.

mod broker;
mod database;
mod model;
mod screen;
mod verdict;

pub use broker::StreamStatus;
pub use model::{
    Backlog, Kind, LastDeadLetter, LastFailure, OtherConsumer, Parked, Paused, Problem, RelayStatus, RunningEvents,
    Severity, Status, SubscriberStatus, WaitReason, WaitingEvent,
};
#[cfg(feature = "cli")]
pub use screen::{Paint, screen};

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::Error;

/// Reads the status. Without NATS it shows what the database knows.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn status(database: &PostgresConfig, nats: &NatsConfig, naming: &Naming) -> Result<Status, Error> {
    let found = database::look(database).await?;
    let stream = Box::pin(broker::look(nats, naming)).await;
    let mut status = model::merge(found, stream);
    status.problems = verdict::problems(&status);
    status.well = status.problems.is_empty();
    Ok(status)
}
