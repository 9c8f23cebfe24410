//! Looks for new events, and corrects the sequence of ids when it is behind.

use super::Leader;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::window::{Look, Watch};
use aftercommit_core::postgres::{database_error, sequence};

impl Leader<'_> {
    /// Whether there is anything that is not handled.
    pub(crate) async fn look(&mut self) -> Result<Look, Error> {
        let handled = self.state.target.as_ref().unwrap_or(&self.state.settled);
        if !self.watch.as_ref().is_some_and(|watch| watch.is_of(handled)) {
            self.watch = None;
        }
        let watch = self.watch.get_or_insert_with(|| Watch::new(handled));
        watch.look(&mut self.log).await.map_err(|error| database_error("looking for new events failed", error))
    }

    /// The sequence lies behind ids that were handed out, or hands them out in another order. The first is put right: the
    /// windows miss nothing, but ids that go back put a key's events out of order, and publishers meet ids that are
    /// there. The second only the sequence's owner can put right.
    pub(crate) async fn correct_ids(&mut self) -> Result<(), Error> {
        let failed = |error| database_error("reading the settings of the outbox's ids failed", error);
        let found = sequence::read(&mut self.log).await.map_err(failed)?;
        found.check()?;
        if !found.is_behind() {
            return Ok(());
        }
        let failed = |error| database_error("the sequence outbox_id_seq is behind, and cannot be set forward", error);
        if let Some(now) = sequence::catch_up(&mut self.log).await.map_err(failed)? {
            tracing::error!(
                was = found.last_id,
                now,
                "the sequence outbox_id_seq was behind ids that had been handed out, and has been set forward: \
                 was it set back, or the outbox truncated or loaded by hand?"
            );
        }
        Ok(())
    }
}
