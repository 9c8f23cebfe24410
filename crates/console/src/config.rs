//! What a console shows, where, and to whom.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};

use crate::access::Access;

/// How long a statement of a page may take.
const STATEMENT: Duration = Duration::from_secs(2);

/// What a console shows, where, and to whom.
#[derive(Debug, Clone)]
pub struct ConsoleConfig {
    /// The publisher's database, which may be a subscriber's too, with a login of the role `reader`.
    pub publisher: PostgresConfig,
    /// Other databases of subscribers, with logins of the role `reader`. Defaults to none.
    pub subscribers: Vec<PostgresConfig>,
    /// NATS, with the user `operator`.
    pub nats: NatsConfig,
    /// The HTTP monitoring port of a NATS server, for the page of the doctor. Defaults to none.
    pub nats_monitor: Option<String>,
    /// The names under which the outbox is published.
    pub naming: Naming,
    /// Where browsers find it.
    pub public_url: PublicUrl,
    /// Who may see it. Defaults to whoever reaches a loopback address, as [`Role::Reader`](crate::Role::Reader).
    pub access: Access,
}

impl ConsoleConfig {
    /// With defaults for the rest.
    pub fn new(publisher: PostgresConfig, nats: NatsConfig, naming: Naming, public_url: PublicUrl) -> Self {
        let (subscribers, nats_monitor, access) = (Vec::new(), None, Access::Loopback);
        Self { publisher, subscribers, nats, nats_monitor, naming, public_url, access }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if let Access::Loopback = self.access
            && !self.public_url.is_loopback()
        {
            return Err(Error::new(
                ErrorKind::Config,
                format!(
                    "without a login the console is for a loopback address only, and {} is none: name a users file (--users) or a \
                     proxy that logs people in (--trust-proxy)",
                    self.public_url
                ),
            ));
        }
        if self.databases().any(|database| database.pooled) {
            return Err(Error::new(
                ErrorKind::Config,
                "the console connects to PostgreSQL itself: behind a pooler in transaction mode its sessions would not be read-only",
            ));
        }
        Ok(())
    }

    /// The publisher's database first.
    pub(crate) fn databases(&self) -> impl Iterator<Item = PostgresConfig> {
        let only_reading = |database: &PostgresConfig| PostgresConfig { reading: Some(STATEMENT), ..database.clone() };
        std::iter::once(&self.publisher).chain(&self.subscribers).map(only_reading)
    }

    pub(crate) fn publisher(&self) -> PostgresConfig {
        PostgresConfig { reading: Some(STATEMENT), ..self.publisher.clone() }
    }
}

/// The address at which browsers find the console, such as `https://ops.example.com/outbox`. Requests for another host are
/// refused, so that no page of a stranger can pretend to be this one (DNS rebinding).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    secure: bool,
    authority: String,
    path: String,
}

impl PublicUrl {
    /// What stands before the path of each page: empty, or `/outbox`.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Whether cookies are for HTTPS only.
    pub(crate) fn is_secure(&self) -> bool {
        self.secure
    }

    pub(crate) fn origin(&self) -> String {
        format!("http{}://{}", if self.secure { "s" } else { "" }, self.authority)
    }

    /// Whether a request for this host is for the console. A loopback address has several names.
    pub(crate) fn is_for(&self, host: &str) -> bool {
        host == self.authority || (self.is_loopback() && is_loopback(name(host)) && port(host) == port(&self.authority))
    }

    /// Whether a page of this origin is one of the console's.
    pub(crate) fn is_origin(&self, origin: &str) -> bool {
        let scheme = if self.secure { "https://" } else { "http://" };
        origin.strip_prefix(scheme).is_some_and(|host| self.is_for(host))
    }

    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(name(&self.authority))
    }
}

fn name(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => authority,
    }
}

fn port(authority: &str) -> &str {
    &authority[name(authority).len()..]
}

fn is_loopback(name: &str) -> bool {
    matches!(name, "localhost" | "[::1]")
        || name.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

impl FromStr for PublicUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not of the form https://host, https://host:port or https://host/path");
        let (secure, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(wrong()),
        };
        let (authority, path) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
        let in_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | '~');
        let path = path.trim_end_matches('/');
        if authority.is_empty() || !authority.chars().all(legal) || !path.chars().all(in_path) || path.contains("//") {
            return Err(wrong());
        }
        let path = if path.is_empty() { String::new() } else { format!("/{path}") };
        Ok(Self { secure, authority: authority.to_ascii_lowercase(), path })
    }
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> PublicUrl {
        text.parse().unwrap_or_else(|problem| panic!("{problem}"))
    }

    #[test]
    fn a_public_url_has_host_and_path() {
        let ops = url("https://ops.example.com/outbox/");
        assert_eq!((ops.path(), ops.is_secure(), ops.origin().as_str()), ("/outbox", true, "https://ops.example.com"));
        assert_eq!(url("http://127.0.0.1:9467").to_string(), "http://127.0.0.1:9467");
        for wrong in [
            "ops.example.com",
            "ftp://ops",
            "https://",
            "https://a b",
            "https://me@ops",
            "https://ops/a?b",
            "https://ops/a//b",
        ] {
            assert!(wrong.parse::<PublicUrl>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_its_own_host_is_served() {
        let ops = url("https://ops.example.com");
        assert!(ops.is_for("ops.example.com") && ops.is_origin("https://ops.example.com"));
        for stranger in ["evil.example.com", "ops.example.com:8080", "127.0.0.1", "localhost", ""] {
            assert!(!ops.is_for(stranger), "{stranger}");
        }
        assert!(!ops.is_origin("http://ops.example.com") && !ops.is_origin("null"));
        let here = url("http://127.0.0.1:9467");
        for name in ["127.0.0.1:9467", "localhost:9467", "[::1]:9467"] {
            assert!(here.is_for(name), "{name}");
        }
        for stranger in ["localhost", "localhost:80", "rebound.example.com:9467", "127.0.0.1.example.com:9467"] {
            assert!(!here.is_for(stranger), "{stranger}");
        }
    }
}
