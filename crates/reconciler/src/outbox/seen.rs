//! A set of outbox ids: one bit for each, in blocks, so that ten million take a little more than a megabyte.

use std::collections::HashMap;

/// Ids in a block.
const BLOCK: i64 = 1 << 16;
/// Words in a block.
const WORDS: usize = (BLOCK / 64) as usize;

#[derive(Debug, Default)]
pub(super) struct Seen(HashMap<i64, Box<[u64; WORDS]>>);

impl Seen {
    pub(super) fn insert(&mut self, id: i64) {
        let (block, word, bit) = place(id);
        let words = self.0.entry(block).or_insert_with(|| Box::new([0; WORDS]));
        if let Some(word) = words.get_mut(word) {
            *word |= bit;
        }
    }

    /// The highest.
    pub(super) fn last(&self) -> Option<i64> {
        let (block, words) = self.0.iter().max_by_key(|(block, _)| **block)?;
        let (at, word) = words.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        let bit = i64::from(63 - word.leading_zeros());
        Some(block * BLOCK + i64::try_from(at).unwrap_or_default() * 64 + bit)
    }

    pub(super) fn contains(&self, id: i64) -> bool {
        let (block, word, bit) = place(id);
        self.0.get(&block).and_then(|words| words.get(word)).is_some_and(|word| word & bit != 0)
    }
}

fn place(id: i64) -> (i64, usize, u64) {
    let within = id.rem_euclid(BLOCK);
    (id.div_euclid(BLOCK), usize::try_from(within / 64).unwrap_or_default(), 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(ids in prop::collection::vec(prop_oneof![0..200_000_i64, any::<i64>()], 0..200), other in any::<i64>()) {
            let mut seen = Seen::default();
            ids.iter().for_each(|id| seen.insert(*id));
            let set: HashSet<i64> = ids.iter().copied().collect();
            prop_assert_eq!(seen.last(), set.iter().max().copied());
            for id in ids.iter().flat_map(|id| [*id, id.wrapping_add(1), id.wrapping_add(64), id.wrapping_add(BLOCK)]).chain([other]) {
                prop_assert_eq!(seen.contains(id), set.contains(&id));
            }
        }
    }
}
