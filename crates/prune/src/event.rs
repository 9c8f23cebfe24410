//! The event that tells what was pruned.

use std::collections::BTreeMap;

use aftercommit_outbox::event::Event;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The most ids in one event.
const IDS: usize = 10_000;
/// The most bytes of ids in one event, so that its JSON stays well below what an event may have.
const BYTES: usize = 400_000;

/// `rows.pruned`: these rows are gone. It is written in the transaction that deleted them. What does not fit into one event
/// comes in several with the same `batch`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowsPruned {
    /// The spec's name. It is the event's key, so subscribers get the events of one spec in order.
    pub spec: String,
    /// The table, with its schema.
    pub table: String,
    /// The ids in this event, as text.
    pub ids: Vec<String>,
    /// How many ids all events of the batch have together.
    pub count: u64,
    /// The rows that went with them, by table. Only in the first event of a batch.
    pub children: BTreeMap<String, u64>,
    /// The associations that went with them, by table. Only in the first event of a batch.
    pub associations: BTreeMap<String, u64>,
    /// Only rows that were finished before this time went; none when no time was given.
    pub before: Option<DateTime<Utc>>,
    /// What was pruned in one go.
    pub batch: Uuid,
    /// Which event of the batch this is, from 1.
    pub chunk: u32,
    /// How many events the batch has.
    pub chunks: u32,
}

impl Event for RowsPruned {
    const TYPE: &'static str = "rows.pruned";

    fn key(&self) -> Option<String> {
        // A key has 512 bytes at most, and a name 200.
        Some(self.spec.clone())
    }
}

/// The ids in pieces that fit into an event each.
pub(crate) fn chunks(ids: &[String]) -> Vec<&[String]> {
    let mut chunks = Vec::new();
    let mut rest = ids;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take(IDS).take_while(|id| {
            // Two quotes and a comma; a character may become six when JSON writes it as \u0000.
            bytes += 3 + id.chars().map(|c| if c.is_control() { 6 } else { c.len_utf8() + 1 }).sum::<usize>();
            bytes <= BYTES
        });
        let (chunk, behind) = rest.split_at(fits.count().max(1));
        chunks.push(chunk);
        rest = behind;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_in_one_chunk_and_no_chunk_is_too_large() {
        for (count, length) in [(0, 1), (1, 1), (1, 900_000), (100_000, 36), (25_000, 5), (3, 300_000)] {
            let ids: Vec<String> = (0..count).map(|i| "0".repeat(length) + &i.to_string()).collect();
            let chunks = chunks(&ids);
            assert_eq!(chunks.concat(), ids);
            for chunk in chunks {
                let bytes = chunk.iter().map(|id| id.len() + 3).sum::<usize>();
                assert!(
                    !chunk.is_empty() && chunk.len() <= IDS && (bytes <= BYTES || chunk.len() == 1),
                    "{count} {length}"
                );
            }
        }
    }
}
