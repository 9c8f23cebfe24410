//! The two servers: our own, which the demo may kill, or those that DATABASE_URL and NATS_URL name.

use std::path::Path;

use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::unique_name;
use async_nats::jetstream;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::Result;

/// Everything that the programs of the demo must know to find each other.
pub struct Places {
    /// pgbench's tables and the outbox.
    pub bank_url: String,
    /// The worker's database: inbox and projection.
    pub projection_url: String,
    pub nats_url: String,
    pub stream: String,
    pub subject_prefix: String,
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
    pub async fn start() -> Result<Self> {
        let given = |name| std::env::var(name).ok().filter(|url| !url.is_empty());
        let (admin_url, postgres) = match given("DATABASE_URL") {
            Some(url) => (url, None),
            None => {
                // fsync stays on: the figures are those of durable commits.
                let settings = vec![("track_commit_timestamp".into(), "on".into())];
                let postgres = Postgres::start(PostgresOptions { settings, ..Default::default() }).await?;
                (postgres.url("postgres"), Some(postgres))
            }
        };
        let (nats_url, nats) = match given("NATS_URL") {
            Some(url) => (url, None),
            None => {
                let nats = Nats::start(NatsOptions::default()).await?;
                (nats.url(), Some(nats))
            }
        };
        let databases = [unique_name("demo_bank"), unique_name("demo_projection")];
        let places = Places {
            bank_url: with_database(&admin_url, &databases[0]),
            projection_url: with_database(&admin_url, &databases[1]),
            nats_url,
            stream: unique_name("DEMO"),
            subject_prefix: unique_name("demo"),
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
        format!("{postgres} and {nats}")
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
        let options = match std::env::var_os("NATS_CREDS") {
            Some(file) => async_nats::ConnectOptions::with_credentials_file(file).await?,
            None => async_nats::ConnectOptions::new(),
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
