//! Of leg C: events that were missing in the stream, and lie behind later ones of their keys there.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;
use uuid::Uuid;

use super::inbox::{Leg, MISSED, NEWEST};
use super::sending::Outstanding;
use super::unhandled;
use crate::envelope::Envelope;
use crate::error::Error;
use crate::jetstream::outbox_service::Moved;
use crate::postgres::finding::Finding;
use crate::postgres::resend::Known;

/// Keys that are asked for together.
const KEYS: usize = 100;

impl Leg<'_> {
    /// Adds the events that were missing in the stream and that the subscriber has not handled, with everything of their
    /// keys that comes before them and is not handled: they run from here in their order, and their copies in the stream
    /// find them done. Returns up to where that goes.
    pub(super) async fn out_of_order(
        &mut self,
        outstanding: &mut Outstanding,
        again: bool,
    ) -> Result<Option<Value>, Error> {
        let mut after = self.position.displaced.clone();
        loop {
            let moved = self.client.displaced(after.clone()).await?;
            if moved.events.is_empty() {
                return Ok(after);
            }
            after = Some(moved.next);
            let ids: Vec<Uuid> = moved.events.iter().map(|event| event.event_id).collect();
            let known = unhandled(self.run, self.leg.subscription.name(), &ids).await?;
            let open = moved.events.into_iter().filter(|event| known.get(&event.event_id) == Some(&Known::Not));
            let open: Vec<Moved> = open.collect();
            if !open.is_empty() {
                self.with_those_before(&open, outstanding, again).await?;
            }
        }
    }

    async fn with_those_before(
        &mut self,
        open: &[Moved],
        outstanding: &mut Outstanding,
        again: bool,
    ) -> Result<(), Error> {
        // The last one of each key.
        let mut keys: BTreeMap<&str, i64> = BTreeMap::new();
        for event in open {
            if let Some(key) = &event.key {
                let last = keys.entry(key).or_insert(event.id);
                *last = event.id.max(*last);
            }
        }
        let lowest = open.iter().map(|event| event.id).min().unwrap_or_default();
        let from = self.first_behind_the_floor().await?.map_or(lowest, |first| first.min(lowest));
        let mut found = self.of_keys(&keys, from).await?;
        let alone: Vec<Uuid> = open.iter().filter(|event| event.key.is_none()).map(|event| event.event_id).collect();
        if !alone.is_empty() {
            let events = self.client.events(&alone).await?;
            found.extend(events.into_iter().map(Before::from));
        }
        let types = &self.leg.subscription.types;
        found.retain(|event| types.is_empty() || types.contains(&event.event_type));
        let ids: Vec<Uuid> = found.iter().map(|event| event.event_id).collect();
        let unhandled = unhandled(self.run, self.leg.subscription.name(), &ids).await?;
        found.retain(|event| unhandled.get(&event.event_id) == Some(&Known::Not));
        for event in &found {
            outstanding.add(event.event_id, event.key.as_deref(), event.id);
        }
        if !again {
            let missing: HashSet<Uuid> = open.iter().map(|event| event.event_id).collect();
            let missing = found.iter().filter(|event| missing.contains(&event.event_id));
            self.run.found(&missing.map(displaced).collect::<Vec<_>>()).await?;
        }
        Ok(())
    }

    /// The lowest outbox id that does not lie before the floor, more or less.
    async fn first_behind_the_floor(&self) -> Result<Option<i64>, Error> {
        let mut token = self.token.clone();
        loop {
            let page = self.client.page(NEWEST, token, &[], false).await?;
            if let Some(first) = page.events.first() {
                return Ok(Some(first.id));
            }
            if !page.more {
                return Ok(None);
            }
            token = Some(page.next);
        }
    }

    /// The events of some keys from an outbox id on, up to one for each.
    async fn of_keys(&self, keys: &BTreeMap<&str, i64>, from: i64) -> Result<Vec<Before>, Error> {
        let mut found = Vec::new();
        let names: Vec<String> = keys.keys().map(ToString::to_string).collect();
        for names in names.chunks(KEYS) {
            let last_of = |key: &str| keys.get(key).copied().unwrap_or_default();
            let last = names.iter().map(|key| last_of(key)).max().unwrap_or_default();
            let mut next = Some(from);
            while let Some(from) = next.filter(|from| *from <= last) {
                let (events, more) = self.client.of_keys(names, from, NEWEST).await?;
                let due = |event: &Envelope| event.key.as_deref().is_some_and(|key| event.sequence <= last_of(key));
                found.extend(events.into_iter().filter(due).map(Before::from));
                next = more;
            }
        }
        Ok(found)
    }
}

/// An event at or before one that was missing in the stream, in its key.
struct Before {
    id: i64,
    event_id: Uuid,
    event_type: String,
    key: Option<String>,
}

impl From<Envelope> for Before {
    fn from(event: Envelope) -> Self {
        Self { id: event.sequence, event_id: event.id.as_uuid(), event_type: event.event_type, key: event.key }
    }
}

fn displaced(event: &Before) -> Finding {
    Finding {
        kind: MISSED,
        item: event.event_id.to_string(),
        event_id: Some(event.event_id),
        outbox_id: Some(event.id),
        key: event.key.clone(),
        detail: format!("{}: it was missing in the stream, and runs from the outbox in its order", event.event_type),
        ..Finding::default()
    }
}
