//! Why an event waits at its subscriber, as the active instance says it.

use chrono::{DateTime, SecondsFormat, Utc};

use aftercommit_core::postgres::worker_status::Heard;
use aftercommit_core::text::{plain, span};
use aftercommit_core::told::{Told, Waiting, Why, shown_key};
use aftercommit_outbox::event::EventId;

/// What the active instance of a subscriber says.
#[derive(Debug, Clone)]
pub(super) struct Instance {
    /// Whether nothing keeps it from working.
    pub(super) ready: bool,
    pub(super) state: String,
    told: Told,
}

/// Why an event waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WhyWaits {
    /// `unavailable`, `snoozed`, `running`, `behind`, or `stopped` when the whole subscriber waits.
    pub(super) state: &'static str,
    pub(super) text: String,
    /// When it is tried again.
    pub(super) next_try_at: Option<DateTime<Utc>>,
}

impl Instance {
    /// The active one of those that were heard; none when nobody is active.
    pub(super) fn of(heard: &[Heard], subscriber: &str, active: Option<&str>) -> Option<Self> {
        let is_active = |one: &&Heard| one.said.subscriber == subscriber && active == Some(&one.said.instance);
        let said = &heard.iter().find(is_active)?.said;
        Some(Self {
            // What was said before it became active says nothing of its work.
            ready: said.ready || !said.active,
            state: said.state.clone(),
            told: Told::read(&said.notes),
        })
    }

    /// Why an event that is not done waits; none when nothing special is known.
    pub(super) fn why(&self, event: EventId, key: Option<&str>) -> Option<WhyWaits> {
        if let Some(waiting) = self.told.waiting.iter().find(|waiting| waiting.event_id == event) {
            return Some(WhyWaits { next_try_at: Some(waiting.until), ..of_itself(waiting)? });
        }
        if !self.ready {
            let text = format!("the subscriber cannot work: {}", plain(&self.state));
            return Some(WhyWaits { state: "stopped", text, next_try_at: None });
        }
        let key = key.map(shown_key)?;
        let behind = |id: EventId, why: String| {
            let text = format!("waits behind event {id} of its key, which {why}");
            Some(WhyWaits { state: "behind", text, next_try_at: None })
        };
        if let Some(first) = self.told.waiting.iter().find(|waiting| waiting.key.as_deref() == Some(&key)) {
            let why = match first.why {
                Why::Failing => format!("fails and is tried again at {}", at(first.until)),
                Why::Snoozed => format!("asked to be run later, at {}", at(first.until)),
                Why::Unavailable => format!("waits for a service that is not available: {}", reason(first)),
            };
            return behind(first.event_id, why);
        }
        let running = self.told.running.iter().find(|running| running.key.as_deref() == Some(&key))?;
        if running.event_id == event {
            return Some(WhyWaits {
                state: "running",
                text: format!("runs {}", since(running.since)),
                next_try_at: None,
            });
        }
        behind(running.event_id, format!("has been running {}", since(running.since)))
    }

    /// Since when an event runs, if that is for long.
    pub(super) fn runs_since(&self, event: EventId) -> Option<DateTime<Utc>> {
        self.told.running.iter().find(|running| running.event_id == event).map(|running| running.since)
    }

    /// When an event is tried again, and why it waits until then in the eyes of who runs it.
    pub(super) fn next_try(&self, event: EventId) -> Option<DateTime<Utc>> {
        self.told.waiting.iter().find(|waiting| waiting.event_id == event).map(|waiting| waiting.until)
    }
}

/// A failed attempt is told with its error, elsewhere.
fn of_itself(waiting: &Waiting) -> Option<WhyWaits> {
    let (state, text) = match waiting.why {
        Why::Failing => return None,
        Why::Snoozed => ("snoozed", "its handler asked to be run later".to_string()),
        Why::Unavailable => {
            let times = if waiting.times > 1 { format!(", {} times in a row", waiting.times) } else { String::new() };
            ("unavailable", format!("waits for a service that is not available{times}: {}", reason(waiting)))
        }
    };
    let text = format!("{text}; next try at {}", at(waiting.until));
    Some(WhyWaits { state, text, next_try_at: None })
}

fn reason(waiting: &Waiting) -> String {
    plain(waiting.reason.as_deref().unwrap_or("no reason is on record"))
}

/// How many attempts an event of the subscriber has, as was said last; none when there is no end, or nobody has said it.
pub(super) fn max_attempts(heard: &[Heard], subscriber: &str) -> Option<i64> {
    let said = heard.iter().find(|heard| heard.said.subscriber == subscriber)?;
    Some(said.said.max_attempts).filter(|most| *most < u32::MAX.into())
}

/// Attempts of those that there are, such as `2 of 10 attempts`.
pub(super) fn of_attempts(attempts: i32, max_attempts: Option<i64>) -> String {
    match max_attempts {
        Some(most) => format!("{attempts} of {most} attempts"),
        None if attempts == 1 => "1 attempt".into(),
        None => format!("{attempts} attempts"),
    }
}

pub(super) fn since(time: DateTime<Utc>) -> String {
    let long = (Utc::now() - time).to_std().unwrap_or_default();
    format!("for {}, since {}", span(long), at(time))
}

pub(super) fn at(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use aftercommit_core::postgres::worker_status::Said;

    fn instance(ready: bool, notes: serde_json::Value) -> Instance {
        let said = Said {
            subscriber: "mails".into(),
            instance: "host:1:a".into(),
            active: true,
            phase: "leading".into(),
            ready,
            state: "the endpoint answered 503".into(),
            max_attempts: 10,
            notes,
        };
        let heard = [Heard { said, since: Utc::now(), seen_at: Utc::now(), age: 0.0 }];
        assert!(Instance::of(&heard, "mails", None).is_none(), "nobody is active");
        Instance::of(&heard, "mails", Some("host:1:a")).unwrap()
    }

    #[test]
    fn a_subscriber_that_cannot_work_says_why() {
        let why = instance(false, json!({})).why(EventId::new(), None).unwrap();
        assert_eq!(
            (why.state, why.text.as_str()),
            ("stopped", "the subscriber cannot work: the endpoint answered 503")
        );
        assert_eq!(instance(true, json!({})).why(EventId::new(), Some("k")), None);
    }

    #[test]
    fn an_event_behind_another_one_of_its_key_names_it() {
        let (first, second) = (EventId::new(), EventId::new());
        let until = Utc::now() + Duration::from_secs(9);
        let waiting = |why: &str| json!({ "waiting": [{ "event_id": first, "key": "k", "why": why, "reason": "the bank is away", "times": 3, "until": until }] });
        let unavailable = instance(true, waiting("unavailable"));
        let why = unavailable.why(first, Some("k")).unwrap();
        assert_eq!((why.state, why.next_try_at), ("unavailable", Some(until)));
        assert!(why.text.contains("3 times in a row: the bank is away; next try at"), "{}", why.text);
        let behind = unavailable.why(second, Some("k")).unwrap();
        assert!(behind.state == "behind" && behind.text.contains(&first.to_string()), "{behind:?}");
        assert_eq!(unavailable.why(second, Some("other")), None);
        assert_eq!(instance(true, waiting("failing")).why(first, Some("k")), None, "its error says it");
        assert_eq!(of_attempts(2, Some(10)), "2 of 10 attempts");
    }
}
