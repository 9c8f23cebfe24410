//! How much of a stream's messages may be in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// How many messages, and of what size, may be in memory.
#[derive(Debug)]
pub struct Budget {
    max_messages: usize,
    max_bytes: usize,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    freed: Notify,
}

/// The share of one message in a [`Budget`], given back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// A budget of this many messages and this many bytes, of which nothing is used.
    pub fn new(max_messages: usize, max_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            max_messages,
            max_bytes,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            freed: Notify::new(),
        })
    }

    /// Room for messages of `typical` bytes.
    pub(super) fn room(&self, typical: usize) -> usize {
        let messages = self.max_messages.saturating_sub(self.messages.load(Ordering::Relaxed));
        let bytes = self.max_bytes.saturating_sub(self.bytes.load(Ordering::Relaxed));
        messages.min(bytes.div_ceil(typical.max(1)))
    }

    /// Whether there is no room for one more message.
    pub fn is_full(&self) -> bool {
        self.room(1) == 0
    }

    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Permit {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Permit { budget: Arc::clone(self), bytes }
    }

    /// Ends when something is given back after this call, whenever it is polled.
    pub(super) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    pub(super) async fn wait_for_room(&self) {
        loop {
            let freed = self.freed.notified();
            if !self.is_full() {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.messages.fetch_sub(1, Ordering::Relaxed);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_full_by_number_or_by_size_and_room_comes_back() {
        let budget = Budget::new(3, 1000);
        assert_eq!(budget.room(100), 3);
        assert_eq!(budget.room(600), 2, "what is on its way may exceed the size by one message");
        let small = budget.take(100);
        let large = budget.take(900);
        assert!(budget.is_full());
        drop(large);
        assert_eq!(budget.room(1), 2);
        let more = [budget.take(1), budget.take(1)];
        assert!(budget.is_full());
        drop((small, more));
        assert_eq!(budget.room(100), 3);
    }
}
