//! What comes before an event in its key: a repair never runs an event while an earlier one of its key is not handled and
//! can still be had.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::outstanding::{Outstanding, Place};
use super::{Subscription, ask, started, unhandled};
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::Error;
use aftercommit_core::outbox_query::client::OutboxClient;
use aftercommit_core::postgres::resend::Known;
use aftercommit_core::postgres::{place, prune};
use aftercommit_core::runner::job::Run;

/// Keys that are asked for together.
const KEYS: usize = 100;
/// Differences between the clocks of the two databases.
const CLOCKS: TimeDelta = TimeDelta::minutes(10);

/// Events that were written before do not count: those before the subscriber's start, those that a worker has pruned from the
/// inbox, and those that one may prune at any moment.
pub(super) async fn horizon(run: &Run, subscription: &Subscription) -> Result<DateTime<Utc>, Error> {
    let name = subscription.name();
    let (now, pruned) =
        ask(run, async |session| Ok((place::now(session).await?, prune::forgotten(session, name).await?))).await?;
    let retention = TimeDelta::from_std(subscription.inbox_retention).unwrap_or(TimeDelta::MAX);
    let due = now.checked_sub_signed(retention);
    let started = started(run, &subscription.spec).await?.map(|started| started.at);
    Ok(due.max(pruned).max(started).map_or(DateTime::UNIX_EPOCH, |horizon| horizon + CLOCKS))
}

/// Knows what comes before.
pub(super) struct Earlier<'a> {
    pub(super) client: &'a OutboxClient,
    pub(super) subscription: &'a Subscription,
    /// What lies in the stream at or before this was compared: of that everything missing was found.
    pub(super) floor: u64,
    pub(super) horizon: DateTime<Utc>,
}

impl Earlier<'_> {
    /// Adds whatever the outbox has before the last event of each key and the subscriber has not handled. Its copy in the
    /// stream, where there is one, then finds it done.
    pub(super) async fn add(&self, run: &Run, outstanding: &mut Outstanding) -> Result<(), Error> {
        let known = outstanding.ids();
        for keys in outstanding.keys().chunks(KEYS) {
            let last: HashMap<&str, i64> = keys.iter().map(|(key, last)| (key.as_str(), *last)).collect();
            let names: Vec<String> = keys.iter().map(|(key, _)| key.clone()).collect();
            let end = last.values().copied().max().unwrap_or_default();
            let mut next = Some(i64::MIN);
            while let Some(from) = next.filter(|from| *from <= end) {
                let (events, more) = self.client.of_keys(&names, from, self.floor).await?;
                next = more;
                let due = |event: &Envelope| {
                    let last = event.key.as_deref().and_then(|key| last.get(key));
                    last.is_some_and(|last| event.sequence <= *last) && self.counts(event, &known)
                };
                self.add_unhandled(run, events.into_iter().filter(due).collect(), outstanding).await?;
            }
        }
        Ok(())
    }

    fn counts(&self, event: &Envelope, known: &HashSet<Uuid>) -> bool {
        let types = &self.subscription.types;
        event.time >= self.horizon
            && (types.is_empty() || types.contains(&event.event_type))
            && !known.contains(&event.id.as_uuid())
    }

    async fn add_unhandled(
        &self,
        run: &Run,
        events: Vec<Envelope>,
        outstanding: &mut Outstanding,
    ) -> Result<(), Error> {
        let ids: Vec<Uuid> = events.iter().map(|event| event.id.as_uuid()).collect();
        let known = unhandled(run, self.subscription.name(), &ids).await?;
        for event in events.iter().filter(|event| known.get(&event.id.as_uuid()) == Some(&Known::Not)) {
            let id = event.sequence;
            outstanding.add(event.id.as_uuid(), event.key.as_deref(), Place::Outbox(id), Some(id));
        }
        Ok(())
    }
}
