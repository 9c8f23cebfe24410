//! How far a subscriber has come in its stream by its own account, and writing that down beside its inbox.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use aftercommit_core::error::Error;
use aftercommit_core::jetstream::witness::{Stream, Witness};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::{database_error, reached};

/// How often a new place is written down.
pub(super) const EVERY: Duration = Duration::from_secs(1);
/// Messages behind an event that is not done of which it is remembered when they were stored. Of more every other is
/// forgotten.
const SEEN: usize = 1024;

/// A place that is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WrittenPlace {
    id: i64,
    place: Witness,
}

/// The places of a subscriber that are written down, the newest last.
#[derive(Debug, Default)]
pub(super) struct WrittenPlaces(Vec<WrittenPlace>);

impl WrittenPlaces {
    /// Reads them, and removes those that are not in the stream any more. The second part is false when there were none at
    /// all.
    pub(super) async fn load(
        connections: &Connections,
        subscriber: &str,
        stream: &Stream,
    ) -> Result<(Self, bool), Error> {
        let failed = |error| database_error("reading the subscriber's position failed", error);
        let rows = connections.run(async |session| reached::rows(session, subscriber, stream.name()).await);
        let rows = rows.await.map_err(failed)?;
        let known = !rows.is_empty();
        let (mut gone, mut places) = (Vec::new(), Vec::new());
        for row in rows {
            let place = Witness { sequence: row.sequence.cast_unsigned(), stored_at: row.stored_at };
            // Below one that is still there nothing was written anew.
            if places.is_empty() && !stream.stands(place).await? {
                gone.push(row.id);
            } else {
                places.push(WrittenPlace { id: row.id, place });
            }
        }
        places.reverse();
        if !gone.is_empty() {
            tracing::warn!(
                subscriber,
                unchanged_to = places.last().map_or(0, |written: &WrittenPlace| written.place.sequence),
                "the stream has lost its end, or its newest messages were removed: the subscriber reads it again from \
                 the last position that is unchanged"
            );
            connections.run(async |session| reached::remove(session, &gone).await).await.map_err(failed)?;
        }
        Ok((Self(places), known))
    }

    pub(super) fn newest(&self) -> Option<Witness> {
        self.0.last().map(|written| written.place)
    }

    /// The ids of those that are too many beside a new one: of the places in each stretch that is twice as long as the next
    /// newer one the oldest stays.
    fn too_many(&self, new: u64) -> Vec<i64> {
        let stretch = |written: &WrittenPlace| new.saturating_sub(written.place.sequence).max(1).ilog2();
        let mut stretches = BTreeSet::new();
        self.0.iter().filter(|written| !stretches.insert(stretch(written))).map(|written| written.id).collect()
    }
}

/// What is done and what is not.
pub(super) struct Account {
    connections: Arc<Connections>,
    subscriber: String,
    stream: String,
    places: WrittenPlaces,
    /// Messages that were taken in and are not done.
    open: BTreeSet<u64>,
    /// Messages that were taken in, in their order.
    seen: VecDeque<Witness>,
    /// The last sequence of all that were taken in.
    newest: u64,
    writing: JoinSet<WriteResult>,
}

/// What came of writing down a place, without those that are too many beside it.
struct WriteResult {
    place: Witness,
    without: Vec<i64>,
    id: Result<i64, sqlx::Error>,
}

impl Account {
    pub(super) fn new(connections: &Arc<Connections>, subscriber: &str, stream: &str, places: WrittenPlaces) -> Self {
        Self {
            connections: Arc::clone(connections),
            subscriber: subscriber.into(),
            stream: stream.into(),
            newest: places.newest().map_or(0, |place| place.sequence),
            places,
            open: BTreeSet::new(),
            seen: VecDeque::new(),
            writing: JoinSet::new(),
        }
    }

    /// Everything before this message was taken in before, or is done.
    pub(super) fn saw(&mut self, place: Witness) {
        if place.sequence <= self.newest {
            return;
        }
        self.newest = place.sequence;
        self.seen.push_back(place);
        if self.seen.len() > SEEN {
            let mut nth = 0;
            self.seen.retain(|_| {
                nth += 1;
                nth % 2 == 0
            });
        }
    }

    pub(super) fn opened(&mut self, sequence: u64) {
        self.open.insert(sequence);
    }

    pub(super) fn done(&mut self, sequence: u64) {
        self.open.remove(&sequence);
    }

    /// The newest message at or before which everything is done.
    fn place(&mut self) -> Option<Witness> {
        let end = self.open.first().copied().unwrap_or(u64::MAX);
        let done = self.seen.partition_point(|place| place.sequence < end);
        self.seen.drain(..done).next_back()
    }

    /// Writes down how far the subscriber has come, unless that goes on already. What cannot be written
    /// is written the next time.
    pub(super) fn write(&mut self) {
        match self.writing.try_join_next() {
            Some(Ok(wrote)) => self.wrote(wrote),
            Some(Err(error)) => {
                tracing::debug!(subscriber = self.subscriber, %error, "writing the subscriber's position failed")
            }
            None if !self.writing.is_empty() => return,
            None => {}
        }
        let Some(place) = self.place() else { return };
        let without = self.places.too_many(place.sequence);
        let (connections, subscriber, stream) =
            (Arc::clone(&self.connections), self.subscriber.clone(), self.stream.clone());
        self.writing.spawn(async move {
            let at = (place.sequence, place.stored_at);
            let id = connections.run(async |session| reached::write(session, &subscriber, &stream, at, &without).await);
            WriteResult { place, id: id.await, without }
        });
    }

    fn wrote(&mut self, wrote: WriteResult) {
        let WriteResult { place, without, id } = wrote;
        match id {
            Ok(id) => {
                self.places.0.retain(|written| !without.contains(&written.id));
                self.places.0.push(WrittenPlace { id, place });
            }
            Err(error) => {
                tracing::debug!(subscriber = self.subscriber, %error, "the subscriber's position was not written");
                self.seen.push_front(place);
            }
        }
    }

    /// The same at the end, for a successor, if the database answers.
    pub(super) async fn close(&mut self, patience: Duration) {
        let written = async {
            while let Some(Ok(wrote)) = self.writing.join_next().await {
                self.wrote(wrote);
            }
            self.write();
            self.writing.join_next().await
        };
        if tokio::time::timeout(patience, written).await.is_err() {
            tracing::debug!(subscriber = self.subscriber, "the subscriber's position was not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(sequence: u64) -> Witness {
        Witness { sequence, stored_at: i64::try_from(sequence).unwrap_or_default() }
    }

    fn account() -> Account {
        let config = aftercommit_core::config::PostgresConfig::new("postgres://localhost/none");
        let connections = Arc::new(Connections::new(&config, "test").unwrap());
        Account::new(&connections, "s", "EVENTS", WrittenPlaces::default())
    }

    #[test]
    fn nothing_that_is_not_done_lies_at_or_before_the_place() {
        let mut account = account();
        for sequence in [3, 5, 8] {
            account.saw(at(sequence));
            account.opened(sequence);
        }
        assert_eq!(account.place(), None);
        account.done(5);
        assert_eq!(account.place(), None, "an earlier one is open");
        account.done(3);
        assert_eq!(account.place(), Some(at(5)));
        // It comes again, and is opened once more.
        account.saw(at(3));
        account.opened(3);
        account.done(8);
        assert_eq!(account.place(), None);
        account.done(3);
        assert_eq!(account.place(), Some(at(8)));
        assert_eq!(account.place(), None, "nothing is new");
    }

    #[test]
    fn what_waits_behind_a_slow_event_is_not_all_remembered() {
        let mut account = account();
        account.saw(at(1));
        account.opened(1);
        (2..=100_000).for_each(|sequence| account.saw(at(sequence)));
        assert!(account.seen.len() <= SEEN);
        account.done(1);
        assert!(account.place().is_some_and(|place| place.sequence > 99_000));
    }

    #[test]
    fn older_places_become_ever_fewer_and_reach_far_back() {
        let mut places = WrittenPlaces::default();
        for n in 1..=10_000_u64 {
            let gone = places.too_many(n * 10);
            places.0.retain(|written| !gone.contains(&written.id));
            places.0.push(WrittenPlace { id: i64::try_from(n).unwrap_or_default(), place: at(n * 10) });
            assert!(places.0.len() <= 20, "{places:?}");
        }
        let newest = places.newest().unwrap().sequence;
        for lost in [100, 1_000, 10_000] {
            let before = places.0.iter().rev().find(|written| written.place.sequence + lost <= newest).unwrap();
            assert!(newest - before.place.sequence <= 5 * lost, "{lost} lost: {before:?}");
        }
    }
}
