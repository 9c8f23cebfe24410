//! The database's URL. Each of libpq's words works or is refused by name: one that is not understood may have been the one
//! that asked for encryption. Nothing of a value gets into an error, because a URL can be cut in the wrong place, and then a
//! piece of its password stands where something harmless is expected.

mod words;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::servers::{Servers, Target};
use crate::config::read_file;
use crate::error::{Error, ErrorKind};
use words::Given;

/// How long to wait for a server that does not even refuse.
pub(super) const CONNECT: Duration = Duration::from_secs(10);

/// What errors call the setting.
const SETTING: &str = "DATABASE_URL";

/// What a URL asks for, completed from the environment as libpq does. `variable` reads one of it.
pub(super) fn read(url: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<Servers, Error> {
    let url = url.trim();
    let Parts { user, password, hosts, ports, database, parameters } = Parts::of(url)?;
    let mut given = Given::read(&parameters, has_stray_at(url))?;
    given.set_unless_given("user", user);
    given.set_unless_given("password", password);
    given.set_unless_given("dbname", database);
    given.set_unless_given("host", hosts);
    given.set_unless_given("port", ports);
    given.complete(variable)?;
    if given.get("dbname").is_some_and(|name| name.contains("://")) {
        return Err(given.refuse("dbname", "is a URL, not the name of a database"));
    }

    let target = given.target()?;
    let security = Security::of(&given, variable, has_stray_at(url))?;
    check_password_file(&given, variable)?;
    let places = places(&given)?;
    let target = target.unwrap_or(if places.len() > 1 { Target::ReadWrite } else { Target::Any });
    let servers = places.into_iter().map(|place| server(&given, place, &security)).collect::<Result<_, _>>()?;
    Ok(Servers::new(servers, target, given.seconds("connect_timeout")?.unwrap_or(CONNECT)))
}

/// A URL taken apart, decoded but for the parameters.
#[derive(Default)]
struct Parts {
    user: Option<String>,
    password: Option<String>,
    /// Separated by commas, as in the parameter `host`.
    hosts: Option<String>,
    ports: Option<String>,
    database: Option<String>,
    parameters: String,
}

impl Parts {
    fn of(url: &str) -> Result<Self, Error> {
        let rest = without_scheme(url)?;
        // As libpq does: what is in front of the last '@' before the first '/' is the login, a '?' in it included.
        let until_slash = rest.find('/').unwrap_or(rest.len());
        let (login, address) = match rest[..until_slash].rfind('@') {
            Some(at) => (Some(&rest[..at]), &rest[at + 1..]),
            None => (None, rest),
        };
        let (address, path) = address.split_at(address.find(['/', '?']).unwrap_or(address.len()));
        let (database, parameters) = path.split_once('?').unwrap_or((path, ""));
        let database = database.strip_prefix('/').unwrap_or(database);
        if database.contains(['@', '/']) {
            return Err(refuse("an '@' or a '/' stands behind the host: in a password write them as %40 and %2F"));
        }
        let mut parts = Self { parameters: parameters.into(), ..Self::default() };
        parts.database = Some(decoded(database)?).filter(|name| !name.is_empty());
        if let Some(login) = login {
            let (user, password) = login.split_once(':').map_or((login, None), |(user, word)| (user, Some(word)));
            parts.user = Some(decoded(user)?).filter(|user| !user.is_empty());
            parts.password = password.map(decoded).transpose()?.filter(|password| !password.is_empty());
        }
        parts.find_hosts(address)?;
        Ok(parts)
    }

    /// `host:port` and more of them, separated by commas; an IPv6 address in brackets.
    fn find_hosts(&mut self, address: &str) -> Result<(), Error> {
        if address.is_empty() {
            return Ok(());
        }
        let (mut hosts, mut ports) = (Vec::new(), Vec::new());
        for one in address.split(',') {
            let (host, port) = match one.strip_prefix('[').map(|one| one.split_once(']')) {
                Some(Some((host, ""))) => (host, ""),
                Some(Some((host, rest))) => (host, rest.strip_prefix(':').ok_or_else(malformed_host)?),
                Some(None) => return Err(malformed_host()),
                None => one.split_once(':').unwrap_or((one, "")),
            };
            if port.contains(':') {
                return Err(refuse("an IPv6 address needs brackets, as in postgres://user@[::1]:5432/database"));
            }
            hosts.push(decoded(host)?);
            ports.push(port);
        }
        if ports.iter().any(|port| !port.is_empty()) {
            self.ports = Some(ports.join(","));
        }
        self.hosts = Some(hosts.join(",")).filter(|hosts| !hosts.is_empty());
        Ok(())
    }
}

/// What is behind `postgres://`.
fn without_scheme(url: &str) -> Result<&str, Error> {
    if let Some(rest) = url.strip_prefix("postgresql://").or_else(|| url.strip_prefix("postgres://")) {
        return Ok(rest);
    }
    let is_scheme = |text: &&str| {
        text.len() <= 20
            && text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
    };
    let jdbc = url.starts_with("jdbc:").then_some("jdbc");
    let named = jdbc.or_else(|| url.split_once("://").map(|(scheme, _)| scheme).filter(is_scheme));
    Err(refuse(match named {
        Some(scheme) => format!("{scheme}: is not its scheme; it has to be of the form {FORM}"),
        None => format!("it is not of the form {FORM}"),
    }))
}

const FORM: &str = "postgres://user:password@host:5432/database";

/// Whether an '@' stands behind the host, so that what looks like a parameter may be a piece of a password.
fn has_stray_at(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split_once('/').is_some_and(|(_, behind)| behind.contains('@'))
}

/// A host and its port, as far as they are given.
type Place = (Option<String>, Option<u16>);

/// Where the servers are; one place without anything when nothing is said.
fn places(given: &Given) -> Result<Vec<Place>, Error> {
    let list = |name: &str| given.get(name).map(|text| text.split(',').map(str::trim).collect::<Vec<_>>());
    let (hosts, addresses) = (list("host"), list("hostaddr"));
    if hosts.is_some() && addresses.is_some() {
        return Err(given.refuse("hostaddr", "is not supported beside a host: name the one or the other"));
    }
    if let Some(addresses) = &addresses
        && addresses.iter().any(|address| address.parse::<std::net::IpAddr>().is_err())
    {
        return Err(given.refuse("hostaddr", "is not an IP address"));
    }
    let named = hosts.or(addresses).unwrap_or_default();
    let is_legal = |host: &&str| {
        let legal = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
        host.starts_with('/') || (!host.is_empty() && host.chars().all(legal))
    };
    if !named.iter().all(is_legal) {
        return Err(malformed_host());
    }
    let mut ports = Vec::new();
    for port in list("port").unwrap_or_default() {
        let number = || port.parse().ok().filter(|port| *port > 0);
        let wrong = || given.refuse("port", "is not a number from 1 to 65535");
        ports.push(if port.is_empty() { None } else { Some(number().ok_or_else(wrong)?) });
    }
    match (named.len(), ports.len()) {
        (_, 0) => ports = vec![None; named.len().max(1)],
        (hosts, 1) => ports = vec![ports[0]; hosts.max(1)],
        (hosts, ports) if hosts != ports => {
            return Err(given.refuse("port", "names another number of ports than there are hosts"));
        }
        _ => {}
    }
    let hosts = if named.is_empty() { vec![None] } else { named.into_iter().map(|host| Some(host.into())).collect() };
    Ok(hosts.into_iter().zip(ports).collect())
}

/// How the connection is protected.
struct Security {
    mode: PgSslMode,
    root: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl Security {
    /// `is_secret` when the name of a file may be a piece of a password.
    fn of(given: &Given, variable: &dyn Fn(&str) -> Option<String>, is_secret: bool) -> Result<Self, Error> {
        let file = |name: &str| given.file(name);
        let (mut root, certificate, key) = (file("sslrootcert")?, file("sslcert")?, file("sslkey")?);
        let mut mode = given.ssl_mode()?;
        match (root.as_deref(), mode) {
            (Some("system"), None | Some(PgSslMode::VerifyFull)) => {
                (root, mode) = (Some(String::new()), Some(PgSslMode::VerifyFull));
            }
            (Some("system"), _) => {
                return Err(given.refuse("sslrootcert", "is system, which needs sslmode=verify-full"));
            }
            // As libpq does.
            (Some(_), Some(PgSslMode::Require)) => mode = Some(PgSslMode::VerifyCa),
            // The driver would look for a file without a name.
            (None, _) if variable("PGSSLROOTCERT").is_some_and(|value| value.is_empty()) => root = Some(String::new()),
            _ => {}
        }
        for (name, value) in [("sslrootcert", &root), ("sslcert", &certificate), ("sslkey", &key)] {
            if let Some(path) = value.as_deref().filter(|value| !value.is_empty() && !is_pem(value)) {
                let read = read_file(Path::new(path), &given.called(name));
                read.map_err(
                    |error| if is_secret { given.refuse(name, "names no file that can be read") } else { error },
                )?;
            }
        }
        if certificate.is_some() != key.is_some() {
            let (there, missing) = if key.is_some() { ("sslkey", "sslcert") } else { ("sslcert", "sslkey") };
            return Err(given.refuse(there, &format!("needs {missing} beside it")));
        }
        Ok(Self { mode: mode.unwrap_or_default(), root, certificate, key })
    }
}

/// Whether it is the certificate or the key itself, rather than the name of a file with one.
fn is_pem(value: &str) -> bool {
    value.trim_start().starts_with("-----BEGIN")
}

/// One server's options, in the only form in which the driver looks into the password file.
fn server(given: &Given, place: Place, security: &Security) -> Result<PgConnectOptions, Error> {
    let (host, port) = place;
    let mut parameters: Vec<(String, String)> = given.for_the_driver();
    parameters.extend(host.iter().map(|host| ("host".into(), host.clone())));
    parameters.extend(port.map(|port| ("port".into(), port.to_string())));
    let encoded = parameters.iter().map(|(name, value)| {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        format!("{}={}", encode(name), encode(value))
    });
    let url = format!("postgres:///?{}", encoded.collect::<Vec<_>>().join("&"));
    let mut options = PgConnectOptions::from_str(&url).map_err(|_| refuse(format!("it is not of the form {FORM}")))?;
    let Security { mode, root, certificate, key } = security;
    let is_socket = options.get_socket().is_some() || options.get_host().starts_with('/');
    // As libpq does: nobody listens on the way to a socket, and the server offers no TLS there.
    options = options.ssl_mode(if is_socket { PgSslMode::Disable } else { *mode });
    options = match root {
        // The system's authorities, whatever PGSSLROOTCERT says.
        Some(root) if root.is_empty() => options.ssl_root_cert_from_pem(Vec::new()),
        Some(root) if is_pem(root) => options.ssl_root_cert_from_pem(root.clone().into_bytes()),
        Some(root) => options.ssl_root_cert(root),
        None => options,
    };
    options = match certificate {
        Some(certificate) if is_pem(certificate) => options.ssl_client_cert_from_pem(certificate),
        Some(certificate) => options.ssl_client_cert(certificate),
        None => options,
    };
    Ok(match key {
        Some(key) if is_pem(key) => options.ssl_client_key_from_pem(key),
        Some(key) => options.ssl_client_key(key),
        None => options,
    })
}

/// The driver passes over a password file that it cannot read or does not trust.
fn check_password_file(given: &Given, variable: &dyn Fn(&str) -> Option<String>) -> Result<(), Error> {
    let Some(file) = variable("PGPASSFILE").filter(|file| !file.is_empty()) else { return Ok(()) };
    if given.get("password").is_some() {
        return Ok(());
    }
    read_file(Path::new(&file), "PGPASSFILE")?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if std::fs::metadata(&file).is_ok_and(|file| file.permissions().mode() & 0o077 != 0) {
            return Err(Error::new(
                ErrorKind::Config,
                format!("others may read the file {file} (PGPASSFILE): run chmod 0600 on it"),
            ));
        }
    }
    Ok(())
}

/// Without its percent signs.
fn decoded(text: &str) -> Result<String, Error> {
    let is_escaped = |at: usize| text.get(at + 1..at + 3).is_some_and(|hex| hex.chars().all(|c| c.is_ascii_hexdigit()));
    if !text.match_indices('%').all(|(at, _)| is_escaped(at)) {
        return Err(refuse("a '%' is not followed by two hexadecimal digits: write it as %25"));
    }
    let text = percent_decode_str(text).decode_utf8().map_err(|_| refuse("it is not UTF-8"))?;
    if text.contains('\0') {
        return Err(refuse("it holds a NUL"));
    }
    Ok(text.into_owned())
}

fn malformed_host() -> Error {
    refuse("its host is malformed")
}

fn refuse(what: impl AsRef<str>) -> Error {
    Error::new(ErrorKind::Config, format!("{SETTING} cannot be used: {}", what.as_ref()))
}

#[cfg(test)]
mod tests;
