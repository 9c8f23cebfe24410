//! One event's whole way.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_operator::explain::{ExplainConfig, Explanation, Standing, explain};

use crate::html::{Tone, facts, or_none, payload, state, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    id: String,
}

#[derive(Serialize)]
pub(crate) struct Event {
    #[serde(flatten)]
    explanation: Explanation,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Event {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let id = super::event_id(&query.id).ok_or_else(|| Problem::not_found("This is no event's id."))?;
        let config = at.console.config();
        let mut databases = config.databases();
        let publisher = databases.next().unwrap_or_else(|| config.publisher());
        let asked = ExplainConfig {
            subscribers: databases.collect(),
            payload: at.shows_payloads(),
            ..ExplainConfig::new(publisher, config.nats.clone(), config.naming.clone())
        };
        Ok(Self { explanation: explain(&asked, id).await?, now: Utc::now() })
    }

    fn title(&self, query: &Query) -> String {
        match &self.explanation.event {
            Some(event) => format!("{} {}", event.event_type, query.id),
            None => format!("Event {}", query.id),
        }
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let Explanation { event, outbox, message, subscribers, moments, unknown, payload: bytes, edited, .. } =
            &self.explanation;
        let mut standings: Vec<Vec<Markup>> = Vec::new();
        standings.extend(outbox.as_ref().map(|outbox| row(html! { "outbox" }, outbox, self.now)));
        standings.extend(message.as_ref().map(|message| vec![
            html! { "stream" },
            state(if message.present { Tone::Well } else { Tone::Rests }, if message.present { "stored" } else { "gone" }),
            html! { "message " (message.stream_sequence) " of " (message.stream) @if message.repair { ", a repair" } },
            html! {},
        ]));
        standings.extend(subscribers.iter().map(|(name, standing)| {
            let link: String = form_urlencoded::byte_serialize(name.as_bytes()).collect();
            row(html! { a href=(at.link(&format!("/subscribers/{link}"))) { (name) } }, standing, self.now)
        }));
        html! {
            @if let Some(event) = event {
                (facts(&[
                    ("Event", html! { span.id { (query.id) } }),
                    ("Key", or_none(event.key.as_deref())),
                    ("Written", time(event.written_at, self.now)),
                    ("From", html! { (event.source) @if let Some(id) = event.outbox_id { ", outbox id " (id) } }),
                    ("Content", html! { (event.payload_bytes) " bytes of " (event.content_type) ", version " (event.version) }),
                ]))
            }
            h2 { "How it stands" }
            (table("How it stands", &[("Where", "t"), ("State", "t"), ("What that means", "reason"), ("Next try", "t")], &standings, "Nobody has it."))
            @for text in unknown { p.notice { "Not known: " (text) } }
            h2 { "What happened" }
            ol.timeline {
                @for moment in moments {
                    li { span { (time(moment.at, self.now)) } span.place title="by the clock of this place" { (moment.place) } span.what { (moment.text) } }
                }
            }
            @match (bytes, event) {
                (Some(bytes), _) => (payload(bytes, true)),
                (None, Some(event)) if !at.shows_payloads() => p.empty { "Your role does not see payloads; it takes reader. This one has " (event.payload_bytes) " bytes." },
                _ => {}
            }
            @for (subscriber, bytes) in edited { h2 { "As an operator edited it, at " (subscriber) } (payload(bytes, true)) }
            (crate::html::command(&format!("aftercommit explain {}", query.id)))
        }
    }
}

fn row(name: Markup, standing: &Standing, now: DateTime<Utc>) -> Vec<Markup> {
    vec![
        name,
        state(tone(standing.state), standing.state),
        html! { (crate::pages::overview::in_code(&standing.text)) },
        html! { @if let Some(next) = standing.next_try_at { (time(next, now)) } },
    ]
}

fn tone(state: &str) -> Tone {
    match state {
        "published" | "handled" | "acked" => Tone::Well,
        "parked" | "dead" | "stopped" => Tone::Stuck,
        "failing" | "behind" | "unavailable" => Tone::Look,
        "unknown" => Tone::Unknown,
        _ => Tone::Rests,
    }
}
