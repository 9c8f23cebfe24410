//! What happens between the start of pgbench and the last event: progress once a second, and the faults on the way.

use std::time::{Duration, Instant};

use crate::programs::{Program, Programs};
use crate::servers::{Role, Servers};
use crate::watch::{Counts, Watch};
use crate::{Result, TICK};

/// How often progress is shown.
const PROGRESS: Duration = Duration::from_secs(1);
/// When pgbench has finished and nothing has been handled for so long, the rest is not waited for.
const STANDSTILL: Duration = Duration::from_secs(60);
/// How long nats-server stays away when it is killed. Programs are started again at once.
const NATS_DOWN: Duration = Duration::from_secs(1);

/// What is killed with SIGKILL.
#[derive(Clone, Copy)]
pub enum Fault {
    Relay,
    Worker,
    Nats,
}

/// A fault that is not over until an event that was committed after it is handled.
struct Recovery {
    what: &'static str,
    since: Instant,
    /// The outbox id of the last event before.
    after: i64,
}

pub struct Show<'a> {
    start: Instant,
    seconds: u64,
    faults: Vec<Fault>,
    recovery: Option<Recovery>,
    servers: &'a mut Servers,
    programs: &'a Programs,
    crew: &'a mut [Program],
    watch: &'a mut Watch,
    pgbench: Program,
}

impl<'a> Show<'a> {
    /// Starts when pgbench has just been started, for so many seconds. The faults are spread evenly over them.
    pub fn new(
        (pgbench, seconds): (Program, u64),
        faults: Vec<Fault>,
        servers: &'a mut Servers,
        programs: &'a Programs,
        crew: &'a mut [Program],
        watch: &'a mut Watch,
    ) -> Self {
        Self { start: Instant::now(), seconds, faults, recovery: None, servers, programs, crew, watch, pgbench }
    }

    /// Goes on until pgbench has finished and every event is handled, or none is handled any more. Returns how long that
    /// took.
    pub async fn run(mut self) -> Result<Duration> {
        let pause = Duration::from_secs(self.seconds) / (self.faults.len() as u32 + 1);
        let mut faults = std::mem::take(&mut self.faults).into_iter();
        let mut next_fault = faults.next().map(|fault| (fault, pause));
        let mut shown = Duration::ZERO;
        let mut finished = None;
        let (mut handled, mut moved) = (0, Duration::ZERO);
        loop {
            tokio::time::sleep(TICK).await;
            let now = self.start.elapsed();
            if finished.is_none() && self.pgbench_has_finished()? {
                finished = Some(now);
                self.say("pgbench has finished");
            }
            self.check_crew()?;
            self.check_recovery().await?;
            if let Some((fault, when)) = next_fault
                && self.recovery.is_none()
                && finished.is_none()
                && now >= when
            {
                self.recovery = Some(self.strike(fault).await?);
                next_fault = faults.next().map(|fault| (fault, when + pause));
            }
            if now >= shown + PROGRESS || finished.is_some() {
                let counts = self.watch.counts().await?;
                if counts.handled > handled {
                    (handled, moved) = (counts.handled, now);
                }
                let drained = finished.is_some() && counts.handled >= counts.published;
                if drained || now >= shown + PROGRESS {
                    shown = now;
                    self.progress(&counts).await?;
                }
                if drained {
                    return Ok(now);
                }
                if finished.is_some_and(|finished| now > moved.max(finished) + STANDSTILL) {
                    self.say_why_it_stands().await;
                    return Ok(now);
                }
            }
        }
    }

    fn pgbench_has_finished(&mut self) -> Result<bool> {
        match self.pgbench.ended()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(format!("pgbench failed ({status}): {}", self.programs.said("pgbench")).into()),
        }
    }

    fn check_crew(&mut self) -> Result<()> {
        for program in self.crew.iter_mut() {
            if let Some(status) = program.ended()? {
                let said = self.programs.said(&program.name);
                return Err(format!("{} ended by itself ({status}): {said}", program.name).into());
            }
        }
        Ok(())
    }

    async fn check_recovery(&mut self) -> Result<()> {
        if let Some(Recovery { what, since, after }) = self.recovery
            && self.watch.applied().await? > after
        {
            let took = since.elapsed().as_secs_f64();
            self.say(&format!("recovered: what was committed after the kill of {what} is handled {took:.1} s later"));
            self.recovery = None;
        }
        Ok(())
    }

    async fn strike(&mut self, fault: Fault) -> Result<Recovery> {
        let since = Instant::now();
        let what = match fault {
            Fault::Relay => {
                let leader = self.watch.leading_relay().await?;
                self.kill("relay", "the leading relay", &Vec::from_iter(leader))?
            }
            Fault::Worker => {
                let active = self.watch.active_workers().await?;
                self.kill("worker", "the active worker", &active)?
            }
            Fault::Nats => self.kill_nats().await?,
        };
        Ok(Recovery { what, since, after: self.watch.published().await? })
    }

    /// Kills the program whose process is one of `pids` and starts it again; its neighbour takes over meanwhile.
    fn kill(&mut self, role: &str, what: &'static str, pids: &[u32]) -> Result<&'static str> {
        let candidates = self.crew.iter_mut().filter(|program| program.name.starts_with(role));
        let victim = candidates.into_iter().find(|program| pids.contains(&program.pid()));
        let victim = victim.ok_or_else(|| format!("no {role} of the demo holds the lease, so none is active"))?;
        let (name, pid) = (victim.name.clone(), victim.pid());
        victim.kill_and_restart()?;
        self.say(&format!("kill -9 of {what} ({name}, process {pid}); it is started again and stands by"));
        Ok(what)
    }

    async fn kill_nats(&mut self) -> Result<&'static str> {
        let start = self.start;
        let nats = self.servers.nats().ok_or("nats-server is not ours to kill")?;
        nats.kill().await?;
        say(start, &format!("kill -9 of nats-server; it stays away for {NATS_DOWN:?}"));
        tokio::time::sleep(NATS_DOWN).await;
        nats.restart().await?;
        say(start, "nats-server is up again");
        Ok("nats-server")
    }

    async fn progress(&mut self, counts: &Counts) -> Result<()> {
        let latencies = self.watch.recent_latencies().await?;
        self.say(&format!(
            "published {:>9}  relayed {:>9}  handled {:>9}  backlog {:>7}  commit to handled p50 {:>8} p99 {:>8}",
            grouped(counts.published),
            grouped(counts.relayed),
            grouped(counts.handled),
            grouped(counts.published.saturating_sub(counts.handled)),
            milliseconds(latencies.percentile(0.5)),
            milliseconds(latencies.percentile(0.99)),
        ));
        Ok(())
    }

    async fn say_why_it_stands(&self) {
        let places = &self.servers.places;
        let mut status = self
            .programs
            .aftercommit("aftercommit", places.environment(Role::Operator, &places.url_for("ops", &places.bank_url)));
        status.args(["status", "--json"]);
        let status = match self.programs.run("status", status).await {
            Ok(()) => "what `aftercommit status` says is in status.log".to_string(),
            Err(error) => format!("`aftercommit status` says: {error}"),
        };
        self.say(&format!("nothing has been handled for {STANDSTILL:?}; {status}"));
    }

    fn say(&self, text: &str) {
        say(self.start, text);
    }
}

fn say(start: Instant, text: &str) {
    println!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
}

/// With commas between thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// A latency, or a dash when there is none.
pub fn milliseconds(latency: Option<f64>) -> String {
    latency.map_or_else(|| "-".into(), |latency| format!("{latency:.1} ms"))
}
