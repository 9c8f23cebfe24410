//! How fast everything is on this machine, each figure beside its floor or its control in the same run.
//!
//! A figure is a ratio of two arms that are measured in turn, round by round, so that whatever else the machine does
//! meets both. Each run of an arm is checked: a figure from a run that lost, doubled or re-ordered an event does not
//! exist. `aftercommit bench` prints the report; `docs/performance.md` says how each figure is taken.

mod arm;
mod backlog;
mod child;
mod counts;
mod drain;
mod event;
mod figure;
mod held;
mod idle;
mod jetstream;
mod latency;
mod machine;
mod postgres;
mod publish;
mod report;
mod retained;
mod scratch;
mod worker;

pub use arm::{Arm, run_arm};
pub use counts::Counts;
pub use figure::{Goal, Row, Series, Spread, Verdict};
pub use machine::Machine;
pub use report::Report;

use std::time::{Duration, Instant};

use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use aftercommit_core::config::{NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};

/// The numbers of all figures.
pub const FIGURES: std::ops::RangeInclusive<u8> = 1..=13;

/// What is measured, and on which servers.
#[derive(Debug, Clone)]
pub struct BenchConfig {
    /// A server on which databases may be made; each figure makes its own and drops it.
    pub postgres: PostgresConfig,
    /// A server with JetStream; each figure makes a stream of its own and deletes it.
    pub nats: NatsConfig,
    /// The same with `sync_interval: always`, for the figures that need it. Defaults to none: they are not measured.
    pub nats_sync: Option<NatsConfig>,
    /// Which figures; none for all. Defaults to none.
    pub only: Vec<u8>,
    /// How often each arm is measured, beside a first time that does not count. Defaults to 7.
    pub rounds: usize,
    /// Events that an arm moves in a round, where the figure does not prescribe another number. Defaults to 200,000.
    pub events: u64,
    /// A smoke run that shows that everything works: one round of few events. Its figures mean nothing. Defaults to
    /// false.
    pub quick: bool,
}

impl BenchConfig {
    /// The defaults for a pair of servers.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig) -> Self {
        Self { postgres, nats, nats_sync: None, only: Vec::new(), rounds: 7, events: 200_000, quick: false }
    }
}

/// Measures, telling on standard error what it is at. Cancelled through `interrupted` it removes what it made.
///
/// # Errors
/// When a server cannot be reached or a figure cannot be set up. A figure that cannot be measured with what there is
/// says so in its row instead.
pub async fn run(config: BenchConfig, interrupted: CancellationToken) -> Result<Report, Error> {
    let started = Instant::now();
    let machine = Machine::look(&config).await?;
    let bench = Bench { config, interrupted };
    let mut rows = Vec::new();
    if bench.wants(&[1, 2]) {
        rows.extend(drain::drain(&bench).await?);
    }
    if bench.wants(&[3, 12]) {
        rows.extend(backlog::backlog(&bench).await?);
    }
    if bench.wants(&[4]) {
        rows.extend(held::snapshot(&bench).await?);
    }
    if bench.wants(&[5]) {
        rows.extend(held::writer(&bench).await?);
        rows.extend(retained::retained(&bench).await?);
    }
    if bench.wants(&[8]) {
        rows.extend(drain::synced(&bench).await?);
    }
    if bench.wants(&[11]) {
        rows.extend(drain::several(&bench).await?);
    }
    if bench.wants(&[6]) {
        rows.extend(Box::pin(latency::latency(&bench)).await?);
    }
    if bench.wants(&[7]) {
        rows.extend(Box::pin(publish::publish(&bench)).await?);
    }
    if bench.wants(&[9]) {
        rows.extend(Box::pin(worker::inbox(&bench)).await?);
    }
    if bench.wants(&[10]) {
        rows.extend(Box::pin(worker::function(&bench)).await?);
    }
    if bench.wants(&[13]) {
        rows.extend(Box::pin(idle::idle(&bench)).await?);
    }
    rows.retain(|row| bench.wants(&[row.figure]));
    rows.sort_by_key(|row| row.figure);
    let Bench { config, .. } = bench;
    Ok(Report { machine, rounds: config.rounds(), quick: config.quick, took: started.elapsed(), rows })
}

impl BenchConfig {
    /// Rounds that count.
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds.max(1) }
    }
}

/// A run.
struct Bench {
    config: BenchConfig,
    interrupted: CancellationToken,
}

impl Bench {
    /// Whether any of these figures is to be measured.
    fn wants(&self, figures: &[u8]) -> bool {
        self.config.only.is_empty() || figures.iter().any(|figure| self.config.only.contains(figure))
    }

    /// Events for an arm in a round.
    fn events(&self) -> u64 {
        if self.config.quick { 2000 } else { self.config.events }
    }

    /// A number that a figure prescribes, or a much smaller one for a smoke run.
    fn size<T>(&self, full: T, quick: T) -> T {
        if self.config.quick { quick } else { full }
    }

    /// Measures each arm once a round, in turn, and in the other direction in every other round, so that no arm always
    /// comes first. The first round warms up and is dropped. Returns what each arm gave, round by round.
    async fn rounds<T, const N: usize>(
        &self,
        what: &str,
        arms: [&str; N],
        mut measure: impl AsyncFnMut(usize) -> Result<T, Error>,
    ) -> Result<[Vec<T>; N], Error> {
        let mut values = [const { Vec::new() }; N];
        let warm_up = usize::from(!self.config.quick);
        for round in 0..self.config.rounds() + warm_up {
            for turn in 0..N {
                let arm = if round % 2 == 0 { turn } else { N - 1 - turn };
                self.say(&format!("{what}: round {round} of {}, {}", self.config.rounds(), arms[arm]));
                let value = measure(arm).await?;
                if round >= warm_up {
                    values[arm].push(value);
                }
            }
        }
        Ok(values)
    }

    fn say(&self, text: &str) {
        eprintln!("{text}");
    }
}

/// What a task of the bench found.
fn ended<T>(task: Result<Result<T, Error>, JoinError>) -> Result<T, Error> {
    task.map_err(|error| Error::with_source(ErrorKind::Integrity, "a task of the bench broke down", error))?
}

/// Looks until `ready` holds, and gives up after `deadline`.
async fn wait_until(
    what: &str,
    deadline: Duration,
    mut ready: impl AsyncFnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    let looking = async {
        while !ready().await? {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    };
    tokio::time::timeout(deadline, looking).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::NotReady, format!("waited {deadline:?} in vain for this: {what}")))
    })
}

/// The pause between two looks. What is looked at takes seconds.
const LOOK: Duration = Duration::from_millis(10);
