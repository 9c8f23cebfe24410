//! Of the inbox comparison: events that were missing in the stream, and lie behind later ones of their keys there.

use serde_json::Value;
use uuid::Uuid;

use super::inbox::{Comparing, MISSED};
use super::outstanding::{Outstanding, Place};
use super::unhandled;
use aftercommit_core::error::Error;
use aftercommit_core::outbox_query::wire::Moved;
use aftercommit_core::postgres::finding::NewFinding;
use aftercommit_core::postgres::resend::Known;

impl Comparing<'_> {
    /// Adds the events that were missing in the stream and that the subscriber has not handled: they run from here in
    /// their order, and their copies in the stream find them done. Returns up to where that goes.
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
            let open = self.not_handled(moved.events).await?;
            let mut findings = Vec::new();
            for event in &open {
                outstanding.add(event.id, event.key.as_deref(), Place::Outbox(event.outbox_id), Some(event.outbox_id));
                findings.push(displaced(event));
            }
            if !again {
                self.run.found(&findings).await?;
            }
        }
    }

    /// Those of them that the subscriber has not handled and that are for it.
    async fn not_handled(&mut self, events: Vec<Moved>) -> Result<Vec<Displaced>, Error> {
        let ids: Vec<Uuid> = events.iter().map(|event| event.event_id).collect();
        let known = unhandled(self.run, self.comparison.subscription.name(), &ids).await?;
        let open: Vec<Uuid> = ids.into_iter().filter(|id| known.get(id) == Some(&Known::Not)).collect();
        if open.is_empty() {
            return Ok(Vec::new());
        }
        let types = &self.comparison.subscription.types;
        // What the outbox no longer has cannot be sent from there.
        let events = self.client.events(&open).await?.into_iter();
        let events = events.filter(|event| types.is_empty() || types.contains(&event.event_type));
        Ok(events
            .map(|event| Displaced {
                outbox_id: event.sequence,
                id: event.id.as_uuid(),
                event_type: event.event_type,
                key: event.key,
            })
            .collect())
    }
}

/// An event that was missing in the stream.
struct Displaced {
    outbox_id: i64,
    id: Uuid,
    event_type: String,
    key: Option<String>,
}

fn displaced(event: &Displaced) -> NewFinding {
    NewFinding {
        kind: MISSED,
        item: event.id.to_string(),
        event_id: Some(event.id),
        outbox_id: Some(event.outbox_id),
        key: event.key.clone(),
        detail: format!("{}: it was missing in the stream, and runs from the outbox in its order", event.event_type),
        ..NewFinding::default()
    }
}
