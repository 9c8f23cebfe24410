//! What a subscriber's instance tells operators: its state, and which single events wait, for what and until when, or run for
//! long. It is written into the subscriber's database, where `aftercommit status`, `peek` and `explain` read it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{SubsecRound, Utc};
use serde_json::Value;

use super::executor::load::Item;
use super::progress::Progress;
use super::subscriber::Subscriber;
use aftercommit_core::health::Phase;
use aftercommit_core::postgres;
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::worker_status::{self, Said};
use aftercommit_core::text;
use aftercommit_core::told::{LENGTH, Running, Told, Waiting, Why, shown_key};
use aftercommit_outbox::event::EventId;

/// How many events of a kind are told: enough to see what is wrong, and little to write.
const TOLD: usize = 50;
/// What runs for less long is nothing to tell.
const LONG: Duration = Duration::from_secs(2);
/// How often something new is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is said that there is nothing new. Who has said nothing for several times as long is gone.
const EVERY: Duration = Duration::from_secs(10);
/// How long the database may take.
const DEADLINE: Duration = Duration::from_secs(2);

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

    /// A lane has begun with these events.
    pub(super) fn started(&self, lane: i64, items: &[Item]) {
        let first = items.iter().find_map(|item| Some((item.id?, item)));
        let Some((event_id, item)) = first else { return };
        let key = item.event.as_ref().and_then(|event| event.key.as_deref()).map(shown_key);
        let running = Running { event_id, key, events: items.len(), since: Utc::now().trunc_subsecs(3) };
        self.kept().running.insert(lane, (Instant::now(), running));
    }

    /// A lane has ended.
    pub(super) fn ended(&self, lane: i64) {
        self.kept().running.remove(&lane);
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
    fn told(&self) -> Told {
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

/// Tells operators how a subscriber is doing, until it is dropped; then [`Teller::stopped`] says that.
#[derive(Clone)]
pub(super) struct Teller {
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) connections: Arc<Connections>,
    pub(super) progress: Arc<Progress>,
    pub(super) instance: String,
}

impl Teller {
    /// Tells what is new, and now and then that nothing is.
    pub(super) async fn run(self) {
        let mut last: Option<(Said, Instant)> = None;
        loop {
            let said = self.said();
            if last.as_ref().is_none_or(|(before, at)| *before != said || at.elapsed() >= EVERY) {
                last = self.write(&said).await.then(|| (said, Instant::now()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Says that the process serves the subscriber no more.
    pub(super) async fn stopped(self) {
        let notes = Value::Object(serde_json::Map::new());
        let said = Said { active: false, phase: "stopped".into(), state: "stopped".into(), notes, ..self.said() };
        self.write(&said).await;
    }

    fn said(&self) -> Said {
        let (phase, ready, state) = self.progress.standing();
        let active = matches!(phase, Phase::Leading | Phase::Paused);
        let told = if active { self.progress.notes.told() } else { Told::default() };
        Said {
            subscriber: self.subscriber.name.clone(),
            instance: self.instance.clone(),
            active,
            phase: phase.name().into(),
            ready,
            state,
            max_attempts: self.subscriber.settings.max_attempts.into(),
            notes: serde_json::to_value(told).unwrap_or_default(),
        }
    }

    /// False when it could not be written. That keeps nobody from working, and when the database is away others say so.
    async fn write(&self, said: &Said) -> bool {
        let written = self.connections.run(async |connection| worker_status::write(connection, said).await);
        match tokio::time::timeout(DEADLINE, written).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                let error = postgres::message(&error);
                tracing::debug!(subscriber = said.subscriber, error, "the subscriber's status was not written");
                false
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
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
