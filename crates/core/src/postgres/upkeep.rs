//! What `aftercommit doctor` wants to know of the care that a server and its tables need: what holds its log, what is not
//! vacuumed, what others have attached to our tables, and who compares and prunes.

use std::time::Duration;

use super::session::Session;
use super::time;

/// The server as its administrators keep it.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Server {
    /// The setting `autovacuum`.
    pub autovacuum: bool,
    /// How many transactions ago the oldest row of this database was last frozen: at two thousand million the server takes
    /// no more writes.
    pub frozen: i64,
    /// The setting `max_slot_wal_keep_size` in MB; -1 when slots may keep as much of the log as there is room for.
    pub slots_keep: i64,
    /// Whether the server offers TLS.
    pub offers_tls: bool,
    /// Whether this connection uses it; none over a socket.
    pub uses_tls: Option<bool>,
}

/// Reads the server's settings and how this connection was made. It reads no table.
pub async fn server(connection: &mut Session) -> Result<Server, sqlx::Error> {
    sqlx::query_as(
        "select current_setting('autovacuum')::bool as autovacuum, age(datfrozenxid)::bigint as frozen,
                (select setting::bigint from pg_settings where name = 'max_slot_wal_keep_size') as slots_keep,
                current_setting('ssl')::bool as offers_tls,
                case when inet_server_addr() is not null
                     then (select ssl from pg_stat_ssl where pid = pg_backend_pid()) end as uses_tls
           from pg_database where datname = current_database()",
    )
    .fetch_one(connection)
    .await
}

/// A replication slot.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Whether somebody reads from it.
    pub active: bool,
    /// How many bytes of the write-ahead log it keeps; none when it keeps nothing.
    pub kept: Option<i64>,
}

/// All replication slots of the server.
pub async fn slots(connection: &mut Session) -> Result<Vec<Slot>, sqlx::Error> {
    sqlx::query_as(
        "select slot_name::text as name, active,
                (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end - restart_lsn)::bigint as kept
           from pg_replication_slots order by slot_name",
    )
    .fetch_all(connection)
    .await
}

/// What others have made of a table of the schema.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Attached {
    /// The table's name, without its schema.
    pub table: String,
    /// What: `trigger`, `rule`, `row security` or `autovacuum`.
    pub kind: String,
    /// The name of the trigger or rule; empty for the others.
    pub name: String,
}

/// What is not ours on our tables: triggers that call functions of others, rules, row security without a policy that lets all
/// rows be seen, and autovacuum that is off. It reads the catalogue, which needs no right on the schema.
pub async fn attached(connection: &mut Session) -> Result<Vec<Attached>, sqlx::Error> {
    sqlx::query_as(
        "with ours as (select c.oid, c.relname, c.relrowsecurity, c.reloptions, n.oid as schema
                         from pg_class c join pg_namespace n on n.oid = c.relnamespace
                        where n.nspname = 'aftercommit' and c.relkind in ('r', 'p'))
         select relname::text as table, 'trigger' as kind, tgname::text as name
           from ours join pg_trigger t on t.tgrelid = ours.oid join pg_proc f on f.oid = t.tgfoid
          where not tgisinternal and tgenabled <> 'D' and f.pronamespace <> schema
         union all
         select relname::text, 'rule', rulename::text from ours join pg_rewrite on ev_class = ours.oid
         union all
         select relname::text, 'row security', ''
           from ours where relrowsecurity and relname not in ('lease', 'reconciler', 'reconcile_run', 'finding')
            and (not exists (select from pg_policy where polrelid = ours.oid and pg_get_expr(polqual, polrelid) = 'true')
                 or exists (select from pg_policy where polrelid = ours.oid and not polpermissive))
         union all
         select relname::text, 'autovacuum', ''
           from ours where exists (select from pg_options_to_table(reloptions)
                                    where option_name = 'autovacuum_enabled' and not option_value::bool)
          order by 1, 2, 3",
    )
    .fetch_all(connection)
    .await
}

/// A reconciler, as its last runs have left it.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Compared {
    /// Its name, such as `outbox` or `consumer:mails`.
    pub name: String,
    /// How long ago it last succeeded, in seconds; none when it never did.
    pub since_success: Option<f64>,
    /// How many runs in a row have failed.
    pub failures: i32,
}

/// The reconcilers that the role may see.
pub async fn compared(connection: &mut Session) -> Result<Vec<Compared>, sqlx::Error> {
    sqlx::query_as(
        "select name, greatest(extract(epoch from clock_timestamp()) - extract(epoch from last_success_at), 0)::float8 as since_success,
                failures
           from aftercommit.reconciler order by name",
    )
    .fetch_all(connection)
    .await
}

/// How long an inbox remembers, as its worker has last pruned it.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Remembered {
    /// The subscriber.
    pub subscriber: String,
    /// How long what is done stays.
    #[sqlx(try_from = "time::Seconds")]
    pub age: Duration,
}

/// The retention of each inbox of this database that was pruned at least once.
pub async fn remembered(connection: &mut Session) -> Result<Vec<Remembered>, sqlx::Error> {
    sqlx::query_as(
        "select substr(category, 7) as subscriber, extract(epoch from period)::float8 as age
           from aftercommit.sweep where category like 'inbox:%' and period is not null order by 1",
    )
    .fetch_all(connection)
    .await
}
