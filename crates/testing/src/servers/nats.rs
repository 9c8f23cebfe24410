//! A nats-server with JetStream for the length of a test.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use super::binaries::{nats_server, nats_version};
use super::instance::{Instance, free_port};
use super::processes::cannot;
use aftercommit_core::error::Error;

/// How many pairs of ports to try.
const PORTS: usize = 5;

/// How a [`Nats`] is set up.
#[derive(Debug, Clone, Default)]
pub struct NatsOptions {
    /// Lines for the configuration file, such as `max_payload: 4096`. Defaults to none.
    pub config: String,
    /// Lines for its block `jetstream`, such as `sync_interval: always`. Defaults to none.
    pub jetstream: String,
    /// The version to run, such as `2.12.8`. Defaults to `AFTERCOMMIT_NATS_VERSION`, then to the newest there is.
    pub version: Option<String>,
}

/// A nats-server of one's own with JetStream. See [the module](super).
#[derive(Debug)]
pub struct Nats {
    instance: Instance,
    program: PathBuf,
    version: String,
    options: NatsOptions,
    port: u16,
    monitor_port: u16,
    /// Its block `cluster`, when it is a member of one.
    cluster: Option<String>,
}

impl Nats {
    /// Starts a server with an empty store.
    ///
    /// # Errors
    /// When the program is not installed, or when the server does not start; the error then holds the end of its log.
    pub async fn start(options: NatsOptions) -> Result<Self, Error> {
        Self::start_in(options, None).await
    }

    /// The same, as the member of a cluster when there is one.
    pub(super) async fn start_in(options: NatsOptions, cluster: Option<String>) -> Result<Self, Error> {
        let wanted = options.version.clone().or_else(|| env::var("AFTERCOMMIT_NATS_VERSION").ok());
        let program = nats_server(wanted.as_deref())?;
        let version = nats_version(&program)?;
        let instance = Instance::create("nats-server", "KILL", None)?;
        let mut nats = Self { instance, program, version, options, port: 0, monitor_port: 0, cluster };
        let mut tries = 0;
        loop {
            (nats.port, nats.monitor_port) = (free_port(), free_port());
            tries += 1;
            match nats.launch().await {
                Err(_) if tries < PORTS => {}
                outcome => return outcome.map(|()| nats),
            }
        }
    }

    /// The server that all tests of this process share.
    ///
    /// # Errors
    /// Those of [`Nats::start`].
    pub async fn shared() -> Result<&'static Self, Error> {
        static SHARED: OnceCell<Nats> = OnceCell::const_new();
        SHARED.get_or_try_init(|| Self::start(NatsOptions::default())).await
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Where the server tells about itself over HTTP (`/healthz`, `/varz`, `/jsz`).
    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.monitor_port)
    }

    /// The name under which it is known to the others of its cluster.
    pub fn name(&self) -> String {
        self.instance.name()
    }

    /// The server's version, such as `2.15.1`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The file with the server's output. It disappears with the server.
    pub fn log(&self) -> PathBuf {
        self.instance.log()
    }

    /// JetStream's files, for what is done to them while the server is stopped.
    pub fn store_directory(&self) -> PathBuf {
        self.instance.directory().join("store")
    }

    /// Kills the server with SIGKILL.
    ///
    /// # Errors
    /// When the server does not run.
    pub async fn kill(&mut self) -> Result<(), Error> {
        self.instance.pid()?;
        self.instance.kill().await
    }

    /// Ends the server in an orderly way.
    ///
    /// # Errors
    /// When the server does not run.
    pub async fn stop(&mut self) -> Result<(), Error> {
        self.instance.signal("INT")?;
        self.instance.ended().await
    }

    /// Starts the server again with its store on the same ports, after [`Nats::stop`] if it still runs.
    ///
    /// # Errors
    /// When the server does not start; the error then holds the end of its log.
    pub async fn restart(&mut self) -> Result<(), Error> {
        if self.instance.is_running() {
            self.stop().await?;
        }
        self.launch().await
    }

    /// Starts the server again with other lines in its configuration file.
    ///
    /// # Errors
    /// Those of [`Nats::restart`].
    pub async fn reconfigure(&mut self, config: impl Into<String>) -> Result<(), Error> {
        self.options.config = config.into();
        self.restart().await
    }

    /// Has the server read other lines in its configuration file while it runs: connections stay as they are.
    ///
    /// # Errors
    /// When the server does not run, or does not take the configuration; the error then holds the end of its log.
    pub async fn reload(&mut self, config: impl Into<String>) -> Result<(), Error> {
        self.options.config = config.into();
        self.write_config()?;
        let log = self.log();
        let reloads = || fs::read_to_string(&log).unwrap_or_default().matches("Reloaded server configuration").count();
        let before = reloads();
        self.instance.signal("HUP")?;
        self.instance.ready(async || reloads() > before).await
    }

    /// Ends the server and starts another version of it, such as `2.15.1`, with its store on the same ports.
    ///
    /// # Errors
    /// When that version is not installed, and those of [`Nats::restart`].
    pub async fn change_version(&mut self, version: &str) -> Result<(), Error> {
        self.program = nats_server(Some(version))?;
        self.version = nats_version(&self.program)?;
        self.restart().await
    }

    /// Halts the server with SIGSTOP: connections stay open, and nothing answers. When this returns the server stands
    /// still: it neither sends nor writes anything any more until [`Nats::resume`].
    ///
    /// This blocks until all threads have stopped. That seldom takes more than a millisecond, but a thread that waits for
    /// the disk stops only when the disk has answered.
    ///
    /// # Errors
    /// When the server does not run or has ended by itself, and when it does not stand still within 60 seconds; the error
    /// then names a thread that has not stopped.
    pub fn pause(&self) -> Result<(), Error> {
        self.instance.halt()
    }

    /// Lets a halted server go on.
    ///
    /// # Errors
    /// When the server does not run.
    pub fn resume(&self) -> Result<(), Error> {
        self.instance.signal("CONT")
    }

    /// Writes the configuration file.
    fn write_config(&self) -> Result<PathBuf, Error> {
        let name = self.instance.name();
        let config = self.instance.directory().join("nats.conf");
        let text = format!(
            "server_name: \"{name}\"\nlisten: \"127.0.0.1:{}\"\nhttp: \"127.0.0.1:{}\"\n\
             jetstream {{\n  store_dir: \"{}\"\n  {}\n}}\n{}\n{}\n",
            self.port,
            self.monitor_port,
            self.store_directory().display(),
            self.options.jetstream,
            self.options.config,
            self.cluster.as_deref().unwrap_or_default(),
        );
        fs::write(&config, text).map_err(|error| cannot("cannot write the configuration of nats-server", error))?;
        Ok(config)
    }

    async fn launch(&mut self) -> Result<(), Error> {
        let name = self.instance.name();
        let config = self.write_config()?;
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(config);
        self.instance.start(&command, None)?;
        let port = self.monitor_port;
        // The name tells that it is our server that answers.
        // A member cannot be healthier than its cluster, which may wait for other members.
        let health = if self.cluster.is_some() { "/healthz?js-enabled-only=true" } else { "/healthz" };
        let is_ready = async || {
            get(port, "/varz").await.is_some_and(|answer| answer.contains(&name))
                // A stream whose files a crash has left half deleted is given up by the server: there is nothing to wait for.
                && get(port, health)
                    .await
                    .is_some_and(|answer| answer.contains(" 200 ") || answer.contains("could not be recovered"))
        };
        self.instance.ready(is_ready).await
    }
}

/// The answer to a request over HTTP; none while nothing listens.
async fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}
