//! What a reconciler has still to send back to its subscriber.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::resend::{self, Event, Open, Order};
use aftercommit_core::runner::job::Run;
use aftercommit_core::sending::Sending;
use aftercommit_core::subscription::Subscription;
use uuid::Uuid;

use super::{ask, failed_to_send};

/// The most events of which a run knows at a time that they are to be sent; 40 bytes each.
const KNOWN: usize = 1_000_000;
/// So many events go in one transaction, unless a single key has more.
const CHUNK: usize = 1000;
/// Findings that are read together.
const FINDINGS: i64 = 10_000;

/// Where an event is. What comes from the outbox goes first: it is added to what the stream has of its key because it
/// comes before that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Its id in the outbox.
    Outbox(i64),
    /// Its sequence in the stream.
    Stream(u64),
}

/// An event that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    /// Stands for its key.
    group: u64,
    /// Where it is, and its place in the order.
    pub(super) place: Place,
    pub(super) event_id: Uuid,
}

impl Item {
    /// Whether it stands for this event of the outbox, which has its place there.
    pub(super) fn is(&self, event: &Envelope) -> bool {
        let id = event.id.as_uuid();
        let place = Place::Outbox(event.sequence);
        (self.event_id, self.place, self.group) == (id, place, group(id, event.key.as_deref()))
    }
}

/// Where whole events come from.
pub(super) trait Source {
    /// The first of these events, as far as they are there, and how many of them this has looked for.
    fn fetch(&self, items: &[Item]) -> impl Future<Output = Result<(Vec<Event>, usize), Error>> + Send;
}

/// Events that are to be sent. When they become too many, it knows only those of some keys, but all of these.
#[derive(Debug)]
pub(super) struct Outstanding {
    items: Vec<Item>,
    /// The last event of each key that has a known place in an outbox.
    last: HashMap<u64, (String, i64)>,
    limit: usize,
    /// Of so many keys it has one.
    one_of: u64,
}

impl Outstanding {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), last: HashMap::new(), limit: KNOWN, one_of: 1 }
    }

    /// Adds an event; `outbox_id` is its place in its outbox, if that is known.
    pub(super) fn add(&mut self, event_id: Uuid, key: Option<&str>, place: Place, outbox_id: Option<i64>) {
        let group = group(event_id, key);
        if group.is_multiple_of(self.one_of) {
            self.items.push(Item { group, place, event_id });
            if let (Some(key), Some(id)) = (key, outbox_id) {
                let last = self.last.entry(group).or_insert_with(|| (key.to_string(), id));
                last.1 = last.1.max(id);
            }
        }
        while self.items.len() > self.limit && self.one_of < 1 << 62 {
            self.one_of *= 2;
            self.items.retain(|item| item.group.is_multiple_of(self.one_of));
            self.last.retain(|group, _| group.is_multiple_of(self.one_of));
        }
    }

    /// Each key with the outbox id of its last event.
    pub(super) fn keys(&self) -> Vec<(String, i64)> {
        self.last.values().cloned().collect()
    }

    /// The events that it has.
    pub(super) fn ids(&self) -> HashSet<Uuid> {
        self.items.iter().map(|item| item.event_id).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds what was found and is not repaired.
    pub(super) async fn add_open(
        &mut self,
        run: &Run,
        kind: &str,
        place: impl Fn(&Open) -> Option<Place>,
    ) -> Result<(), Error> {
        let mut after = 0;
        loop {
            let open = ask(run, async |session| resend::open(session, &run.name, kind, after, FINDINGS).await).await?;
            let Some(last) = open.last() else { return Ok(()) };
            after = last.id;
            for finding in &open {
                if let Some(place) = place(finding) {
                    self.add(finding.event_id, finding.key.as_deref(), place, finding.outbox_id);
                }
            }
        }
    }

    /// Whether it has all.
    pub(super) fn is_whole(&self) -> bool {
        self.one_of == 1
    }

    /// What goes together: whole keys, the ones with the oldest events first.
    fn chunks(mut self, size: usize) -> Vec<Vec<Item>> {
        self.items.sort_unstable_by_key(|item| (item.group, item.place, item.event_id));
        self.items.dedup();
        let mut groups: Vec<&[Item]> = self.items.chunk_by(|one, other| one.group == other.group).collect();
        groups.sort_unstable_by_key(|group| group.first().map(|item| item.place));
        let mut chunks: Vec<Vec<Item>> = Vec::new();
        for group in groups {
            match chunks.last_mut() {
                Some(chunk) if chunk.len() + group.len() <= size => chunk.extend(group),
                _ => chunks.push(group.to_vec()),
            }
        }
        for chunk in &mut chunks {
            chunk.sort_unstable_by_key(|item| item.place);
        }
        chunks
    }

    /// Sends everything, in as many transactions as it takes, and returns how many events that were. What was found of them
    /// counts as on its way with the same commit.
    pub(super) async fn send(
        self,
        run: &mut Run,
        subscription: &Subscription,
        kind: &str,
        source: &impl Source,
    ) -> Result<u64, Error> {
        let order = Order {
            subscriber: subscription.name().into(),
            stream: subscription.spec.stream.clone(),
            who: format!("reconciler {} run {}", run.name, run.id),
            again: false,
        };
        let failed = |error| failed_to_send(&order.subscriber, error);
        let connections = run.connections.clone();
        let mut all = 0;
        for chunk in self.chunks(CHUNK) {
            let mut session = connections.take().await.map_err(failed)?;
            let mut sending = Sending::begin(&mut session, order.clone()).await.map_err(failed)?;
            let (mut rest, mut sent) = (chunk.as_slice(), 0);
            while !rest.is_empty() {
                let (events, looked_for) = source.fetch(rest).await?;
                rest = rest.get(looked_for.max(1)..).unwrap_or_default();
                sending.send(&events).await.map_err(failed)?;
                let ids: Vec<Uuid> = events.iter().map(|event| event.event.id.as_uuid()).collect();
                sending.mark_repairing(&run.name, kind, &ids).await.map_err(failed)?;
                sent += events.len() as u64;
            }
            sending.commit("reconcile repair").await.map_err(failed)?;
            connections.give_back(session);
            run.repaired(sent);
            all += sent;
        }
        Ok(all)
    }
}

/// Stands for a key, or for an event without one.
fn group(event_id: Uuid, key: Option<&str>) -> u64 {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    key.map_or_else(|| hasher.hash_one(event_id), |key| hasher.hash_one(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(chunks: &[Vec<Item>]) -> Vec<Vec<u64>> {
        let sequence = |item: &Item| match item.place {
            Place::Outbox(id) => id.unsigned_abs(),
            Place::Stream(sequence) => sequence,
        };
        chunks.iter().map(|chunk| chunk.iter().map(sequence).collect()).collect()
    }

    #[test]
    fn keys_stay_whole_and_in_order() {
        let mut all = Outstanding::new();
        for (n, key) in [(9, Some("a")), (1, Some("b")), (4, Some("a")), (2, None), (8, Some("b")), (3, Some("c"))] {
            all.add(Uuid::from_u128(n), key, Place::Stream(u64::try_from(n).unwrap()), None);
        }
        all.add(Uuid::from_u128(9), Some("a"), Place::Stream(9), None);
        assert!(all.is_whole());
        assert_eq!(places(&all.chunks(3)), [vec![1, 2, 8], vec![3, 4, 9]]);
        let mut one = Outstanding::new();
        (1..=5).for_each(|n| one.add(Uuid::from_u128(n), Some("a"), Place::Stream(1), None));
        assert_eq!(one.chunks(2).len(), 1, "a key is not split");
    }

    #[test]
    fn of_too_many_it_knows_whole_keys() {
        let mut some = Outstanding { limit: 100, ..Outstanding::new() };
        for n in 0..1000_i64 {
            let place = Place::Outbox(n);
            some.add(Uuid::from_u128(u128::from(n.unsigned_abs())), Some(&(n % 50).to_string()), place, Some(n));
        }
        assert!(!some.is_whole());
        let keys = some.keys();
        assert!(keys.len() <= 5 && keys.iter().all(|(key, last)| *last >= 950 && (last % 50).to_string() == *key));
        let chunks = some.chunks(1);
        assert!((1..=5).contains(&chunks.len()), "{chunks:?}");
        assert!(chunks.iter().all(|chunk| chunk.len() == 20), "{chunks:?}");
    }
}
