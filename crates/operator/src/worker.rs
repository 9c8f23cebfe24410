//! What an operator tells workers: pause and resume.

use super::pause::{self, Pausing, Target};
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::subscription::{ALL, check_name, lease_name};

/// Which subscribers of a database to pause or resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// One subscriber, by its name, that a worker has served in this database.
    Subscriber(&'a str),
    /// One subscriber, also when no worker has served it yet.
    Ahead(&'a str),
    /// Every subscriber, also those that come later: the kill switch. It is apart from the pauses of single subscribers.
    All,
}

/// What a resume did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
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
/// event an attempt. What is paused already gets another reason, if one is given. `who` does it, for the audit trail.
///
/// # Errors
/// When the name is none of a subscriber, no worker has ever served [`Which::Subscriber`] in this database, or the database
/// cannot be reached or has no schema.
pub async fn pause(
    config: &PostgresConfig,
    which: Which<'_>,
    who: &str,
    reason: Option<&str>,
) -> Result<Pausing, Error> {
    let name = name(which)?;
    let known = matches!(which, Which::Subscriber(_));
    pause::pause(config, &target(&name, which, "worker pause", who), reason, known).await
}

/// Lets a subscriber, or all that are not paused by themselves, go on where they were, in order.
///
/// # Errors
/// As [`pause`]; of a name that nobody has served it says that it was not paused.
pub async fn resume(config: &PostgresConfig, which: Which<'_>, who: &str) -> Result<Resumed, Error> {
    let name = name(which)?;
    let (changed, names) = pause::resume(config, &target(&name, which, "worker resume", who)).await?;
    let prefix = lease_name("");
    let single = names.iter().filter(|name| *name != ALL).filter_map(|name| name.strip_prefix(&prefix));
    Ok(Resumed { changed, all_paused: names.iter().any(|name| name == ALL), paused: single.map(Into::into).collect() })
}

fn target<'a>(name: &'a str, which: Which<'a>, action: &'a str, who: &'a str) -> Target<'a> {
    let subscriber = match which {
        Which::Subscriber(name) | Which::Ahead(name) => Some(name),
        Which::All => None,
    };
    Target { name, subscriber, action, who }
}

fn name(which: Which<'_>) -> Result<String, Error> {
    match which {
        Which::All => Ok(ALL.into()),
        Which::Subscriber(name) | Which::Ahead(name) => {
            check_name(name).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
            Ok(lease_name(name))
        }
    }
}
