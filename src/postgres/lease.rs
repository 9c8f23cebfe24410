//! Leases: who does what one process at a time must do. All times are the database's.

use std::time::Duration;

use sqlx::PgConnection;

/// Takes the lease when it is free or has run out. Returns the new epoch, or none when somebody else holds it.
pub(crate) async fn acquire(
    connection: &mut PgConnection,
    name: &str,
    holder: &str,
    ttl: Duration,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "insert into aftercommit.lease as lease (name, holder, epoch, expires_at)
         values ($1, $2, 1, clock_timestamp() + $3)
         on conflict (name) do update
            set holder = excluded.holder, epoch = lease.epoch + 1, expires_at = clock_timestamp() + $3
          where lease.expires_at <= clock_timestamp()
         returning epoch",
    )
    .bind(name)
    .bind(holder)
    .bind(ttl)
    .fetch_optional(connection)
    .await
}

/// Prolongs the lease. False when it has gone to somebody else.
pub(crate) async fn renew(
    connection: &mut PgConnection,
    name: &str,
    holder: &str,
    epoch: i64,
    ttl: Duration,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "update aftercommit.lease set expires_at = clock_timestamp() + $4
          where name = $1 and holder = $2 and epoch = $3",
    )
    .bind(name)
    .bind(holder)
    .bind(epoch)
    .bind(ttl)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Gives the lease up, so that the next one need not wait until it runs out.
pub(crate) async fn release(
    connection: &mut PgConnection,
    name: &str,
    holder: &str,
    epoch: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.lease set expires_at = clock_timestamp()
          where name = $1 and holder = $2 and epoch = $3",
    )
    .bind(name)
    .bind(holder)
    .bind(epoch)
    .execute(connection)
    .await
    .map(|_| ())
}

/// A lease that somebody holds, or held: other tables' writes can be made conditional on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tenure {
    pub(crate) name: String,
    pub(crate) holder: String,
    pub(crate) epoch: i64,
}
