//! What a message of the stream is to the outbox, and what a row of the outbox is that no message was found for. No
//! input or output.

use std::time::Duration;

use aftercommit_core::config::Naming;
use aftercommit_core::envelope::Envelope;
use aftercommit_core::postgres::compare::{Absent, Horizon, Original};
use chrono::{DateTime, Utc};

/// A message that says it is from this outbox.
#[derive(Debug, Clone)]
pub(super) struct Claimed {
    pub(super) sequence: u64,
    pub(super) subject: String,
    pub(super) event: Envelope,
}

/// What a message is, when it is not simply an event of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Oddity {
    /// The outbox has the event, but with something else in it.
    Differs { what: &'static str },
    /// The outbox does not have the event, and has not removed it for its age either.
    Ghost,
    /// The event as it was before it was forgotten.
    Forgotten,
}

/// What a message is whose row was looked for. `Ok(true)` for one that is exactly its row's, `Ok(false)` for one whose
/// row was removed from the outbox because it was old.
pub(super) fn message(
    claimed: &Claimed,
    original: Option<&Original>,
    horizon: Option<&Horizon>,
    naming: &Naming,
) -> Result<bool, Oddity> {
    let event = &claimed.event;
    match original {
        Some(original) if original.event_id == event.id.as_uuid() => match difference(claimed, original, naming) {
            None => Ok(true),
            Some(what) => match original.erased.filter(|erased| erased.digest == event.digest()) {
                // Whoever forgets it erases the message, too.
                Some(erased) if erased.open => Ok(true),
                Some(_) => Err(Oddity::Forgotten),
                None => Err(Oddity::Differs { what }),
            },
        },
        // Ids are given out again after a restore to an earlier time.
        Some(_) => Err(Oddity::Ghost),
        None if horizon.is_none_or(|horizon| is_removed(event.sequence, event.time, horizon)) => Ok(false),
        None => Err(Oddity::Ghost),
    }
}

/// Rows are removed in the order of their ids, among those that were written before some time.
fn is_removed(id: i64, written: DateTime<Utc>, horizon: &Horizon) -> bool {
    let before_first = horizon.first.is_none_or(|(first, at)| id < first || written < at);
    id > 0 && id <= horizon.last_id && before_first
}

fn difference(claimed: &Claimed, original: &Original, naming: &Naming) -> Option<&'static str> {
    let Claimed { event, subject, .. } = claimed;
    let differences = [
        (original.payload.as_ref() != Some(&event.payload), "payload"),
        (original.event_type != event.event_type, "type"),
        (naming.prefix.subject(&original.event_type) != *subject, "subject"),
        (original.key != event.key, "key"),
        (original.version.unsigned_abs() != event.version, "version"),
        (original.content_type != event.content_type, "content type"),
        (original.created_at != event.time, "time"),
        (original.headers != event.headers, "headers"),
    ];
    differences.into_iter().find_map(|(differs, what)| differs.then_some(what))
}

/// What a row is that was not found between the two places where it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is not in the stream. `seen` is where an earlier repair had put it.
    Missing { seen: Option<u64> },
    /// It is not in the stream, and is queued to be.
    Queued,
    /// It is not in the stream, which will never take it.
    Refused,
    /// It was published out of order. Whether it is there, the message under this sequence tells.
    Elsewhere(u64),
    /// Nobody has said yet that it shall be in the stream, or somebody that it shall not.
    Parked,
    /// The stream has removed it because it was old.
    Expired,
}

/// What a row is. `max_age` is how long the stream keeps messages.
pub(super) fn row(absent: &Absent, max_age: Option<Duration>) -> Verdict {
    let state = |place: &Option<(String, Option<u64>)>| place.as_ref().map(|(state, at)| (state.clone(), *at));
    match (state(&absent.repair), state(&absent.parked)) {
        (Some((state, _)), _) if state == "queued" => Verdict::Queued,
        (Some((state, _)), _) if state == "refused" => Verdict::Refused,
        _ if has_expired(absent.age, max_age) => Verdict::Expired,
        (Some((_, Some(sequence))), _) => Verdict::Elsewhere(sequence),
        (None, Some((state, Some(sequence)))) if state == "published" => Verdict::Elsewhere(sequence),
        (None, Some(_)) => Verdict::Parked,
        _ => Verdict::Missing { seen: None },
    }
}

/// Whether a stream may have removed an event that was written so long ago. A message is younger than its event, so
/// this errs on the side of the clocks only.
fn has_expired(age: Duration, max_age: Option<Duration>) -> bool {
    const CLOCKS: Duration = Duration::from_mins(1);
    max_age.is_some_and(|max_age| age + CLOCKS.min(max_age / 10) >= max_age)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use uuid::Uuid;

    use super::*;
    use aftercommit_core::postgres::compare::Erased;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    fn claimed(id: i64) -> Claimed {
        let event = Envelope {
            id: Uuid::from_u128(7).into(),
            event_type: "order.placed".into(),
            version: 1,
            key: Some("a".into()),
            source: "/aftercommit".into(),
            time: at(100),
            sequence: id,
            headers: BTreeMap::new(),
            content_type: "application/json".into(),
            payload: "{}".into(),
            replaces: Vec::new(),
        };
        Claimed { sequence: 1, subject: "events.order.placed".into(), event }
    }

    fn original() -> Original {
        Original {
            event_id: Uuid::from_u128(7),
            event_type: "order.placed".into(),
            version: 1,
            key: Some("a".into()),
            content_type: "application/json".into(),
            created_at: at(100),
            headers: BTreeMap::new(),
            payload: Some("{}".into()),
            erased: None,
        }
    }

    #[test]
    fn an_event_that_was_forgotten_is_no_forgery() {
        let naming = Naming::default();
        let tombstone = |open, digest| Original { payload: None, erased: Some(Erased { digest, open }), ..original() };
        let is = |original: &Original| message(&claimed(1), Some(original), None, &naming);
        let was = claimed(1).event.digest();
        assert_eq!(is(&tombstone(true, was)), Ok(true), "its message is being erased");
        assert_eq!(is(&tombstone(false, was)), Err(Oddity::Forgotten), "its message should have been");
        let other = Envelope { payload: "[]".into(), ..claimed(1).event }.digest();
        assert_eq!(is(&tombstone(true, other)), Err(Oddity::Differs { what: "payload" }));
    }

    #[test]
    fn every_part_of_an_event_is_compared() {
        let naming = Naming::default();
        let is = |claimed: &Claimed, original: &Original| message(claimed, Some(original), None, &naming);
        assert_eq!(is(&claimed(1), &original()), Ok(true));
        let changes: [fn(&mut Original); 8] = [
            |o| o.payload = Some("[]".into()),
            |o| o.payload = None,
            |o| o.event_type = "order.paid".into(),
            |o| o.key = None,
            |o| o.version = 2,
            |o| o.content_type = "text/plain".into(),
            |o| o.created_at = at(101),
            |o| _ = o.headers.insert("x".into(), "y".into()),
        ];
        for change in changes {
            let mut original = original();
            change(&mut original);
            assert!(matches!(is(&claimed(1), &original), Err(Oddity::Differs { .. })), "{original:?}");
        }
        let moved = Claimed { subject: "events.other".into(), ..claimed(1) };
        assert_eq!(is(&moved, &original()), Err(Oddity::Differs { what: "subject" }));
        let other = Original { event_id: Uuid::from_u128(8), ..original() };
        assert_eq!(is(&claimed(1), &other), Err(Oddity::Ghost));
    }

    #[test]
    fn what_the_outbox_removed_for_its_age_is_no_ghost() {
        let naming = Naming::default();
        let is = |id, first: Option<(i64, i64)>, last_id| {
            let horizon = Horizon { first: first.map(|(id, time)| (id, at(time))), last_id };
            message(&claimed(id), None, Some(&horizon), &naming)
        };
        assert_eq!(is(5, Some((6, 50)), 9), Ok(false), "its id is before the first");
        assert_eq!(is(5, Some((4, 101)), 9), Ok(false), "it was written before the first");
        assert_eq!(is(5, None, 9), Ok(false), "everything was removed");
        for (id, first, last_id) in
            [(5, Some((4, 50)), 9), (10, Some((4, 101)), 9), (0, Some((4, 101)), 9), (5, None, 4)]
        {
            assert_eq!(is(id, first, last_id), Err(Oddity::Ghost), "{id} {first:?} {last_id}");
        }
    }

    #[test]
    fn a_row_without_a_message_is_missing_unless_there_is_a_reason() {
        let minutes = Duration::from_mins;
        let is = |parked: Option<(&str, Option<u64>)>, repair: Option<(&str, Option<u64>)>, age| {
            let place = |place: Option<(&str, Option<u64>)>| place.map(|(state, at)| (state.to_string(), at));
            let absent = Absent {
                id: 1,
                event_id: Uuid::nil(),
                event_type: "a".into(),
                key: None,
                age: minutes(age),
                parked: place(parked),
                repair: place(repair),
            };
            row(&absent, Some(minutes(60)))
        };
        assert_eq!(is(None, None, 1), Verdict::Missing { seen: None });
        assert_eq!(is(None, None, 58), Verdict::Missing { seen: None });
        assert_eq!(is(None, None, 59), Verdict::Expired);
        for state in ["parked", "released", "discarded"] {
            assert_eq!(is(Some((state, None)), None, 1), Verdict::Parked);
        }
        assert_eq!(is(Some(("published", Some(4))), None, 1), Verdict::Elsewhere(4));
        assert_eq!(is(Some(("published", Some(4))), Some(("published", Some(9))), 1), Verdict::Elsewhere(9));
        assert_eq!(is(Some(("published", Some(4))), Some(("queued", None)), 1), Verdict::Queued);
        assert_eq!(is(None, Some(("refused", None)), 1), Verdict::Refused);
        assert_eq!(is(None, Some(("published", Some(9))), 90), Verdict::Expired);
    }
}
