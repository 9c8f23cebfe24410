//! One subscriber: how it stands and what waits for it.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_operator::peek::{self, Peek};
use aftercommit_operator::status::SubscriberStatus;

use super::overview::standing;
use crate::html::{chart, command, facts, number, or_none, span, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

/// Messages that are shown of what waits.
const SHOWN: usize = 50;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    name: String,
}

#[derive(Serialize)]
pub(crate) struct Subscriber {
    status: Option<SubscriberStatus>,
    waits: Option<Peek>,
    unknown: Vec<String>,
    #[serde(skip)]
    points: VecDeque<Option<f64>>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Subscriber {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let (config, name) = (at.console.config(), &query.name);
        let seen = at.console.0.collector.look().await;
        let status = seen.status.as_ref().and_then(|status| status.subscribers.get(name).cloned());
        if seen.status.is_some() && status.is_none() {
            return Err(Problem::not_found(format!(
                "There is no subscriber {name}, neither in the stream nor in the databases."
            )));
        }
        let mut unknown = seen.unknown.clone();
        let mut waits: Option<Peek> = None;
        // The database that knows most of it is its own.
        for database in config.databases() {
            match Box::pin(peek::peek(&database, &config.nats, &config.naming, name, SHOWN)).await {
                Ok(peek) if waits.as_ref().is_none_or(|best| peek.unknown.len() < best.unknown.len()) => {
                    waits = Some(peek)
                }
                Ok(_) => {}
                Err(error) => unknown.push(error.report()),
            }
        }
        let points = seen.history.pending.get(name).cloned().unwrap_or_default();
        Ok(Self { status, waits, unknown, points, now: Utc::now() })
    }

    fn title(&self, query: &Query) -> String {
        format!("Subscriber {}", query.name)
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let name: String = form_urlencoded::byte_serialize(query.name.as_bytes()).collect();
        html! {
            (super::unknown(&self.unknown))
            @if let Some(status) = &self.status { (self.facts(status, at, &name)) }
            @if let Some(peek) = &self.waits {
                h2 { "What waits" }
                @if let Some(obstacle) = &peek.obstacle { p.notice { "No progress: " (obstacle) } }
                (self.waiting(peek, at))
                (super::unknown(&peek.unknown))
            }
            (command(&format!("aftercommit peek --subscriber {0}; worker pause --subscriber {0}", query.name)))
        }
    }
}

impl Subscriber {
    fn facts(&self, status: &SubscriberStatus, at: &At<'_>, name: &str) -> Markup {
        let since = status.active_since.map(|since| html! { ", since " (time(since, self.now)) });
        html! {
            (facts(&[
                ("State", html! { (standing(status)) " " (status.state.as_deref().unwrap_or_default()) }),
                ("Active worker", html! { (or_none(status.active.as_deref())) @if let Some(since) = since { (since) } }),
                ("Stand by", number(status.standbys.map(|standbys| standbys as i128))),
                ("Pending", number(status.pending.map(i128::from))),
                ("In flight", number(status.in_flight.map(i128::from))),
                ("Oldest", html! { @match status.oldest_seconds { Some(age) => (span(age as i64)), None => span.none { "–" } } }),
                ("Failing", number(status.failing.map(i128::from))),
                ("Redrive", number(status.redrive.map(i128::from))),
                ("Dead letters", html! { a href=(at.link(&format!("/dead?q=subscriber:{name}"))) { (number(status.dead_letters.map(i128::from))) } }),
                ("Delivered again", number(status.redelivered.map(i128::from))),
                ("Pending in the last hour", chart("events that wait", &self.points)),
            ]))
            @if let Some(failure) = &status.last_failure {
                p.notice {
                    "Attempt " (failure.attempts) @if let Some(most) = failure.max_attempts { " of " (most) } " of "
                    a.id href=(at.link(&format!("/events/{}", failure.event_id))) { (failure.event_id.to_string()) }
                    " failed " (time(failure.at, self.now)) ": " (failure.error)
                }
            }
        }
    }

    fn waiting(&self, peek: &Peek, at: &At<'_>) -> Markup {
        let heads = [
            ("Sequence", "n"),
            ("Stored", "t"),
            ("State", "t"),
            ("Type", "t"),
            ("Key", "key"),
            ("Event", "id"),
            ("Why", "reason"),
        ];
        let rows: Vec<Vec<Markup>> = peek.messages.iter().map(|message| vec![
            number(Some(message.stream_sequence.into())),
            time(message.stored_at, self.now),
            html! { (message.state) },
            or_none(message.event_type.as_deref()),
            or_none(message.key.as_deref()),
            html! { @match &message.event_id { Some(id) => a href=(at.link(&format!("/events/{id}"))) { (id.to_string()) }, None => span.none { "–" } } },
            html! {
                (message.why.as_deref().unwrap_or_default())
                @if let Some(error) = &message.last_error { " " (error) }
                @if let Some(next) = message.next_try_at { ", next try " (time(next, self.now)) }
            },
        ]).collect();
        table("What waits", &heads, &rows, "Nothing waits for it in the stream.")
    }
}
