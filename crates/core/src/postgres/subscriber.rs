//! Everything that a database knows of one subscriber.

use super::session::{Session, Tx};

/// What there is of a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains {
    /// Who holds its lease now; none when nobody does.
    pub active: Option<String>,
    /// Whether anything at all is known of it.
    pub known: bool,
    /// Events that it gave up and that nobody has decided about.
    pub dead_letters: i64,
    /// Events that were redriven to it and have not run.
    pub redrive: i64,
}

/// Looks what there is of a subscriber, under its name and that of its lease.
pub async fn remains(connection: &mut Session, name: &str, lease: &str) -> Result<Remains, sqlx::Error> {
    let (active, known, dead_letters, redrive) = sqlx::query_as(
        "select (select holder from aftercommit.lease where name = $2 and expires_at > clock_timestamp()),
                exists (select from aftercommit.lease where name = $2)
                    or exists (select from aftercommit.inbox where subscriber = $1)
                    or exists (select from aftercommit.attempt where subscriber = $1)
                    or exists (select from aftercommit.dead_letter where subscriber = $1)
                    or exists (select from aftercommit.redrive where subscriber = $1)
                    or exists (select from aftercommit.reconciler where name in ('consumer:' || $1, 'inbox:' || $1)),
                (select count(*) from aftercommit.dead_letter where subscriber = $1),
                (select count(*) from aftercommit.redrive where subscriber = $1)",
    )
    .bind(name)
    .bind(lease)
    .fetch_one(connection)
    .await?;
    Ok(Remains { active, known, dead_letters, redrive })
}

/// Deletes up to `limit` rows of its inbox, and returns how many.
pub async fn forget_inbox(connection: &mut Session, name: &str, limit: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.inbox
          where subscriber = $1
            and event_id = any(array(select event_id from aftercommit.inbox where subscriber = $1
                                   order by event_id limit $2))",
    )
    .bind(name)
    .bind(limit)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Deletes what else there is, but for the audit trail.
pub async fn forget(tx: &mut Tx<'_>, name: &str, lease: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with reconcilers(name) as (values ('consumer:' || $1), ('inbox:' || $1)),
         attempts as (delete from aftercommit.attempt where subscriber = $1),
         running as (delete from aftercommit.running where subscriber = $1),
         reached as (delete from aftercommit.reached where subscriber = $1),
         start as (delete from aftercommit.subscriber_start where subscriber = $1),
         pruned as (delete from aftercommit.inbox_pruned where subscriber = $1),
         findings as (delete from aftercommit.finding where name in (select name from reconcilers)),
         runs as (delete from aftercommit.reconcile_run where name in (select name from reconcilers)),
         legs as (delete from aftercommit.reconciler where name in (select name from reconcilers)),
         pauses as (delete from aftercommit.pause where name = $2)
         delete from aftercommit.lease where name = $2",
    )
    .bind(name)
    .bind(lease)
    .execute(tx)
    .await
    .map(drop)
}
