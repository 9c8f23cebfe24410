//! What the figures were taken on.

use std::fmt;
use std::fs;

use serde::Serialize;

use crate::bench::BenchConfig;
use aftercommit_core::error::Error;
use aftercommit_core::{jetstream, postgres};

/// The machine and the versions of what runs on it.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Machine {
    /// The processor, as the system names it.
    pub(crate) processor: String,
    /// Threads that run at the same time.
    pub(crate) cores: usize,
    /// Main memory in GiB.
    pub(crate) memory_gib: u64,
    /// The system and its version.
    pub(crate) system: String,
    /// PostgreSQL's version.
    pub(crate) postgres: String,
    /// The version of nats-server.
    pub(crate) nats: String,
    /// The version of this crate, and how it was built.
    pub(crate) aftercommit: String,
}

impl Machine {
    pub(crate) async fn look(config: &BenchConfig) -> Result<Self, Error> {
        let mut session = postgres::connect(&config.postgres, "aftercommit-bench").await?;
        let nats = jetstream::connect(&config.nats, "aftercommit-bench", "_INBOX").await?;
        let built = if cfg!(debug_assertions) { "debug build" } else { "release build" };
        Ok(Self {
            processor: line("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".into()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: memory().unwrap_or_default(),
            system: system(),
            postgres: crate::postgres::version(&mut session).await?,
            nats: nats.client.server_info().version,
            aftercommit: format!("{}, {built}", env!("CARGO_PKG_VERSION")),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, memory_gib, system, postgres, nats, aftercommit } = self;
        write!(
            f,
            "{cores} cores of {processor}, {memory_gib} GiB, {system}; PostgreSQL {postgres}, nats-server {nats}, \
             aftercommit {aftercommit}"
        )
    }
}

/// What is behind the colon of the first line of a file that begins so.
fn line(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start().trim_start_matches(':').trim().to_string())
}

fn memory() -> Option<u64> {
    let kib: u64 = line("/proc/meminfo", "MemTotal")?.split(' ').next()?.parse().ok()?;
    Some((kib + (1 << 19)) >> 20)
}

fn system() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} {}", std::env::consts::OS, release.trim()).trim().to_string()
}
