//! The two servers: our own, which the demo may kill, or those that DATABASE_URL and NATS_URL name.

use std::path::Path;

use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::unique_name;
use async_nats::jetstream;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::Result;
use crate::secured::Secured;

/// Everything that the programs of the demo must know to find each other.
pub struct Places {
    /// pgbench's tables and the outbox.
    pub bank_url: String,
    /// The worker's database: inbox and projection.
    pub projection_url: String,
    pub nats_url: String,
    pub stream: String,
    pub subject_prefix: String,
    /// None without `--secured`.
    pub secured: Option<Secured>,
}

/// Whose work a program of this package does.
#[derive(Clone, Copy)]
pub enum Role {
    Owner,
    Provisioner,
    Relay,
    Worker,
    Operator,
}

impl Places {
    /// What a program needs to reach its database and NATS.
    pub fn environment(&self, role: Role, database_url: &str) -> Vec<(&'static str, String)> {
        let mut settings = vec![
            ("DATABASE_URL", database_url.to_string()),
            ("NATS_URL", self.nats_url.clone()),
            ("AFTERCOMMIT_STREAM", self.stream.clone()),
            ("AFTERCOMMIT_SUBJECT_PREFIX", self.subject_prefix.clone()),
            ("AFTERCOMMIT_SOURCE", "/pgbench".into()),
        ];
        settings.extend(self.secured.iter().flat_map(|secured| secured.nats(role)));
        settings
    }

    /// The URL of the bank's or the projection's database for the login of a program.
    pub fn url_for(&self, login: &str, admin_url: &str) -> String {
        match &self.secured {
            Some(secured) => secured.as_login(admin_url, login),
            None => admin_url.to_string(),
        }
    }
}

pub struct Servers {
    /// None when it is the user's.
    postgres: Option<Postgres>,
    /// None when it is the user's.
    nats: Option<Nats>,
    admin_url: String,
    databases: [String; 2],
    pub places: Places,
}

impl Servers {
    /// With `secured`, servers of its own with roles, permissions, passwords and TLS; its files are below `directory`.
    pub async fn start(secured: bool, directory: &Path) -> Result<Self> {
        let given = |name| std::env::var(name).ok().filter(|url| !url.is_empty());
        let (postgres_url, nats_url) = (given("DATABASE_URL"), given("NATS_URL"));
        // fsync stays on: the figures are those of durable commits.
        let settings = vec![("track_commit_timestamp".into(), "on".into())];
        let options = PostgresOptions { settings, ..Default::default() };
        let databases = [unique_name("demo_bank"), unique_name("demo_projection")];
        if secured {
            if postgres_url.is_some() || nats_url.is_some() {
                return Err("--secured makes roles, users and certificates on servers of its own: unset DATABASE_URL and NATS_URL".into());
            }
            let (secured, certificate) = Secured::new(directory)?;
            let (postgres, url) = secured.postgres(options, &certificate).await?;
            let nats = secured.nats_server(&certificate).await?;
            let admin_url = secured.database_url(&url, "postgres");
            let places = Places {
                bank_url: with_database(&admin_url, &databases[0]),
                projection_url: with_database(&admin_url, &databases[1]),
                nats_url: nats.url().replace("nats://127.0.0.1", "tls://localhost"),
                // Those of accounts.conf.
                stream: "EVENTS".into(),
                subject_prefix: "events".into(),
                secured: Some(secured),
            };
            return Ok(Self { postgres: Some(postgres), nats: Some(nats), admin_url, databases, places });
        }
        let (admin_url, postgres) = match postgres_url {
            Some(url) => (url, None),
            None => {
                let postgres = Postgres::start(options).await?;
                (postgres.url("postgres"), Some(postgres))
            }
        };
        let (nats_url, nats) = match nats_url {
            Some(url) => (url, None),
            None => {
                let nats = Nats::start(NatsOptions::default()).await?;
                (nats.url(), Some(nats))
            }
        };
        let places = Places {
            bank_url: with_database(&admin_url, &databases[0]),
            projection_url: with_database(&admin_url, &databases[1]),
            nats_url,
            stream: unique_name("DEMO"),
            subject_prefix: unique_name("demo"),
            secured: None,
        };
        Ok(Self { postgres, nats, admin_url, databases, places })
    }

    /// Which servers these are, in words.
    pub fn describe(&self) -> String {
        let postgres = match &self.postgres {
            Some(_) => "a PostgreSQL of its own".to_string(),
            None => "the PostgreSQL of DATABASE_URL".to_string(),
        };
        let nats = match &self.nats {
            Some(nats) => format!("a nats-server {} of its own", nats.version()),
            None => "the NATS of NATS_URL (yours, so it is not killed)".to_string(),
        };
        let secured = self.places.secured.as_ref().map_or("", |_| ", both with TLS, passwords, roles and permissions");
        format!("{postgres} and {nats}{secured}")
    }

    /// The server that may be killed; none when it is the user's.
    pub fn nats(&mut self) -> Option<&mut Nats> {
        self.nats.as_mut()
    }

    pub async fn create_databases(&self) -> Result<()> {
        let mut admin = PgConnection::connect(&self.admin_url).await?;
        for name in &self.databases {
            sqlx::query(AssertSqlSafe(format!("create database {name}"))).execute(&mut admin).await?;
        }
        Ok(())
    }

    /// A client of the NATS server.
    pub async fn connect_nats(&self) -> Result<jetstream::Context> {
        use async_nats::ConnectOptions;
        let options = match (&self.places.secured, std::env::var_os("NATS_CREDS")) {
            (Some(secured), _) => {
                ConnectOptions::with_user_and_password("proof".into(), secured.password("proof").into())
                    .add_root_certificates(secured.ca.clone())
                    .require_tls(true)
            }
            (None, Some(file)) => ConnectOptions::with_credentials_file(file).await?,
            (None, None) => ConnectOptions::new(),
        };
        let servers: Vec<&str> = self.places.nats_url.split(',').collect();
        Ok(jetstream::new(options.connect(servers).await?))
    }

    /// Copies the logs of our own servers to `directory`.
    pub fn keep_logs(&self, directory: &Path) {
        let logs = [
            ("postgres.log", self.postgres.as_ref().map(Postgres::log)),
            ("nats-server.log", self.nats.as_ref().map(Nats::log)),
        ];
        for (name, log) in logs {
            // A log that cannot be kept is no reason to hide what failed.
            let _ = log.map(|log| std::fs::copy(log, directory.join(name)));
        }
    }

    /// Removes what the demo made on servers that are not its own.
    pub async fn clean_up(&self) -> Result<()> {
        if self.postgres.is_none() {
            let mut admin = PgConnection::connect(&self.admin_url).await?;
            for name in &self.databases {
                let drop = format!("drop database if exists {name} with (force)");
                sqlx::query(AssertSqlSafe(drop)).execute(&mut admin).await?;
            }
        }
        if self.nats.is_none() {
            let context = self.connect_nats().await?;
            if context.get_stream(&self.places.stream).await.is_ok() {
                context.delete_stream(&self.places.stream).await?;
            }
        }
        Ok(())
    }
}

/// `url` with another database.
fn with_database(url: &str, database: &str) -> String {
    let (address, parameters) = url.split_once('?').map_or((url, None), |(address, rest)| (address, Some(rest)));
    let host = address.find("://").map_or(0, |scheme| scheme + 3);
    let end = address[host..].find('/').map_or(address.len(), |path| host + path);
    let parameters = parameters.map(|parameters| format!("?{parameters}")).unwrap_or_default();
    format!("{}/{database}{parameters}", &address[..end])
}

/// A URL without its password, and the password.
pub fn split_password(url: &str) -> (String, Option<String>) {
    let user = url.find("://").map_or(0, |scheme| scheme + 3);
    let split = url[user..].split_once('@').and_then(|(login, rest)| Some((login.split_once(':')?, rest)));
    match split {
        Some(((name, password), rest)) => {
            let password = percent_encoding::percent_decode_str(password).decode_utf8_lossy();
            (format!("{}{name}@{rest}", &url[..user]), Some(password.into_owned()))
        }
        None => (url.to_string(), None),
    }
}
