//! What became of the events of a run.

use std::collections::HashMap;

use serde::Serialize;
use uuid::Uuid;

/// How many events a run had and what went wrong with them. All but `events` must be 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    /// Committed.
    pub(crate) events: u64,
    /// Committed, and nowhere to be found.
    pub(crate) lost: u64,
    /// More than once where once is right.
    pub(crate) doubled: u64,
    /// Behind a later event of their key.
    pub(crate) out_of_order: u64,
    /// Never committed.
    pub(crate) unknown: u64,
}

/// An event where it arrived, or where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) event_id: Uuid,
    pub(crate) outbox_id: i64,
    pub(crate) key: Option<String>,
}

impl Counts {
    /// Compares what was committed with what arrived, the latter in the order in which it did.
    pub(crate) fn compare(committed: &[Uuid], arrived: &[Place]) -> Self {
        let mut times: HashMap<Uuid, u64> = committed.iter().map(|id| (*id, 0)).collect();
        let mut last: HashMap<&str, i64> = HashMap::new();
        let mut counts = Self { events: committed.len() as u64, ..Self::default() };
        for place in arrived {
            match times.get_mut(&place.event_id) {
                Some(times) => *times += 1,
                None => counts.unknown += 1,
            }
            if let Some(key) = &place.key {
                let last = last.entry(key).or_default();
                counts.out_of_order += u64::from(place.outbox_id < *last);
                *last = place.outbox_id.max(*last);
            }
        }
        counts.lost = times.values().filter(|times| **times == 0).count() as u64;
        counts.doubled = times.values().map(|times| times.saturating_sub(1)).sum();
        counts
    }

    /// Those of several runs together.
    pub(crate) fn add(&mut self, other: Self) {
        self.events += other.events;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.out_of_order += other.out_of_order;
        self.unknown += other.unknown;
    }

    /// Whether every event arrived once and in order.
    pub(crate) fn all_is_well(&self) -> bool {
        *self == Self { events: self.events, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_goes_wrong_is_counted() {
        let ids: Vec<Uuid> = (0..4).map(Uuid::from_u128).collect();
        let place = |n: usize, key: &str| Place {
            event_id: Uuid::from_u128(n as u128),
            outbox_id: n as i64 + 1,
            key: Some(key.into()),
        };
        let well = [place(0, "a"), place(2, "b"), place(1, "a"), place(3, "a")];
        assert!(Counts::compare(&ids, &well).all_is_well());
        let badly = [place(0, "a"), place(3, "a"), place(3, "a"), place(1, "a"), place(9, "a")];
        assert_eq!(
            Counts::compare(&ids, &badly),
            Counts { events: 4, lost: 1, doubled: 1, out_of_order: 1, unknown: 1 }
        );
    }
}
