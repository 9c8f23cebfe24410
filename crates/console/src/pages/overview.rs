//! The first page: does it work, what is stuck, what is to be done.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Serialize;

use aftercommit_operator::status::{Problem as Trouble, RelayStatus, Severity, Status, SubscriberStatus};

use crate::collector::Seen;
use crate::html::{Tone, chart, number, span, state, table, time};
use crate::page::{At, Nothing, Page};
use crate::problem::Problem;

#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Overview(Arc<Seen>);

impl Page for Overview {
    type Query = Nothing;

    async fn load(at: &At<'_>, _: &Nothing) -> Result<Self, Problem> {
        Ok(Self(at.console.0.collector.look().await))
    }

    fn title(&self, _: &Nothing) -> String {
        "Overview".into()
    }

    fn content(&self, at: &At<'_>, _: &Nothing) -> Markup {
        html! {
            div data-live=(at.link("/live")) {
                @for (_, part) in parts(&self.0, &at.link("")) { (part) }
            }
            p.live { "Updates by itself: " span data-live-state="" aria-live="polite" { "needs JavaScript" } ". Key " kbd { "r" } " pauses." }
            (crate::html::command("aftercommit status"))
        }
    }
}

/// The parts that change, each with the id of its element.
pub(crate) fn parts(seen: &Seen, base: &str) -> Vec<(&'static str, Markup)> {
    let verdict = verdict(seen);
    let Some(status) = &seen.status else {
        return vec![
            ("verdict", verdict),
            ("problems", unknown(seen)),
            ("tiles", html! { div #tiles {} }),
            ("subscribers", html! { div #subscribers {} }),
        ];
    };
    vec![
        ("verdict", verdict),
        ("problems", problems(seen, status)),
        ("tiles", tiles(seen, status)),
        ("subscribers", html! { div #subscribers { (subscribers(seen, status, base)) } }),
    ]
}

fn verdict(seen: &Seen) -> Markup {
    let (class, sign, text) = match &seen.status {
        None => ("unknown", "?", "Not known".to_string()),
        Some(status) => {
            let count = |severity| status.problems.iter().filter(|problem| problem.severity == severity).count();
            let (stuck, look) = (count(Severity::Stuck), count(Severity::Attention));
            match (stuck, look) {
                (0, 0) => ("well", "●", "Everything flows".into()),
                (0, look) => ("look", "▲", format!("{look} to look at")),
                (stuck, 0) => ("stuck", "■", format!("{stuck} stuck")),
                (stuck, look) => ("stuck", "■", format!("{stuck} stuck, {look} to look at")),
            }
        }
    };
    html! {
        div #verdict class={ "verdict " (class) } {
            span aria-hidden="true" { (sign) } span { (text) }
            span.when { "as of " (seen.at.format("%H:%M:%S")) " UTC" }
        }
    }
}

fn unknown(seen: &Seen) -> Markup {
    html! { ul #problems.problems { @for text in &seen.unknown { li { (text) } } } }
}

fn problems(seen: &Seen, status: &Status) -> Markup {
    html! {
        ul #problems.problems {
            @for Trouble { severity, place, what, remedy, .. } in &status.problems {
                li {
                    (match severity { Severity::Stuck => state(Tone::Stuck, "stuck"), Severity::Attention => state(Tone::Look, "look") })
                    " " strong { (place) } ": " (what)
                    p.remedy { (in_code(remedy)) }
                }
            }
            @for text in &seen.unknown { li { (state(Tone::Unknown, "not known")) " " (text) } }
        }
    }
}

/// What stands between backticks is a command.
pub(crate) fn in_code(text: &str) -> Markup {
    html! { @for (index, part) in text.split('`').enumerate() { @if index % 2 == 1 { code { (part) } } @else { (part) } } }
}

fn tiles(seen: &Seen, status: &Status) -> Markup {
    let parked = &status.parked;
    html! {
        div #tiles.tiles {
            div.tile {
                h2 { "To publish" }
                div.big { (number(Some(status.backlog.events.into()))) }
                p { @match status.backlog.oldest_seconds { Some(age) => { "the oldest for " (span(age as i64)) }, None => "nothing waits" } }
                (chart("events to publish", &seen.history.backlog))
            }
            div.tile {
                h2 { "Relay" }
                @match &status.relay {
                    Some(relay) => (self::relay(relay, status, seen.at)),
                    None => { div.big { "none" } p { "no relay has ever run here" } }
                }
            }
            div.tile {
                h2 { "Stream" }
                @match &status.stream {
                    Some(stream) => {
                        div.big { (number(Some(stream.messages.into()))) }
                        p { (stream.name) ", sequences " (stream.first_stream_sequence) " to " (stream.last_stream_sequence) }
                    }
                    None => { div.big { "?" } p { (status.stream_error.as_deref().unwrap_or("not known")) } }
                }
            }
            div.tile {
                h2 { "Parked" }
                div.big { (number(Some(parked.events.into()))) }
                p { @if parked.events == 0 { "the stream has taken everything" } @else { (parked.behind) " wait behind; " (parked.reason.as_deref().unwrap_or_default()) } }
            }
        }
    }
}

fn relay(relay: &RelayStatus, status: &Status, now: DateTime<Utc>) -> Markup {
    let paused = status.paused.iter().find(|paused| paused.name == "relay");
    let (tone, word) = match (relay.alive, paused) {
        (_, Some(_)) => (Tone::Rests, "paused"),
        (true, None) => (Tone::Well, "leads"),
        (false, None) => (Tone::Stuck, "none leads"),
    };
    html! {
        div.big { (state(tone, word)) }
        p { (relay.state.as_deref().unwrap_or_default()) }
        p { (relay.leader) ", epoch " (relay.epoch) @if let Some(since) = relay.since { ", since " (time(since, now)) } }
        @if let Some(paused) = paused { p { "by " (paused.by) @if let Some(reason) = &paused.reason { ": " (reason) } } }
    }
}

fn subscribers(seen: &Seen, status: &Status, base: &str) -> Markup {
    let heads = [
        ("Subscriber", "t"),
        ("State", "t"),
        ("Pending", "n"),
        ("", "t"),
        ("Oldest", "n"),
        ("In flight", "n"),
        ("Failing", "n"),
        ("Redrive", "n"),
        ("Dead letters", "n"),
        ("Active worker", "key"),
    ];
    let none = std::collections::VecDeque::new();
    let rows: Vec<Vec<Markup>> = status.subscribers.iter().map(|(name, one)| {
        let points = seen.history.pending.get(name).unwrap_or(&none);
        let known = |value: Option<i64>| number(value.map(i128::from));
        let name_in_url: String = form_urlencoded::byte_serialize(name.as_bytes()).collect();
        vec![
            html! { a href={ (base) "/subscribers/" (name_in_url) } { (name) } },
            standing(one),
            number(one.pending.map(i128::from)),
            chart("events that wait", points),
            html! { @match one.oldest_seconds { Some(age) => (span(age as i64)), None => span.none { "–" } } },
            number(one.in_flight.map(i128::from)),
            known(one.failing),
            known(one.redrive),
            html! { @match one.dead_letters {
                Some(letters) if letters > 0 => a href={ (base) "/dead?q=subscriber:" (name_in_url) } { (number(Some(letters.into()))) },
                letters => (known(letters)),
            } },
            html! { (crate::html::or_none(one.active.as_deref())) @if let Some(standbys) = one.standbys.filter(|standbys| *standbys > 0) { " +" (standbys) } },
        ]
    }).collect();
    html! {
        h2 { "Subscribers" }
        (table("Subscribers", &heads, &rows, "No subscriber is provisioned yet. `aftercommit provision --config worker.toml` makes the consumers of a worker's subscribers."))
    }
}

/// In one word, how a subscriber stands.
pub(crate) fn standing(one: &SubscriberStatus) -> Markup {
    let (tone, word) = match (one.paused, &one.active, one.ready) {
        (true, ..) => (Tone::Rests, "paused"),
        (_, None, None) => (Tone::Unknown, "not known"),
        (_, None, _) => (Tone::Stuck, "not served"),
        (_, Some(_), Some(false)) => (Tone::Look, "in trouble"),
        (_, Some(_), _) if one.failing.is_some_and(|failing| failing > 0) => (Tone::Look, "failing"),
        (_, Some(_), _) => (Tone::Well, "working"),
    };
    state(tone, word)
}
