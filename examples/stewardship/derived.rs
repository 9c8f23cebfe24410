//! What is derived, and the two that keep it: the subscriber, which is fast, and the reconciler, which is sure.

use std::collections::BTreeSet;
use std::slice;
use std::time::Duration;

use aftercommit::backoff::Backoff;
use aftercommit::reconciler::{Drift, ItemError, Reconciler};
use aftercommit::worker::{BatchError, BatchHandler, Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;

use super::events::{
    MonitorInheritanceFlagChanged, MonitorOperationCompleted, SystemConnectionLinkChanged, SystemDataStewardsChanged,
    SystemDeleted,
};

/// Brings the stewards of a monitor and the users' lists into line with the state as it is now, and returns how many rows
/// were not. It never looks at what an event says, and never touches explicit rows. A monitor that is gone is fine.
pub async fn converge(tx: &mut PgTransaction<'_>, monitor: &str) -> Result<u64, sqlx::Error> {
    // One at a time: of two that looked at different moments the one with the older picture could write last.
    sqlx::query("select from monitor where key = $1 for update").bind(monitor).execute(&mut **tx).await?;
    let mut changed = 0;
    for sql in [
        "delete from monitor_steward s
          where monitor_key = $1 and source = 'inherited' and not exists (
            select from inheritance i
             where (i.monitor_key, i.user_id, i.source_system) = (s.monitor_key, s.user_id, s.source_system))",
        "insert into monitor_steward
         select monitor_key, user_id, 'inherited', source_system from inheritance where monitor_key = $1
         on conflict do nothing",
    ] {
        changed += sqlx::query(sql).bind(monitor).execute(&mut **tx).await?.rows_affected();
    }
    Ok(changed + converge_clients(tx, monitor).await?)
}

/// Puts the monitor into the lists of those who are stewards of it, and takes it out of all others.
async fn converge_clients(tx: &mut PgTransaction<'_>, monitor: &str) -> Result<u64, sqlx::Error> {
    // In one order, so that two monitors cannot wait for each other. The update looks again, under the locks.
    let users: Vec<i64> = sqlx::query_scalar(
        "select user_id from client c
          where ($1 = any(monitors)) <> exists (
            select from monitor_steward s where s.monitor_key = $1 and s.user_id = c.user_id)
          order by user_id for update",
    )
    .bind(monitor)
    .fetch_all(&mut **tx)
    .await?;
    let done = sqlx::query(
        "update client c
            set monitors = case
                when exists (select from monitor_steward s where s.monitor_key = $1 and s.user_id = c.user_id)
                then array(select unnest(c.monitors) union select $1 collate \"C\" order by 1)
                else array_remove(c.monitors, $1) end
          where user_id = any($2)",
    );
    Ok(done.bind(monitor).bind(users).execute(&mut **tx).await?.rows_affected())
}

/// Counts a monitor's operations, and returns how many rows were wrong.
async fn count_operations(tx: &mut PgTransaction<'_>, monitor: &str) -> Result<u64, sqlx::Error> {
    sqlx::query("select from monitor where key = $1 for update").bind(monitor).execute(&mut **tx).await?;
    let count = sqlx::query(
        "insert into monitor_stat as s select monitor_key, count(*) from operation where monitor_key = $1 group by 1
         on conflict (monitor_key) do update set operations = excluded.operations
          where s.operations <> excluded.operations",
    );
    Ok(count.bind(monitor).execute(&mut **tx).await?.rows_affected())
}

/// Has the monitors converge that events concern, as soon as they arrive.
#[derive(Debug, Clone, Copy)]
pub struct Stewardship;

impl Stewardship {
    /// The name of the subscriber, and of the reconciler.
    pub const NAME: &str = "stewardship";

    pub fn subscriber() -> Subscriber {
        Subscriber::new(Self::NAME)
            .on::<SystemDataStewardsChanged>(Self)
            .on::<SystemConnectionLinkChanged>(Self)
            .on::<MonitorInheritanceFlagChanged>(Self)
            .on::<SystemDeleted>(Self)
            .max_attempts(3)
            .backoff(Backoff { first: Duration::from_millis(20), max: Duration::from_millis(100) })
    }
}

/// Has the monitors converge that watch one of these connections, or one of the system's.
async fn converge_all(tx: &mut PgTransaction<'_>, connections: &[String], system: &str) -> Result<(), HandlerError> {
    let monitors: Vec<String> = sqlx::query_scalar(
        "select key from monitor where connection_id = any($1)
         union select key from monitor join connection_link using (connection_id) where system_id = $2
         order by 1",
    )
    .bind(connections)
    .bind(system)
    .fetch_all(&mut **tx)
    .await?;
    for monitor in monitors {
        converge(tx, &monitor).await?;
    }
    Ok(())
}

impl Handler<SystemDataStewardsChanged> for Stewardship {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        changed: &Delivery<SystemDataStewardsChanged>,
    ) -> Result<(), HandlerError> {
        converge_all(tx, &[], &changed.event.system_id).await
    }
}

impl Handler<SystemConnectionLinkChanged> for Stewardship {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        changed: &Delivery<SystemConnectionLinkChanged>,
    ) -> Result<(), HandlerError> {
        converge_all(tx, slice::from_ref(&changed.event.connection_config_id), &changed.event.system_id).await
    }
}

impl Handler<SystemDeleted> for Stewardship {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deleted: &Delivery<SystemDeleted>) -> Result<(), HandlerError> {
        converge_all(tx, &deleted.event.connections, &deleted.event.system_id).await
    }
}

impl Handler<MonitorInheritanceFlagChanged> for Stewardship {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        changed: &Delivery<MonitorInheritanceFlagChanged>,
    ) -> Result<(), HandlerError> {
        converge(tx, &changed.event.monitor_config_key).await?;
        Ok(())
    }
}

/// Counts operations once for all that come within a window: a monitor completes many of them in a burst.
#[derive(Debug, Clone, Copy)]
pub struct Stats;

impl Stats {
    pub fn subscriber() -> Subscriber {
        Subscriber::new("stewardship-stats")
            .on_batch::<MonitorOperationCompleted>(Self)
            .debounce(Duration::from_secs(1))
            .max_attempts(3)
            .backoff(Backoff { first: Duration::from_millis(20), max: Duration::from_millis(100) })
    }
}

impl BatchHandler<MonitorOperationCompleted> for Stats {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        completed: &[Delivery<MonitorOperationCompleted>],
    ) -> Result<(), BatchError> {
        let monitors: BTreeSet<&str> =
            completed.iter().map(|delivery| delivery.event.monitor_config_key.as_str()).collect();
        for monitor in monitors {
            count_operations(tx, monitor).await?;
        }
        Ok(())
    }
}

impl Reconciler for Stewardship {
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
        let sql = "select key from swept where $1 is null or key > $1 order by key limit $2";
        Ok(sqlx::query_scalar(sql).bind(after).bind(limit).fetch_all(&mut **tx).await?)
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, monitor: &str) -> Result<Drift, ItemError> {
        Ok(Drift::of(converge(tx, monitor).await? + count_operations(tx, monitor).await?))
    }
}
