//! What is wrong, and what to do about it.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};

use super::model::{Kind, Paused, Problem, Severity, Status, SubscriberStatus, WaitReason};
use aftercommit_core::postgres::status::COUNT_LIMIT;
use aftercommit_core::postgres::time;
use aftercommit_core::relay::LEASE;
use aftercommit_core::text::{counted, cut, plain, span};

/// What waits for longer although everything seems to work is told.
const LONG: f64 = 60.0;
/// What runs for longer, while others wait, is told.
const LONG_RUN: Duration = Duration::from_secs(10);
/// A backlog that is younger says nothing yet.
const FRESH: f64 = 5.0;
/// How much of an error is shown.
const SHOWN: usize = 300;

/// All that is wrong, the worst first.
pub(super) fn problems(status: &Status) -> Vec<Problem> {
    let mut found = Vec::from_iter(relay(status));
    found.extend(parked(status));
    found.extend(stream(status));
    for (name, one) in &status.subscribers {
        found.extend(subscriber(status, name, one).into_iter().map(|Found { severity, kind, what, remedy }| Problem {
            severity,
            kind,
            place: format!("subscriber {name}"),
            what,
            remedy,
        }));
    }
    found.sort_by_key(|problem| problem.severity);
    found
}

fn problem(severity: Severity, kind: Kind, place: &str, what: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { severity, kind, place: place.into(), what: what.into(), remedy: remedy.into() }
}

fn relay(status: &Status) -> Option<Problem> {
    let events = status.backlog.events;
    let oldest = status.backlog.oldest_seconds.unwrap_or(0.0);
    let more = if events >= COUNT_LIMIT { " or more" } else { "" };
    let waits = format!("{}{more} to publish, the oldest for {}", counted(events, "event"), span(time::span(oldest)));
    if let Some(pause) = status.paused.iter().find(|pause| pause.name == LEASE) {
        return Some(problem(
            Severity::Stuck,
            Kind::Paused,
            "relay",
            format!("{}: {waits}", told(pause)),
            "`aftercommit relay resume`",
        ));
    }
    let alive = status.relay.as_ref().filter(|relay| relay.alive);
    match (alive, &status.relay) {
        _ if events == 0 => None,
        (None, Some(last)) => Some(problem(
            Severity::Stuck,
            Kind::Backlog,
            "relay",
            format!("no relay leads: {waits}; the last one was {}", plain(&last.leader)),
            "start aftercommit-relay; if it runs, its log and /healthz say why it does not lead",
        )),
        (None, None) => Some(problem(
            Severity::Stuck,
            Kind::Backlog,
            "relay",
            format!("no relay has ever led this outbox: {waits}"),
            "start aftercommit-relay with this database",
        )),
        (Some(relay), _) => {
            let state = relay.state.as_deref().unwrap_or("it has not reported yet");
            let works = matches!(state, "idle" | "publishing");
            (oldest > if works { LONG } else { FRESH }).then(|| {
                let what = format!("{waits}, although a relay leads: {}", cut(state, SHOWN));
                problem(
                    Severity::Stuck,
                    Kind::Backlog,
                    "relay",
                    what,
                    "mend what it says; it goes on by itself then. `aftercommit doctor` looks closer",
                )
            })
        }
    }
}

fn parked(status: &Status) -> Option<Problem> {
    let parked = &status.parked;
    let reason = parked.reason.as_deref().unwrap_or("no reason is on record");
    let behind = match parked.behind {
        0 => String::new(),
        behind => format!(", {} of their keys behind them", counted(behind, "later event")),
    };
    (parked.events + parked.behind > 0).then(|| {
        let since = span(time::span(parked.oldest_seconds.unwrap_or(0.0)));
        let events = counted(parked.events, "event");
        problem(
            Severity::Stuck,
            Kind::Parked,
            "relay",
            format!("{events} parked for {since}{behind}: {}", cut(reason, SHOWN)),
            "`aftercommit parked list`; then `aftercommit parked release` or `discard`",
        )
    })
}

fn stream(status: &Status) -> Option<Problem> {
    let error = status.stream_error.as_deref()?;
    let remedy = "start nats-server, or mend NATS_URL and the login; without NATS the numbers marked ? are not known";
    Some(problem(Severity::Stuck, Kind::Stream, "stream", cut(error, SHOWN), remedy))
}

/// What is wrong with one subscriber.
struct Found {
    severity: Severity,
    kind: Kind,
    what: String,
    remedy: String,
}

fn found(severity: Severity, kind: Kind, what: String, remedy: impl Into<String>) -> Found {
    Found { severity, kind, what, remedy: remedy.into() }
}

fn subscriber(status: &Status, name: &str, one: &SubscriberStatus) -> Vec<Found> {
    let mut all = Vec::new();
    if one.paused {
        all.push(paused(status, name, one));
    } else if one.failing.is_none() {
        all.extend(unknown_here(one));
    } else if one.active.is_none() {
        all.push(nobody(one));
    } else if one.has_consumer == Some(false) {
        let what = "the stream has no consumer of this name: its worker gets nothing".to_string();
        all.push(found(Severity::Stuck, Kind::Worker, what, "`aftercommit provision --config worker.toml`"));
    } else if one.ready == Some(false) {
        let state = cut(one.state.as_deref().unwrap_or("no reason is on record"), SHOWN);
        let what = format!("its worker cannot work: {state}{}", waiting(one));
        all.push(found(Severity::Stuck, Kind::Worker, what, "mend what it says; it goes on by itself then"));
    } else {
        all.extend(slow(name, one));
    }
    all.extend(unavailable(name, one));
    all.extend(failing(name, one));
    all.extend(dead(name, one));
    all
}

/// How much waits, as a part of a sentence.
fn waiting(one: &SubscriberStatus) -> String {
    match (one.pending, one.in_flight) {
        (Some(0), Some(0)) => "; nothing waits".into(),
        (Some(pending), Some(in_flight)) => {
            let oldest = one.oldest_seconds.map(|age| format!(", the oldest for {}", span(time::span(age))));
            let waits = if pending + in_flight == 1 { "waits" } else { "wait" };
            format!("; {} {waits}{}", counted(pending + in_flight, "event"), oldest.unwrap_or_default())
        }
        _ => "; how much waits is not known".into(),
    }
}

fn anything_waits(one: &SubscriberStatus) -> bool {
    one.pending.unwrap_or(0) + one.in_flight.unwrap_or(0) > 0 || one.redrive.is_some_and(|redrive| redrive > 0)
}

fn paused(status: &Status, name: &str, one: &SubscriberStatus) -> Found {
    let own = format!("subscriber:{name}");
    let pause = status.paused.iter().find(|pause| pause.name == own);
    let all = status.paused.iter().find(|pause| pause.name == aftercommit_core::subscription::ALL);
    let remedy = match pause {
        Some(_) => format!("`aftercommit worker resume --subscriber {}`", plain(name)),
        None => "`aftercommit worker resume --all`".into(),
    };
    let what = pause.or(all).map_or_else(|| "paused".into(), told);
    found(Severity::Stuck, Kind::Paused, format!("{what}{}", waiting(one)), remedy)
}

fn told(pause: &Paused) -> String {
    let all = if pause.name == aftercommit_core::subscription::ALL { " with all subscribers" } else { "" };
    let reason = pause.reason.as_deref().map(|reason| format!(" ({})", cut(reason, SHOWN))).unwrap_or_default();
    format!("paused{all} since {} by {}{reason}", at(pause.since), plain(&pause.by))
}

/// A subscriber that no worker has served from this database: it may be another's.
fn unknown_here(one: &SubscriberStatus) -> Option<Found> {
    one.oldest_seconds.is_some_and(|age| age > FRESH).then(|| {
        let what = format!("no worker of this database has ever served it{}", waiting(one));
        let remedy = "start aftercommit-worker with it; if it works with another database, ask that one (DATABASE_URL)";
        found(Severity::Attention, Kind::Worker, what, remedy)
    })
}

fn nobody(one: &SubscriberStatus) -> Found {
    let last = match &one.last_seen {
        Some((instance, seen)) => {
            let state = one.state.as_deref().filter(|state| *state != "stopped");
            let state = state.map(|state| format!(": {}", cut(state, SHOWN))).unwrap_or_default();
            format!("; {} was seen last, at {}{state}", plain(instance), at(*seen))
        }
        None => String::new(),
    };
    let severity = if anything_waits(one) { Severity::Stuck } else { Severity::Attention };
    let what = format!("no worker serves it{}{last}", waiting(one));
    let remedy = "start aftercommit-worker with it; if it runs, its log and /healthz say why it is not active";
    found(severity, Kind::Worker, what, remedy)
}

/// What runs for long while others wait, or waits for long for no reason that is known.
fn slow(name: &str, one: &SubscriberStatus) -> Option<Found> {
    let peek = format!("aftercommit peek --subscriber {}", plain(name));
    let long = |since: DateTime<Utc>| (Utc::now() - since).to_std().ok().filter(|long| *long >= LONG_RUN);
    let slowest = one.running.iter().filter_map(|running| Some((running, long(running.since)?))).next();
    if let Some((running, long)) = slowest.filter(|_| anything_waits(one)) {
        let key = running.key.as_ref().map(|key| format!(" of key {}", plain(key))).unwrap_or_default();
        let others = match running.events {
            0 | 1 => String::new(),
            many => format!(" and {} in one transaction", counted(many as u64 - 1, "other")),
        };
        let what = format!(
            "event {}{key}{others} has been running for {}: later events of its key wait{}",
            running.event_id,
            span(long),
            waiting(one)
        );
        let remedy = format!("find out why its handler is slow; `{peek}` shows what waits");
        return Some(found(Severity::Attention, Kind::Slow, what, remedy));
    }
    // What fails or waits for a time is told with its reason.
    let explained = one.failing.is_some_and(|failing| failing > 0) || !one.waiting.is_empty();
    (one.oldest_seconds.is_some_and(|age| age > LONG) && !explained).then(|| {
        let what = format!("it is slow, or makes no progress{}", waiting(one));
        found(Severity::Attention, Kind::Slow, what, format!("`{peek}` shows what waits"))
    })
}

/// What waits because a service that its handler needs is not available.
fn unavailable(name: &str, one: &SubscriberStatus) -> Option<Found> {
    let first =
        one.waiting.iter().filter(|waiting| waiting.why == WaitReason::Unavailable).min_by_key(|one| one.until)?;
    let events = one.waiting.iter().filter(|waiting| waiting.why == WaitReason::Unavailable).count();
    let key = first.key.as_ref().map(|key| format!(", first of key {}", plain(key))).unwrap_or_default();
    let reason = cut(first.reason.as_deref().unwrap_or("no reason is on record"), SHOWN);
    let verb = if events == 1 { "waits" } else { "wait" };
    let what = format!(
        "{} {verb} for a service that is not available{key}: {reason}; next try at {}",
        counted(events as u64, "event"),
        at(first.until)
    );
    let remedy =
        format!("get that service running again; `aftercommit peek --subscriber {}` shows the events", plain(name));
    Some(found(Severity::Stuck, Kind::Unavailable, what, remedy))
}

fn failing(name: &str, one: &SubscriberStatus) -> Option<Found> {
    let events = one.failing.filter(|failing| *failing > 0)?;
    let mut what = format!("{} {}", counted(events, "event"), if events == 1 { "fails" } else { "fail" });
    let mut remedy = format!("mend the cause; `aftercommit peek --subscriber {}` shows the events", plain(name));
    if let Some(last) = &one.last_failure {
        let of = last.max_attempts.map(|most| format!(" of {most}")).unwrap_or_default();
        what += &format!(": attempt {}{of} failed at {}: {}", last.attempts, at(last.at), cut(&last.error, SHOWN));
        if let Some(next) = last.next_attempt_at {
            what += &format!("; next try at {}", at(next));
        }
        remedy = format!("mend the cause; `aftercommit explain {}` tells its story", last.event_id);
    }
    Some(found(Severity::Attention, Kind::Failing, what, remedy))
}

fn dead(name: &str, one: &SubscriberStatus) -> Option<Found> {
    let letters = one.dead_letters.filter(|letters| *letters > 0)?;
    let last = one.last_dead_letter.as_ref();
    let last = last.map(|last| format!(", the last at {}: {}", at(last.at), cut(&last.reason, SHOWN)));
    let what = format!("{}{}", counted(letters, "dead letter"), last.unwrap_or_default());
    let remedy = format!("`aftercommit dead list --subscriber {} --group`", plain(name));
    Some(found(Severity::Attention, Kind::DeadLetters, what, remedy))
}

fn at(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}
