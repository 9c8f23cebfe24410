//! Events, by what they are.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_operator::events::{self, Search, Wanted};
use aftercommit_outbox::event::EventId;

use super::terms::{Terms, when};
use crate::html::{number, or_none, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

const NAMES: [&str; 6] = ["id", "type", "key", "header", "since", "until"];
/// Events on a page.
const SHOWN: i64 = 50;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    q: Option<String>,
    before: Option<i64>,
}

#[derive(Serialize)]
pub(crate) struct Events {
    #[serde(flatten)]
    search: Search,
    /// Events that were named by their ids.
    named: Vec<EventId>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Events {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let terms = Terms::read(query.q.as_deref().unwrap_or_default(), &NAMES)?;
        let id = |text: &str| {
            super::event_id(text)
                .ok_or_else(|| Problem::refused(format!("{text} is no event's id; say key:{text} or type:{text}.")))
        };
        let named: Vec<EventId> = terms.all("id").map(id).collect::<Result<_, _>>()?;
        let now = Utc::now();
        let moment = |name: &str| terms.one(name)?.map(|text| Ok::<_, Problem>(when(&text)?.resolve(now))).transpose();
        let (event_type, key, header) = (terms.one("type")?, terms.one("key")?, terms.one("header")?);
        let header = header
            .as_deref()
            .map(|text| text.split_once('=').ok_or_else(|| Problem::refused("Say header:NAME=VALUE.")));
        let wanted = Wanted {
            event_type: event_type.as_deref(),
            key: key.as_deref(),
            header: header.transpose()?,
            since: moment("since")?,
            until: moment("until")?,
        };
        // Whoever names events by their ids wants nothing else.
        let search = match named.is_empty() {
            true => events::search(&at.console.config().publisher(), &wanted, query.before, SHOWN).await?,
            false => Search { events: Vec::new(), before: None, looked_back_to: None },
        };
        Ok(Self { search, named, now })
    }

    fn title(&self, _: &Query) -> String {
        "Events".into()
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let q = query.q.as_deref().unwrap_or_default();
        let heads =
            [("Outbox id", "n"), ("Written", "t"), ("Type", "t"), ("Key", "key"), ("Event", "id"), ("Bytes", "n")];
        let rows: Vec<Vec<Markup>> = self
            .search
            .events
            .iter()
            .map(|event| {
                let id = event.event_id.to_string();
                vec![
                    number(Some(event.outbox_id.into())),
                    time(event.written_at, self.now),
                    html! { (event.event_type) },
                    or_none(event.key.as_deref()),
                    html! { a href=(at.link(&format!("/events/{id}"))) { (id) } },
                    number(Some(event.payload_bytes.into())),
                ]
            })
            .collect();
        html! {
            form.search action=(at.link("/events")) role="search" {
                input name="q" value=(q) aria-label="Search" placeholder="type:order.* key:order-7 since:2h, or an event's id" data-search;
                button { "Search" }
            }
            p.hint { "Names: " @for name in &NAMES[1..] { code { (name) ":" } " " } ", such as " code { "header:tenant=7" } ". An id alone is looked up everywhere." }
            @for id in &self.named { p { a.id href=(at.link(&format!("/events/{id}"))) { (id.to_string()) } " – its whole way" } }
            @if self.named.is_empty() {
                (table("Events", &heads, &rows, "No event was found. Events stay in the outbox for as long as its retention says; older ones may still be in the stream, by their ids."))
                @if let Some(to) = self.search.looked_back_to {
                    p.notice { "Looked at 100 000 events, back to " (time(to, self.now)) ". What is older was not searched yet." }
                }
                @if let Some(before) = self.search.before {
                    p { a href={ (at.link("/events")) "?" (form_urlencoded::Serializer::new(String::new()).append_pair("q", q).append_pair("before", &before.to_string()).finish()) } { "Older" } }
                }
            }
        }
    }
}
