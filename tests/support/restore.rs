//! Dumps, copies and restores, with PostgreSQL's own programs and with files.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aftercommit::testing::servers::{Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use sqlx::{AssertSqlSafe, PgPool};

use super::SOON;

/// A copy of a directory, made while nobody writes to it. It is removed with this value.
pub struct Copy(PathBuf);

impl Copy {
    pub fn of(directory: &Path) -> Self {
        let copy = std::env::temp_dir().join(unique_name("copy"));
        run(Command::new("cp").arg("-a").arg(directory).arg(&copy));
        Self(copy)
    }

    /// Puts the copy in the place of what is there now.
    pub fn replace(&self, directory: &Path) {
        std::fs::remove_dir_all(directory).unwrap();
        run(Command::new("cp").arg("-a").arg(&self.0).arg(directory));
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A dump in a file, removed with this value.
pub struct Dump(PathBuf);

impl Dump {
    pub fn of(database_url: &str) -> Self {
        let file = std::env::temp_dir().join(unique_name("dump"));
        let program = Postgres::program("pg_dump").unwrap();
        run(Command::new(program).args(["--format=custom", "--dbname", database_url, "--file"]).arg(&file));
        Self(file)
    }

    pub fn restore(&self, database_url: &str) {
        let program = Postgres::program("pg_restore").unwrap();
        run(Command::new(program).args(["--exit-on-error", "--dbname", database_url]).arg(&self.0));
    }
}

impl Drop for Dump {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the cluster's next transaction id `epoch` times 2^32 higher.
pub async fn raise_transaction_ids(postgres: &mut Postgres, epoch: u32) {
    postgres.stop().await.unwrap();
    let data = postgres.data_directory();
    let owner = std::fs::metadata(&data).unwrap();
    let mut reset = Command::new(Postgres::program("pg_resetwal").unwrap());
    // It refuses to run as root.
    reset.uid(owner.uid()).gid(owner.gid()).current_dir("/");
    run(reset.args(["--epoch", &epoch.to_string(), "--pgdata"]).arg(&data));
    postgres.restart().await.unwrap();
}

/// A second cluster that follows the first, as `pg_basebackup` makes it.
pub async fn standby_of(primary: &Postgres) -> Postgres {
    let mut standby = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    standby.stop().await.unwrap();
    let data = standby.data_directory();
    let owner = std::fs::metadata(&data).unwrap();
    // The server is known by the name in its file.
    let config = std::fs::read_to_string(data.join("postgresql.conf")).unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    let url = primary.url("postgres");
    let mut backup = Command::new(Postgres::program("pg_basebackup").unwrap());
    backup.uid(owner.uid()).gid(owner.gid());
    backup.args(["--checkpoint=fast", "--wal-method=stream", "--dbname", &url, "--pgdata"]).arg(&data);
    run(backup.current_dir("/"));
    let config = format!("{config}\nprimary_conninfo = '{url}'\n");
    std::fs::write(data.join("postgresql.conf"), config).unwrap();
    std::fs::write(data.join("standby.signal"), "").unwrap();
    standby.restart().await.unwrap();
    standby
}

/// Waits until the standby has everything that the primary has written so far.
pub async fn has_caught_up(primary: &PgPool, standby: &PgPool) {
    let written: String =
        sqlx::query_scalar("select pg_current_wal_insert_lsn()::text").fetch_one(primary).await.unwrap();
    eventually(SOON, "the standby has caught up", async || {
        sqlx::query_scalar("select pg_last_wal_replay_lsn() >= $1::text::pg_lsn")
            .bind(&written)
            .fetch_one(standby)
            .await
            .unwrap()
    })
    .await
    .unwrap();
}

/// From here on the standby gets nothing.
pub async fn cut_off(standby: &PgPool) {
    for sql in ["alter system set primary_conninfo = ''", "select pg_reload_conf()"] {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(standby).await.unwrap();
    }
    eventually(SOON, "it follows no more", async || {
        let receivers = "select count(*) from pg_stat_wal_receiver";
        sqlx::query_scalar::<_, i64>(receivers).fetch_one(standby).await.unwrap() == 0
    })
    .await
    .unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
