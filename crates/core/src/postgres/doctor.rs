//! What `aftercommit doctor` wants to know of the server, the schema and the role.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::migrate::is_record;
use super::session::Session;
use super::time;
use crate::config::PostgresConfig;
use crate::error::Error;

/// The server and its settings, as they are for this role and database.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Server {
    /// The version of PostgreSQL as text, such as `18.1`.
    pub version: String,
    /// The version as a number, such as 180001.
    pub version_number: i32,
    /// The role that this connection works as.
    pub role: String,
    /// Whether it only follows another server.
    pub standby: bool,
    /// The setting `fsync`: without it a crash of the machine can lose and damage data.
    pub fsync: bool,
    /// The setting `full_page_writes`: without it a crash of the machine can damage data.
    pub full_page_writes: bool,
    /// The setting `synchronous_commit`, such as `on`.
    pub synchronous_commit: String,
    /// The port that the server's own process listens on; none over a socket.
    pub port: Option<i32>,
    /// What the server's clock shows.
    #[sqlx(try_from = "time::Time")]
    pub clock: DateTime<Utc>,
    /// Whether the role sees what other roles do.
    pub sees_others: bool,
}

/// Reads the server's settings. It reads no table.
pub async fn server(connection: &mut Session) -> Result<Server, sqlx::Error> {
    sqlx::query_as(
        "select current_setting('server_version') as version, current_setting('server_version_num')::int4 as version_number,
                current_user::text as role, pg_is_in_recovery() as standby, current_setting('fsync')::bool as fsync,
                current_setting('full_page_writes')::bool as full_page_writes,
                current_setting('synchronous_commit') as synchronous_commit, inet_server_port() as port,
                clock_timestamp() as clock, pg_has_role('pg_read_all_stats', 'usage') as sees_others",
    )
    .fetch_one(connection)
    .await
}

/// The connections of the whole server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub struct Connections {
    /// How many there can be, those that are kept for superusers left out.
    pub limit: i64,
    /// How many there are.
    pub used: i64,
    /// Those that carry the name of a program of aftercommit.
    pub ours: i64,
}

/// Counts them. Who has them and under which name every role may see.
pub async fn connections(connection: &mut Session) -> Result<Connections, sqlx::Error> {
    sqlx::query_as(
        "select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
                - coalesce(current_setting('reserved_connections', true)::bigint, 0) as limit,
                count(usesysid) as used, count(usesysid) filter (where application_name like 'aftercommit%') as ours
           from pg_stat_activity where datid is not null",
    )
    .fetch_one(connection)
    .await
}

/// The servers to which the configuration does not ask for encryption although they are not on this machine.
pub fn in_clear(config: &PostgresConfig) -> Result<Vec<String>, Error> {
    super::options(config, "").map(|servers| servers.in_clear())
}

/// The ports that the configuration names.
pub fn configured_ports(config: &PostgresConfig) -> Result<Vec<u16>, Error> {
    super::options(config, "").map(|servers| servers.ports())
}

/// What of the schema is there, without reading any of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub struct Tables {
    /// Whether the table `outbox` exists.
    pub outbox: bool,
    /// Whether the table `migrations` exists and is aftercommit's, by its columns.
    pub migrations: bool,
    /// Whether the role may read the record of migrations.
    pub readable: bool,
}

/// Looks into the catalogue, which needs no right on the schema.
pub async fn tables(connection: &mut Session) -> Result<Tables, sqlx::Error> {
    sqlx::query_as(concat!(
        "select coalesce(bool_or(relname = 'outbox'), false) as outbox,
                coalesce(bool_or(record), false) as migrations,
                coalesce(bool_or(record and has_schema_privilege(schema, 'usage') and has_table_privilege(oid, 'select')), false)
                    as readable
           from (select c.oid, relname, n.oid as schema, relname = 'migrations' and ",
        is_record!(),
        " as record from pg_class c join pg_namespace n on n.oid = c.relnamespace
                  where n.nspname = 'aftercommit' and c.relkind = 'r') as t",
    ))
    .fetch_one(connection)
    .await
}

/// Whether the role may do anything in the schema, so that no rights need to be counted.
pub async fn unlimited(connection: &mut Session) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select rolsuper or exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                                     where n.nspname = 'aftercommit' and c.relname = 'outbox' and pg_has_role(c.relowner, 'usage'))
           from pg_roles where rolname = current_user",
    )
    .fetch_one(connection)
    .await
}

/// Transactions that were prepared for a two-phase commit in this database.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Prepared {
    /// How many there are.
    pub count: i64,
    /// The oldest.
    pub gid: String,
    /// The role that prepared the oldest.
    pub owner: String,
    /// How long ago the oldest was prepared.
    #[sqlx(try_from = "time::Seconds")]
    pub age: Duration,
}

/// None when there are none.
pub async fn prepared(connection: &mut Session) -> Result<Option<Prepared>, sqlx::Error> {
    sqlx::query_as(
        "select count(*) over () as count, gid, owner::text,
                greatest(extract(epoch from clock_timestamp() - prepared), 0)::float8 as age
           from pg_prepared_xacts where database = current_database() order by prepared limit 1",
    )
    .fetch_optional(connection)
    .await
}

/// An open transaction.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Transaction {
    /// The process id of its session.
    pub pid: i32,
    /// The role; empty when the session has none or it cannot be seen.
    pub role: String,
    /// The name that the session has given itself, `application_name`; empty when it has none.
    pub application: String,
    /// What the session does, such as `idle in transaction`; empty when that cannot be seen.
    pub state: String,
    /// How long it has been open.
    #[sqlx(try_from = "time::Seconds")]
    pub age: Duration,
}

/// The longest open transaction of this database that the role can see, our own left out.
pub async fn longest_transaction(connection: &mut Session) -> Result<Option<Transaction>, sqlx::Error> {
    sqlx::query_as(
        "select pid, coalesce(usename::text, '') as role, coalesce(application_name, '') as application,
                coalesce(state, '') as state, greatest(extract(epoch from clock_timestamp() - xact_start), 0)::float8 as age
           from pg_stat_activity
          where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
            and xact_start is not null
          order by xact_start limit 1",
    )
    .fetch_optional(connection)
    .await
}

/// The age of the oldest event that the relay may remove once it is published; none without one.
pub async fn oldest_event(connection: &mut Session) -> Result<Option<Duration>, sqlx::Error> {
    let seconds: Option<f64> = sqlx::query_scalar(
        "select greatest(extract(epoch from clock_timestamp()) - extract(epoch from created_at), 0)::float8 from aftercommit.outbox o
          where not exists (select from aftercommit.parked p
                             where p.outbox_id = o.id and p.state in ('parked', 'released'))
          order by id limit 1",
    )
    .fetch_optional(connection)
    .await?;
    Ok(seconds.map(time::span))
}
