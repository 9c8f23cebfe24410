//! Does every event in the stream have a subscriber, and every subscriber a publisher?

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use aftercommit_core::config::{Naming, NatsConfig};
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::{self, doctor};
use aftercommit_core::subscription::Subscription;
use aftercommit_outbox::subject;

/// What of the stream nobody gets, and who gets nothing. With `--json` it is printed as it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Coverage {
    /// The event types that the stream holds.
    pub types: Vec<String>,
    /// Those of them that no subscriber gets.
    pub types_without_subscriber: Vec<String>,
    /// What a subscriber wants and the stream has no event of: nobody publishes it, or nobody has since the stream forgot
    /// the last one.
    pub subscribers_without_publisher: Vec<Unserved>,
}

/// A type that a subscriber wants.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Unserved {
    /// The subscriber.
    pub subscriber: String,
    /// The event type; `*` for whatever there is.
    #[serde(rename = "type")]
    pub event_type: String,
}

impl Coverage {
    /// Whether everybody has what they need.
    pub fn is_complete(&self) -> bool {
        self.types_without_subscriber.is_empty() && self.subscribers_without_publisher.is_empty()
    }
}

/// Compares the event types in the stream with what its durable consumers get, and with what `declared` subscribers of the
/// stream want, provisioned or not: `worker::Registry::subscriptions` tells them.
///
/// # Errors
/// When NATS cannot be reached, or the stream does not exist.
pub async fn coverage(nats: &NatsConfig, naming: &Naming, declared: &[Subscription]) -> Result<Coverage, Error> {
    let connection = jetstream::connect(nats, "aftercommit-coverage", "_INBOX_operator").await?;
    let (subjects, consumers) = doctor::flow(&connection, &naming.stream).await?;
    let mut readers: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for consumer in consumers {
        let filters = if consumer.filters.is_empty() { vec![naming.prefix.wildcard()] } else { consumer.filters };
        readers.entry(consumer.name).or_default().extend(filters);
    }
    for spec in declared.iter().map(|subscription| &subscription.spec).filter(|spec| spec.stream == naming.stream) {
        readers.entry(spec.name.clone()).or_default().extend(spec.subjects.iter().cloned());
    }
    Ok(judge(&subjects, &readers, naming))
}

fn judge(subjects: &BTreeSet<String>, readers: &BTreeMap<String, BTreeSet<String>>, naming: &Naming) -> Coverage {
    let events = || subjects.iter().filter_map(|subject| Some((subject, naming.prefix.event_type(subject)?)));
    let is_read = |subject: &str| readers.values().flatten().any(|filter| subject::matches(filter, subject));
    let unserved = readers.iter().flat_map(|(reader, filters)| filters.iter().map(move |filter| (reader, filter)));
    let unserved = unserved.filter(|(_, filter)| !events().any(|(subject, _)| subject::matches(filter, subject)));
    let named = |filter: &str| match naming.prefix.event_type(filter) {
        Some(">") => "*".to_string(),
        Some(event_type) => event_type.to_string(),
        // Of another prefix.
        None => filter.to_string(),
    };
    Coverage {
        types: events().map(|(_, event_type)| event_type.to_string()).collect(),
        types_without_subscriber: events()
            .filter(|(subject, _)| !is_read(subject))
            .map(|(_, event_type)| event_type.to_string())
            .collect(),
        subscribers_without_publisher: unserved
            .map(|(reader, filter)| Unserved { subscriber: reader.clone(), event_type: named(filter) })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_nobody_gets_and_who_gets_nothing_is_named() {
        let naming = Naming::default();
        let subjects = set(&["events.order.placed", "events.order.paid", "foreign.subject"]);
        let readers = [("mails".to_string(), set(&["events.order.placed", "events.order.lost"]))].into();
        let found = judge(&subjects, &readers, &naming);
        assert_eq!(found.types, ["order.paid", "order.placed"]);
        assert_eq!(found.types_without_subscriber, ["order.paid"]);
        let unserved = Unserved { subscriber: "mails".into(), event_type: "order.lost".into() };
        assert_eq!(found.subscribers_without_publisher, [unserved]);

        let all = [("audit".to_string(), set(&["events.>"]))].into();
        assert!(judge(&subjects, &all, &naming).is_complete());
        let nothing = judge(&set(&[]), &all, &naming);
        assert_eq!(nothing.subscribers_without_publisher[0].event_type, "*");
    }
}
