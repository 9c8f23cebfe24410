//! Dead letters: what subscribers gave up.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_operator::Filter;
use aftercommit_operator::dead::{self, DeadLetter, Group, OpenedLetter};

use super::terms::Terms;
use super::{ROWS, database, event_id, of_all, unknown};
use crate::html::{command, facts, number, or_none, payload, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

const NAMES: [&str; 6] = ["id", "subscriber", "type", "key", "error", "age"];

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    q: Option<String>,
    /// `letters` or `groups`; groups when nothing is said.
    by: Option<By>,
}

#[derive(Clone, Copy, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum By {
    Letters,
    Groups,
}

#[derive(Serialize)]
pub(crate) struct Letters {
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<Placed<Group>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    letters: Option<Vec<Placed<DeadLetter>>>,
    unknown: Vec<String>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

/// Something, and the number of the database that it is in.
#[derive(Serialize)]
struct Placed<T> {
    database: usize,
    #[serde(flatten)]
    of: T,
}

impl<T> Placed<T> {
    fn all(found: Vec<(usize, T)>) -> Vec<Self> {
        found.into_iter().map(|(database, of)| Self { database, of }).collect()
    }
}

fn filter(q: Option<&str>) -> Result<(Filter, bool), Problem> {
    let terms = Terms::read(q.unwrap_or_default(), &NAMES)?;
    let (older_than, newer_than) = terms.ages()?;
    let mut filter = Filter {
        subscriber: terms.one("subscriber")?,
        event_type: terms.one("type")?,
        key: terms.one("key")?,
        error: terms.one("error")?,
        older_than,
        newer_than,
        ..Filter::default()
    };
    for text in terms.all("id") {
        match (text.parse(), event_id(text)) {
            (Ok(letter), _) => filter.ids.push(letter),
            (_, Some(event)) => filter.events.push(event),
            _ => {
                return Err(Problem::refused(format!(
                    "{text} is neither a letter's number nor an event's id; say key:{text} or error:{text}."
                )));
            }
        }
    }
    Ok((filter, terms.is_empty()))
}

impl Page for Letters {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let (filter, says_nothing) = filter(query.q.as_deref())?;
        let by = query.by.unwrap_or(if says_nothing { By::Groups } else { By::Letters });
        let now = Utc::now();
        let filter = &filter;
        Ok(match by {
            By::Groups => {
                let (mut groups, unknown) =
                    of_all(at, async |database| dead::groups(&database, filter, ROWS).await).await?;
                groups.sort_by_key(|(_, group)| std::cmp::Reverse(group.letters));
                Self { groups: Some(Placed::all(groups)), letters: None, unknown, now }
            }
            By::Letters => {
                let (letters, unknown) = of_all(at, async |database| dead::list(&database, filter, ROWS).await).await?;
                Self { groups: None, letters: Some(Placed::all(letters)), unknown, now }
            }
        })
    }

    fn title(&self, _: &Query) -> String {
        "Dead letters".into()
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let q = query.q.as_deref().unwrap_or_default();
        let link = |q: &str, by: &str| {
            let pairs =
                form_urlencoded::Serializer::new(String::new()).append_pair("q", q).append_pair("by", by).finish();
            format!("{}?{pairs}", at.link("/dead"))
        };
        html! {
            form.search action=(at.link("/dead")) role="search" {
                input name="q" value=(q) aria-label="Search" placeholder="subscriber:mails error:\"printer\" age:>1h" data-search;
                select name="by" aria-label="Show" {
                    option value="letters" selected[self.letters.is_some()] { "each letter" }
                    option value="groups" selected[self.groups.is_some()] { "in groups" }
                }
                button { "Search" }
            }
            p.hint { "Names: " @for name in &NAMES[1..] { code { (name) ":" } " " } ". A number is a letter's, an id an event's." }
            (unknown(&self.unknown))
            @if let Some(groups) = &self.groups { (self.groups(groups, &link)) }
            @if let Some(letters) = &self.letters {
                (self.letters(letters, at))
                @if letters.len() as i64 >= ROWS { p.notice { "These are the first " (ROWS) ". Narrow the search to see others." } }
            }
            (command("aftercommit dead list --group"))
        }
    }
}

impl Letters {
    fn groups(&self, groups: &[Placed<Group>], link: &impl Fn(&str, &str) -> String) -> Markup {
        let heads =
            [("Letters", "n"), ("Subscriber", "t"), ("Type", "t"), ("Reason", "reason"), ("First", "t"), ("Last", "t")];
        let rows: Vec<Vec<Markup>> = groups
            .iter()
            .map(|Placed { of: group, .. }| {
                let error: String = group.reason.split('"').next().unwrap_or_default().chars().take(80).collect();
                let q = match error.trim() {
                    "" => format!("subscriber:{} type:{}", group.subscriber, group.event_type),
                    error => format!("subscriber:{} type:{} error:\"{error}\"", group.subscriber, group.event_type),
                };
                vec![
                    html! { a href=(link(&q, "letters")) { (number(Some(group.letters.into()))) } },
                    html! { (group.subscriber) },
                    html! { (group.event_type) },
                    html! { (group.reason) },
                    time(group.oldest, self.now),
                    time(group.newest, self.now),
                ]
            })
            .collect();
        table(
            "Groups of dead letters",
            &heads,
            &rows,
            "There are no dead letters. An event that a subscriber gives up, after its last attempt or at once, would be here with its reason.",
        )
    }

    fn letters(&self, letters: &[Placed<DeadLetter>], at: &At<'_>) -> Markup {
        let heads = [
            ("Letter", "n"),
            ("Given up", "t"),
            ("Subscriber", "t"),
            ("Type", "t"),
            ("Key", "key"),
            ("Attempts", "n"),
            ("Reason", "reason"),
        ];
        let rows: Vec<Vec<Markup>> = letters
            .iter()
            .map(|Placed { database, of: letter }| {
                vec![
                    html! { a href=(at.link(&format!("/dead/{}?database={database}", letter.id))) { (letter.id) } },
                    time(letter.dead_at, self.now),
                    html! { (letter.subscriber) },
                    html! { (letter.event_type) },
                    or_none(letter.key.as_deref()),
                    number(Some(letter.attempts.into())),
                    html! { (letter.reason) },
                ]
            })
            .collect();
        table("Dead letters", &heads, &rows, "No dead letter fits this search.")
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OneQuery {
    id: i64,
    database: Option<usize>,
}

#[derive(Serialize)]
pub(crate) struct Letter {
    #[serde(flatten)]
    letter: OpenedLetter,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Letter {
    type Query = OneQuery;

    async fn load(at: &At<'_>, query: &OneQuery) -> Result<Self, Problem> {
        let database = database(at, query.database.unwrap_or_default())?;
        Ok(Self { letter: dead::show(&database, query.id).await?, now: Utc::now() })
    }

    fn title(&self, query: &OneQuery) -> String {
        format!("Dead letter {}", query.id)
    }

    fn content(&self, at: &At<'_>, query: &OneQuery) -> Markup {
        let OpenedLetter { letter, headers, payload: bytes, audit } = &self.letter;
        let event = letter.event_id.to_string();
        let headings = [("When", "t"), ("Who", "t"), ("What", "t"), ("More", "reason")];
        let entries: Vec<Vec<Markup>> = audit.iter().map(|entry| super::audit::row(entry, self.now)).collect();
        html! {
            p.problem { (letter.reason) }
            (facts(&[
                ("Subscriber", html! { (letter.subscriber) }),
                ("Event", html! { a.id href=(at.link(&format!("/events/{event}"))) { (event) } }),
                ("Type", html! { (letter.event_type) ", version " (letter.version) }),
                ("Key", or_none(letter.key.as_deref())),
                ("Attempts", number(Some(letter.attempts.into()))),
                ("First failed", time(letter.first_failed_at, self.now)),
                ("Given up", time(letter.dead_at, self.now)),
                ("Written", time(letter.time, self.now)),
                ("From", html! { (letter.source) @if let Some(id) = letter.outbox_id { ", outbox id " (id) } }),
                ("Stream", html! { (letter.stream) ", sequence " (letter.stream_sequence) }),
            ]))
            h2 { "Headers" }
            @if headers.is_empty() { p.empty { "The publisher has set none." } } @else {
                (facts(&headers.iter().map(|(name, value)| (name.as_str(), html! { (value) })).collect::<Vec<_>>()))
            }
            (payload(bytes, at.shows_payloads()))
            h2 { "What operators did" }
            (table("What operators did", &headings, &entries, "Nobody has done anything with it yet."))
            (command(&format!("aftercommit dead retry {0}, dead edit {0} --payload @corrected.json, dead discard {0}", query.id)))
        }
    }
}
