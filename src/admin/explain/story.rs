//! Makes a story of what everybody knows: plain conclusions, no questions.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::gather::{Evidence, Outbox, Stream};
use super::{About, Explanation, Moment, Standing, StreamMessage};
use crate::config::Naming;
use crate::event::EventId;
use crate::jetstream::stream::ConsumerPosition;
use crate::postgres::audit::Done;
use crate::postgres::explain::AtSubscriber;
use crate::postgres::status::AtWork;
use crate::subject;

pub(super) fn tell(event_id: EventId, naming: &Naming, evidence: Evidence) -> Explanation {
    let Evidence { outbox, databases, stream, payload, mut unknown } = evidence;
    let mut moments = Vec::new();
    let about = about(naming, outbox.as_ref(), stream.as_ref());
    let message = stream.as_ref().and_then(|stream| message(naming, stream));
    if let Some(about) = &about {
        moments.push(moment(about.written_at, "outbox", written(about, outbox.as_ref())));
    }
    if let Some(outbox) = &outbox {
        tell_aside(outbox, &mut moments);
    }
    if let Some(StreamMessage { stream, sequence, stored_at: Some(at), repair, .. }) = &message {
        let repair = if *repair { ", out of the outbox's order, after it had been set aside" } else { "" };
        moments.push(moment(*at, "stream", format!("published to {stream} as message {sequence}{repair}")));
    }
    let mut at_work = BTreeMap::new();
    let mut here = BTreeMap::new();
    for database in databases {
        at_work.extend(database.at_work.into_iter().map(|at_work| (at_work.subscriber.clone(), at_work)));
        for found in database.here {
            tell_subscriber(&found, &mut moments);
            here.insert(found.subscriber.clone(), found);
        }
        for done in &database.audit {
            tell_operator(done, &mut moments);
        }
    }
    let consumers = stream.as_ref().map_or(&[][..], |stream| &stream.consumers);
    let on = about.as_ref().map(|about| naming.prefix.subject(&about.event_type));
    let sequence = message.as_ref().map(|message| message.sequence);
    let wants = |consumer: &&ConsumerPosition| {
        let covered = |filter: &String| on.as_deref().is_some_and(|on| subject::matches(filter, on));
        consumer.subjects.is_empty() && on.is_some() || consumer.subjects.iter().any(covered)
    };
    let mut subscribers = BTreeMap::new();
    for consumer in consumers.iter().filter(wants) {
        let name = &consumer.name;
        let place = Place { here: here.remove(name), at_work: at_work.get(name), consumer: Some(consumer), sequence };
        if place.here.is_none() && place.at_work.is_none() {
            unknown.push(format!("subscriber {name}: no database that was asked knows it (--subscriber-database)"));
        }
        subscribers.insert(name.clone(), place.standing());
    }
    for (name, found) in here {
        let place = Place { here: Some(found), at_work: at_work.get(&name), consumer: None, sequence };
        subscribers.insert(name.clone(), place.standing());
    }
    moments.sort_by_key(|moment| moment.at);
    let present = message.as_ref().is_some_and(|message| message.present);
    let outbox = outbox.as_ref().and_then(|outbox| outbox_standing(outbox, present));
    Explanation { event_id, event: about, outbox, message, subscribers, moments, unknown, payload }
}

fn moment(at: DateTime<Utc>, place: &str, text: impl Into<String>) -> Moment {
    Moment { at, place: place.into(), text: text.into() }
}

fn about(naming: &Naming, outbox: Option<&Outbox>, stream: Option<&Stream>) -> Option<About> {
    if let Some(written) = outbox.and_then(|outbox| outbox.written.as_ref()) {
        return Some(About {
            event_type: written.event_type.clone(),
            version: written.version.into(),
            key: written.key.clone(),
            source: naming.source.clone(),
            outbox_id: Some(written.id),
            content_type: written.content_type.clone(),
            payload_bytes: usize::try_from(written.payload_bytes).unwrap_or_default(),
            written_at: written.created_at,
        });
    }
    let event = stream?.message.as_ref()?.event.as_ref()?;
    Some(About {
        event_type: event.event_type.clone(),
        version: event.version.into(),
        key: event.key.clone(),
        source: event.source.clone(),
        outbox_id: Some(event.sequence).filter(|id| *id > 0),
        content_type: event.content_type.clone(),
        payload_bytes: event.payload.len(),
        written_at: event.time,
    })
}

fn written(about: &About, outbox: Option<&Outbox>) -> String {
    match (outbox.and_then(|outbox| outbox.written.as_ref()), about.outbox_id) {
        (Some(written), _) => format!("written as outbox id {}, in transaction {}", written.id, written.xid),
        (None, Some(id)) => format!("written as outbox id {id}, as the message says; the outbox does not have it here"),
        (None, None) => "written, as the message says".into(),
    }
}

fn message(naming: &Naming, stream: &Stream) -> Option<StreamMessage> {
    let name = naming.stream.clone();
    match (&stream.message, stream.said) {
        (Some(message), _) => Some(StreamMessage {
            stream: name,
            sequence: message.sequence,
            present: true,
            stored_at: Some(message.stored_at),
            message_id: message.message_id.clone(),
            repair: message.repair,
        }),
        (None, Some(sequence)) => Some(StreamMessage {
            stream: name,
            sequence,
            present: false,
            stored_at: None,
            message_id: None,
            repair: false,
        }),
        (None, None) => None,
    }
}

fn tell_aside(outbox: &Outbox, moments: &mut Vec<Moment>) {
    let Some(aside) = &outbox.aside else { return };
    moments.push(moment(aside.parked_at, "outbox", format!("set aside: {}", aside.reason)));
    match aside.state.as_str() {
        "released" => moments.push(moment(aside.changed_at, "outbox", "released")),
        "discarded" => moments.push(moment(aside.changed_at, "outbox", "given up, never to be published")),
        _ => {}
    }
}

fn outbox_standing(outbox: &Outbox, in_stream: bool) -> Option<Standing> {
    let written = outbox.written.as_ref();
    if let Some(aside) = &outbox.aside {
        let (state, text) = match aside.state.as_str() {
            "parked" => ("parked", format!("set aside, see `aftercommit parked list`: {}", aside.reason)),
            "released" => ("released", "released and on its way out".into()),
            "discarded" => ("discarded", "given up by an operator; it is never published".into()),
            _ => ("published", "published after it had been set aside".into()),
        };
        return Some(Standing { state, text });
    }
    let written = written?;
    if outbox.log.settled.holds(written.id, written.xid) {
        return Some(Standing { state: "published", text: "published; the relay has settled it".into() });
    }
    let trouble = match &outbox.leader {
        _ if outbox.paused => "; the relay is paused: `aftercommit relay resume`",
        None => "; no relay has ever led this outbox",
        Some(leader) if leader.lease_left <= 0.0 => "; no relay leads at present",
        Some(_) => "",
    };
    let leader_is_past = outbox.leader.as_ref().and_then(|leader| leader.last_id).is_some_and(|id| id >= written.id);
    let target = outbox.log.target.as_ref();
    let in_window = target.is_some_and(|target| target.holds(written.id, written.xid));
    Some(if in_stream || (in_window && leader_is_past) {
        Standing { state: "published", text: "published; the relay has yet to settle it".into() }
    } else if in_window {
        Standing { state: "under way", text: format!("on its way into the stream{trouble}") }
    } else {
        Standing { state: "waiting", text: format!("not published yet{trouble}") }
    })
}

fn tell_subscriber(found: &AtSubscriber, moments: &mut Vec<Moment>) {
    let name = found.subscriber.as_str();
    if let Some(failing) = &found.failing {
        if failing.attempts > 1 || failing.crashes > 1 {
            moments.push(moment(failing.first_failed_at, name, "the first attempt failed"));
        }
        let crashes = crashes(failing.crashes);
        let text = format!("attempt {} failed{crashes}: {}", failing.attempts, failing.last_error);
        moments.push(moment(failing.last_failed_at, name, text));
    }
    if let Some(letter) = &found.letter {
        tell_letter(name, letter.first_failed_at, letter.dead_at, letter.attempts.into(), &letter.reason, moments);
    }
    match &found.done {
        Some(done) if done.outcome == "handled" => moments.push(moment(done.at, name, "handled")),
        Some(done) if done.outcome == "dead" && found.letter.is_none() => {
            moments.push(moment(done.at, name, "given up"));
        }
        _ => {}
    }
}

fn crashes(crashes: i32) -> String {
    match crashes {
        0 => String::new(),
        1 => ", and the worker died once while it ran".into(),
        many => format!(", and the worker died {many} times while it ran"),
    }
}

fn tell_letter(
    subscriber: &str,
    first_failed_at: DateTime<Utc>,
    dead_at: DateTime<Utc>,
    attempts: i64,
    reason: &str,
    moments: &mut Vec<Moment>,
) {
    if attempts > 1 {
        moments.push(moment(first_failed_at, subscriber, "the first attempt failed"));
    }
    let attempts = if attempts == 1 { "1 attempt".into() } else { format!("{attempts} attempts") };
    moments.push(moment(dead_at, subscriber, format!("given up after {attempts}, now a dead letter: {reason}")));
}

fn tell_operator(done: &Done, moments: &mut Vec<Moment>) {
    let subscriber = done.subscriber.as_deref().unwrap_or("outbox");
    let what = done.subscriber.as_ref().map(|name| format!(" at {name}")).unwrap_or_default();
    moments.push(moment(done.at, "operator", format!("{}: {}{what}", done.who, done.action)));
    // An edit leaves the letter where it is, and there it is told.
    if matches!(done.action.as_str(), "dead retry" | "dead discard") {
        let time = |name: &str| done.detail.get(name)?.as_str()?.parse::<DateTime<Utc>>().ok();
        let attempts = done.detail.get("attempts").and_then(Value::as_i64).unwrap_or(0);
        let reason = done.detail.get("reason").and_then(Value::as_str).unwrap_or_default();
        if let (Some(first_failed_at), Some(dead_at)) = (time("first_failed_at"), time("dead_at")) {
            tell_letter(subscriber, first_failed_at, dead_at, attempts, reason, moments);
        }
    }
}

/// One subscriber, as its database and its consumer know it.
struct Place<'a> {
    here: Option<AtSubscriber>,
    at_work: Option<&'a AtWork>,
    consumer: Option<&'a ConsumerPosition>,
    sequence: Option<u64>,
}

impl Place<'_> {
    fn standing(&self) -> Standing {
        let (state, text) = self.in_database().unwrap_or_else(|| self.at_consumer());
        Standing { state, text }
    }

    /// Why an event that should run does not.
    fn trouble(&self) -> &'static str {
        match self.at_work {
            Some(at_work) if at_work.paused => "; the subscriber is paused",
            Some(at_work) if at_work.active.is_none() => "; no worker is active for it",
            _ if self.consumer.is_some_and(|consumer| consumer.paused) => "; its consumer is paused in NATS",
            _ => "",
        }
    }

    fn in_database(&self) -> Option<(&'static str, String)> {
        let here = self.here.as_ref()?;
        let trouble = self.trouble();
        let failing = here.failing.as_ref().map(|failing| {
            format!("{} attempts have failed{}: {}", failing.attempts, crashes(failing.crashes), failing.last_error)
        });
        if let Some(letter) = &here.letter {
            let more = if here.redrive.is_some() { "; it also waits to run again" } else { "" };
            let id = letter.id;
            return Some(("dead", format!("dead letter {id}{more}: {}; `aftercommit dead show {id}`", letter.reason)));
        }
        match here.done.as_ref().map(|done| done.outcome.as_str()) {
            Some("handled") => return Some(("handled", "handled".into())),
            Some("discarded") => return Some(("discarded", "given up for good by an operator".into())),
            Some(_) => return Some(("dead", "given up; there is no dead letter of it any more".into())),
            None => {}
        }
        if here.running {
            return Some(("running", "runs at present".into()));
        }
        if let Some((_, who)) = &here.redrive {
            let failing = failing.map(|failing| format!("; {failing}")).unwrap_or_default();
            return Some(("redrive", format!("sent back by {who}, waits to run again{failing}{trouble}")));
        }
        failing.map(|failing| ("failing", format!("{failing}; it is tried again{trouble}")))
    }

    fn at_consumer(&self) -> (&'static str, String) {
        let trouble = self.trouble();
        let (Some(consumer), Some(sequence)) = (self.consumer, self.sequence) else {
            return (
                "unknown",
                "its message in the stream is not known, so it cannot be compared with the consumer".into(),
            );
        };
        if sequence > consumer.delivered {
            let pending = consumer.pending;
            return ("waiting", format!("not delivered yet; the consumer has {pending} messages to deliver{trouble}"));
        }
        let asked = self.at_work.is_some();
        match (sequence <= consumer.ack_floor, asked) {
            (true, false) => ("acked", "acknowledged: handled or given up, its database knows which".into()),
            (true, true) => (
                "acked",
                "acknowledged, and its inbox has no row: pruned long ago, or somebody took the message from the consumer".into(),
            ),
            (false, false) => ("delivered", "delivered: done, running or failing, its database knows which".into()),
            (false, true) => {
                ("delivered", format!("delivered and not done: it runs, or waits behind another event of its key{trouble}"))
            }
        }
    }
}
