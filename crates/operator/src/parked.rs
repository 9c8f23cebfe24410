//! What becomes of parked events: those that the stream did not take, and what waits behind them.

pub use super::filter::Filter;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::audit::{self, Entry};
pub use aftercommit_core::postgres::parked::ParkedEvent;
use aftercommit_core::postgres::parked_choice::{self, Choice};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{self, database_error, parked};
use aftercommit_outbox::event::EventId;

/// Events that are dealt with in one transaction.
const BATCH: i64 = 1000;

async fn choice(filter: &Filter, connection: &mut Session) -> Result<Choice, Error> {
    if filter.subscriber.is_some() || !filter.ids.is_empty() {
        let problem =
            "parked events have no subscriber and no number: they belong to the outbox; name them by event id";
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let now = parked_choice::now(connection).await.map_err(reading)?;
    Ok(Choice {
        events: filter.event_ids(),
        event_type: filter.event_type.clone(),
        key: filter.key.clone(),
        error: filter.error.clone(),
        // What is parked from now on is not selected.
        parked_before: Some(filter.older_than.map_or(now, |when| when.resolve(now).min(now))),
        parked_after: filter.newer_than.map(|when| when.resolve(now)),
        after: i64::MIN,
    })
}

/// What an action did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LetGo {
    /// The events that were meant, in outbox order.
    pub events: Vec<EventId>,
    /// How many events the relay publishes now: those behind them, and after [`release`] they themselves.
    pub released: i64,
}

/// The parked events and what waits behind them, in outbox order, up to `limit`.
///
/// # Errors
/// When the database cannot be reached or has no schema.
pub async fn list(config: &PostgresConfig, limit: i64) -> Result<Vec<ParkedEvent>, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let events = parked::list(&mut connection, limit).await.map_err(reading)?;
    Ok(events)
}

/// Those that the filter finds, up to `limit`.
///
/// # Errors
/// As [`list`].
pub async fn find(config: &PostgresConfig, filter: &Filter, limit: i64) -> Result<Vec<ParkedEvent>, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let choice = self::choice(filter, &mut connection).await?;
    let events = parked_choice::list(&mut connection, &choice, limit).await.map_err(reading)?;
    Ok(events)
}

/// How many the filter finds.
///
/// # Errors
/// As [`list`].
pub async fn count(config: &PostgresConfig, filter: &Filter) -> Result<i64, Error> {
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let choice = self::choice(filter, &mut connection).await?;
    parked_choice::count(&mut connection, &choice).await.map_err(reading)
}

/// Lets the leading relay try parked events again, and then what waits behind them, in order. `who` does it, for the audit
/// trail ([`audit`](crate::audit)). Up to 1,000 of them go in one transaction; what is parked meanwhile is left alone.
///
/// # Errors
/// [`ErrorKind::Config`] when the filter is empty and [`Filter::all`] is not set; and as [`list`]. What was released
/// before an error stays released.
pub async fn release(config: &PostgresConfig, who: &str, filter: &Filter) -> Result<LetGo, Error> {
    let_go(config, who, filter, false).await
}

/// Gives parked events up: they are never published. What waits behind them is let go, in order.
///
/// # Errors
/// As [`release`].
pub async fn discard(config: &PostgresConfig, who: &str, filter: &Filter) -> Result<LetGo, Error> {
    let_go(config, who, filter, true).await
}

async fn let_go(config: &PostgresConfig, who: &str, filter: &Filter, discard: bool) -> Result<LetGo, Error> {
    filter.check("parked events")?;
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut choice = self::choice(filter, &mut connection).await?;
    let mut done = LetGo::default();
    loop {
        let batch = one_batch(&mut connection, who, &choice, discard).await.map_err(|error| {
            let (verb, events) = (if discard { "discarding" } else { "releasing" }, done.events.len());
            database_error(format!("{verb} parked events failed after {events} of them"), error)
        })?;
        let Some((last, batch)) = batch else { return Ok(done) };
        choice.after = last;
        done.events.extend(batch.events);
        done.released += batch.released;
    }
}

/// Lets the next events of a choice go. None when there are no more; else up to which outbox id it has come.
async fn one_batch(
    connection: &mut Session,
    who: &str,
    choice: &Choice,
    discard: bool,
) -> Result<Option<(i64, LetGo)>, sqlx::Error> {
    let events = parked_choice::list(connection, choice, BATCH).await?;
    let Some(last) = events.last().map(|event| event.outbox_id) else { return Ok(None) };
    let action = if discard { "parked discard" } else { "parked release" };
    let mut tx = connection.begin().await?;
    let mut done = LetGo::default();
    for event in events {
        // None when somebody else was faster.
        let id = event.event_id.as_uuid();
        let Some(released) = parked::release(&mut tx, id, discard).await? else { continue };
        let detail = serde_json::json!({ "released": released });
        audit::write(&mut tx, &Entry { who, action, subscriber: None, event_id: Some(id), detail }).await?;
        done.events.push(event.event_id);
        done.released += released;
    }
    tx.commit().await?;
    Ok(Some((last, done)))
}

fn reading(error: sqlx::Error) -> Error {
    database_error("reading the parked events failed", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_filter_that_says_nothing_lets_nothing_go() {
        let config = PostgresConfig::new("postgres://nowhere");
        for act in [release(&config, "me", &Filter::default()).await, discard(&config, "me", &Filter::default()).await]
        {
            assert_eq!(act.unwrap_err().kind(), ErrorKind::Config);
        }
    }
}
