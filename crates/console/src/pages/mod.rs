//! The pages, one file each.

pub(crate) mod audit;
pub(crate) mod dead;
pub(crate) mod doctor;
pub(crate) mod event;
pub(crate) mod events;
pub(crate) mod jobs;
pub(crate) mod live;
pub(crate) mod login;
pub(crate) mod overview;
pub(crate) mod parked;
pub(crate) mod reconcile;
pub(crate) mod subscriber;
pub(crate) mod terms;

use aftercommit_core::config::PostgresConfig;
use aftercommit_outbox::event::EventId;

use crate::page::At;
use crate::problem::Problem;

/// Rows of a list.
pub(crate) const ROWS: i64 = 100;

/// Asks every database, and puts together what they answer. What one does not answer is said in the second part.
async fn of_all<T, F>(at: &At<'_>, ask: impl Fn(PostgresConfig) -> F) -> Result<(Vec<(usize, T)>, Vec<String>), Problem>
where
    F: Future<Output = Result<Vec<T>, aftercommit_core::error::Error>>,
{
    let (mut all, mut unknown, mut answered) = (Vec::new(), Vec::new(), false);
    for (index, database) in at.console.config().databases().enumerate() {
        match ask(database).await {
            Ok(rows) => {
                answered = true;
                all.extend(rows.into_iter().map(|row| (index, row)));
            }
            Err(error) => unknown.push(format!("database {index}: {}", error.report())),
        }
    }
    match answered {
        true => Ok((all, unknown)),
        false => Err(Problem::new(axum::http::StatusCode::SERVICE_UNAVAILABLE, unknown.join("\n"))),
    }
}

/// The id of an event, when the text is one.
fn event_id(text: &str) -> Option<EventId> {
    text.parse::<uuid::Uuid>().ok().map(EventId::from)
}

/// One database by its number in the list: 0 is the publisher's.
fn database(at: &At<'_>, index: usize) -> Result<PostgresConfig, Problem> {
    let found = at.console.config().databases().nth(index);
    found.ok_or_else(|| Problem::not_found(format!("There is no database {index}.")))
}

/// What is not known, above a list.
fn unknown(texts: &[String]) -> maud::Markup {
    maud::html! { @for text in texts { p.notice { "Not known: " (text) } } }
}
