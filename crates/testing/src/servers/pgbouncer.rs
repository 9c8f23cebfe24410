//! A PgBouncer in transaction mode for the length of a test.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::binaries;
use super::instance::{Instance, free_port};
use super::postgres::Postgres;
use super::processes::{Owner, cannot, unprivileged};
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::{connect, database};

/// How many ports to try.
const PORTS: usize = 5;

/// A PgBouncer of one's own in front of a [`Postgres`], in transaction mode. Whoever connects is the user `postgres`.
/// See [the module](super).
#[derive(Debug)]
pub struct PgBouncer {
    instance: Instance,
    program: PathBuf,
    owner: Option<Owner>,
    port: u16,
}

impl PgBouncer {
    /// Starts it with a pool of `pool_size` connections per database. `settings` are names and values for its section
    /// `[pgbouncer]`, such as `("query_wait_timeout", "5")`. Run by root, it runs as the user `postgres`, or else
    /// `nobody`.
    ///
    /// # Errors
    /// When the program is not installed, or when it does not start; the error then holds the end of its log.
    pub async fn start(postgres: &Postgres, pool_size: u32, settings: &[(&str, &str)]) -> Result<Self, Error> {
        let program = binaries::pgbouncer()?;
        let owner = unprivileged()?;
        let instance = Instance::create("pgbouncer", "TERM", owner)?;
        let mut pgbouncer = Self { instance, program, owner, port: 0 };
        let mut tries = 0;
        loop {
            pgbouncer.port = free_port();
            tries += 1;
            match pgbouncer.launch(postgres, pool_size, settings).await {
                Err(_) if tries < PORTS => {}
                outcome => return outcome.map(|()| pgbouncer),
            }
        }
    }

    /// The URL of a database behind it, by the database's name.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The file with its output. It disappears with it.
    pub fn log(&self) -> PathBuf {
        self.instance.log()
    }

    async fn launch(&mut self, postgres: &Postgres, pool_size: u32, settings: &[(&str, &str)]) -> Result<(), Error> {
        let mut ini = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = {pool_size}\n",
            postgres.port(),
            self.port,
        );
        for (name, value) in settings {
            ini.push_str(&format!("{name} = {value}\n"));
        }
        let file = self.instance.directory().join("pgbouncer.ini");
        fs::write(&file, ini).map_err(|error| cannot("cannot write pgbouncer.ini", error))?;
        let mut command = Command::new(&self.program);
        command.arg(&file);
        self.instance.start(&command, self.owner)?;
        // The name tells that it is our server that answers.
        let config = PostgresConfig { pooled: true, ..PostgresConfig::new(self.url("postgres")) };
        let is_ready = async || match connect(&config, "aftercommit-testing").await {
            Ok(mut session) => database::cluster_name(&mut session).await.is_ok_and(|name| name == postgres.name()),
            Err(_) => false,
        };
        self.instance.ready(is_ready).await
    }
}
