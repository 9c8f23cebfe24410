//! Events that the stream would not take.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Serialize;

use aftercommit_operator::parked::{self, ParkedEvent};

use super::ROWS;
use crate::html::{Tone, command, number, or_none, state, table, time};
use crate::page::{At, Nothing, Page};
use crate::problem::Problem;

#[derive(Serialize)]
pub(crate) struct Parked {
    parked: Vec<ParkedEvent>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Parked {
    type Query = Nothing;

    async fn load(at: &At<'_>, _: &Nothing) -> Result<Self, Problem> {
        Ok(Self { parked: parked::list(&at.console.config().publisher(), ROWS).await?, now: Utc::now() })
    }

    fn title(&self, _: &Nothing) -> String {
        "Parked events".into()
    }

    fn content(&self, at: &At<'_>, _: &Nothing) -> Markup {
        let heads = [
            ("Outbox id", "n"),
            ("Since", "t"),
            ("State", "t"),
            ("Type", "t"),
            ("Key", "key"),
            ("Event", "id"),
            ("Code", "n"),
            ("Reason", "reason"),
        ];
        let rows: Vec<Vec<Markup>> = self
            .parked
            .iter()
            .map(|event| {
                let id = event.event_id.to_string();
                vec![
                    number(Some(event.outbox_id.into())),
                    time(event.parked_at, self.now),
                    match (event.state.as_str(), event.code) {
                        ("released", _) => state(Tone::Rests, "released"),
                        (_, None) => state(Tone::Look, "waits behind"),
                        _ => state(Tone::Stuck, "parked"),
                    },
                    html! { (event.event_type) },
                    or_none(event.key.as_deref()),
                    html! { a href=(at.link(&format!("/events/{id}"))) { (id) } },
                    html! { @match event.code { Some(code) => (code), None => span.none { "–" } } },
                    html! { (event.reason) },
                ]
            })
            .collect();
        html! {
            (table("Parked events", &heads, &rows, "Nothing is parked: the stream has taken every event. One that it can never take, such as one that is larger than nats-server allows, would be here with the server's reason, and those of its key behind it."))
            @if self.parked.len() as i64 >= ROWS { p.notice { "These are the first " (ROWS) "." } }
            (command("aftercommit parked list; parked release EVENT_ID; parked discard EVENT_ID"))
        }
    }
}
