//! A stream that has lost its end: wiped, recreated, or restored from an older copy.

use super::Leader;
use super::resume::Claim;
use crate::fence::fenced;
use aftercommit_core::error::Error;
use aftercommit_core::fault;
use aftercommit_core::jetstream::stream::Extent;
use aftercommit_core::postgres::relay_log::{self, Appended, Base, State};
use aftercommit_core::postgres::{database_error, window};

impl Leader<'_> {
    /// When the stream ends before the base, or is another one than the log speaks of, goes back to the newest state
    /// whose settled events lie in what is left, or to the beginning.
    pub(crate) async fn rewind_if_lost(&mut self, stream: Extent) -> Result<(), Error> {
        let Some(base) = self.state.base.clone().filter(|base| base.stream == self.naming.stream) else {
            return Ok(());
        };
        let recreated = base.created != stream.created && !self.still_holds(&base).await?;
        if !recreated && base.sequence <= stream.last {
            return Ok(());
        }
        let failed = |error| database_error("going back in the relay's log failed", error);
        let common = if recreated { 0 } else { stream.last };
        let earlier = relay_log::newest_at(&mut self.log, &base.stream, common).await.map_err(failed)?;
        let kept = match (&earlier, recreated) {
            (Some(State { base: Some(base), .. }), false) => base.sequence,
            _ => 0,
        };
        tracing::error!(
            stream = %self.naming.stream, recreated, end = stream.last, base = base.sequence,
            back_to = earlier.as_ref().map(|state| state.created_at.to_rfc3339()),
            "the stream has lost its end: events that were acknowledged are gone from it and are published again"
        );
        let kept = Base { stream: base.stream, created: stream.created, sequence: kept };
        let back =
            relay_log::go_back(&mut self.log, &self.state, earlier.as_ref(), &kept, common).await.map_err(failed)?;
        let Appended::Yes(state) = back else { return Err(fenced()) };
        fault::point("relay-rewound");
        self.state = *state;
        self.tail.forget();
        let first = window::first(&mut self.log).await.map_err(failed)?;
        if earlier.is_none() {
            tracing::error!(
                first_id = first.map(|(id, _)| id),
                first_written = first.map(|(_, at)| at.to_rfc3339()),
                "the relay's log does not reach back to what is left: everything in the outbox is looked up; events that \
                 were already removed from the outbox cannot be published again"
            );
        }
        self.load_parked().await
    }

    /// Whether the stream has the event that the log knows under the base: then it is the same stream, moved.
    async fn still_holds(&mut self, base: &Base) -> Result<bool, Error> {
        if base.sequence == 0 {
            return Ok(true);
        }
        let Some(message) = self.stream.message(base.sequence).await? else { return Ok(false) };
        let known = self.known(std::slice::from_ref(&message)).await?;
        Ok(matches!(known.get(&base.sequence), Some(Claim::Event(_))))
    }
}
