//! A database for each test.

use aftercommit::config::PostgresConfig;
use aftercommit::testing::servers::Postgres;
use sqlx::postgres::PgRow;
use sqlx::{Connection as _, PgConnection, Row as _};
use uuid::Uuid;

/// A database of one test's own.
pub struct Database {
    /// Where it is.
    pub url: String,
}

/// What is the same for every publish of one event: `type`, `version`, `key`, `headers`, `content_type`.
pub type Columns = (String, i32, Option<String>, String, String);

/// What a publisher writes of an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Column `event_id`.
    pub event_id: Uuid,
    /// The other columns, without `payload`.
    pub columns: Columns,
    /// Column `payload`.
    pub payload: Vec<u8>,
}

impl Database {
    /// One without the schema aftercommit.
    pub async fn empty() -> Self {
        Self { url: Postgres::shared().await.unwrap().create_database().await.unwrap() }
    }

    /// One with the schema aftercommit.
    pub async fn migrated() -> Self {
        let database = Self::empty().await;
        aftercommit::operator::migrate(&PostgresConfig::new(&database.url)).await.unwrap();
        database
    }

    /// A connection with the driver of the product itself.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    /// Runs a statement.
    pub async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&mut self.connect().await).await.unwrap();
    }

    /// Ends every other session in this database, and returns when they are gone.
    pub async fn terminate(&self) {
        self.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity
              where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'",
        )
        .await;
    }

    /// The committed events, in the order of the outbox.
    pub async fn written(&self) -> Vec<Written> {
        let sql = "select event_id, type, version, key, headers::text, content_type, payload
                     from aftercommit.outbox order by id";
        let of = |row: PgRow| Written {
            event_id: row.get(0),
            columns: (row.get(1), row.get(2), row.get(3), row.get(4), row.get(5)),
            payload: row.get(6),
        };
        sqlx::query(sql).fetch_all(&mut self.connect().await).await.unwrap().into_iter().map(of).collect()
    }
}
