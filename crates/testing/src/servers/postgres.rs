//! A PostgreSQL cluster for the length of a test.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use super::binaries;
use super::instance::{DEADLINE, Instance, free_port};
use super::processes::{Owner, cannot, processes, run, send, unprivileged};
use crate::{eventually, unique_name};
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::{connect, database};

/// What `pg_stat_activity` shows.
const APPLICATION: &str = "aftercommit-testing";

/// How many ports to try.
const PORTS: usize = 5;

/// How a [`Postgres`] is set up.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// Whether commits wait for the disk. Turn it off where no crash of the machine matters: tests are faster, and data
    /// outlives even [`Postgres::kill`]. Defaults to true.
    pub fsync: bool,
    /// Settings for postgresql.conf, names and values, such as `("track_commit_timestamp", "on")`. They win over
    /// those that the server is given anyway: `max_connections = 200`. Defaults to none.
    pub settings: Vec<(String, String)>,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { fsync: true, settings: Vec::new() }
    }
}

/// A PostgreSQL server of one's own, with the superuser `postgres` and no password. See [the module](super).
#[derive(Debug)]
pub struct Postgres {
    instance: Instance,
    binaries: PathBuf,
    owner: Option<Owner>,
    port: u16,
}

impl Postgres {
    /// Makes a cluster and starts its server. Run by root, the server runs as the user `postgres`, or else `nobody`.
    ///
    /// # Errors
    /// When no server is installed, or when it does not start; the error then holds the end of its log.
    pub async fn start(options: PostgresOptions) -> Result<Self, Error> {
        let binaries = binaries::postgres()?;
        let owner = unprivileged()?;
        // An immediate shutdown is the quickest that leaves no process behind.
        let instance = Instance::create("postgres", "QUIT", owner)?;
        let mut postgres = Self { instance, binaries, owner, port: 0 };
        postgres.make_cluster(&options).await?;
        let mut tries = 0;
        loop {
            postgres.port = free_port();
            tries += 1;
            match postgres.launch().await {
                Err(_) if tries < PORTS => {}
                outcome => return outcome.map(|()| postgres),
            }
        }
    }

    /// The server that all tests of this process share. It does not wait for the disk.
    ///
    /// # Errors
    /// Those of [`Postgres::start`].
    pub async fn shared() -> Result<&'static Self, Error> {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED.get_or_try_init(|| Self::start(PostgresOptions { fsync: false, ..PostgresOptions::default() })).await
    }

    /// A program that comes with the server, such as `psql` or `pg_dump`.
    ///
    /// # Errors
    /// When no server is installed.
    pub fn program(name: &str) -> Result<PathBuf, Error> {
        let found = binaries::postgres()?;
        // Some installations put a link to the server alone into the PATH, and the other programs elsewhere.
        let linked = fs::canonicalize(found.join("postgres")).ok();
        let beside = [Some(found), linked.and_then(|server| Some(server.parent()?.to_path_buf()))];
        let mut programs = beside.into_iter().flatten().map(|directory| directory.join(name));
        Ok(programs.find(|program| program.is_file()).unwrap_or_else(|| name.into()))
    }

    /// The URL of a database on this server. `postgres` is there from the start.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn name(&self) -> String {
        self.instance.name()
    }

    /// The file with the server's output. It disappears with the server.
    pub fn log(&self) -> PathBuf {
        self.instance.log()
    }

    /// The cluster's files, for what is done to them while the server is stopped. They belong to the user as whom the
    /// server runs.
    pub fn data_directory(&self) -> PathBuf {
        self.instance.directory().join("data")
    }

    /// Makes an empty database under a name of its own and returns its URL.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn create_database(&self) -> Result<String, Error> {
        let name = unique_name("test");
        let config = PostgresConfig::new(self.url("postgres"));
        let mut connection = connect(&config, APPLICATION).await?;
        database::create(&mut connection, &name).await?;
        Ok(self.url(&name))
    }

    /// Kills the server as a power cut would: every process of it at once, with SIGKILL. [`Postgres::restart`] then
    /// recovers what was committed.
    ///
    /// # Errors
    /// When the server does not run.
    pub async fn kill(&mut self) -> Result<(), Error> {
        let postmaster = self.instance.pid()?;
        // Halted, it starts no process behind our back.
        self.instance.halt()?;
        let family: Vec<u32> = processes()?
            .iter()
            .filter(|process| process.pid == postmaster || process.parent == postmaster)
            .map(|process| process.pid)
            .collect();
        send("KILL", &family)?;
        self.instance.ended().await?;
        // The next postmaster refuses to start while one of the old processes holds the shared memory.
        let are_gone = async || {
            processes()
                .is_ok_and(|all| !all.iter().any(|process| family.contains(&process.pid) && process.state != 'Z'))
        };
        eventually(DEADLINE, "all processes of the server have ended", are_gone).await
    }

    /// Ends the server in an orderly way, cutting off whoever is connected.
    ///
    /// # Errors
    /// When the server does not run.
    pub async fn stop(&mut self) -> Result<(), Error> {
        self.instance.signal("INT")?;
        self.instance.ended().await
    }

    /// Starts the server again with its data on the same port, after [`Postgres::stop`] if it still runs.
    ///
    /// # Errors
    /// When the server does not start; the error then holds the end of its log.
    pub async fn restart(&mut self) -> Result<(), Error> {
        if self.instance.is_running() {
            self.stop().await?;
        }
        self.launch().await
    }

    async fn make_cluster(&self, options: &PostgresOptions) -> Result<(), Error> {
        let directory = self.instance.directory().to_path_buf();
        let data = directory.join("data");
        let mut initdb = Command::new(self.binaries.join("initdb"));
        initdb.args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--pgdata"]);
        initdb.arg(&data).current_dir(&directory);
        let owner = self.owner;
        spawn_blocking(move || run(&mut initdb, owner))
            .await
            .map_err(|error| Error::with_source(ErrorKind::NotReady, "initdb was interrupted", error))??;
        // No socket, because the path of a temporary directory can be too long for one.
        let mut text = String::from("\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n");
        text.push_str(&format!("max_connections = 200\ncluster_name = '{}'\n", self.instance.name()));
        text.push_str(&format!("fsync = {}\n", options.fsync));
        for (name, value) in &options.settings {
            text.push_str(&format!("{name} = '{}'\n", quoted(value)));
        }
        File::options()
            .append(true)
            .open(data.join("postgresql.conf"))
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| cannot("cannot write postgresql.conf", error))
    }

    async fn launch(&mut self) -> Result<(), Error> {
        let mut command = Command::new(self.binaries.join("postgres"));
        command.arg("-D").arg(self.data_directory()).args(["-p", &self.port.to_string()]);
        self.instance.start(&command, self.owner)?;
        let (config, name) = (PostgresConfig::new(self.url("postgres")), self.instance.name());
        // The name tells that it is our server that answers.
        let is_ready = async || match connect(&config, APPLICATION).await {
            Ok(mut connection) => database::cluster_name(&mut connection).await.is_ok_and(|answer| answer == name),
            Err(_) => false,
        };
        self.instance.ready(is_ready).await
    }
}

/// For a value in single quotes in postgresql.conf.
fn quoted(value: &str) -> String {
    value.replace('\\', "\\\\").replace('\'', "''")
}
