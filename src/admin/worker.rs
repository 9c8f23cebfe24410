//! What an operator tells workers: pause and resume.

use crate::config::PostgresConfig;
use crate::error::{Error, ErrorKind};
use crate::postgres::audit::{self, Entry};
use crate::postgres::session::Tx;
use crate::postgres::{self, database_error, lease, pause};
use crate::worker::{ALL, check_name, lease_name};

/// Which subscribers of a database to pause or resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
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
/// event an attempt. `who` does it, for the audit trail.
///
/// # Errors
/// When the name is none of a subscriber, or the database cannot be reached or has no schema.
pub async fn pause(
    config: &PostgresConfig,
    which: Which<'_>,
    who: &str,
    reason: Option<&str>,
) -> Result<Paused, Error> {
    let name = name(which)?;
    let failed = |error| database_error("pausing failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let changed = pause::pause(&mut tx, &name, reason).await.map_err(failed)?;
    if changed {
        let detail = serde_json::json!({ "reason": reason });
        write_down(&mut tx, which, who, "worker pause", detail).await.map_err(failed)?;
    }
    let known = which == Which::All || lease::exists(&mut tx, &name).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(Paused { changed, known })
}

/// Lets a subscriber, or all that are not paused by themselves, go on where they were, in order.
///
/// # Errors
/// As [`pause`].
pub async fn resume(config: &PostgresConfig, which: Which<'_>, who: &str) -> Result<Resumed, Error> {
    let name = name(which)?;
    let failed = |error| database_error("resuming failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let changed = pause::resume(&mut tx, &name).await.map_err(failed)?;
    if changed {
        write_down(&mut tx, which, who, "worker resume", serde_json::json!({})).await.map_err(failed)?;
    }
    let resumed = still_paused(&mut tx, changed).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(resumed)
}

async fn write_down(
    tx: &mut Tx<'_>,
    which: Which<'_>,
    who: &str,
    action: &'static str,
    detail: serde_json::Value,
) -> Result<(), sqlx::Error> {
    let subscriber = match which {
        Which::Subscriber(name) => Some(name),
        Which::All => None,
    };
    audit::write(tx, &Entry { who, action, subscriber, event_id: None, detail }).await
}

async fn still_paused(connection: &mut Tx<'_>, changed: bool) -> Result<Resumed, sqlx::Error> {
    let names: Vec<String> = pause::list(connection).await?.into_iter().map(|pause| pause.name).collect();
    let prefix = lease_name("");
    let single = names.iter().filter(|name| *name != ALL).filter_map(|name| name.strip_prefix(&prefix));
    Ok(Resumed { changed, all_paused: names.iter().any(|name| name == ALL), paused: single.map(Into::into).collect() })
}

fn name(which: Which<'_>) -> Result<String, Error> {
    match which {
        Which::All => Ok(ALL.into()),
        Which::Subscriber(name) => {
            check_name(name).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
            Ok(lease_name(name))
        }
    }
}
