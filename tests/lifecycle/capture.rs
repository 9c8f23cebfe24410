//! Captures: what they publish, for which statements, how they are installed, and who may.

mod changes;
mod guide;
mod installing;
mod order;
mod refusals;
mod replication;
mod rights;
mod statements;
mod subscribers;
mod values;

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use crate::support::Database;

/// A database with some tables, and what their captures wrote.
pub struct Shop {
    pub database: Database,
    pub pool: PgPool,
}

/// An event: its type, its key and its data.
type Told = (String, Option<String>, Value);

impl Shop {
    /// A database with the schema and what this SQL makes.
    pub async fn with(sql: &str) -> Self {
        let database = Database::migrated().await;
        let shop = Self { pool: database.pool().await, database };
        shop.run(sql).await;
        shop
    }

    /// Runs SQL, which must succeed.
    pub async fn run(&self, sql: &str) {
        if let Err(error) = self.attempt(sql).await {
            panic!("{sql}: {error}");
        }
    }

    /// Runs SQL and returns the server's message, with its hint.
    pub async fn attempt(&self, sql: &str) -> Result<(), String> {
        attempt(&self.database.config.url, sql).await
    }

    /// The events since the last call.
    pub async fn told(&self) -> Vec<Told> {
        let events =
            sqlx::query_as("select type, key, data from aftercommit.events order by id").fetch_all(&self.pool).await;
        self.run("truncate aftercommit.outbox").await;
        events.unwrap()
    }

    /// Their types and keys alone, such as `order.inserted 7`.
    pub async fn told_of(&self) -> Vec<String> {
        let short = |(event_type, key, _): &Told| format!("{event_type} {}", key.as_deref().unwrap_or("-"));
        self.told().await.iter().map(short).collect()
    }

    /// The problems of each capture.
    pub async fn problems(&self) -> Vec<String> {
        sqlx::query_scalar("select unnest(problems) from aftercommit.capture_check()")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    pub async fn one<T>(&self, sql: &str) -> T
    where
        T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        sqlx::query_scalar(AssertSqlSafe(sql.to_string())).fetch_one(&self.pool).await.unwrap()
    }

    /// Whether the server is this major version or newer.
    pub async fn at_least(&self, major: i32) -> bool {
        self.one::<i32>("select current_setting('server_version_num')::int / 10000").await >= major
    }
}

/// Runs SQL in a session of its own.
pub async fn attempt(url: &str, sql: &str) -> Result<(), String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let done = sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&mut connection).await;
    done.map(drop).map_err(|error| {
        let error = error.into_database_error().unwrap().downcast::<sqlx::postgres::PgDatabaseError>();
        format!("{} {}", error.message(), error.hint().unwrap_or_default())
    })
}
