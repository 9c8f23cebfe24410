//! How to reach the two servers, and the names that publishers, relay and workers share.

use std::fmt;
use std::path::PathBuf;

use crate::subject::SubjectPrefix;

/// The names under which one outbox is published.
#[derive(Debug, Clone)]
pub struct Naming {
    /// The JetStream stream. Defaults to `EVENTS`.
    pub stream: String,
    /// The first tokens of every subject. Defaults to `events`.
    pub prefix: SubjectPrefix,
    /// The CloudEvents source. Defaults to `/aftercommit`.
    pub source: String,
}

impl Default for Naming {
    fn default() -> Self {
        Self { stream: "EVENTS".into(), prefix: SubjectPrefix::default(), source: "/aftercommit".into() }
    }
}

/// How to reach PostgreSQL.
#[derive(Clone)]
pub struct PostgresConfig {
    /// A `postgres://` URL, TLS parameters included (`sslmode`, `sslrootcert`, `sslcert`, `sslkey`). It may hold a
    /// password, so it is never printed.
    pub url: String,
}

impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig").finish_non_exhaustive()
    }
}

/// How to reach NATS.
#[derive(Clone)]
pub struct NatsConfig {
    /// One or more `nats://` or `tls://` URLs, separated by commas. Defaults to `nats://127.0.0.1:4222`.
    pub url: String,
    /// A credentials file (JWT and seed). Defaults to none.
    pub creds: Option<PathBuf>,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self { url: "nats://127.0.0.1:4222".into(), creds: None }
    }
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsConfig").field("creds", &self.creds).finish_non_exhaustive()
    }
}
