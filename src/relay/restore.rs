//! An outbox that was restored into another cluster.

use super::leader::{Leader, fenced};
use crate::error::Error;
use crate::fault;
use crate::postgres::{database_error, restamp};

impl Leader<'_> {
    /// Makes the log valid in this cluster when it was written in another one: restored from a dump, or upgraded.
    pub(super) async fn restamp_if_restored(&mut self) -> Result<(), Error> {
        let failed = |error| database_error("moving the relay's log into this cluster failed", error);
        let here = restamp::system_identifier(&mut self.log).await.map_err(failed)?;
        if self.state.system_identifier == here {
            return Ok(());
        }
        tracing::warn!(
            was = self.state.system_identifier,
            here,
            settled_id = self.state.settled.last_id,
            "the database was restored or upgraded into another cluster, moving the relay's log into it"
        );
        let restamped = restamp::restamp(&mut self.log, &self.state, here).await.map_err(failed)?.ok_or_else(fenced)?;
        fault::point("relay-restamped");
        self.state = restamped.state;
        if restamped.sequence_was_behind {
            tracing::error!(
                "the sequence aftercommit.outbox_id_seq was not restored and has been set forward; its ids do not tell \
                 what was published, so every event that the stream does not hold is published"
            );
        }
        tracing::warn!(rows = restamped.rows, "events that were not settled have transaction ids of this cluster now");
        Ok(())
    }
}
