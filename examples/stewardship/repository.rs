//! What people change. Each method publishes beside its mutation, in the caller's transaction; one that changes nothing
//! publishes nothing. It locks the row of the system or monitor first, and so orders that one's events.

use aftercommit::outbox;
use sqlx::PgTransaction;

use super::Error;
use super::derived;
use super::events::{
    Change, MonitorInheritanceFlagChanged, MonitorOperationCompleted, SystemConnectionLinkChanged,
    SystemDataStewardsChanged, SystemDeleted,
};

pub async fn create_system(tx: &mut PgTransaction<'_>, system: &str) -> Result<(), Error> {
    sqlx::query("insert into system values ($1) on conflict do nothing").bind(system).execute(&mut **tx).await?;
    Ok(())
}

/// Fails when there is no such system. Waits for another transaction that changes or deletes it.
async fn lock_system(tx: &mut PgTransaction<'_>, system: &str) -> Result<(), Error> {
    let found =
        sqlx::query("select from system where id = $1 for update").bind(system).fetch_optional(&mut **tx).await?;
    found.map(drop).ok_or_else(|| format!("there is no system {system}").into())
}

pub async fn add_steward(tx: &mut PgTransaction<'_>, system: &str, user: i64) -> Result<(), Error> {
    let sql = "insert into system_steward values ($1, $2) on conflict do nothing";
    change_steward(tx, system, user, Change::Added, sql).await
}

pub async fn remove_steward(tx: &mut PgTransaction<'_>, system: &str, user: i64) -> Result<(), Error> {
    let sql = "delete from system_steward where system_id = $1 and user_id = $2";
    change_steward(tx, system, user, Change::Removed, sql).await
}

async fn change_steward(
    tx: &mut PgTransaction<'_>,
    system: &str,
    user: i64,
    change: Change,
    sql: &'static str,
) -> Result<(), Error> {
    lock_system(tx, system).await?;
    let done = sqlx::query(sql).bind(system).bind(user).execute(&mut **tx).await?;
    if done.rows_affected() > 0 {
        let event = SystemDataStewardsChanged { system_id: system.into(), user_id: user, change };
        outbox::publish(tx, &event).await?;
    }
    Ok(())
}

/// Makes the user a steward of exactly these systems, and publishes exactly what differs.
pub async fn replace_for_user(tx: &mut PgTransaction<'_>, user: i64, systems: &[&str]) -> Result<(), Error> {
    // All of them in one order, so that two such calls cannot wait for each other.
    let concerned: Vec<String> = sqlx::query_scalar(
        "select id from system
          where id = any($2) or id in (select system_id from system_steward where user_id = $1)
          order by id for update",
    )
    .bind(user)
    .bind(systems)
    .fetch_all(&mut **tx)
    .await?;
    for system in &concerned {
        match systems.contains(&system.as_str()) {
            true => add_steward(tx, system, user).await?,
            false => remove_steward(tx, system, user).await?,
        }
    }
    Ok(())
}

pub async fn link(tx: &mut PgTransaction<'_>, system: &str, connection: &str) -> Result<(), Error> {
    let sql = "insert into connection_link values ($1, $2) on conflict do nothing";
    change_link(tx, system, connection, Change::Added, sql).await
}

pub async fn unlink(tx: &mut PgTransaction<'_>, system: &str, connection: &str) -> Result<(), Error> {
    let sql = "delete from connection_link where system_id = $1 and connection_id = $2";
    change_link(tx, system, connection, Change::Removed, sql).await
}

async fn change_link(
    tx: &mut PgTransaction<'_>,
    system: &str,
    connection: &str,
    change: Change,
    sql: &'static str,
) -> Result<(), Error> {
    lock_system(tx, system).await?;
    let done = sqlx::query(sql).bind(system).bind(connection).execute(&mut **tx).await?;
    if done.rows_affected() > 0 {
        let (system_id, connection_config_id) = (system.into(), connection.into());
        outbox::publish(tx, &SystemConnectionLinkChanged { system_id, connection_config_id, change }).await?;
    }
    Ok(())
}

/// Deletes a system with its stewards and links. The snapshot is taken under the lock of the system's row: whoever
/// wants to add a steward meanwhile waits, and then finds no system.
pub async fn delete_system(tx: &mut PgTransaction<'_>, system: &str) -> Result<SystemDeleted, Error> {
    lock_system(tx, system).await?;
    let stewards = sqlx::query_scalar("select user_id from system_steward where system_id = $1 order by 1");
    let connections = sqlx::query_scalar("select connection_id from connection_link where system_id = $1 order by 1");
    let event = SystemDeleted {
        system_id: system.into(),
        stewards: stewards.bind(system).fetch_all(&mut **tx).await?,
        connections: connections.bind(system).fetch_all(&mut **tx).await?,
    };
    sqlx::query("delete from system where id = $1").bind(system).execute(&mut **tx).await?;
    outbox::publish(tx, &event).await?;
    Ok(event)
}

/// Creates a monitor or sets its flag. Only a change of the flag is published; a new monitor begins with false.
pub async fn upsert_monitor(
    tx: &mut PgTransaction<'_>,
    key: &str,
    connection: &str,
    inherit: bool,
) -> Result<(), Error> {
    let insert = "insert into monitor values ($1, $2, false) on conflict do nothing";
    sqlx::query(insert).bind(key).bind(connection).execute(&mut **tx).await?;
    let update = sqlx::query("update monitor set inherit = $2 where key = $1 and inherit <> $2");
    if update.bind(key).bind(inherit).execute(&mut **tx).await?.rows_affected() > 0 {
        let event = MonitorInheritanceFlagChanged { monitor_config_key: key.into(), enabled: inherit };
        outbox::publish(tx, &event).await?;
    }
    Ok(())
}

/// Makes a user a steward of a monitor by hand.
pub async fn add_explicit(tx: &mut PgTransaction<'_>, monitor: &str, user: i64) -> Result<(), Error> {
    sqlx::query("insert into monitor_steward values ($1, $2, 'explicit') on conflict do nothing")
        .bind(monitor)
        .bind(user)
        .execute(&mut **tx)
        .await?;
    derived::converge(tx, monitor).await?;
    Ok(())
}

pub async fn complete_operation(tx: &mut PgTransaction<'_>, monitor: &str, operation: &str) -> Result<(), Error> {
    sqlx::query("select from monitor where key = $1 for update").bind(monitor).execute(&mut **tx).await?;
    sqlx::query("insert into operation values ($1, $2)").bind(monitor).bind(operation).execute(&mut **tx).await?;
    let event = MonitorOperationCompleted { monitor_config_key: monitor.into(), operation_type: operation.into() };
    outbox::publish(tx, &event).await?;
    Ok(())
}
