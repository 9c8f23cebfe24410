//! Keys whose events wait behind a parked one.

use std::collections::HashSet;
use std::sync::Arc;

/// Keys with a parked event: their later events wait behind it. A copy shares the set until one of the two changes it.
#[derive(Debug, Clone, Default)]
pub(super) struct BlockedKeys {
    keys: Arc<HashSet<String>>,
    /// How many of them have been looked at in this round.
    looked_at: usize,
}

impl BlockedKeys {
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.keys.contains(key)
    }

    /// Takes these keys in place of those that it has.
    pub(super) fn replace(&mut self, keys: HashSet<String>) {
        self.keys = Arc::new(keys);
    }

    pub(super) fn block(&mut self, key: &str) {
        Arc::make_mut(&mut self.keys).insert(key.into());
    }

    pub(super) fn unblock(&mut self, keys: &[String]) {
        if !keys.is_empty() {
            let blocked = Arc::make_mut(&mut self.keys);
            keys.iter().for_each(|key| _ = blocked.remove(key));
        }
    }

    /// The next keys to look at, `most` of them at most. After the last key the first one follows.
    pub(super) fn next(&mut self, most: usize) -> Vec<String> {
        let next: Vec<String> =
            self.keys.iter().cycle().skip(self.looked_at).take(most.min(self.keys.len())).cloned().collect();
        self.looked_at = (self.looked_at + next.len()).checked_rem(self.keys.len()).unwrap_or(0);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_its_turn() {
        let mut blocked = BlockedKeys::default();
        assert!(blocked.next(2).is_empty());
        ["a", "b", "c"].iter().for_each(|key| blocked.block(key));
        let first: HashSet<String> = [blocked.next(2), blocked.next(1)].concat().into_iter().collect();
        assert_eq!(first.len(), 3);
        assert_eq!(blocked.next(9).len(), 3, "each one once");
    }

    #[test]
    fn what_is_unblocked_is_gone_and_a_copy_keeps_what_it_had() {
        let mut blocked = BlockedKeys::default();
        blocked.replace(HashSet::from(["a".to_string(), "b".to_string()]));
        let copy = blocked.clone();
        blocked.unblock(&["a".to_string()]);
        assert!(!blocked.contains("a") && blocked.contains("b") && copy.contains("a"));
        assert!(!blocked.is_empty());
    }
}
