//! What each user sees, kept by two that know nothing of each other: a subscriber, which is fast, and a reconciler, which is sure.

use std::time::Duration;

use aftercommit::Event;
use aftercommit::reconciler::{Drift, ItemError, Reconciler};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;

/// A system is gone: what `DeleteHooks` publishes, with what its hook wrote down.
#[derive(Debug, Serialize, Deserialize)]
pub struct SystemDeleted {
    pub id: String,
    pub snapshot: Snapshot,
}

/// What the hook wrote down: who saw which monitor by this system.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    pub access: Option<Vec<Access>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Access {
    pub monitor_id: String,
    pub user_id: i64,
}

impl Event for SystemDeleted {
    const TYPE: &'static str = "system.deleted";
}

/// A row of `steward` is gone, by whatever statement or cascade: what its capture publishes.
#[derive(Debug, Serialize, Deserialize)]
pub struct StewardDeleted {
    pub old: Steward,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Steward {
    pub user_id: i64,
}

impl Event for StewardDeleted {
    const TYPE: &'static str = "steward.deleted";
}

/// A row of `watched` is gone.
#[derive(Debug, Serialize, Deserialize)]
pub struct WatchedDeleted {
    pub old: Watched,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Watched {
    pub monitor_id: String,
}

impl Event for WatchedDeleted {
    const TYPE: &'static str = "watched.deleted";
}

/// Keeps `client.monitors` as the view `access` says.
#[derive(Debug, Clone, Copy)]
pub struct Seen;

impl Seen {
    pub const NAME: &str = "seen";

    pub fn subscriber() -> Subscriber {
        Subscriber::new(Self::NAME).on::<SystemDeleted>(Self).on::<StewardDeleted>(Self).on::<WatchedDeleted>(Self)
    }
}

/// Takes exactly the pairs of the snapshot away, but for those that a user still has by another path.
impl Handler<SystemDeleted> for Seen {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deleted: &Delivery<SystemDeleted>) -> Result<(), HandlerError> {
        let pairs = deleted.event.snapshot.access.as_deref().unwrap_or_default();
        for Access { monitor_id, user_id } in pairs {
            sqlx::query("select from client where user_id = $1 for update").bind(user_id).execute(&mut **tx).await?;
            sqlx::query(
                "update client set monitors = array_remove(monitors, $1)
                  where user_id = $2 and not exists (select from access where (monitor_id, user_id) = ($1, $2))",
            )
            .bind(monitor_id)
            .bind(user_id)
            .execute(&mut **tx)
            .await?;
        }
        Ok(())
    }
}

impl Handler<StewardDeleted> for Seen {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deleted: &Delivery<StewardDeleted>) -> Result<(), HandlerError> {
        converge(tx, deleted.event.old.user_id).await?;
        Ok(())
    }
}

impl Handler<WatchedDeleted> for Seen {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deleted: &Delivery<WatchedDeleted>) -> Result<(), HandlerError> {
        let users: Vec<i64> =
            sqlx::query_scalar("select user_id from client where $1 = any(monitors) order by user_id")
                .bind(&deleted.event.old.monitor_id)
                .fetch_all(&mut **tx)
                .await?;
        for user in users {
            converge(tx, user).await?;
        }
        Ok(())
    }
}

/// Brings one user's list into line with the view, and returns how many rows were not.
async fn converge(tx: &mut PgTransaction<'_>, user: i64) -> Result<u64, sqlx::Error> {
    sqlx::query("select from client where user_id = $1 for update").bind(user).execute(&mut **tx).await?;
    let done = sqlx::query(
        "update client c set monitors = a.monitors
           from (select coalesce(array_agg(monitor_id order by monitor_id), '{}') as monitors
                   from access where user_id = $1) a
          where c.user_id = $1 and c.monitors <> a.monitors",
    );
    Ok(done.bind(user).execute(&mut **tx).await?.rows_affected())
}

impl Reconciler for Seen {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(15 * 60)
    }

    async fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<String>, ItemError> {
        let sql = "select user_id::text from client where $1::bigint is null or user_id > $1::bigint order by user_id limit $2";
        let after: Option<i64> = after.and_then(|after| after.parse().ok());
        Ok(sqlx::query_scalar(sql).bind(after).bind(limit).fetch_all(&mut **tx).await?)
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, user: &str) -> Result<Drift, ItemError> {
        let user = user.parse().map_err(|_| sqlx::Error::RowNotFound)?;
        Ok(Drift::of(converge(tx, user).await?))
    }
}
