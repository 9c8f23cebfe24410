//! What the integration tests share.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

mod certificates;
mod database;
mod endpoint;
mod http;
mod outbox;
mod proxy;
mod restore;
mod roles;
mod scenario;
mod work;
mod writers;

use std::time::Duration;

pub use certificates::{Authority, Directory};
pub use database::{Database, succeeded};
pub use endpoint::{Endpoint, Received, Reply};
pub use http::{answers, complains, free_address, get, metric, reaches};
pub use outbox::{Message, Outbox, RelayProcess, RunningRelay};
pub use proxy::{Proxy, Way};
pub use restore::{Copy, Dump, raise_transaction_ids};
pub use roles::Roles;
pub use scenario::{NAME, Scenario};
pub use work::{Act, Number, Record, RunningWorker, Work, WorkerProcess, child_worker};
pub use writers::{Random, Writers};

/// Long enough for a slow machine, short enough to tell that something hangs.
pub const SOON: Duration = Duration::from_secs(60);
