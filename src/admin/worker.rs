//! What an operator tells workers: pause and resume.

use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind};
use crate::postgres::session::Session;
use crate::postgres::{self, database_error, lease, pause};
use crate::worker::{ALL, check_name, durable_name};

/// Whom to pause or resume, in one subscriber's database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who<'a> {
    /// One subscriber, by its name.
    Subscriber(&'a str),
    /// Every subscriber, also those that come later: the kill switch. It is apart from the pauses of single subscribers.
    All,
}

/// What a pause did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paused {
    /// False when it was paused already.
    pub changed: bool,
    /// Whether a worker has ever served the subscriber in this database; if not, the name may be wrong.
    pub known: bool,
}

/// What a resume did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    /// False when it was not paused.
    pub changed: bool,
    /// Whether all subscribers are paused, so that the kill switch holds the subscriber still.
    pub all_paused: bool,
    /// The subscribers that are paused by themselves.
    pub paused: Vec<String>,
}

/// Stops handling, whichever instance is active, until [`resume`]: running handlers finish, everything else goes back to
/// JetStream and waits there. It takes hold within about a second, is written down, so it survives restarts, and costs no
/// event an attempt.
///
/// # Errors
/// When the name is none of a subscriber, or the database cannot be reached or has no schema.
pub async fn pause(config: &PostgresConfig, who: Who<'_>, reason: Option<&str>) -> Result<Paused, Error> {
    let name = name(who)?;
    let failed = |error| database_error("pausing failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let changed = pause::pause(&mut connection, &name, reason).await.map_err(failed)?;
    let known = who == Who::All || lease::exists(&mut connection, &name).await.map_err(failed)?;
    Ok(Paused { changed, known })
}

/// Lets a subscriber, or all that are not paused by themselves, go on where they were, in order.
///
/// # Errors
/// As [`pause`].
pub async fn resume(config: &PostgresConfig, who: Who<'_>) -> Result<Resumed, Error> {
    let name = name(who)?;
    let failed = |error| database_error("resuming failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let changed = pause::resume(&mut connection, &name).await.map_err(failed)?;
    still_paused(&mut connection, changed).await.map_err(failed)
}

async fn still_paused(connection: &mut Session, changed: bool) -> Result<Resumed, sqlx::Error> {
    let names: Vec<String> = pause::list(connection).await?.into_iter().map(|pause| pause.name).collect();
    let prefix = durable_name("");
    let single = names.iter().filter(|name| *name != ALL).filter_map(|name| name.strip_prefix(&prefix));
    Ok(Resumed { changed, all_paused: names.iter().any(|name| name == ALL), paused: single.map(Into::into).collect() })
}

fn name(who: Who<'_>) -> Result<String, Error> {
    match who {
        Who::All => Ok(ALL.into()),
        Who::Subscriber(name) => {
            check_name(name).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
            Ok(durable_name(name))
        }
    }
}
