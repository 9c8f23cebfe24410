//! What a process of the example knows of itself, by its environment.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::subject::SubjectPrefix;

use super::Error;

/// A process's place in the fleet.
#[derive(Debug, Clone)]
pub struct Seat {
    /// Which service it is.
    pub name: String,
    /// The fleet, in front of the names of its streams.
    pub fleet: String,
    /// Who takes part in deletions.
    pub participants: Vec<String>,
    pub database: PostgresConfig,
    pub nats: NatsConfig,
    /// Where files outside of the databases are.
    pub files: PathBuf,
    /// How many rows a step deletes, where that is not the service's own.
    pub chunk: Option<u32>,
    /// How many times as long as a step takes it rests; not at all when left out.
    pub rest: Option<f64>,
    /// How many of its first attempts fail.
    pub fails: u32,
    /// How long each step takes besides.
    pub pause: Duration,
    /// Writes `committed` into this file behind the commit, and does not reply.
    pub holds: Option<PathBuf>,
}

impl Seat {
    /// Of this process; none when it is not one of the fleet.
    pub fn of_this_process() -> Result<Option<Self>, Error> {
        let Ok(name) = std::env::var("FLEET_NAME") else { return Ok(None) };
        let number = |name| Ok::<_, Error>(std::env::var(name)?.parse::<u32>()?);
        Ok(Some(Self {
            name,
            fleet: std::env::var("FLEET")?,
            participants: std::env::var("FLEET_PARTICIPANTS")?.split(',').map(String::from).collect(),
            database: PostgresConfig::new(std::env::var("FLEET_DATABASE")?),
            nats: NatsConfig { url: std::env::var("FLEET_NATS")?, ..NatsConfig::default() },
            files: std::env::var_os("FLEET_FILES").ok_or("FLEET_FILES is not set")?.into(),
            chunk: std::env::var("FLEET_CHUNK").ok().map(|chunk| chunk.parse()).transpose()?,
            rest: std::env::var("FLEET_REST").ok().map(|rest| rest.parse()).transpose()?,
            fails: number("FLEET_FAILS")?,
            pause: Duration::from_millis(number("FLEET_PAUSE")?.into()),
            holds: std::env::var_os("FLEET_HOLDS").map(PathBuf::from),
        }))
    }

    /// Tells it to a process.
    pub fn tell(&self, command: &mut Command) {
        command
            .env("FLEET_NAME", &self.name)
            .env("FLEET", &self.fleet)
            .env("FLEET_PARTICIPANTS", self.participants.join(","))
            .env("FLEET_DATABASE", &self.database.url)
            .env("FLEET_NATS", &self.nats.url)
            .env("FLEET_FILES", &self.files)
            .env("FLEET_FAILS", self.fails.to_string())
            .env("FLEET_PAUSE", self.pause.as_millis().to_string());
        if let Some(chunk) = self.chunk {
            command.env("FLEET_CHUNK", chunk.to_string());
        }
        if let Some(rest) = self.rest {
            command.env("FLEET_REST", rest.to_string());
        }
        if let Some(holds) = &self.holds {
            command.env("FLEET_HOLDS", holds);
        }
    }

    /// Its own stream.
    pub fn naming(&self) -> Result<Naming, Error> {
        self.naming_of(&self.name)
    }

    /// The stream of a service: each has one of its own, because a stream has one owner.
    pub fn naming_of(&self, name: &str) -> Result<Naming, Error> {
        let stream = format!("{}_{name}", self.fleet).to_uppercase();
        let prefix = SubjectPrefix::new(format!("{}-{name}", self.fleet))?;
        Ok(Naming { stream, prefix, source: format!("/{name}") })
    }
}
