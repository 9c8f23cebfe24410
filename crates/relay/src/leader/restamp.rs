//! New transaction ids for the events of an outbox that was restored into another cluster.

use super::Leader;
use crate::fence::fenced;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::postgres::database_error;
use aftercommit_core::postgres::relay_log::Appended;
use aftercommit_core::postgres::restamp::{self, Step};

impl Leader<'_> {
    /// Makes the log valid in this cluster when it was written in another one: restored from a dump, or upgraded.
    pub(crate) async fn restamp_if_restored(&mut self) -> Result<(), Error> {
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
        if let Some(appended) = restamp::settle_nothing_if_behind(&mut self.log, &self.state).await.map_err(failed)? {
            let Appended::Yes(state) = appended else { return Err(fenced()) };
            self.state = *state;
            tracing::error!(
                "the sequence outbox_id_seq was not restored and has been set forward; its ids do not tell \
                 what was published, so every event that the stream does not hold is published"
            );
        }
        let rows = self.restamp_rows().await?;
        let Appended::Yes(state) = restamp::finish(&mut self.log, &self.state, here).await.map_err(failed)? else {
            return Err(fenced());
        };
        fault::point("relay-restamped");
        self.state = *state;
        tracing::warn!(rows, "events that were not settled have transaction ids of this cluster now");
        Ok(())
    }

    /// Gives the events new transaction ids, step by step. Steps that an earlier leader has done take little time.
    async fn restamp_rows(&mut self) -> Result<u64, Error> {
        let failed = |error| database_error("giving events transaction ids of this cluster failed", error);
        let (mut total, mut behind) = (0, self.state.settled.last_id);
        loop {
            match restamp::step(&mut self.log, &self.state, behind).await.map_err(failed)? {
                Step::Done { up_to, rows } => {
                    (total, behind) = (total + rows, up_to);
                    self.progress.state(format!("moving events into this cluster, done up to id {up_to}"));
                    fault::point("relay-restamp-step");
                }
                Step::End { rows } => return Ok(total + rows),
                Step::Fenced => return Err(fenced()),
            }
            if self.signals.is_shut_down() {
                return Err(Error::new(
                    ErrorKind::NotReady,
                    "told to stop while the outbox was moved into this cluster",
                ));
            }
        }
    }
}
