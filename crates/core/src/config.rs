//! How to reach the two servers, and the names that publishers, relay and workers share.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use crate::error::{Error, ErrorKind};
pub use aftercommit_outbox::schema::{Schema, SchemaError};
use aftercommit_outbox::subject::SubjectPrefix;

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

/// Checks the name of a stream. The error is for behind the setting's name.
pub fn check_stream(name: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '.' | '*' | '>' | '/' | '\\');
    if !name.is_empty() && name.chars().all(legal) {
        return Ok(());
    }
    Err(format!("{name:?} cannot be the name of a stream"))
}

/// How to reach PostgreSQL.
#[derive(Clone)]
pub struct PostgresConfig {
    /// A `postgres://` URL, TLS parameters included (`sslmode`, `sslrootcert`, `sslcert`, `sslkey`). It may hold a
    /// password, so it is never printed.
    pub url: String,
    /// Whether PgBouncer, or another pooler, stands in between in transaction mode: each statement then takes a
    /// transaction of its own and leaves nothing in the server's session, which costs round trips. Defaults to false.
    pub pooled: bool,
    /// The schema with the tables and functions of aftercommit. Defaults to `aftercommit`.
    pub schema: Schema,
    /// For who only looks: sessions write nothing whatever they are told, and the server ends each statement after this long.
    /// Not behind a pooler. Defaults to none.
    pub reading: Option<Duration>,
}

impl PostgresConfig {
    /// PostgreSQL at this URL, with nothing in between.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), pooled: false, schema: Schema::default(), reading: None }
    }
}

impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig")
            .field("pooled", &self.pooled)
            .field("schema", &self.schema)
            .field("reading", &self.reading)
            .finish_non_exhaustive()
    }
}

/// How to reach NATS.
#[derive(Clone)]
pub struct NatsConfig {
    /// One or more `nats://` or `tls://` URLs, separated by commas. One `tls://` makes TLS a must for all of them.
    /// It may hold a password, so it is never printed. Defaults to `nats://127.0.0.1:4222`.
    pub url: String,
    /// How to log in. Defaults to the user that the URL names.
    pub auth: NatsAuth,
    /// What makes the connection secret and the server trusted. Any of its settings makes TLS a must. Defaults to the
    /// system's certificates, when URL or server ask for TLS.
    pub tls: NatsTls,
    /// Where answers come, for servers whose permissions give each user an inbox of its own: the first tokens of a
    /// subject, beginning with `_INBOX`. Defaults to that of the role, such as `_INBOX_relay` or `_INBOX_worker`.
    pub inbox_prefix: Option<String>,
    /// The first tokens of JetStream's API, for a user whose account imports it under another name (`JS.API`), or for the
    /// domain of a leaf node (`$JS.hub.API`). Defaults to `$JS.API`.
    pub api_prefix: Option<String>,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".into(),
            auth: NatsAuth::default(),
            tls: NatsTls::default(),
            inbox_prefix: None,
            api_prefix: None,
        }
    }
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url: _, auth, tls, inbox_prefix, api_prefix } = self;
        f.debug_struct("NatsConfig")
            .field("auth", auth)
            .field("tls", tls)
            .field("inbox_prefix", inbox_prefix)
            .field("api_prefix", api_prefix)
            .finish_non_exhaustive()
    }
}

/// Who connects to NATS. Files are read anew for each connection, so that secrets can be changed while a process runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NatsAuth {
    /// The user or token of the URL, `user:password@` or `token@`; no login when it has none.
    #[default]
    Url,
    /// The user of a credentials file (JWT and seed).
    Credentials(PathBuf),
    /// The user of an nkey, by its seed (`SU…`).
    Nkey(Secret),
    /// The bearer of a token.
    Token(Secret),
    /// A user with a password.
    UserPassword {
        /// The user's name.
        user: String,
        /// The password.
        password: Secret,
    },
}

/// TLS with NATS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatsTls {
    /// CA certificates (PEM) to trust instead of the system's. Defaults to none.
    pub ca: Option<PathBuf>,
    /// What to show to a server that wants to see a certificate. Defaults to none.
    pub certificate: Option<ClientCertificate>,
    /// Whether to start with TLS before the server's greeting, for servers with `handshake_first`. Defaults to false.
    pub first: bool,
}

/// A client's certificate and its key, in PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, with those between it and the authority's behind it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Something that must not be printed. `Debug` shows the name of the file at most.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// The secret itself.
    Text(String),
    /// A file with nothing but the secret in it; space around it does not count.
    File(PathBuf),
}

impl Secret {
    /// The secret. `setting` is what errors call it.
    pub fn read(&self, setting: &str) -> Result<String, Error> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::File(path) => read_file(path, setting).map(|text| text.trim().to_string()),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(…)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// Whether what is sent to a host, or to the directory of a socket, stays on this machine.
pub(crate) fn stays_here(host: &str) -> bool {
    let is_loopback = host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    let host = host.to_ascii_lowercase();
    is_loopback || host.starts_with('/') || host == "localhost" || host.ends_with(".localhost")
}

/// The text of a file that a setting names. What is in it does not get into the error.
pub fn read_file(path: &Path, setting: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|error| {
        Error::with_source(ErrorKind::Config, format!("the file {} cannot be read ({setting})", path.display()), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_printed() {
        let secret = || Secret::Text("hunter2".into());
        let url = "nats://me:hunter2@127.0.0.1".to_string();
        for auth in [
            NatsAuth::Url,
            NatsAuth::Nkey(secret()),
            NatsAuth::Token(secret()),
            NatsAuth::UserPassword { user: "me".into(), password: secret() },
        ] {
            let printed = format!("{:?}", NatsConfig { url: url.clone(), auth, ..Default::default() });
            assert!(!printed.contains("hunter2"), "{printed}");
        }
        assert!(!format!("{:?}", PostgresConfig::new(url)).contains("hunter2"));
        assert!(format!("{:?}", Secret::File("/run/secrets/token".into())).contains("/run/secrets/token"));
    }

    #[test]
    fn only_a_loopback_address_or_a_socket_stays_on_this_machine() {
        for host in
            ["localhost", "Db.Localhost", "127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "/run/postgresql"]
        {
            assert!(stays_here(host), "{host}");
        }
        for host in ["db", "10.0.0.1", "localhost.example.com", "fe80::1", "192.168.1.1", "127.0.0.1.nip.io", ""] {
            assert!(!stays_here(host), "{host}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_its_setting() {
        let error = Secret::File("/nowhere/token".into()).read("NATS_TOKEN_FILE").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.report().contains("/nowhere/token") && error.report().contains("NATS_TOKEN_FILE"), "{error}");
    }
}
