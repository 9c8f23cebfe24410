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
mod split;
mod standby;
mod statements;
mod work;
mod writers;

use std::time::Duration;

pub use certificates::{Authority, Directory};
pub use database::{Database, succeeded};
pub use endpoint::{Endpoint, Received, Reply};
pub use http::{answers, complains, free_address, get, metric, reaches};
pub use outbox::{Message, Outbox, RelayProcess, RunningRelay};
pub use proxy::{Proxy, Way};
pub use restore::{Copy, Dump, cut_off, has_caught_up, raise_transaction_ids, standby_of};
pub use roles::Roles;
pub use scenario::{NAME, Scenario};
pub use split::Split;
pub use standby::standby_from_files;
pub use statements::{Statement, generic_plan, nodes, outside, statements};
pub use work::{Act, Number, Record, RunningWorker, Work, WorkerProcess, child_worker};
pub use writers::{Random, Writers};

/// Whether a nats-server is of a line before this one, such as `(2, 14)`.
pub fn is_before(version: &str, line: (u32, u32)) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) < line
}

/// Long enough for a slow machine, short enough to tell that something hangs.
pub const SOON: Duration = Duration::from_secs(60);
