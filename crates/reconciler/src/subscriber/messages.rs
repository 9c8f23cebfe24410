//! The stream as a source of events that are redriven.

use std::collections::HashMap;

use aftercommit_core::jetstream::stored::StreamMessage;
use uuid::Uuid;

use super::outstanding::{Item, Place, Source};
use super::{Since, Subscription};
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::stored;
use aftercommit_core::outbox_query::client::OutboxClient;
use aftercommit_core::postgres::resend::Event;
use aftercommit_outbox::subject;

/// Events that are asked for together.
const EVENTS: usize = 100;

/// The event of a message, if it is for the subscriber. The worker skips what is no event, and so does this.
pub(super) fn event_for(message: &StreamMessage, subscription: &Subscription, subjects: &Since) -> Option<Event> {
    let wanted = |filter: &String| subject::matches(filter, &message.subject) && subjects.has(filter, message.sequence);
    let event = subscription.spec.subjects.iter().any(wanted).then(|| stored::event(message).ok())??;
    Some(Event { event, sequence: message.sequence })
}

/// The stream as a source of events.
pub(super) struct Messages<'a> {
    pub(super) history: &'a History,
    pub(super) subjects: &'a Since,
    pub(super) subscription: &'a Subscription,
    /// The last sequence.
    pub(super) last: u64,
    /// Who knows of events that are not at their places any more, and of those that come from the outbox.
    pub(super) relay: Option<&'a OutboxClient>,
}

impl Source for Messages<'_> {
    async fn fetch(&self, items: &[Item]) -> Result<(Vec<Event>, usize), Error> {
        let sequence = |item: &Item| match item.place {
            Place::Stream(sequence) => Some(sequence),
            Place::Outbox(_) => None,
        };
        let from_outbox = items.partition_point(|item| sequence(item).is_none());
        if from_outbox > 0 {
            let ids: Vec<Uuid> = items.iter().take(from_outbox.min(EVENTS)).map(|item| item.event_id).collect();
            return Ok((self.of_the_outbox(&ids).await?, ids.len()));
        }
        let wanted: Vec<(u64, Uuid)> = items.iter().filter_map(|item| Some((sequence(item)?, item.event_id))).collect();
        let sequences: Vec<u64> = wanted.iter().map(|(sequence, _)| *sequence).collect();
        let (messages, looked_for) = self.history.some(&sequences).await?;
        let there: HashMap<u64, &StreamMessage> = messages.iter().map(|message| (message.sequence, message)).collect();
        let (mut events, mut moved) = (Vec::new(), Vec::new());
        for (sequence, id) in wanted.iter().take(looked_for) {
            match there.get(sequence) {
                // A stream that has lost its end may have another message there.
                Some(message) if stored::event(message).map_or(true, |event| event.id.as_uuid() != *id) => {
                    moved.push(*id)
                }
                Some(message) => events.extend(event_for(message, self.subscription, self.subjects)),
                None if *sequence > self.last => moved.push(*id),
                None => {}
            }
        }
        for ids in moved.chunks(EVENTS) {
            events.extend(self.of_the_outbox(ids).await?);
        }
        Ok((events, looked_for))
    }
}

impl Messages<'_> {
    async fn of_the_outbox(&self, ids: &[Uuid]) -> Result<Vec<Event>, Error> {
        let Some(client) = self.relay else { return Ok(Vec::new()) };
        let events = client.events(ids).await?;
        Ok(events.into_iter().map(|event| Event { event, sequence: 0 }).collect())
    }
}
