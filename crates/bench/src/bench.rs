//! A run of the bench: what it is told, and how arms are measured in turn.

use std::time::Duration;

use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use aftercommit_core::config::{NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};

/// What is measured, and on which servers.
#[derive(Debug, Clone)]
pub(crate) struct BenchConfig {
    /// A server on which databases may be made; each figure makes its own and drops it.
    pub(crate) postgres: PostgresConfig,
    /// A server with JetStream; each figure makes a stream of its own and deletes it.
    pub(crate) nats: NatsConfig,
    /// The same with `sync_interval: always`, for the figures that need it. Defaults to none: they are not measured.
    pub(crate) nats_sync: Option<NatsConfig>,
    /// Which figures; none for all. Defaults to none.
    pub(crate) only: Vec<u8>,
    /// How often each arm is measured, beside a first time that does not count. Defaults to 7.
    pub(crate) rounds: usize,
    /// Events that an arm moves in a round, where the figure does not prescribe another number. Defaults to 200,000.
    pub(crate) events: u64,
    /// A smoke run that shows that everything works: one round of few events. Its figures mean nothing. Defaults to
    /// false.
    pub(crate) quick: bool,
}

impl BenchConfig {
    /// The defaults for a pair of servers.
    pub(crate) fn new(postgres: PostgresConfig, nats: NatsConfig) -> Self {
        Self { postgres, nats, nats_sync: None, only: Vec::new(), rounds: 7, events: 200_000, quick: false }
    }

    /// Rounds that count.
    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds.max(1) }
    }
}

/// A run.
pub(crate) struct Bench {
    pub(crate) config: BenchConfig,
    pub(crate) interrupted: CancellationToken,
}

impl Bench {
    /// Whether any of these figures is to be measured.
    pub(crate) fn wants(&self, figures: &[u8]) -> bool {
        self.config.only.is_empty() || figures.iter().any(|figure| self.config.only.contains(figure))
    }

    /// Events for an arm in a round.
    pub(crate) fn events(&self) -> u64 {
        if self.config.quick { 2000 } else { self.config.events }
    }

    /// A number that a figure prescribes, or a much smaller one for a smoke run.
    pub(crate) fn size<T>(&self, full: T, quick: T) -> T {
        if self.config.quick { quick } else { full }
    }

    /// Measures each arm once a round, in turn, and in the other direction in every other round, so that no arm always
    /// comes first. The first round warms up and is dropped. Returns what each arm gave, round by round.
    pub(crate) async fn rounds<T, const N: usize>(
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

    pub(crate) fn say(&self, text: &str) {
        eprintln!("{text}");
    }
}

/// What a task of the bench found.
pub(crate) fn ended<T>(task: Result<Result<T, Error>, JoinError>) -> Result<T, Error> {
    task.map_err(|error| Error::with_source(ErrorKind::Integrity, "a task of the bench broke down", error))?
}

/// Looks until `ready` holds, and gives up after `deadline`.
pub(crate) async fn wait_until(
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
