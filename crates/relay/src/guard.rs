//! Whether the stream's settings are still such that no event is lost, while the relay publishes into it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::progress::RelayPosition;
use aftercommit_core::config::Naming;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::settings::{Findings, Problem};
use aftercommit_core::jetstream::stream::{StreamReader, UNMAP};
use aftercommit_core::jetstream::topology;

/// How often the settings are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// What bounds the size of events: with it none is lost, and the answer to each that is too large says so.
pub(super) const SIZE: &str = "max_msg_size";

/// Looks at the settings of a stream.
pub(super) struct Guard {
    pub(super) stream: StreamReader,
    pub(super) naming: Arc<Naming>,
    /// Whether others write to it, too.
    pub(super) shared: bool,
}

impl Guard {
    /// What is wrong with the settings, or not known of them.
    pub(super) async fn findings(&self) -> Result<Findings, Error> {
        let config = self.stream.described().await?.config;
        Ok(topology::findings(&config, &self.naming, self.shared))
    }

    /// Looks again and again, and tells whether events would be lost. It ends only with its leader.
    pub(super) async fn watch(self, unfit: watch::Sender<bool>, progress: watch::Receiver<RelayPosition>) {
        let mut known = Vec::new();
        let mut mapped = false;
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // What keeps it from being read, the leader meets as well.
            let Ok(findings) = self.findings().await else { continue };
            if findings.unknown != known {
                Self::tell_unknown(&findings.unknown, &self.naming.stream);
                known = findings.unknown;
            }
            let newest = progress.borrow().last_sequence;
            let misplaced = self.misplaced(newest).await;
            if let Some(message) = misplaced.as_ref().filter(|_| !mapped) {
                tracing::error!(
                    stream = self.naming.stream,
                    stored = message,
                    remedy = UNMAP,
                    "nats-server maps subjects of events"
                );
            }
            mapped = misplaced.is_some();
            // Told each time, since whoever listens has its own view of what was before.
            unfit.send_replace(lossy(&findings.problems).next().is_some());
        }
    }

    /// Whether nats-server has put the newest event under another subject than it was published on. The answer to a publish
    /// does not say.
    async fn misplaced(&self, newest: u64) -> Option<String> {
        if newest == 0 {
            return None;
        }
        let message = self.stream.message(newest).await.ok().flatten()?;
        message.misplaced(&self.naming)
    }

    /// Refuses a stream with these problems.
    pub(super) fn refuse<'a>(problems: impl IntoIterator<Item = &'a Problem>, stream: &str) -> Result<(), Error> {
        let problems: Vec<String> = problems.into_iter().map(ToString::to_string).collect();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotReady, format!("stream {stream} would lose events: {}", problems.join("; "))))
    }

    /// Warns of settings that this version does not know.
    pub(super) fn tell_unknown(settings: &[String], stream: &str) {
        if !settings.is_empty() {
            tracing::warn!(
                stream,
                settings = settings.join(", "),
                "the stream has settings that this version does not know; they may change or lose events"
            );
        }
    }
}

/// The problems with which nothing may be published.
pub(super) fn lossy(problems: &[Problem]) -> impl Iterator<Item = &Problem> {
    problems.iter().filter(|problem| problem.setting != SIZE)
}
