//! What the leader tells about itself: to the heartbeat, and through it to `aftercommit status`.

use tokio::sync::watch;

use super::chain::Sent;

/// How far the leader is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Position {
    /// The outbox id of the last event stored in the stream.
    pub(super) last_id: i64,
    /// Its stream sequence.
    pub(super) last_sequence: u64,
    /// Events stored since this process took the lead.
    pub(super) published: u64,
    /// What the leader does or waits for.
    pub(super) state: String,
}

/// The leader's position, written by the pump, read by the heartbeat.
#[derive(Debug)]
pub(super) struct Progress(watch::Sender<Position>);

impl Progress {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(Position::default()))
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Position> {
        self.0.subscribe()
    }

    /// These events are in the stream now, the last one under `sequence`.
    pub(super) fn stored(&self, events: &[Sent], sequence: u64) {
        if let Some(last) = events.last() {
            self.0.send_modify(|position| {
                position.last_id = last.outbox_id;
                position.last_sequence = sequence;
                position.published += events.len() as u64;
            });
        }
    }

    /// The stream's tail was found there.
    pub(super) fn found(&self, outbox_id: i64, sequence: u64) {
        self.0.send_modify(|position| {
            position.last_id = position.last_id.max(outbox_id);
            position.last_sequence = sequence;
        });
    }

    pub(super) fn state(&self, state: impl Into<String>) {
        let state = state.into();
        self.0.send_if_modified(|position| {
            let changed = position.state != state;
            position.state = state;
            changed
        });
    }
}
