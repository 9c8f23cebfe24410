//! A database and a stream of one measurement.

use aftercommit::operator;
use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::subject::SubjectPrefix;
use async_nats::jetstream;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use url::Url;

use crate::arms::Kind;

/// The servers on which all is measured.
pub struct Servers {
    pub database_url: Url,
    pub nats_url: String,
}

/// A new database with the tables of one arm, and a new stream, the same for all.
pub struct Scratch {
    pub kind: Kind,
    pub database_url: Url,
    pub nats_url: String,
    pub pool: PgPool,
    pub context: jetstream::Context,
    server: Url,
}

impl Scratch {
    pub async fn new(servers: &Servers, kind: Kind) -> anyhow::Result<Self> {
        let mut database_url = servers.database_url.clone();
        database_url.set_path(kind.short());
        let mut server = PgConnection::connect(servers.database_url.as_str()).await?;
        for statement in ["drop database if exists {} with (force)", "create database {}"] {
            let statement = AssertSqlSafe(statement.replace("{}", kind.short()));
            sqlx::query(statement).execute(&mut server).await?;
        }
        let context = jetstream::new(async_nats::connect(&servers.nats_url).await?);
        let scratch = Self {
            kind,
            pool: PgPoolOptions::new().max_connections(24).connect(database_url.as_str()).await?,
            database_url,
            nats_url: servers.nats_url.clone(),
            context,
            server: servers.database_url.clone(),
        };
        let _ = scratch.context.delete_stream(scratch.stream()).await;
        operator::provision(&scratch.nats(), &scratch.naming()?).await?;
        kind.migrate(&scratch).await?;
        Ok(scratch)
    }

    pub async fn remove(self) -> anyhow::Result<()> {
        self.pool.close().await;
        self.context.delete_stream(self.stream()).await?;
        let mut server = PgConnection::connect(self.server.as_str()).await?;
        let statement = AssertSqlSafe(format!("drop database {} with (force)", self.kind.short()));
        sqlx::query(statement).execute(&mut server).await?;
        Ok(())
    }

    pub fn postgres(&self) -> PostgresConfig {
        PostgresConfig::new(self.database_url.as_str())
    }

    pub fn nats(&self) -> NatsConfig {
        NatsConfig { url: self.nats_url.clone(), ..NatsConfig::default() }
    }

    pub fn naming(&self) -> anyhow::Result<Naming> {
        let prefix = SubjectPrefix::new(self.kind.short().to_owned())?;
        Ok(Naming { stream: self.stream(), prefix, source: "/rivals".to_owned() })
    }

    pub fn stream(&self) -> String {
        self.kind.short().to_uppercase()
    }

    pub fn subject(&self) -> String {
        format!("{}.bench", self.kind.short())
    }

    /// Writes so many events in one go, of 256 bytes or a little less, on a thousand keys.
    pub async fn seed(&self, events: u64) -> anyhow::Result<()> {
        let statement = format!(
            "with events as (select jsonb_build_object('n', n, 'key', 'k' || n % 1000, 'version', n / 1000, \
             'pad', repeat('x', 190)) as payload, 'k' || n % 1000 as key from generate_series(1, $1) n) {}",
            self.kind.insert()
        );
        let statement = AssertSqlSafe(statement);
        sqlx::query(statement).bind(i64::try_from(events)?).execute(&self.pool).await?;
        sqlx::query("analyze").execute(&self.pool).await?;
        Ok(())
    }

    /// The statement that writes one event: its payload, then its key.
    pub fn insert_one(&self) -> String {
        format!("with events as (select $1::jsonb as payload, $2::text as key) {}", self.kind.insert())
    }
}
