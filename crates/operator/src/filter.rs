//! What an operator's action is about: dead letters and parked events are found in the same way.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_outbox::event::EventId;

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// So long ago, by the clock of the database that is asked.
    Ago(Duration),
    /// This moment.
    At(DateTime<Utc>),
}

impl When {
    /// The moment, when it is `now`.
    pub fn resolve(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::At(at) => at,
            Self::Ago(age) => {
                let age = TimeDelta::from_std(age).ok();
                age.and_then(|age| now.checked_sub_signed(age)).unwrap_or(DateTime::UNIX_EPOCH)
            }
        }
    }
}

impl From<Duration> for When {
    fn from(age: Duration) -> Self {
        Self::Ago(age)
    }
}

/// Which dead letters or parked events are selected: those for which everything that is set holds. Of parked events, what only
/// waits behind another one is let go with that, and is not selected by itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    /// These dead letters, by their ids. Defaults to none: it does not matter.
    pub ids: Vec<i64>,
    /// These events. Defaults to none: it does not matter.
    pub events: Vec<EventId>,
    /// Dead letters of this subscriber.
    pub subscriber: Option<String>,
    /// Those of events of this type.
    pub event_type: Option<String>,
    /// Those of events with this key.
    pub key: Option<String>,
    /// Those whose reason contains this text.
    pub error: Option<String>,
    /// Those that became dead letters or were parked at this time or before.
    pub older_than: Option<When>,
    /// Those that became dead letters or were parked after this time.
    pub newer_than: Option<When>,
    /// All of them. What changes something wants this to be said when nothing else is set. Defaults to false.
    pub all: bool,
}

impl Filter {
    /// Just this dead letter.
    pub fn id(id: i64) -> Self {
        Self { ids: vec![id], ..Self::default() }
    }

    /// Just this event.
    pub fn event(id: EventId) -> Self {
        Self { events: vec![id], ..Self::default() }
    }

    /// Whether each one is named, by its id or its event, and not only described.
    pub fn names_each(&self) -> bool {
        !self.ids.is_empty() || !self.events.is_empty()
    }

    /// Refuses a filter that says nothing. Every reason contains the empty text, so that says nothing either. `what` is to be
    /// selected.
    pub(super) fn check(&self, what: &str) -> Result<(), Error> {
        let error = self.error.clone().filter(|text| !text.is_empty());
        if (Self { error, ..self.clone() }) != Self::default() {
            return Ok(());
        }
        let problem =
            format!("no {what} selected: name them by id or by event, describe them, or say that all are meant");
        Err(Error::new(ErrorKind::Config, problem))
    }

    /// The selected events; none when they do not matter.
    pub(super) fn event_ids(&self) -> Option<Vec<uuid::Uuid>> {
        Some(self.events.iter().map(|id| id.as_uuid()).collect::<Vec<_>>()).filter(|ids| !ids.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_says_nothing_is_refused() {
        let check = |filter: Filter| filter.check("dead letters");
        assert_eq!(check(Filter::default()).unwrap_err().kind(), ErrorKind::Config);
        assert!(check(Filter { all: true, ..Filter::default() }).is_ok());
        assert!(check(Filter { error: Some(String::new()), ..Filter::default() }).is_err());
        assert!(check(Filter::id(1)).is_ok());
    }

    #[test]
    fn a_time_is_a_moment_or_an_age() {
        let now: DateTime<Utc> = "2026-11-20T12:00:00Z".parse().unwrap();
        let at = "2026-11-20T11:00:00Z".parse().unwrap();
        assert_eq!(When::from(Duration::from_hours(1)).resolve(now), at);
        assert_eq!(When::At(at).resolve(now), at);
        assert_eq!(When::Ago(Duration::MAX).resolve(now), DateTime::UNIX_EPOCH);
    }
}
