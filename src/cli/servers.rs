//! Where PostgreSQL and NATS are, and who connects to them.
//!
//! Secrets have no flags of their own, because everybody on the machine can see command lines: they come from files or
//! from the environment.

use std::env;
use std::path::PathBuf;

use clap::Args;

use super::NamingArgs;
use aftercommit_core::config::{
    ClientCertificate, Naming, NatsAuth, NatsConfig, NatsTls, PostgresConfig, Schema, Secret,
};
use aftercommit_core::error::{Error, ErrorKind};

/// Where PostgreSQL is.
#[derive(Args)]
#[command(next_help_heading = "PostgreSQL")]
pub struct PostgresArgs {
    /// The database, as postgres://user@host:5432/database; with a password better in the environment or a file
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, default_value = "", hide_default_value = true)]
    database_url: String,
    /// A file with the URL instead
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE")]
    database_url_file: Option<PathBuf>,
    /// PgBouncer, or another pooler, stands in between in transaction mode
    #[arg(long, env = "AFTERCOMMIT_PGBOUNCER")]
    pgbouncer: bool,
    /// The schema with the tables and functions of aftercommit
    #[arg(long, env = "AFTERCOMMIT_SCHEMA", value_name = "NAME", default_value_t)]
    schema: Schema,
}

impl PostgresArgs {
    /// What they say.
    ///
    /// # Errors
    /// When a file cannot be read, or settings contradict each other.
    pub fn config(&self) -> Result<PostgresConfig, Error> {
        let names = ("DATABASE_URL (--database-url)", "DATABASE_URL_FILE (--database-url-file)");
        let url = url(&self.database_url, &self.database_url_file, names)?;
        Ok(PostgresConfig { pooled: self.pgbouncer, schema: self.schema.clone(), ..PostgresConfig::new(url) })
    }
}

/// Where the outbox is, for somebody who works in another database.
#[derive(Args)]
#[command(next_help_heading = "PostgreSQL")]
pub(super) struct OutboxArgs {
    /// The publisher's database, to read there what the stream does not hold any more, without a relay; with a password
    /// better in the environment or a file
    #[arg(
        long,
        env = "OUTBOX_DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        default_value = "",
        hide_default_value = true
    )]
    outbox_database: String,
    /// A file with the URL instead
    #[arg(long, env = "OUTBOX_DATABASE_URL_FILE", value_name = "FILE")]
    outbox_database_file: Option<PathBuf>,
    /// The schema of aftercommit there. Defaults to --schema
    #[arg(long, env = "OUTBOX_SCHEMA", value_name = "NAME")]
    outbox_schema: Option<Schema>,
}

impl OutboxArgs {
    /// None when nothing is given; `own` is the database in which somebody works. The pooler stands in front of both databases
    /// or of none.
    pub(super) fn config(&self, own: &PostgresConfig) -> Result<Option<PostgresConfig>, Error> {
        let names = ("OUTBOX_DATABASE_URL (--outbox-database)", "OUTBOX_DATABASE_URL_FILE (--outbox-database-file)");
        let url = url(&self.outbox_database, &self.outbox_database_file, names)?;
        let schema = self.outbox_schema.clone().unwrap_or_else(|| own.schema.clone());
        Ok(Some(PostgresConfig { url, schema, ..own.clone() }).filter(|config| !config.url.is_empty()))
    }
}

/// A URL, or what a file has of it; `names` are those of both settings.
fn url(url: &str, file: &Option<PathBuf>, names: (&str, &str)) -> Result<String, Error> {
    match file.clone() {
        None => Ok(url.trim().into()),
        Some(_) if !url.is_empty() => Err(both(names.0, names.1)),
        Some(file) => Secret::File(file).read(names.1),
    }
}

/// Where NATS is.
#[derive(Args)]
#[command(next_help_heading = "NATS")]
pub struct NatsArgs {
    /// The NATS servers, as nats://host:port or tls://host:port, separated by commas
    #[arg(long, env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// A NATS credentials file
    #[arg(long, env = "NATS_CREDS", value_name = "FILE")]
    nats_creds: Option<PathBuf>,
    /// A file with the seed of an nkey
    #[arg(long, env = "NATS_NKEY", value_name = "FILE")]
    nats_nkey: Option<PathBuf>,
    /// A file with a token; or set NATS_TOKEN to the token itself
    #[arg(long, env = "NATS_TOKEN_FILE", value_name = "FILE")]
    nats_token_file: Option<PathBuf>,
    /// A user with a password
    #[arg(long, env = "NATS_USER", value_name = "NAME")]
    nats_user: Option<String>,
    /// A file with the user's password; or set NATS_PASSWORD to the password itself
    #[arg(long, env = "NATS_PASSWORD_FILE", value_name = "FILE")]
    nats_password_file: Option<PathBuf>,
    /// CA certificates to trust instead of the system's
    #[arg(long, env = "NATS_CA", value_name = "FILE")]
    nats_ca: Option<PathBuf>,
    /// The certificate to show to the server
    #[arg(long, env = "NATS_CERT", value_name = "FILE")]
    nats_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, env = "NATS_KEY", value_name = "FILE")]
    nats_key: Option<PathBuf>,
    /// Start with TLS before the server's greeting
    #[arg(long, env = "NATS_TLS_FIRST")]
    nats_tls_first: bool,
    /// Where answers come, for a user who has an inbox of its own, such as _INBOX_worker.receipts
    #[arg(long, env = "NATS_INBOX_PREFIX", value_name = "SUBJECT")]
    nats_inbox_prefix: Option<String>,
    /// The first tokens of JetStream's API, for a user whose account imports it as something else than $JS.API, such as
    /// JS.API
    #[arg(long, env = "NATS_API_PREFIX", value_name = "SUBJECT")]
    nats_api_prefix: Option<String>,
    /// The JetStream domain, for a stream behind a leaf node; short for the API prefix $JS.DOMAIN.API
    #[arg(long, env = "NATS_DOMAIN", value_name = "DOMAIN")]
    nats_domain: Option<String>,
}

/// The first tokens of the API of a JetStream domain.
fn domain_prefix(domain: &str) -> Result<String, Error> {
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '.' | '*' | '>');
    if domain.chars().all(legal) {
        return Ok(format!("$JS.{domain}.API"));
    }
    Err(refuse(format!(
        "{domain:?} cannot be a JetStream domain (NATS_DOMAIN or --nats-domain): take the name that stands in the block \
         jetstream of the server's configuration, such as hub"
    )))
}

impl NatsArgs {
    /// What they say.
    ///
    /// # Errors
    /// When a file cannot be read, or settings contradict each other.
    pub fn config(&self) -> Result<NatsConfig, Error> {
        self.with(environment("NATS_TOKEN"), environment("NATS_PASSWORD"))
    }

    /// With the secrets that come from the environment only.
    fn with(&self, token: Option<Secret>, password: Option<Secret>) -> Result<NatsConfig, Error> {
        let certificate = match (self.nats_cert.clone(), self.nats_key.clone()) {
            (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
            (None, None) => None,
            (Some(_), None) => return Err(refuse("NATS_CERT (--nats-cert) needs NATS_KEY (--nats-key)")),
            (None, Some(_)) => return Err(refuse("NATS_KEY (--nats-key) needs NATS_CERT (--nats-cert)")),
        };
        let tls = NatsTls { ca: self.nats_ca.clone(), certificate, first: self.nats_tls_first };
        let given = |prefix: &Option<String>| prefix.clone().filter(|prefix| !prefix.is_empty());
        let inbox_prefix = given(&self.nats_inbox_prefix);
        let api_prefix = match (given(&self.nats_api_prefix), given(&self.nats_domain)) {
            (Some(_), Some(_)) => {
                return Err(refuse(
                    "give either NATS_API_PREFIX (--nats-api-prefix) or NATS_DOMAIN (--nats-domain): a domain is a prefix, too",
                ));
            }
            (prefix, None) => prefix,
            (None, Some(domain)) => Some(domain_prefix(&domain)?),
        };
        Ok(NatsConfig { url: self.nats_url.clone(), auth: self.auth(token, password)?, tls, inbox_prefix, api_prefix })
    }

    fn auth(&self, token: Option<Secret>, password: Option<Secret>) -> Result<NatsAuth, Error> {
        let file = |path: &Option<PathBuf>| path.clone().map(Secret::File);
        let token = either(token, file(&self.nats_token_file), "NATS_TOKEN", "NATS_TOKEN_FILE (--nats-token-file)")?;
        let password = either(
            password,
            file(&self.nats_password_file),
            "NATS_PASSWORD",
            "NATS_PASSWORD_FILE (--nats-password-file)",
        )?;
        let user = match (self.nats_user.clone().filter(|user| !user.is_empty()), password) {
            (Some(user), Some(password)) => Some(NatsAuth::UserPassword { user, password }),
            (None, None) => None,
            (Some(_), None) => {
                return Err(refuse("NATS_USER (--nats-user) needs NATS_PASSWORD or NATS_PASSWORD_FILE"));
            }
            (None, Some(_)) => return Err(refuse("a password for NATS needs NATS_USER (--nats-user)")),
        };
        let ways = [
            ("NATS_CREDS (--nats-creds)", self.nats_creds.clone().map(NatsAuth::Credentials)),
            ("NATS_NKEY (--nats-nkey)", file(&self.nats_nkey).map(NatsAuth::Nkey)),
            ("NATS_TOKEN (--nats-token-file)", token.map(NatsAuth::Token)),
            ("NATS_USER (--nats-user)", user),
        ];
        let mut given = ways.into_iter().filter_map(|(name, auth)| Some((name, auth?)));
        match (given.next(), given.next()) {
            (None, _) => Ok(NatsAuth::Url),
            (Some((_, auth)), None) => Ok(auth),
            (Some((one, _)), Some((other, _))) => Err(both(one, other)),
        }
    }
}

/// Where both are, and the names under which an outbox is published.
#[derive(Args)]
pub struct Servers {
    #[command(flatten)]
    postgres: PostgresArgs,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

impl Servers {
    /// What they say.
    ///
    /// # Errors
    /// When a file cannot be read, or settings contradict each other.
    pub fn config(&self) -> Result<(PostgresConfig, NatsConfig, Naming), Error> {
        Ok((self.postgres.config()?, self.nats.config()?, self.naming.config()?))
    }
}

fn environment(name: &str) -> Option<Secret> {
    env::var(name).ok().and_then(|text| secret(&text))
}

/// What a variable holds, taken as if it stood in a file: how it got there, a line's end may have come along.
fn secret(text: &str) -> Option<Secret> {
    Some(text.trim()).filter(|text| !text.is_empty()).map(|text| Secret::Text(text.into()))
}

fn either(text: Option<Secret>, file: Option<Secret>, one: &str, other: &str) -> Result<Option<Secret>, Error> {
    if text.is_some() && file.is_some() { Err(both(one, other)) } else { Ok(text.or(file)) }
}

fn both(one: &str, other: &str) -> Error {
    refuse(format!("{one} and {other} are both set: take one of them away"))
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        nats: NatsArgs,
        #[command(flatten)]
        postgres: PostgresArgs,
    }

    fn parse(arguments: &[&str]) -> Line {
        Line::try_parse_from(["test"].iter().chain(arguments)).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn each_way_to_connect_is_understood() {
        let secret = || Some(Secret::Text("hunter2".into()));
        let auth = |arguments: &[&str], token, password| parse(arguments).nats.with(token, password).unwrap().auth;
        let file = || Secret::File("f".into());
        assert_eq!(auth(&[], None, None), NatsAuth::Url);
        assert_eq!(auth(&["--nats-creds", "f"], None, None), NatsAuth::Credentials("f".into()));
        assert_eq!(auth(&["--nats-nkey", "f"], None, None), NatsAuth::Nkey(file()));
        assert_eq!(auth(&["--nats-token-file", "f"], None, None), NatsAuth::Token(file()));
        assert_eq!(auth(&[], secret(), None), NatsAuth::Token(Secret::Text("hunter2".into())));
        let user = |password| NatsAuth::UserPassword { user: "me".into(), password };
        assert_eq!(auth(&["--nats-user", "me"], None, secret()), user(Secret::Text("hunter2".into())));
        assert_eq!(auth(&["--nats-user", "me", "--nats-password-file", "f"], None, None), user(file()));
    }

    #[test]
    fn a_secret_in_the_environment_is_read_as_in_a_file() {
        for text in ["s3cret", "s3cret\n", "s3cret\r\n", " s3cret "] {
            assert_eq!(secret(text), Some(Secret::Text("s3cret".into())), "{text:?}");
        }
        assert_eq!(secret("\n"), None);
    }

    #[test]
    fn contradictions_are_refused_and_named() {
        let secret = || Some(Secret::Text("hunter2".into()));
        for (arguments, token, password, named) in [
            (&["--nats-creds", "f", "--nats-nkey", "f"][..], None, None, "NATS_NKEY"),
            (&["--nats-creds", "f"], secret(), None, "NATS_TOKEN"),
            (&["--nats-token-file", "f"], secret(), None, "NATS_TOKEN_FILE"),
            (&["--nats-user", "me", "--nats-password-file", "f"], None, secret(), "NATS_PASSWORD_FILE"),
            (&["--nats-user", "me"], secret(), secret(), "NATS_USER"),
            (&["--nats-user", "me"], None, None, "NATS_PASSWORD"),
            (&[], None, secret(), "NATS_USER"),
            (&["--nats-cert", "f"], None, None, "NATS_KEY"),
            (&["--nats-key", "f"], None, None, "NATS_CERT"),
        ] {
            let error = parse(arguments).nats.with(token, password).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.report().contains(named) && !error.report().contains("hunter2"), "{}", error.report());
        }
    }

    #[test]
    fn a_database_is_named_once() {
        let line = parse(&["--database-url", "postgres://me:hunter2@one/db", "--database-url-file", "f"]);
        let error = line.postgres.config().unwrap_err();
        assert!(error.report().contains("DATABASE_URL_FILE") && !error.report().contains("hunter2"));
        let error = parse(&["--database-url-file", "/nowhere/url"]).postgres.config().unwrap_err();
        assert!(error.report().contains("/nowhere/url") && error.report().contains("DATABASE_URL_FILE"));
    }
}
