//! The words of libpq, and what becomes of each.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::postgres::PgSslMode;

use super::{SETTING, decoded, refuse};
use crate::error::{Error, ErrorKind};
use crate::postgres::servers::Target;

/// What becomes of a word.
enum Becomes {
    /// It works.
    Works,
    /// Only these values, which ask for what happens anyway.
    Only(&'static [&'static str]),
    /// It is refused, and why.
    Unsupported(&'static str),
}
use Becomes::{Only, Unsupported, Works};

const KEEPALIVE: &str = "a connection that dies without a word is given up after a minute anyway";
const NO_KERBEROS: &str = "there is no Kerberos here";
const NO_OAUTH: &str = "there is no OAuth here";

/// libpq's parameters, the variables of the environment that stand for them, and what becomes of them. A variable whose
/// value cannot do harm when nobody looks at it is left out.
const WORDS: &[(&str, &str, Becomes)] = &[
    ("host", "PGHOST", Works),
    ("hostaddr", "PGHOSTADDR", Works),
    ("port", "PGPORT", Works),
    ("dbname", "PGDATABASE", Works),
    ("user", "PGUSER", Works),
    ("password", "PGPASSWORD", Works),
    ("options", "PGOPTIONS", Works),
    ("application_name", "PGAPPNAME", Works),
    ("sslmode", "PGSSLMODE", Works),
    ("ssl", "", Only(&["true"])),
    ("sslrootcert", "PGSSLROOTCERT", Works),
    ("sslcert", "PGSSLCERT", Works),
    ("sslkey", "PGSSLKEY", Works),
    ("target_session_attrs", "PGTARGETSESSIONATTRS", Works),
    ("connect_timeout", "PGCONNECT_TIMEOUT", Works),
    // The driver's own, for services that give the same URL to their pool.
    ("statement-cache-capacity", "", Works),
    ("client_encoding", "", Only(&["UTF8", "utf8", "UTF-8", "utf-8", "auto"])),
    ("channel_binding", "PGCHANNELBINDING", Only(&["disable", "prefer"])),
    ("gssencmode", "PGGSSENCMODE", Only(&["disable", "prefer"])),
    ("gssdelegation", "PGGSSDELEGATION", Only(&["0"])),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS", Only(&["disable"])),
    ("replication", "", Only(&["false", "off", "no", "0"])),
    ("sslnegotiation", "PGSSLNEGOTIATION", Only(&["postgres"])),
    ("sslcompression", "PGSSLCOMPRESSION", Only(&["0"])),
    ("sslcertmode", "PGSSLCERTMODE", Only(&["allow"])),
    ("sslsni", "PGSSLSNI", Only(&["1"])),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Only(&["TLSv1", "TLSv1.1", "TLSv1.2"])),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Only(&["TLSv1.3"])),
    ("min_protocol_version", "PGMINPROTOCOLVERSION", Only(&["3.0"])),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION", Only(&["3.0", "3.2", "latest"])),
    ("passfile", "", Unsupported("set PGPASSFILE instead")),
    ("fallback_application_name", "", Unsupported("write application_name")),
    ("keepalives", "", Unsupported(KEEPALIVE)),
    ("keepalives_idle", "", Unsupported(KEEPALIVE)),
    ("keepalives_interval", "", Unsupported(KEEPALIVE)),
    ("keepalives_count", "", Unsupported(KEEPALIVE)),
    ("tcp_user_timeout", "", Unsupported(KEEPALIVE)),
    ("require_auth", "PGREQUIREAUTH", Unsupported("use sslmode=verify-full, which knows the server")),
    ("requirepeer", "PGREQUIREPEER", Unsupported("use sslmode=verify-full over TCP, which knows the server")),
    ("requiressl", "PGREQUIRESSL", Unsupported("write sslmode=require, or better verify-full")),
    ("sslpassword", "", Unsupported("use a key file without a passphrase")),
    ("sslcrl", "PGSSLCRL", Unsupported("lists of revoked certificates are not read")),
    ("sslcrldir", "PGSSLCRLDIR", Unsupported("lists of revoked certificates are not read")),
    ("sslkeylogfile", "", Unsupported("keys are not written anywhere")),
    ("service", "PGSERVICE", Unsupported("write what the service's file says into the URL")),
    ("servicefile", "", Unsupported("write what the service's file says into the URL")),
    ("krbsrvname", "", Unsupported(NO_KERBEROS)),
    ("gsslib", "", Unsupported(NO_KERBEROS)),
    ("scram_client_key", "", Unsupported("use a password")),
    ("scram_server_key", "", Unsupported("use a password")),
    ("oauth_issuer", "", Unsupported(NO_OAUTH)),
    ("oauth_client_id", "", Unsupported(NO_OAUTH)),
    ("oauth_client_secret", "", Unsupported(NO_OAUTH)),
    ("oauth_scope", "", Unsupported(NO_OAUTH)),
];

/// What the driver itself also calls these words.
const ALIASES: &[(&str, &str)] = &[
    ("ssl-mode", "sslmode"),
    ("ssl-root-cert", "sslrootcert"),
    ("ssl-ca", "sslrootcert"),
    ("ssl-cert", "sslcert"),
    ("ssl-key", "sslkey"),
];

/// What is given, by libpq's names, each with what errors call it.
#[derive(Default)]
pub(super) struct Given {
    values: BTreeMap<&'static str, (String, String)>,
    /// The driver's `options[name]=value`.
    settings: Vec<(String, String)>,
}

impl Given {
    /// Reads what stands behind the '?'. A name is not shown when it may be a piece of a password.
    pub(super) fn read(parameters: &str, is_secret: bool) -> Result<Self, Error> {
        let mut given = Self::default();
        for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
            let Some((name, value)) = parameter.split_once('=') else {
                return Err(refuse("a parameter has no value: write name=value"));
            };
            let (name, value) = (decoded(name)?, decoded(value)?);
            let canonical = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(&*name, |(_, name)| *name);
            let called = format!("{name} in {SETTING}");
            if name.strip_prefix("options[").is_some_and(|name| name.ends_with(']')) && !is_secret {
                given.settings.push((name, value));
            } else if let Some((known, _, becomes)) = WORDS.iter().find(|(known, ..)| *known == canonical) {
                admit(becomes, &called, &value)?;
                if given.values.insert(known, (value, called.clone())).is_some() {
                    return Err(Error::new(ErrorKind::Config, format!("{called} is given twice")));
                }
            } else {
                return Err(unknown(&name, is_secret));
            }
        }
        if given.get("ssl").is_some() {
            if given.get("sslmode").is_some() {
                return Err(given.refuse("ssl", "is given beside sslmode: take one of them away"));
            }
            // As libpq does.
            given.values.insert("sslmode", ("require".into(), format!("ssl in {SETTING}")));
        }
        Ok(given)
    }

    /// What another place of the URL says, over which a parameter wins.
    pub(super) fn set_unless_given(&mut self, name: &'static str, value: Option<String>) {
        if let Some(value) = value {
            self.values.entry(name).or_insert_with(|| (value, format!("{name} in {SETTING}")));
        }
    }

    /// What the URL does not say. A variable that is set to nothing does not count.
    pub(super) fn complete(&mut self, variable: &dyn Fn(&str) -> Option<String>) -> Result<(), Error> {
        let is_placed = self.get("host").is_some() || self.get("hostaddr").is_some();
        for (name, variable_name, becomes) in WORDS {
            let hidden = self.values.contains_key(name) || (is_placed && matches!(*name, "host" | "hostaddr"));
            if variable_name.is_empty() || hidden {
                continue;
            }
            let Some(value) = variable(variable_name).filter(|value| !value.is_empty()) else { continue };
            admit(becomes, variable_name, &value)?;
            self.values.insert(name, (value, (*variable_name).into()));
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(value, _)| value.as_str())
    }

    /// What errors call it.
    pub(super) fn called(&self, name: &str) -> String {
        self.values.get(name).map_or_else(|| format!("{name} in {SETTING}"), |(_, called)| called.clone())
    }

    pub(super) fn refuse(&self, name: &str, why: &str) -> Error {
        Error::new(ErrorKind::Config, format!("{} {why}", self.called(name)))
    }

    /// The name of a file, or what would be in it.
    pub(super) fn file(&self, name: &str) -> Result<Option<String>, Error> {
        match self.get(name) {
            Some("") => Err(self.refuse(name, "is empty")),
            value => Ok(value.map(str::to_string)),
        }
    }

    pub(super) fn seconds(&self, name: &str) -> Result<Option<Duration>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(seconds @ 1..=3600) => Ok(Some(Duration::from_secs(seconds))),
            _ => Err(self.refuse(name, "is not a number of seconds from 1 to 3600")),
        }
    }

    pub(super) fn target(&self) -> Result<Option<Target>, Error> {
        let Some(value) = self.get("target_session_attrs") else { return Ok(None) };
        Target::named(value).map(Some).ok_or_else(|| {
            let why = "is none of any, read-write, read-only, primary, standby and prefer-standby";
            self.refuse("target_session_attrs", why)
        })
    }

    pub(super) fn ssl_mode(&self) -> Result<Option<PgSslMode>, Error> {
        let Some(value) = self.get("sslmode") else { return Ok(None) };
        Ok(Some(match value {
            "disable" => PgSslMode::Disable,
            "prefer" => PgSslMode::Prefer,
            "require" => PgSslMode::Require,
            "verify-ca" => PgSslMode::VerifyCa,
            "verify-full" => PgSslMode::VerifyFull,
            "allow" => {
                return Err(self.refuse("sslmode", "is allow, which is not supported: write prefer or verify-full"));
            }
            _ => return Err(self.refuse("sslmode", "is none of disable, prefer, require, verify-ca and verify-full")),
        }))
    }

    /// What the driver understands by itself. Hosts and TLS are told to it in another way.
    pub(super) fn for_the_driver(&self) -> Vec<(String, String)> {
        let plain = ["dbname", "user", "password", "options", "application_name", "statement-cache-capacity"];
        let plain = plain.into_iter().filter_map(|name| Some((name.to_string(), self.get(name)?.to_string())));
        plain.chain(self.settings.iter().cloned()).collect()
    }
}

fn admit(becomes: &Becomes, called: &str, value: &str) -> Result<(), Error> {
    let said = match becomes {
        Works => return Ok(()),
        Only(values) if values.contains(&value) => return Ok(()),
        Only(values) => format!("{called} is supported with the value {} only", values.join(" or ")),
        Unsupported(why) => format!("{called} is not supported: {why}"),
    };
    Err(Error::new(ErrorKind::Config, said))
}

fn unknown(name: &str, is_secret: bool) -> Error {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '[' | ']');
    if is_secret || name.len() > 40 || name.is_empty() || !name.chars().all(is_plain) {
        return refuse(
            "it has an unknown parameter, whose name is not shown; in a password write '/' as %2F and '@' as %40",
        );
    }
    let bare = |name: &str| name.to_ascii_lowercase().replace(['_', '-'], "");
    let meant = |known: &&str| bare(known) == bare(name) || (name.len() >= 4 && bare(known).starts_with(&bare(name)));
    let hint = match WORDS.iter().map(|(known, ..)| *known).find(meant) {
        Some(known) => format!(": is {known} meant?"),
        None => String::new(),
    };
    refuse(format!("its parameter {name} is unknown{hint}"))
}
