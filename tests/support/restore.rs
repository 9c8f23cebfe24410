//! Dumps, copies and restores, with PostgreSQL's own programs and with files.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aftercommit::testing::servers::Postgres;
use aftercommit::testing::unique_name;

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

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
