//! Pausing and resuming, as relay and workers have it.

use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::audit::{self, Entry};
use aftercommit_core::postgres::{self, database_error, lease, pause};

/// What a pause did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pausing {
    /// It is paused from now on.
    Paused,
    /// It was paused already, and has another reason now.
    ReasonChanged,
    /// It was paused already, and nothing was changed.
    Unchanged,
}

/// What is to be paused or resumed.
pub(super) struct Target<'a> {
    /// As the table of pauses has it.
    pub(super) name: &'a str,
    /// For the audit trail.
    pub(super) subscriber: Option<&'a str>,
    /// For the audit trail, such as `relay pause`.
    pub(super) action: &'a str,
    pub(super) who: &'a str,
}

/// Pauses, and writes down who did it and why. With `known` only what has a lease can be paused: another name is a slip of
/// the pen that would pause nobody.
pub(super) async fn pause(
    config: &PostgresConfig,
    target: &Target<'_>,
    reason: Option<&str>,
    known: bool,
) -> Result<Pausing, Error> {
    let failed = |error| database_error("pausing failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    if known && !lease::exists(&mut tx, target.name).await.map_err(failed)? {
        return Err(unknown(target));
    }
    let before = pause::pause(&mut tx, target.name, target.who, reason).await.map_err(failed)?;
    let pausing = match &before {
        None => Pausing::Paused,
        Some(before) if reason.is_some() && before.reason.as_deref() != reason => Pausing::ReasonChanged,
        Some(_) => Pausing::Unchanged,
    };
    let mut detail = serde_json::json!({ "reason": reason });
    if let (Pausing::ReasonChanged, Some(before)) = (pausing, before) {
        detail["before"] = serde_json::json!({ "by": before.by, "reason": before.reason });
    }
    if pausing != Pausing::Unchanged {
        audit::write(&mut tx, &entry(target, detail)).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)?;
    Ok(pausing)
}

/// Resumes, and writes down who did it. False when it was not paused. Beside it, what is still paused.
pub(super) async fn resume(config: &PostgresConfig, target: &Target<'_>) -> Result<(bool, Vec<String>), Error> {
    let failed = |error| database_error("resuming failed", error);
    let mut connection = postgres::connect(config, "aftercommit").await?;
    let mut tx = connection.begin().await.map_err(failed)?;
    let changed = pause::resume(&mut tx, target.name).await.map_err(failed)?;
    if changed {
        audit::write(&mut tx, &entry(target, serde_json::json!({}))).await.map_err(failed)?;
    }
    let left = pause::list(&mut tx).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok((changed, left.into_iter().map(|pause| pause.name).collect()))
}

fn entry<'a>(target: &Target<'a>, detail: serde_json::Value) -> Entry<'a> {
    let Target { subscriber, action, who, .. } = *target;
    Entry { who, action, subscriber, event_id: None, detail }
}

fn unknown(target: &Target<'_>) -> Error {
    let name = target.subscriber.unwrap_or(target.name);
    Error::new(
        ErrorKind::NotReady,
        format!(
            "nothing was paused: no worker has ever served subscriber {name} in this database; is the name right, and is \
             it the subscriber's database? `aftercommit status` lists the subscribers"
        ),
    )
}
