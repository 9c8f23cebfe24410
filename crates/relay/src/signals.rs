//! What tells a leader to stop, to pause, or to wait because the stream would lose events.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What a leader is told from outside. A copy is told the same.
#[derive(Debug, Clone)]
pub(super) struct Signals {
    shutdown: CancellationToken,
    paused: watch::Receiver<bool>,
    /// Whether the stream's settings would lose events at present.
    unfit: watch::Receiver<bool>,
}

impl Signals {
    pub(super) fn new(
        shutdown: CancellationToken,
        paused: watch::Receiver<bool>,
        unfit: watch::Receiver<bool>,
    ) -> Self {
        Self { shutdown, paused, unfit }
    }

    /// Whether the relay is to end.
    pub(super) fn is_shut_down(&self) -> bool {
        self.shutdown.is_cancelled()
    }

    /// Whether an operator has paused publishing.
    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Whether the relay is to publish no more, for now or for good.
    pub(super) fn is_told_to_stop(&self) -> bool {
        self.is_shut_down() || self.is_paused()
    }

    /// Returns when the relay is to end.
    pub(super) async fn shut_down(&self) {
        self.shutdown.cancelled().await;
    }

    /// Returns when the relay is to publish no more, for now or for good.
    pub(super) fn told_to_stop(&self) -> impl Future<Output = ()> + use<> {
        let (shutdown, mut paused) = (self.shutdown.clone(), self.paused.clone());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                Ok(_) = paused.wait_for(|paused| *paused) => {}
            }
        }
    }

    /// Returns when publishing is not paused any more, or the relay is to end.
    pub(super) async fn resumed(&self) {
        let mut paused = self.paused.clone();
        tokio::select! {
            // The sender lives as long as the leader.
            _ = paused.wait_for(|paused| !paused) => {}
            () = self.shut_down() => {}
        }
    }

    /// Returns when the stream is found to lose events from now on; what was found before counts no more.
    pub(super) fn turns_unfit(&self) -> impl Future<Output = ()> + use<> {
        let mut unfit = self.unfit.clone();
        async move {
            unfit.mark_unchanged();
            while unfit.changed().await.is_ok() {
                if *unfit.borrow_and_update() {
                    return;
                }
            }
            // Nobody looks any more.
            std::future::pending().await
        }
    }

    /// Waits so long, or until the relay is to end.
    pub(super) async fn rest(&self, wait: Duration) {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.shut_down() => {}
        }
    }
}
