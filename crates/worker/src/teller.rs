//! What a subscriber's instance tells operators: its state, and which single events wait or run for long. It is written into
//! the subscriber's database, where `aftercommit status`, `peek` and `explain` read it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::progress::Progress;
use super::subscriber::Subscriber;
use aftercommit_core::health::Phase;
use aftercommit_core::postgres;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::worker_status::{self, Said};
use aftercommit_core::told::Told;

/// How often something new is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is said that there is nothing new. Who has said nothing for several times as long is gone.
const EVERY: Duration = Duration::from_secs(10);
/// How long the database may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// Tells operators how a subscriber is doing, until it is dropped; then [`Teller::stopped`] says that.
#[derive(Clone)]
pub(super) struct Teller {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) progress: Arc<Progress>,
    pub(super) instance: String,
}

impl Teller {
    /// Tells what is new, and now and then that nothing is.
    pub(super) async fn run(self) {
        let mut last: Option<(Said, Instant)> = None;
        loop {
            let said = self.said();
            if last.as_ref().is_none_or(|(before, at)| *before != said || at.elapsed() >= EVERY) {
                last = self.write(&said).await.then(|| (said, Instant::now()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Says that the process serves the subscriber no more.
    pub(super) async fn stopped(self) {
        let notes = Value::Object(serde_json::Map::new());
        let said = Said { active: false, phase: "stopped".into(), state: "stopped".into(), notes, ..self.said() };
        self.write(&said).await;
    }

    fn said(&self) -> Said {
        let (phase, ready, state) = self.progress.standing();
        let active = matches!(phase, Phase::Leading | Phase::Paused);
        let told = if active { self.progress.notes.told() } else { Told::default() };
        Said {
            subscriber: self.subscriber.name.clone(),
            instance: self.instance.clone(),
            active,
            phase: phase.name().into(),
            ready,
            state,
            max_attempts: self.subscriber.settings.max_attempts.into(),
            notes: serde_json::to_value(told).unwrap_or_default(),
        }
    }

    /// False when it could not be written. That keeps nobody from working, and when the database is away others say so.
    async fn write(&self, said: &Said) -> bool {
        let written = self.connections.run(async |connection| worker_status::write(connection, said).await);
        match tokio::time::timeout(DEADLINE, written).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                let error = postgres::message(&error);
                tracing::debug!(subscriber = said.subscriber, error, "the subscriber's status was not written");
                false
            }
            Err(_) => false,
        }
    }
}
