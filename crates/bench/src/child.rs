//! Processes beside this one: what they cost is read from the system, apart from the cost of measuring.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::process::{Child as Process, Command};

use crate::arm::Arm;
use crate::bench::wait_until;
use crate::cost;
use crate::scratch::Scratch;
use aftercommit_core::config::{NatsAuth, NatsConfig, Secret};
use aftercommit_core::error::{Error, ErrorKind};

/// How long a relay may take for what an arm gives it.
const DEADLINE: Duration = Duration::from_mins(10);

/// A process that is killed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Child {
    process: Process,
    id: u32,
}

/// Memory of a process in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// What it holds now.
    pub(crate) now: u64,
    /// What it held at most.
    pub(crate) peak: u64,
}

impl Child {
    /// One of our programs beside this one, on a scratch outbox.
    pub(crate) fn start(program: &str, arguments: &[&str], scratch: &Scratch) -> Result<Self, Error> {
        let mut command = command(program, scratch)?;
        let process = command.args(arguments).stdout(Stdio::null()).spawn().map_err(|error| cannot(program, error))?;
        let id = process.id().unwrap_or_default();
        Ok(Self { process, id })
    }

    /// An error when it has ended.
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        match self.process.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(Error::new(ErrorKind::NotReady, format!("a measured process ended: {status}"))),
            Err(error) => Err(cannot("a measured process", error)),
        }
    }

    /// Waits until so many messages are in the stream that it publishes to; an error when it ends before.
    pub(crate) async fn until_stored(&mut self, messages: u64, scratch: &Scratch) -> Result<(), Error> {
        wait_until("every event is in the stream", DEADLINE, async || {
            self.check()?;
            Ok(scratch.stream.extent().await?.last >= messages)
        })
        .await
    }

    /// The processor time that it has taken; none where the system does not tell.
    pub(crate) fn cpu(&self) -> Option<Duration> {
        cost::cpu(&self.id.to_string())
    }

    /// Its memory; none where the system does not tell.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id)).ok()?;
        let bytes = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim_start_matches(':').trim().split(' ').next()?.parse().ok()?;
            Some(kib * 1024)
        };
        Some(Memory { now: bytes("VmRSS")?, peak: bytes("VmHWM")? })
    }

    /// Kills it and waits until it has ended.
    pub(crate) async fn kill(mut self) -> Result<(), Error> {
        self.process.kill().await.map_err(|error| cannot("a measured process", error))
    }
}

/// Runs an arm in a process of its own and returns what it found.
pub(crate) async fn run_arm<T: DeserializeOwned>(arm: Arm, events: u64, scratch: &Scratch) -> Result<T, Error> {
    let mut command = command("aftercommit-bench", scratch)?;
    command.args(["arm", arm.name(), "--events", &events.to_string()]);
    let output = command.stdout(Stdio::piped()).output().await.map_err(|error| cannot("aftercommit-bench", error))?;
    if !output.status.success() {
        return Err(Error::new(ErrorKind::NotReady, format!("the arm {} failed: {}", arm.name(), output.status)));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::with_source(ErrorKind::Integrity, "an arm's answer cannot be read", error))
}

fn cannot(program: &str, error: std::io::Error) -> Error {
    Error::with_source(ErrorKind::Config, format!("cannot run {program}"), error)
}

/// A program beside this one, told of the scratch outbox and nothing else.
fn command(program: &str, scratch: &Scratch) -> Result<Command, Error> {
    let mut command = Command::new(beside(program)?);
    let ours = |name: &str| ["AFTERCOMMIT_", "DATABASE_URL", "NATS_"].iter().any(|prefix| name.starts_with(prefix));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(ours)) {
        command.env_remove(name);
    }
    command
        .env("DATABASE_URL", &scratch.postgres.url)
        .env("AFTERCOMMIT_PGBOUNCER", scratch.postgres.pooled.to_string())
        .env("AFTERCOMMIT_STREAM", &scratch.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", scratch.naming.prefix.to_string())
        .env("AFTERCOMMIT_SOURCE", &scratch.naming.source)
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
        .envs(nats_variables(&scratch.nats))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    Ok(command)
}

/// The path of a program that was built with this one.
fn beside(program: &str) -> Result<PathBuf, Error> {
    let this = std::env::current_exe().map_err(|error| cannot("the running program", error))?;
    let path = this.with_file_name(format!("{program}{}", std::env::consts::EXE_SUFFIX));
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::new(ErrorKind::Config, format!("{} is missing: build all programs of aftercommit", path.display())))
}

/// How to reach NATS, as our programs take it from the environment.
fn nats_variables(config: &NatsConfig) -> Vec<(&'static str, String)> {
    let path = |path: &std::path::Path| path.display().to_string();
    let secret = |secret: &Secret, text: &'static str, file: &'static str| match secret {
        Secret::Text(secret) => (text, secret.clone()),
        Secret::File(from) => (file, path(from)),
    };
    let mut variables = vec![("NATS_URL", config.url.clone())];
    match &config.auth {
        NatsAuth::Url => {}
        NatsAuth::Credentials(file) => variables.push(("NATS_CREDS", path(file))),
        NatsAuth::Nkey(seed) => variables.push(secret(seed, "NATS_NKEY", "NATS_NKEY")),
        NatsAuth::Token(token) => variables.push(secret(token, "NATS_TOKEN", "NATS_TOKEN_FILE")),
        NatsAuth::UserPassword { user, password } => {
            variables.push(("NATS_USER", user.clone()));
            variables.push(secret(password, "NATS_PASSWORD", "NATS_PASSWORD_FILE"));
        }
    }
    variables.extend(config.tls.ca.as_deref().map(|ca| ("NATS_CA", path(ca))));
    if let Some(certificate) = &config.tls.certificate {
        variables.push(("NATS_CERT", path(&certificate.certificate)));
        variables.push(("NATS_KEY", path(&certificate.key)));
    }
    if config.tls.first {
        variables.push(("NATS_TLS_FIRST", "true".into()));
    }
    variables
}
