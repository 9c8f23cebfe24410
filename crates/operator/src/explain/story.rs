//! Makes a story of what everybody knows: plain conclusions, no questions.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::super::waits::{Instance, WhyWaits, at, max_attempts, of_attempts, since};
use super::gather::{Evidence, Outbox, Stream};
use super::{About, Explanation, Moment, Standing, StreamMessage};
use aftercommit_core::config::Naming;
use aftercommit_core::jetstream::stream::ConsumerPosition;
use aftercommit_core::postgres::audit::AuditEntry;
use aftercommit_core::postgres::explain::AtSubscriber;
use aftercommit_core::postgres::failure::Failure;
use aftercommit_core::postgres::forget::Tombstone;
use aftercommit_core::postgres::status::AtWork;
use aftercommit_core::text::counted;
use aftercommit_outbox::event::EventId;
use aftercommit_outbox::subject;

pub(super) fn tell(event_id: EventId, naming: &Naming, evidence: Evidence) -> Explanation {
    let Evidence { outbox, databases, stream, payload, mut unknown } = evidence;
    let mut moments = Vec::new();
    let mut edited = BTreeMap::new();
    let about = about(naming, outbox.as_ref(), stream.as_ref());
    let message = stream.as_ref().and_then(|stream| message(naming, stream));
    if let Some(about) = &about {
        moments.push(moment(about.written_at, "outbox", written(about, outbox.as_ref())));
    }
    if let Some(outbox) = &outbox {
        tell_parked(outbox, &mut moments);
        tell_repair(outbox, message.as_ref(), &mut moments);
        if let Some(tombstone) = &outbox.tombstone {
            moments.push(moment(tombstone.erased_at, "outbox", format!("erased: {}", forgotten(tombstone))));
        }
    }
    if let Some(StreamMessage { stream, stream_sequence: sequence, stored_at: Some(at), repair, .. }) = &message {
        let parked = outbox.as_ref().is_some_and(|outbox| outbox.parked.is_some());
        let erased = outbox.as_ref().is_some_and(|outbox| outbox.tombstone.is_some());
        let repair = match (repair, parked) {
            (false, _) => "",
            (true, false) if erased => ", its tombstone",
            (true, true) => ", out of the outbox's order, after it had been parked",
            (true, false) => ", out of the outbox's order, because it was missing there",
        };
        moments.push(moment(*at, "stream", format!("published to {stream} as message {sequence}{repair}")));
    }
    let mut edits = BTreeMap::new();
    let mut at_work = BTreeMap::new();
    let mut here = BTreeMap::new();
    let (mut instances, mut mosts) = (BTreeMap::new(), BTreeMap::new());
    for database in databases {
        for at_work in &database.at_work {
            let (name, active) = (&at_work.subscriber, at_work.active.as_deref());
            instances.extend(Instance::of(&database.heard, name, active).map(|instance| (name.clone(), instance)));
        }
        at_work.extend(database.at_work.into_iter().map(|at_work| (at_work.subscriber.clone(), at_work)));
        for found in database.here {
            let name = &found.subscriber;
            let failures: Vec<&Failure> = database.failures.iter().filter(|one| one.subscriber == *name).collect();
            let most = max_attempts(&database.heard, name);
            mosts.extend(most.map(|most| (name.clone(), most)));
            tell_subscriber(&found, &failures, most, &mut moments);
            here.insert(found.subscriber.clone(), found);
        }
        for done in &database.audit {
            tell_operator(done, &database.failures, &mut moments);
        }
        let differs = |(_, held): &(String, Vec<u8>)| payload.as_ref().is_some_and(|published| published != held);
        edited.extend(database.payloads.into_iter().filter(differs));
        edits.extend(database.audit.into_iter().filter_map(edit));
    }
    let consumers = stream.as_ref().map_or(&[][..], |stream| &stream.consumers);
    let on = about.as_ref().map(|about| naming.prefix.subject(&about.event_type));
    let sequence = message.as_ref().map(|message| message.stream_sequence);
    let key = about.as_ref().and_then(|about| about.key.as_deref());
    let place = |name: &String, here, consumer| Place {
        event_id,
        key,
        here,
        at_work: at_work.get(name),
        instance: instances.get(name),
        max_attempts: mosts.get(name).copied(),
        edited_by: edits.get(name).map(String::as_str),
        consumer,
        sequence,
    };
    let wants = |consumer: &&ConsumerPosition| {
        let covered = |filter: &String| on.as_deref().is_some_and(|on| subject::matches(filter, on));
        consumer.subjects.is_empty() && on.is_some() || consumer.subjects.iter().any(covered)
    };
    let mut subscribers = BTreeMap::new();
    let known = |consumer: &&ConsumerPosition| {
        consumer.ours || here.contains_key(&consumer.name) || at_work.contains_key(&consumer.name)
    };
    let wanting: Vec<&ConsumerPosition> = consumers.iter().filter(wants).filter(known).collect();
    for consumer in wanting {
        let name = &consumer.name;
        let place = place(name, here.remove(name), Some(consumer));
        if place.here.is_none() && place.at_work.is_none() {
            unknown.push(format!("subscriber {name}: no database that was asked knows it (--subscriber-database)"));
        }
        subscribers.insert(name.clone(), place.standing());
    }
    for (name, found) in here {
        let place = place(&name, Some(found), None);
        subscribers.insert(name.clone(), place.standing());
    }
    if payload.is_some() {
        let gone = edits.iter().filter(|(name, _)| !edited.contains_key(*name));
        unknown.extend(gone.map(|(name, who)| {
            format!(
                "subscriber {name}: the payload that it runs, or ran, was edited by {who}; when it has run, only the audit \
                 trail has what it was before (`aftercommit audit --event {event_id}`)"
            )
        }));
    }
    moments.sort_by_key(|moment| moment.at);
    let present = message.as_ref().is_some_and(|message| message.present);
    let outbox = outbox.as_ref().and_then(|outbox| outbox_standing(outbox, present));
    Explanation { event_id, event: about, outbox, message, subscribers, moments, unknown, payload, edited }
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
            stream_sequence: message.sequence,
            present: true,
            stored_at: Some(message.stored_at),
            message_id: message.message_id.clone(),
            repair: message.repair,
        }),
        (None, Some(sequence)) => Some(StreamMessage {
            stream: name,
            stream_sequence: sequence,
            present: false,
            stored_at: None,
            message_id: None,
            repair: false,
        }),
        (None, None) => None,
    }
}

fn tell_parked(outbox: &Outbox, moments: &mut Vec<Moment>) {
    let Some(parked) = &outbox.parked else { return };
    moments.push(moment(parked.parked_at, "outbox", format!("parked: {}", parked.reason)));
    match parked.state.as_str() {
        "released" => moments.push(moment(parked.changed_at, "outbox", "released")),
        "discarded" => moments.push(moment(parked.changed_at, "outbox", "discarded, never to be published")),
        _ => {}
    }
}

/// What a reconciler found and the relay did about it.
fn tell_repair(outbox: &Outbox, message: Option<&StreamMessage>, moments: &mut Vec<Moment>) {
    let Some(repair) = &outbox.repair else { return };
    let why = match outbox.tombstone {
        Some(_) => "its tombstone was queued to be published",
        None => "found missing in the stream, queued to be published again",
    };
    moments.push(moment(repair.queued_at, "outbox", why));
    // The message itself tells the rest, where it is still there.
    let sequence = repair.sequence.and_then(|sequence| u64::try_from(sequence).ok());
    let told = message.is_some_and(|message| message.stored_at.is_some() && Some(message.stream_sequence) == sequence);
    if let (Some(at), Some(sequence), false) = (repair.published_at, sequence, told) {
        moments.push(moment(at, "stream", format!("published again as message {sequence}")));
    }
}

fn outbox_standing(outbox: &Outbox, in_stream: bool) -> Option<Standing> {
    let written = outbox.written.as_ref();
    if let Some(tombstone) = &outbox.tombstone {
        let more = match tombstone.open {
            true => "; the stream may still have its payload: `aftercommit forget --resume`",
            false => "",
        };
        return Some(standing("erased", format!("erased: {}{more}", forgotten(tombstone))));
    }
    if let Some(parked) = &outbox.parked {
        let (state, text) = match parked.state.as_str() {
            "parked" => ("parked", format!("parked, see `aftercommit parked list`: {}", parked.reason)),
            "released" => ("released", "released and on its way out".into()),
            "discarded" => ("discarded", "discarded by an operator; it is never published".into()),
            _ => ("published", "published after it had been parked".into()),
        };
        return Some(standing(state, text));
    }
    if let Some(repair) = outbox.repair.as_ref().filter(|repair| repair.state != "published") {
        let reason = repair.reason.as_deref().unwrap_or("the leading relay has yet to do it");
        return Some(standing("released", format!("missing in the stream, to be published again: {reason}")));
    }
    let written = written?;
    if outbox.log.settled.holds(written.id, written.xid) {
        return Some(standing("published", "published; the relay has settled it"));
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
        standing("published", "published; the relay has yet to settle it")
    } else if in_window {
        standing("in_flight", format!("on its way into the stream{trouble}"))
    } else {
        standing("waiting", format!("not published yet{trouble}"))
    })
}

/// By whom and why.
fn forgotten(tombstone: &Tombstone) -> String {
    match (&tombstone.who, &tombstone.why) {
        (Some(who), Some(why)) => format!("forgotten by {who}: {why}"),
        _ => "forgotten by its publisher".into(),
    }
}

fn standing(state: &'static str, text: impl Into<String>) -> Standing {
    Standing { state, text: text.into(), attempts: None, max_attempts: None, next_try_at: None }
}

fn tell_subscriber(found: &AtSubscriber, failures: &[&Failure], max_attempts: Option<i64>, moments: &mut Vec<Moment>) {
    let name = found.subscriber.as_str();
    let of = max_attempts.map(|most| format!(" of {most}")).unwrap_or_default();
    for failure in failures {
        moments.push(moment(failure.at, name, format!("attempt {}{of} failed: {}", failure.attempt, failure.error)));
    }
    if let Some(failing) = &found.failing {
        if failures.is_empty() && failing.attempts > 1 {
            moments.push(moment(failing.first_failed_at, name, "the first attempt failed"));
        }
        let on_record = failures.last().is_some_and(|last| last.attempt == failing.attempts);
        if !on_record || failing.crashes > 0 {
            let crashes = crashes(failing.crashes);
            let text = format!("attempt {}{of} failed{crashes}: {}", failing.attempts, failing.last_error);
            moments.push(moment(failing.last_failed_at, name, text));
        }
    }
    if let Some(letter) = &found.letter {
        let first = letter.first_failed_at;
        let first = if failures.is_empty() { Some(first) } else { None };
        tell_letter(name, first, letter.dead_at, letter.attempts.into(), &letter.reason, moments);
    }
    match &found.done {
        Some(done) if done.outcome == "handled" => moments.push(moment(done.at, name, "handled")),
        Some(done) if done.outcome == "erased" => {
            moments.push(moment(done.at, name, "the tombstone came: not handled"))
        }
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
    first_failed_at: Option<DateTime<Utc>>,
    dead_at: DateTime<Utc>,
    attempts: i64,
    reason: &str,
    moments: &mut Vec<Moment>,
) {
    if let Some(first_failed_at) = first_failed_at.filter(|_| attempts > 1) {
        moments.push(moment(first_failed_at, subscriber, "the first attempt failed"));
    }
    let attempts = if attempts == 1 { "1 attempt".into() } else { format!("{attempts} attempts") };
    moments.push(moment(dead_at, subscriber, format!("given up after {attempts}, now a dead letter: {reason}")));
}

fn tell_operator(done: &AuditEntry, failures: &[Failure], moments: &mut Vec<Moment>) {
    let subscriber = done.subscriber.as_deref().unwrap_or("outbox");
    let what = done.subscriber.as_ref().map(|name| format!(" at {name}")).unwrap_or_default();
    moments.push(moment(done.at, "operator", format!("{}: {}{what}", done.who, done.action)));
    // An edit leaves the letter where it is, and there it is told.
    if matches!(done.action.as_str(), "dead retry" | "dead discard") {
        let time = |name: &str| done.detail.get(name)?.as_str()?.parse::<DateTime<Utc>>().ok();
        let attempts = done.detail.get("attempts").and_then(Value::as_i64).unwrap_or(0);
        let reason = done.detail.get("reason").and_then(Value::as_str).unwrap_or_default();
        if let (Some(first_failed_at), Some(dead_at)) = (time("first_failed_at"), time("dead_at")) {
            let on_record = failures.iter().any(|one| one.subscriber == subscriber && one.at <= dead_at);
            let first = if on_record { None } else { Some(first_failed_at) };
            tell_letter(subscriber, first, dead_at, attempts, reason, moments);
        }
    }
}

/// The subscriber whose payload an entry of the audit trail says was changed, and by whom.
fn edit(done: AuditEntry) -> Option<(String, String)> {
    let hash = |name: &str| done.detail.get(name).and_then(Value::as_str).map(str::to_string);
    let changed = hash("payload_sha256_after").is_some_and(|after| hash("payload_sha256") != Some(after));
    done.subscriber.filter(|_| changed).map(|subscriber| (subscriber, done.who))
}

/// One subscriber, as its database and its consumer know it.
struct Place<'a> {
    event_id: EventId,
    key: Option<&'a str>,
    here: Option<AtSubscriber>,
    at_work: Option<&'a AtWork>,
    /// The active instance, as it says.
    instance: Option<&'a Instance>,
    max_attempts: Option<i64>,
    /// Who has changed the payload of its dead letter.
    edited_by: Option<&'a str>,
    consumer: Option<&'a ConsumerPosition>,
    sequence: Option<u64>,
}

impl Place<'_> {
    fn standing(&self) -> Standing {
        let (state, text) = self.in_database().unwrap_or_else(|| self.at_consumer());
        let failing = self.here.as_ref().and_then(|here| here.failing.as_ref());
        let open = !matches!(state, "handled" | "dead" | "discarded" | "acked");
        Standing {
            state,
            text,
            attempts: failing.map(|failing| failing.attempts),
            max_attempts: self.max_attempts.filter(|_| failing.is_some()),
            next_try_at: self.next_try_at().filter(|_| open),
        }
    }

    fn next_try_at(&self) -> Option<DateTime<Utc>> {
        let on_record = self.here.as_ref().and_then(|here| here.failing.as_ref()?.retry_at);
        self.instance.and_then(|instance| instance.next_try(self.event_id)).or(on_record)
    }

    /// What the active instance says of why it waits.
    fn why(&self) -> Option<WhyWaits> {
        self.instance.and_then(|instance| instance.why(self.event_id, self.key))
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
            let attempts = of_attempts(failing.attempts, self.max_attempts);
            format!("{attempts} failed{}: {}", crashes(failing.crashes), failing.last_error)
        });
        if let Some(letter) = &here.letter {
            let more = if here.redrive.is_some() { "; it also waits to run again" } else { "" };
            let id = letter.id;
            return Some(("dead", format!("dead letter {id}{more}: {}; `aftercommit dead show {id}`", letter.reason)));
        }
        match here.done.as_ref().map(|done| done.outcome.as_str()) {
            Some("handled") => {
                let edited = self.edited_by.map(|who| format!(", with the payload as {who} edited it"));
                return Some(("handled", format!("handled{}", edited.unwrap_or_default())));
            }
            Some("erased") => return Some(("erased", "forgotten by its publisher before it was handled".into())),
            Some("discarded") => return Some(("discarded", "given up for good by an operator".into())),
            Some(_) => return Some(("dead", "given up; there is no dead letter of it any more".into())),
            None => {}
        }
        if here.running {
            let long = self.instance.and_then(|instance| instance.runs_since(self.event_id)).map(since);
            return match (long, self.why().filter(|why| why.state != "running")) {
                (Some(long), _) => Some(("running", format!("runs {long}"))),
                // It is among what runs again and again, as long as a service is not available.
                (None, Some(why)) if why.state != "behind" => Some((why.state, why.text)),
                _ => Some(("running", "runs at present".into())),
            };
        }
        if let Some((_, who)) = &here.redrive {
            let failing = failing.map(|failing| format!("; {failing}")).unwrap_or_default();
            return Some(("redrive", format!("redriven by {who}, waits to run again{failing}{trouble}")));
        }
        let next = self.next_try_at().map(|next| format!(", next try at {}", at(next))).unwrap_or_default();
        failing.map(|failing| ("failing", format!("{failing}; it is tried again{next}{trouble}")))
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
            let pending = counted(i128::from(pending), "message");
            let stopped = self.instance.filter(|instance| !instance.ready);
            let stopped = stopped.map(|instance| format!("; its worker cannot work: {}", instance.state));
            let trouble = stopped.unwrap_or_else(|| trouble.into());
            return ("waiting", format!("not delivered yet; the consumer has {pending} to deliver{trouble}"));
        }
        let asked = self.at_work.is_some();
        match (sequence <= consumer.ack_floor, asked) {
            (true, false) => ("acked", "acknowledged: handled or given up, its database knows which".into()),
            (true, true) => (
                "acked",
                "acknowledged, and its inbox has no row: pruned long ago, or somebody took the message from the consumer".into(),
            ),
            (false, false) => ("delivered", "delivered: done, running or failing, its database knows which".into()),
            (false, true) => match self.why() {
                Some(why) => (why.state, format!("delivered and not done: {}{trouble}", why.text)),
                None => (
                    "delivered",
                    format!("delivered and not done: it runs, or waits behind another event of its key{trouble}"),
                ),
            },
        }
    }
}
