//! What an operator does about subscribers that are no more.

use serde_json::json;

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::subscriber::{self, Remains};
use aftercommit_core::postgres::{self, database_error};
use aftercommit_core::subscription::{check_name, lease_name};

/// Inbox rows that one transaction removes.
const BATCH: i64 = 10_000;

/// What [`forget`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Forgotten {
    /// Rows of the subscriber's inbox.
    pub inbox: u64,
}

/// Looks whether [`forget`] would be refused, and changes nothing.
///
/// # Errors
/// As [`forget`].
pub async fn may_be_forgotten(config: &PostgresConfig, name: &str) -> Result<(), Error> {
    check_name(name).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let remains = subscriber::remains(&mut connection, name, &lease_name(name)).await;
    check(name, &remains.map_err(|error| database_error("looking for the subscriber failed", error))?)?;
    try_out(&mut connection, name).await
}

/// Refuses a login that may remove the inbox and not all of the rest: with half of it gone a subscriber would begin anew.
async fn try_out(connection: &mut Session, name: &str) -> Result<(), Error> {
    let tried = async {
        let mut tx = connection.begin().await?;
        subscriber::forget(&mut tx, name, &lease_name(name)).await?;
        tx.rollback().await
    };
    let doing = "nothing was removed: forgetting a subscriber needs the login that owns the schema";
    tried.await.map_err(|error| database_error(doing, error))
}

/// Removes everything that a subscriber's database knows of it: inbox, attempts, lease, pause, and what its reconcilers
/// found. For a subscriber that was taken away for good; one of that name that comes later begins anew, and handles all that
/// its consumer delivers. The audit trail stays. It needs the login that owns the schema. `who` does it, for the audit
/// trail.
///
/// The inbox goes in transactions of 10,000 rows; when it is broken off, run it again.
///
/// # Errors
/// When a worker still serves it, when it has dead letters or events that were redriven, which have to be decided about
/// first, when nothing is known of it, or when the database cannot be reached, has no schema, or refuses.
pub async fn forget(config: &PostgresConfig, name: &str, who: &str) -> Result<Forgotten, Error> {
    check_name(name).map_err(|problem| Error::new(ErrorKind::Config, problem))?;
    let failed = |error| database_error("forgetting the subscriber failed", error);
    let lease = lease_name(name);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    check(name, &subscriber::remains(&mut connection, name, &lease).await.map_err(failed)?)?;
    try_out(&mut connection, name).await?;
    let mut inbox = 0;
    loop {
        let removed = subscriber::forget_inbox(&mut connection, name, BATCH).await.map_err(failed)?;
        inbox += removed;
        if removed < BATCH.unsigned_abs() {
            break;
        }
    }
    let mut tx = connection.begin().await.map_err(failed)?;
    subscriber::forget(&mut tx, name, &lease).await.map_err(failed)?;
    let detail = json!({ "inbox_rows": inbox });
    let entry = Entry { who, action: "subscriber forget", subscriber: Some(name), event_id: None, detail };
    audit::write(&mut tx, &entry).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(Forgotten { inbox })
}

fn check(name: &str, remains: &Remains) -> Result<(), Error> {
    let refuse = |problem: String| Err(Error::new(ErrorKind::NotReady, problem));
    if let Some(holder) = &remains.active {
        return refuse(format!("{holder} serves the subscriber {name}: stop its workers first"));
    }
    if !remains.known {
        return refuse(format!("nothing is known of a subscriber {name} in this database: is the name right?"));
    }
    if remains.dead_letters > 0 {
        let letters = remains.dead_letters;
        return refuse(format!(
            "the subscriber {name} has {letters} dead letters that nobody has decided about: see `aftercommit dead list \
             --subscriber {name}`, then `aftercommit dead discard --subscriber {name} --yes`"
        ));
    }
    if remains.redrive > 0 {
        let events = remains.redrive;
        return refuse(format!(
            "{events} events that were redriven to the subscriber {name} have not run: let a worker run them first"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_still_needs_is_not_forgotten() {
        let gone = Remains { active: None, known: true, dead_letters: 0, redrive: 0 };
        assert!(check("a", &gone).is_ok());
        for (remains, expected) in [
            (Remains { active: Some("host:1:2".into()), ..gone.clone() }, "host:1:2 serves"),
            (Remains { known: false, ..gone.clone() }, "is the name right"),
            (Remains { dead_letters: 3, ..gone.clone() }, "3 dead letters"),
            (Remains { redrive: 2, ..gone.clone() }, "2 events that were redriven"),
        ] {
            let error = check("a", &remains).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
