//! The operator's console: what is stuck and what to do, in a browser.
//!
//! [`Console::router`] is an axum router to put into a service of your own; `aftercommit console` serves it by itself. Pages are made on the
//! server and work without JavaScript. Each page has a twin in JSON below `/api/v1`, with the same rights.
//!
//! It only looks: sessions with the databases are read-only, and the server ends each of their statements after two seconds.

#![warn(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod collector;
mod config;
mod document;
mod guard;
mod html;
mod page;
mod pages;
mod problem;
mod routes;
mod serve;

pub use access::users::{UsersFile, hash_password};
pub use access::{Access, Proxy, Role};
pub use config::{ConsoleConfig, PublicUrl};
pub use serve::serve;

use std::sync::Arc;

use axum::Router;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use aftercommit_core::error::Error;
use collector::Collector;

/// How many pages ask the databases at a time; others wait their turn.
const AT_A_TIME: usize = 8;

/// A console, and what its pages share. Cheap to clone.
#[derive(Clone)]
pub struct Console(Arc<Shared>);

struct Shared {
    config: ConsoleConfig,
    access: access::Gate,
    collector: Collector,
    turns: Semaphore,
}

impl Console {
    /// Checks the config and starts to watch the system, until `shutdown` is cancelled.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](aftercommit_core::error::ErrorKind::Config) when two settings do not fit, or the users file cannot be used.
    pub fn start(config: ConsoleConfig, shutdown: &CancellationToken) -> Result<Self, Error> {
        config.check()?;
        let access = access::Gate::new(&config)?;
        let collector = Collector::start(&config, shutdown.clone());
        Ok(Self(Arc::new(Shared { config, access, collector, turns: Semaphore::new(AT_A_TIME) })))
    }

    /// All pages below the path of the public URL.
    pub fn router(&self) -> Router {
        routes::router(self)
    }

    /// Every route, as `METHOD path`, with the least role that may use it; none for those that everybody may.
    pub fn rights(&self) -> Vec<(String, Option<Role>)> {
        routes::all().iter().map(|route| (format!("{} {}", route.method, route.path), route.least)).collect()
    }

    fn config(&self) -> &ConsoleConfig {
        &self.0.config
    }
}
