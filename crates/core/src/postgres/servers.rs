//! The servers that a URL names, and which of them is wanted: each is tried in turn, so that the next connection behind a
//! failover finds the new primary.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::{is_outage, message, patience};
use crate::config::stays_here;

/// What a server has to be for, as libpq's `target_session_attrs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

impl Target {
    const NAMES: [(&str, Self); 6] = [
        ("any", Self::Any),
        ("read-write", Self::ReadWrite),
        ("read-only", Self::ReadOnly),
        ("primary", Self::Primary),
        ("standby", Self::Standby),
        ("prefer-standby", Self::PreferStandby),
    ];

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(one, _)| *one == name).map(|(_, target)| *target)
    }

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, target)| *target == self).map_or("any", |(name, _)| name)
    }

    /// Why a server is not wanted.
    fn misfit(self, is_standby: bool, is_read_only: bool) -> Option<&'static str> {
        match self {
            Self::ReadWrite if is_standby => Some("is a standby"),
            Self::ReadWrite if is_read_only => Some("takes no writes"),
            Self::ReadOnly if !is_standby && !is_read_only => Some("takes writes"),
            Self::Primary if is_standby => Some("is a standby"),
            Self::Standby | Self::PreferStandby if !is_standby => Some("is no standby"),
            _ => None,
        }
    }
}

/// The servers of one database, in the order in which they are tried.
#[derive(Clone)]
pub struct Servers {
    servers: Vec<PgConnectOptions>,
    target: Target,
    /// How long to wait for each.
    patience: Duration,
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the driver's options: they show the password.
        f.debug_list().entries(self.servers.iter().map(address)).finish()
    }
}

impl Servers {
    pub(super) fn new(servers: Vec<PgConnectOptions>, target: Target, patience: Duration) -> Self {
        Self { servers, target, patience }
    }

    /// The same with other options for each.
    pub(super) fn map(self, change: impl FnMut(PgConnectOptions) -> PgConnectOptions) -> Self {
        Self { servers: self.servers.into_iter().map(change).collect(), ..self }
    }

    pub(super) fn ports(&self) -> Vec<u16> {
        self.servers.iter().map(PgConnectOptions::get_port).collect()
    }

    /// Connects to the first server that is wanted.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        if let ([only], Target::Any) = (self.servers.as_slice(), self.target) {
            return self.open(only).await;
        }
        let (mut spare, mut refusals) = (None, Vec::new());
        for server in &self.servers {
            let refusal = match self.look_at(server).await {
                Ok((connection, None)) => return Ok(connection),
                Ok((connection, Some(misfit))) => {
                    if self.target == Target::PreferStandby && spare.is_none() {
                        spare = Some(connection);
                    } else {
                        // The server hears of it, or finds out.
                        _ = connection.close().await;
                    }
                    misfit.to_string()
                }
                Err(error) if is_outage(&error) => message(&error),
                // As libpq does: a wrong password is not tried elsewhere.
                Err(error) => return Err(error),
            };
            refusals.push(format!("{}: {refusal}", address(server)));
        }
        spare.ok_or_else(|| {
            let (target, refusals) = (self.target.name(), refusals.join("; "));
            sqlx::Error::Io(io::Error::other(format!("no server is {target} (target_session_attrs): {refusals}")))
        })
    }

    async fn open(&self, server: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
        patience::heard(Some(self.patience), Box::pin(server.connect())).await
    }

    /// A connection, and why it is not wanted.
    async fn look_at(&self, server: &PgConnectOptions) -> Result<(PgConnection, Option<&'static str>), sqlx::Error> {
        let mut connection = self.open(server).await?;
        if self.target == Target::Any {
            return Ok((connection, None));
        }
        // Without a prepared statement, because a pooler may stand in between.
        let ask = "select pg_catalog.pg_is_in_recovery()::pg_catalog.text, \
                   pg_catalog.current_setting('transaction_read_only')";
        let answer = sqlx::raw_sql(ask).fetch_one(&mut connection);
        let row = patience::heard(Some(self.patience), answer).await?;
        let is_standby = sqlx::Row::try_get::<&str, _>(&row, 0)? == "true";
        let is_read_only = sqlx::Row::try_get::<&str, _>(&row, 1)? == "on";
        Ok((connection, self.target.misfit(is_standby, is_read_only)))
    }

    /// The only server there is.
    #[cfg(test)]
    pub(super) fn one(mut self) -> PgConnectOptions {
        assert_eq!(self.servers.len(), 1);
        self.servers.remove(0)
    }

    /// The servers to which somebody on the way could listen, or whose place he could take.
    pub(super) fn in_clear(&self) -> Vec<String> {
        self.servers.iter().filter(|server| is_in_clear(server)).map(address).collect()
    }

    /// Says once in a process which they are.
    pub(super) fn warn_of_clear_text(&self) {
        static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        for server in self.in_clear() {
            if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(server.clone()) {
                tracing::warn!(
                    server,
                    "the connection to PostgreSQL may be neither encrypted nor verified: set sslmode=verify-full in \
                     DATABASE_URL, with sslrootcert for an authority of your own"
                );
            }
        }
    }
}

impl From<PgConnectOptions> for Servers {
    fn from(options: PgConnectOptions) -> Self {
        Self::new(vec![options], Target::Any, super::url::CONNECT)
    }
}

/// Where a server is, which is no secret.
fn address(server: &PgConnectOptions) -> String {
    match server.get_socket() {
        Some(directory) => format!("{}/.s.PGSQL.{}", directory.display(), server.get_port()),
        None if server.get_host().contains(':') => format!("[{}]:{}", server.get_host(), server.get_port()),
        None => format!("{}:{}", server.get_host(), server.get_port()),
    }
}

/// Whether the connection leaves this machine and need not be encrypted.
fn is_in_clear(server: &PgConnectOptions) -> bool {
    let is_optional = matches!(server.get_ssl_mode(), PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer);
    is_optional && server.get_socket().is_none() && !stays_here(server.get_host())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_attribute_wants_the_servers_that_libpq_names() {
        // A primary, one that is set to read only, a standby.
        let servers = [(false, false), (false, true), (true, true)];
        for (name, wanted) in [
            ("any", [true, true, true]),
            ("read-write", [true, false, false]),
            ("read-only", [false, true, true]),
            ("primary", [true, true, false]),
            ("standby", [false, false, true]),
            ("prefer-standby", [false, false, true]),
        ] {
            let target = Target::named(name).unwrap();
            let fits = servers.map(|(standby, read_only)| target.misfit(standby, read_only).is_none());
            assert_eq!((fits, target.name()), (wanted, name));
        }
        assert_eq!(Target::named("Read-Write"), None);
    }

    #[test]
    fn what_leaves_the_machine_has_to_be_encrypted() {
        let server = |host: &str, mode| PgConnectOptions::new_without_pgpass().host(host).ssl_mode(mode);
        for host in ["localhost", "127.0.0.1", "::1", "/run/postgresql"] {
            assert!(!is_in_clear(&server(host, PgSslMode::Disable)), "{host}");
        }
        for (mode, clear) in [
            (PgSslMode::Disable, true),
            (PgSslMode::Prefer, true),
            (PgSslMode::Require, false),
            (PgSslMode::VerifyFull, false),
        ] {
            assert_eq!(is_in_clear(&server("db", mode)), clear, "{mode:?}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        let servers = Servers::from(PgConnectOptions::new_without_pgpass().host("db").port(1).password("hunter2"));
        assert_eq!(format!("{servers:?}"), "[\"db:1\"]");
    }
}
