//! A database for each test, and PostgreSQL's own programs on it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use aftercommit::config::PostgresConfig;
use aftercommit::testing::servers::Postgres;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

/// One of the programs that come with the server.
fn program(name: &str) -> PathBuf {
    Postgres::program(name).unwrap()
}

/// A database of the test's own.
pub struct Database {
    pub config: PostgresConfig,
}

impl Database {
    /// An empty one.
    pub async fn empty() -> Self {
        let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
        Self { config: PostgresConfig::new(url) }
    }

    /// One with the schema aftercommit.
    pub async fn migrated() -> Self {
        let database = Self::empty().await;
        aftercommit::operator::migrate(&database.config).await.unwrap();
        database
    }

    pub async fn pool(&self) -> PgPool {
        PgPool::connect(&self.config.url).await.unwrap()
    }

    /// The same database for another role.
    pub fn url_of(&self, role: &str) -> String {
        self.config.url.replace("//postgres@", &format!("//{role}@"))
    }

    /// Waits until nobody else is in the middle of a transaction: the server notices a moment later that a client was killed, and
    /// keeps its locks until then.
    pub async fn nobody_is_at_work(&self) {
        let pool = self.pool().await;
        let open = "select count(*) from pg_stat_activity
                     where datname = current_database() and xact_start is not null and pid <> pg_backend_pid()";
        aftercommit::testing::eventually(super::SOON, "the sessions of the dead are gone", async || {
            sqlx::query_scalar::<_, i64>(open).fetch_one(&pool).await.unwrap() == 0
        })
        .await
        .unwrap();
    }

    pub async fn execute(&self, sql: &str) {
        let mut connection = PgConnection::connect(&self.config.url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&mut connection).await.unwrap();
    }

    /// Feeds a script to psql, which stops at the first error.
    pub fn psql(&self, script: &str) -> Output {
        let mut psql = Command::new(program("psql"))
            .args(["-X", "-q", "--single-transaction", "-v", "ON_ERROR_STOP=1", "-d", &self.config.url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // One that has stopped at an error reads no further, and says why.
        _ = psql.stdin.take().unwrap().write_all(script.as_bytes());
        psql.wait_with_output().unwrap()
    }

    /// What pg_dump prints, without the lines that differ from run to run.
    pub fn pg_dump(&self, options: &[&str]) -> String {
        let dump = Command::new(program("pg_dump")).args(options).args(["-d", &self.config.url]).output().unwrap();
        assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        let script = String::from_utf8(dump.stdout).unwrap();
        let random = |line: &&str| line.starts_with("\\restrict") || line.starts_with("\\unrestrict");
        script.lines().filter(|line| !random(line)).fold(String::new(), |script, line| script + line + "\n")
    }
}

/// What psql printed, when it succeeded.
pub fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
