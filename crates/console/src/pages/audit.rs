//! Who did what.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_operator::audit::{self, AuditEntry, AuditFilter};

use super::terms::{Terms, when};
use super::{ROWS, event_id, of_all, unknown};
use crate::html::{command, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

const NAMES: [&str; 3] = ["id", "subscriber", "since"];

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    q: Option<String>,
}

#[derive(Serialize)]
pub(crate) struct Audit {
    entries: Vec<AuditEntry>,
    unknown: Vec<String>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

/// When, who, what, and more about it.
pub(crate) fn row(entry: &AuditEntry, now: DateTime<Utc>) -> Vec<Markup> {
    let more = entry.detail.as_object().filter(|detail| !detail.is_empty()).map(|_| entry.detail.to_string());
    vec![
        time(entry.at, now),
        html! { (entry.who) " " span.age { "as " (entry.role) } },
        html! { (entry.action) },
        html! { (more.unwrap_or_default()) },
    ]
}

impl Page for Audit {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let terms = Terms::read(query.q.as_deref().unwrap_or_default(), &NAMES)?;
        let event = terms
            .one("id")?
            .map(|text| event_id(&text).ok_or_else(|| Problem::refused(format!("{text} is no event's id."))))
            .transpose()?;
        let since = terms.one("since")?.map(|text| when(&text)).transpose()?;
        let filter = AuditFilter { event, subscriber: terms.one("subscriber")?, since };
        let (entries, unknown) = of_all(at, async |database| audit::list(&database, &filter, ROWS).await).await?;
        let mut entries: Vec<AuditEntry> = entries.into_iter().map(|(_, entry)| entry).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.at));
        Ok(Self { entries, unknown, now: Utc::now() })
    }

    fn title(&self, _: &Query) -> String {
        "Audit".into()
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let heads =
            [("When", "t"), ("Who", "t"), ("What", "t"), ("Subscriber", "t"), ("Event", "id"), ("More", "reason")];
        let rows: Vec<Vec<Markup>> = self.entries.iter().map(|entry| {
            let mut cells = row(entry, self.now).into_iter();
            let mut next = || cells.next().unwrap_or_default();
            let (when, who, what, more) = (next(), next(), next(), next());
            let event = html! { @match &entry.event_id { Some(id) => a href=(at.link(&format!("/events/{id}"))) { (id.to_string()) }, None => span.none { "–" } } };
            vec![when, who, what, crate::html::or_none(entry.subscriber.as_deref()), event, more]
        }).collect();
        html! {
            form.search action=(at.link("/audit")) role="search" {
                input name="q" value=(query.q.as_deref().unwrap_or_default()) aria-label="Search" placeholder="subscriber:mails since:1d, or an event's id" data-search;
                button { "Search" }
            }
            (unknown(&self.unknown))
            (table("Audit trail", &heads, &rows, "Nobody has done anything yet. Retries, edits, pauses, releases, replays and erasures leave an entry here."))
            @if self.entries.len() as i64 >= ROWS { p.notice { "These are the last " (ROWS) "." } }
            (command("aftercommit audit --since 1d"))
        }
    }
}
