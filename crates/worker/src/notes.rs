//! The single events of a subscriber that wait, for what and until when, and those that run for long.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{SubsecRound, Utc};

use super::item::Item;
use aftercommit_core::text;
use aftercommit_core::told::{LENGTH, Running, Told, Waiting, Why, shown_key};
use aftercommit_outbox::event::EventId;

/// How many events of a kind are told: enough to see what is wrong, and little to write.
const TOLD: usize = 50;
/// What runs for less long is nothing to tell.
const LONG: Duration = Duration::from_secs(2);

/// The events that wait or run at present.
#[derive(Debug, Default)]
pub(super) struct Notes(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    waiting: HashMap<EventId, Waiting>,
    running: HashMap<i64, (Instant, Running)>,
}

impl Notes {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing waits here and nothing runs.
    pub(super) fn clear(&self) {
        *self.kept() = Kept::default();
    }

    /// An executor has begun with these events.
    pub(super) fn started(&self, executor: i64, items: &[Item]) {
        let first = items.iter().find_map(|item| Some((item.id?, item)));
        let Some((event_id, item)) = first else { return };
        let key = item.event.as_ref().and_then(|event| event.key.as_deref()).map(shown_key);
        let running = Running { event_id, key, events: items.len(), since: Utc::now().trunc_subsecs(3) };
        self.kept().running.insert(executor, (Instant::now(), running));
    }

    /// An executor has ended.
    pub(super) fn ended(&self, executor: i64) {
        self.kept().running.remove(&executor);
    }

    /// An event waits. When many do, the first of them are kept.
    pub(super) fn waits(
        &self,
        event_id: EventId,
        key: Option<&str>,
        why: Why,
        reason: Option<&str>,
        times: u32,
        wait: Duration,
    ) {
        let mut kept = self.kept();
        if kept.waiting.len() >= TOLD && !kept.waiting.contains_key(&event_id) {
            return;
        }
        let key = key.map(shown_key);
        let reason = reason.map(|reason| text::cut(reason, LENGTH));
        let until = (Utc::now() + wait).trunc_subsecs(3);
        kept.waiting.insert(event_id, Waiting { event_id, key, why, reason, times, until });
    }

    /// An event is done.
    pub(super) fn done(&self, event_id: EventId) {
        self.kept().waiting.remove(&event_id);
    }

    /// What is to be told, in an order that stays.
    pub(super) fn told(&self) -> Told {
        let kept = self.kept();
        let mut waiting: Vec<Waiting> = kept.waiting.values().cloned().collect();
        let running = kept.running.values().filter(|(begun, _)| begun.elapsed() >= LONG);
        let mut running: Vec<Running> = running.map(|(_, running)| running.clone()).collect();
        drop(kept);
        waiting.sort_by_key(|waiting| waiting.event_id);
        running.sort_by_key(|running| running.since);
        running.truncate(TOLD);
        Told { waiting, running }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_waits_is_told_until_it_is_done() {
        let notes = Notes::default();
        let (one, two) = (EventId::new(), EventId::new());
        notes.waits(one, Some("k\n"), Why::Unavailable, Some("503"), 1, Duration::from_secs(5));
        notes.waits(two, None, Why::Failing, None, 0, Duration::from_secs(5));
        let told = notes.told();
        assert_eq!(told.waiting.iter().map(|one| one.event_id).collect::<Vec<_>>(), [one, two]);
        assert_eq!(told.waiting[0].key.as_deref(), Some("k\\n"));
        assert_eq!(Told::read(&serde_json::to_value(&told).unwrap()), told);
        notes.done(one);
        assert_eq!(notes.told().waiting.len(), 1);
        notes.clear();
        assert_eq!(notes.told(), Told::default());
    }

    #[test]
    fn a_thousand_that_wait_are_not_all_told() {
        let notes = Notes::default();
        let ids: Vec<EventId> = (0..1000).map(|_| EventId::new()).collect();
        ids.iter().for_each(|id| notes.waits(*id, None, Why::Snoozed, None, 0, Duration::ZERO));
        assert_eq!(notes.told().waiting.len(), TOLD);
        notes.waits(ids[0], None, Why::Unavailable, None, 2, Duration::ZERO);
        assert!(notes.told().waiting.iter().any(|one| one.times == 2), "what is known is kept up to date");
    }

    #[test]
    fn notes_of_another_version_are_read_as_far_as_they_are_known() {
        let notes = serde_json::json!({ "waiting": [{ "event_id": 7 }], "later": [] });
        assert_eq!(Told::read(&notes), Told::default());
        assert_eq!(Told::read(&Value::Null), Told::default());
    }
}
