//! A standby without PostgreSQL's client programs.

use std::fs;
use std::process::Command;

use aftercommit::testing::servers::{Postgres, PostgresOptions};

/// A second cluster that follows the first, which is stopped while its files are copied.
pub async fn standby_from_files(primary: &mut Postgres) -> Postgres {
    let mut standby = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    standby.stop().await.unwrap();
    primary.stop().await.unwrap();
    let data = standby.data_directory();
    // The server is known by the name in its file.
    let config = fs::read_to_string(data.join("postgresql.conf")).unwrap();
    fs::remove_dir_all(&data).unwrap();
    let copied = Command::new("cp").arg("-a").arg(primary.data_directory()).arg(&data).status().unwrap();
    assert!(copied.success());
    fs::write(data.join("postgresql.conf"), format!("{config}\nprimary_conninfo = '{}'\n", primary.url("postgres")))
        .unwrap();
    fs::write(data.join("standby.signal"), "").unwrap();
    primary.restart().await.unwrap();
    standby.restart().await.unwrap();
    standby
}
