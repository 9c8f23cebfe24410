//! Servers, databases, streams and processes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use aftercommit::config::{NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::requester::{Reply, TABLES};
use super::seat::Seat;
use super::{Error, REQUESTER, SOON, services};

/// All that runs. Dropped, nothing is left of it.
pub struct Fleet {
    processes: BTreeMap<String, Process>,
    seats: BTreeMap<String, Seat>,
    pools: BTreeMap<String, PgPool>,
    program: fn() -> Result<Command, Error>,
    directory: Directory,
    _postgres: Postgres,
    _nats: Nats,
}

/// A process that is killed when this is dropped.
struct Process {
    child: Child,
    replies: UnboundedReceiver<Reply>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

impl Fleet {
    /// Servers, and a database and a stream for each service, with rows of all tenants; no process runs yet.
    pub async fn prepare(program: fn() -> Result<Command, Error>) -> Result<Self, Error> {
        let tables = services::ALL.iter().map(|service| (service.name, service.sql));
        let fleet = Self::of(program, false, tables).await?;
        fleet.make_files()?;
        Ok(fleet)
    }

    /// The same for some services, and the requester. Commits wait for the disk or not.
    pub async fn of(
        program: fn() -> Result<Command, Error>,
        fsync: bool,
        tables: impl IntoIterator<Item = (&str, &'static str)>,
    ) -> Result<Self, Error> {
        let settings = vec![("max_connections".into(), "300".into())];
        let postgres = Postgres::start(PostgresOptions { fsync, settings }).await?;
        let nats = Nats::start(NatsOptions::default()).await?;
        let directory = Directory(std::env::temp_dir().join(unique_name("tenant-deletion")));
        fs::create_dir(&directory.0)?;
        let mut fleet = Self {
            processes: BTreeMap::new(),
            seats: BTreeMap::new(),
            pools: BTreeMap::new(),
            program,
            directory,
            _postgres: postgres,
            _nats: nats,
        };
        let name = unique_name("fleet");
        let tables: Vec<_> = tables.into_iter().collect();
        let participants: Vec<String> = tables.iter().map(|(service, _)| (*service).into()).collect();
        for (service, sql) in tables.into_iter().chain([(REQUESTER, TABLES)]) {
            fleet.add(&name, &participants, service, sql).await?;
        }
        Ok(fleet)
    }

    async fn add(
        &mut self,
        fleet: &str,
        participants: &[String],
        service: &str,
        sql: &'static str,
    ) -> Result<(), Error> {
        let database = PostgresConfig::new(self._postgres.create_database().await?);
        operator::migrate(&database).await?;
        let pool = PgPoolOptions::new().max_connections(1).connect(&database.url).await?;
        sqlx::raw_sql(sql).execute(&pool).await?;
        let seat = Seat {
            name: service.into(),
            fleet: fleet.into(),
            participants: participants.to_vec(),
            database,
            nats: NatsConfig { url: self._nats.url(), ..NatsConfig::default() },
            files: self.directory.0.join(service),
            chunk: None,
            rest: None,
            fails: 0,
            pause: Duration::ZERO,
            holds: None,
        };
        operator::provision_claimed(&seat.database, &seat.nats, &seat.naming()?, false).await?;
        self.seats.insert(service.into(), seat);
        self.pools.insert(service.into(), pool);
        Ok(())
    }

    /// The files of the models.
    fn make_files(&self) -> Result<(), Error> {
        let files = &self.seat("training")?.files;
        for tenant in 1..=services::TENANTS {
            let directory = files.join(format!("tenant-{tenant}"));
            fs::create_dir_all(&directory)?;
            for n in 1..=30 {
                fs::write(directory.join(format!("model-{n}.bin")), format!("the model {n} of the tenant {tenant}"))?;
            }
        }
        Ok(())
    }

    /// How a service is set up.
    pub fn seat(&self, service: &str) -> Result<&Seat, Error> {
        self.seats.get(service).ok_or_else(|| format!("there is no service {service}").into())
    }

    /// The same, to be disturbed.
    pub fn seat_mut(&mut self, service: &str) -> Result<&mut Seat, Error> {
        self.seats.get_mut(service).ok_or_else(|| format!("there is no service {service}").into())
    }

    /// A service's database.
    pub fn pool(&self, service: &str) -> Result<&PgPool, Error> {
        self.pools.get(service).ok_or_else(|| format!("there is no service {service}").into())
    }

    /// Starts the process of a service.
    pub fn start(&mut self, service: &str) -> Result<(), Error> {
        let mut command = (self.program)()?;
        self.seat(service)?.tell(&mut command);
        let log = File::options().create(true).append(true).open(self.log(service))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn()?;
        let (told, replies) = unbounded_channel();
        let output = child.stdout.take().ok_or("the process has no output")?;
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let reply = line.strip_prefix("reply ").and_then(|reply| serde_json::from_str(reply).ok());
                reply.map(|reply| told.send(reply));
            }
        });
        self.processes.insert(service.into(), Process { child, replies });
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self, service: &str) -> Result<(), Error> {
        let mut process = self.processes.remove(service).ok_or("the process does not run")?;
        process.child.kill()?;
        process.child.wait()?;
        Ok(())
    }

    /// The memory of a service's process, in MB.
    pub fn memory(&self, service: &str) -> Result<f64, Error> {
        let process = self.processes.get(service).ok_or("the process does not run")?;
        let status = fs::read_to_string(format!("/proc/{}/status", process.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("the kernel tells no VmRSS")?;
        let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes / 1024.0)
    }

    /// Where a process writes what it logs.
    fn log(&self, service: &str) -> PathBuf {
        self.directory.0.join(format!("{service}.log"))
    }

    /// The end of each process's log, for when something is wrong.
    pub fn logs(&self) -> String {
        let end = |service: &String| {
            let log = fs::read_to_string(self.log(service)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            format!("--- {service}\n{}\n", lines[lines.len().saturating_sub(20)..].join("\n"))
        };
        self.seats.keys().map(end).collect()
    }

    /// Asks the requester to delete a tenant, as its caller does.
    pub fn ask(&mut self, tenant: i64) -> Result<(), Error> {
        let requester = self.processes.get_mut(REQUESTER).ok_or("the requester does not run")?;
        let input = requester.child.stdin.as_mut().ok_or("the requester has no input")?;
        Ok(writeln!(input, "delete {tenant}")?)
    }

    /// The requester's reply.
    pub async fn reply(&mut self) -> Result<Reply, Error> {
        let requester = self.processes.get_mut(REQUESTER).ok_or("the requester does not run")?;
        let reply = tokio::time::timeout(SOON, requester.replies.recv()).await;
        reply.ok().flatten().ok_or_else(|| format!("the requester does not reply\n{}", self.logs()).into())
    }

    /// Waits until the requester has committed and holds its reply back.
    pub async fn committed(&self) -> Result<(), Error> {
        let file = self.seat(REQUESTER)?.holds.clone().ok_or("the requester does not hold its reply back")?;
        Ok(eventually(SOON, "the request is committed", async || file.exists()).await?)
    }

    /// Lets the requester hold its next reply back.
    pub fn hold_reply(&mut self) -> Result<(), Error> {
        let file = self.directory.0.join("committed");
        self.seat_mut(REQUESTER)?.holds = Some(file);
        Ok(())
    }

    /// A process that has ended by itself.
    pub fn ended(&mut self) -> Option<String> {
        let mut running = self.processes.iter_mut();
        running.find_map(|(name, process)| Some(format!("{name} has ended: {}", process.child.try_wait().ok()??)))
    }
}
