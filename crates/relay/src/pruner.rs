//! Retention: what is settled and old is removed, for as long as a relay leads.

use std::time::Duration;

use aftercommit_core::fault;
use aftercommit_core::postgres::prune;
use aftercommit_core::postgres::relay_log::State;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::walk::Walk;

/// Events that one statement looks at at most.
const BATCH: i64 = 5000;
/// States of the relay's log that are kept in any case.
const LOG_STATES: i64 = 10_000;
/// States that one statement looks at at most.
const STATES: i64 = 1000;

/// Removes what is old, and remembers how far it got, so that it reads neither what is retained nor what it has removed
/// and the server cannot clean up yet.
#[derive(Debug, Default)]
pub(super) struct Pruner {
    /// The last pass got here, with what was settled then.
    last: Option<(Mark, i64)>,
    /// Up to this state the log is thinned out.
    thinned: i64,
}

/// What was removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Removed {
    pub(super) events: u64,
    pub(super) states: u64,
    /// What was known of parked events and repairs.
    pub(super) notes: u64,
}

impl Pruner {
    /// One pass. What it could not do, the next one does.
    pub(super) async fn pass(
        &mut self,
        connection: &mut Session,
        state: &State,
        retention: Duration,
    ) -> Result<Removed, sqlx::Error> {
        let mut removed = Removed::default();
        let settled = &state.settled;
        let mut after = self.begin(connection, settled).await?;
        loop {
            let batch = prune::outbox(connection, settled, retention, after, BATCH).await?;
            fault::point("relay-pruned");
            removed.events += batch.removed;
            after = batch.next;
            self.last = Some((settled.clone(), after));
            if !batch.more {
                break;
            }
        }
        removed.notes = prune::parked(connection, settled, retention, BATCH).await?
            + prune::repairs(connection, settled, retention, BATCH).await?;
        let up_to = state.seq - LOG_STATES;
        removed.states = prune::thin_log(connection, self.thinned, up_to).await?;
        self.thinned = self.thinned.max(up_to);
        loop {
            let states = prune::shorten_log(connection, up_to, retention, STATES).await?;
            removed.states += states;
            if states < STATES.unsigned_abs() {
                return Ok(removed);
            }
        }
    }

    /// Where to begin: where the last pass ended, or before the first row that was not settled then and lies there.
    async fn begin(&self, connection: &mut Session, settled: &Mark) -> Result<i64, sqlx::Error> {
        let Some((mark, after)) = &self.last else { return Ok(0) };
        let came = Walk::<i64>::new(mark.clone(), settled.clone(), 0).next(connection, 1).await?;
        Ok(came.first().map_or(*after, |id| (*after).min(id - 1)))
    }
}
