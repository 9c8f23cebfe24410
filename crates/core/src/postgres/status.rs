//! Read-only questions for `aftercommit status` and for health.

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::maybe::Maybe;
use super::relay_log::State;
use super::session::Session;
use super::snapshot::xids;
use super::time;

/// Backlogs are counted up to here.
pub const COUNT_LIMIT: i64 = 1_000_000;

/// Events that are committed and not in the stream.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Backlog {
    /// How many, counted up to [`COUNT_LIMIT`].
    pub events: i64,
    /// How long ago the oldest of them was written, in seconds.
    pub oldest_seconds: Option<f64>,
}

/// Counts the backlog behind a relay's state and the last outbox id that it reports as published.
pub async fn backlog(connection: &mut Session, state: &State, last_id: i64) -> Result<Backlog, sqlx::Error> {
    let settled = &state.settled;
    let target = state.target.as_ref().unwrap_or(settled);
    sqlx::query_as(
        "with published as materialized (
             -- how far the open window is; a report of an earlier window says nothing about it
             select coalesce(max(id), 0) as id from aftercommit.outbox
              where id = $5 and id > $7
                and not (id <= $2 and pg_visible_in_snapshot(xid, (select $1::text::pg_snapshot)))
         ), unsettled as (
             -- a window is published first and may be as large as the limit; with an upper bound PostgreSQL takes the
             -- range for a small one when it knows nothing
             select * from (select id, xid, created_at from aftercommit.outbox where id > $2 and id <= $10
                             order by id limit 2 * $6) as new
             union all
             select o.id, o.xid, o.created_at
               from unnest($3::text[]::xid8[]) as t(xid)
              cross join lateral (
                    select * from aftercommit.outbox o
                     where o.xid = t.xid and (o.xid, o.id) > (t.xid, $7) and (o.xid, o.id) <= (t.xid, $2)
                     order by o.xid, o.id limit $6) as o
             union all
             -- rows of new transactions with ids that were passed, as after a sequence was set back
             select id, xid, created_at
               from (select id, xid, created_at from aftercommit.outbox o where (o.xid, o.id) > ($9::text::xid8, $7)
                      order by o.xid, o.id limit 1000) as late
              where id > $7 and id <= $2
         )
         select count(*) as events,
                -- greatest() would make 0 of null
                case when count(*) > 0 then greatest(extract(epoch from clock_timestamp()) - extract(epoch from min(created_at)), 0)::float8 end
                    as oldest_seconds
           from (select created_at from unsettled u, published p
                  where not (u.id <= p.id
                             and (u.id <= $8 or pg_visible_in_snapshot(u.xid, (select $4::text::pg_snapshot))))
                  limit $6) as waiting",
    )
    .bind(settled.snapshot.to_string())
    .bind(settled.last_id)
    .bind(xids(settled.running()))
    .bind(target.snapshot.to_string())
    .bind(last_id)
    .bind(COUNT_LIMIT)
    .bind(settled.floor)
    .bind(target.floor)
    .bind(settled.next_xid.to_string())
    .bind(i64::MAX)
    .fetch_one(connection)
    .await
}

/// The leading relay as its lease and its last report show it.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Leader {
    /// Who holds the lease: host, process id and a random part.
    pub holder: String,
    /// The epoch of the lease.
    pub epoch: i64,
    /// Seconds until the lease runs out; negative when it has.
    pub lease_left: f64,
    /// The outbox id of the last event that it stored in the stream; none when no relay has reported.
    pub last_id: Option<i64>,
    /// The stream sequence of that event; none when no relay has reported.
    pub last_sequence: Option<i64>,
    /// What it does or waits for; none when no relay has reported.
    pub state: Option<String>,
    /// Since when it leads, as it says.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub since: Option<DateTime<Utc>>,
}

/// Who leads; none when no relay ever did.
pub async fn leader(connection: &mut Session, lease: &str) -> Result<Option<Leader>, sqlx::Error> {
    sqlx::query_as(
        "select l.holder, l.epoch,
                greatest(extract(epoch from l.expires_at) - extract(epoch from clock_timestamp()), -1e9)::float8 as lease_left,
                s.last_id, s.last_sequence, s.state, case when s.epoch = l.epoch then s.since end as since
           from aftercommit.lease l left join aftercommit.relay_status s on true
          where l.name = $1",
    )
    .bind(lease)
    .fetch_optional(connection)
    .await
}

/// The age in seconds of the longest open transaction of the database, prepared ones included; 0 without one, none when
/// the role may not see those of other roles.
pub async fn oldest_transaction(connection: &mut Session) -> Result<Option<f64>, sqlx::Error> {
    sqlx::query_scalar(
        "select case when pg_has_role('pg_read_all_stats', 'usage')
                then coalesce(extract(epoch from clock_timestamp() - least(
                         (select min(xact_start) from pg_stat_activity
                           where datname = current_database() and backend_type = 'client backend'
                             and pid <> pg_backend_pid()),
                         (select min(prepared) from pg_prepared_xacts where database = current_database())
                     )), 0)::float8 end",
    )
    .fetch_one(connection)
    .await
}

/// Dead letters per subscriber in this database.
pub async fn dead_letters(connection: &mut Session) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as("select subscriber, count(*) from aftercommit.dead_letter group by subscriber order by subscriber")
        .fetch_all(connection)
        .await
}

/// A subscriber as its database knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct AtWork {
    /// Name of the subscriber.
    pub subscriber: String,
    /// The active worker.
    pub active: Option<String>,
    /// Whether an operator has switched it off, alone or with all others.
    pub paused: bool,
    /// Events of which attempts have failed, and which are to be tried again.
    pub failing: i64,
    /// Events that an operator redrove, and which have not run since.
    pub redrive: i64,
    /// How many dead letters it has.
    pub dead_letters: i64,
    /// The failed attempt that was the last one.
    pub last_failure: Option<LastFailure>,
    /// Why and when it gave up on an event last.
    pub last_letter: Option<(String, DateTime<Utc>)>,
}

/// A failed attempt of an event that is tried again.
#[derive(Debug, Clone, PartialEq)]
pub struct LastFailure {
    /// The event's id.
    pub event_id: Uuid,
    /// How many of its attempts have failed.
    pub attempts: i32,
    /// Why this one failed.
    pub error: String,
    /// When it failed, by the database's clock.
    pub at: DateTime<Utc>,
    /// When the next attempt of any of the subscriber's events begins.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

impl FromRow<'_, PgRow> for AtWork {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            subscriber: row.try_get("subscriber")?,
            active: row.try_get("holder")?,
            paused: row.try_get("paused")?,
            failing: row.try_get("failing")?,
            redrive: row.try_get("redrive")?,
            dead_letters: row.try_get("dead_letters")?,
            last_failure: match row.try_get("event_id")? {
                Some(event_id) => Some(LastFailure {
                    event_id,
                    attempts: row.try_get("attempts")?,
                    error: row.try_get("last_error")?,
                    at: time::at(row, "last_failed_at")?,
                    next_attempt_at: time::maybe_at(row, "next_attempt_at")?,
                }),
                None => None,
            },
            last_letter: match time::maybe_at(row, "dead_at")? {
                Some(at) => Some((row.try_get("reason")?, at)),
                None => None,
            },
        })
    }
}

/// The subscribers that have left anything in this database.
pub async fn subscribers(connection: &mut Session) -> Result<Vec<AtWork>, sqlx::Error> {
    sqlx::query_as(
        "with failing as (select subscriber, count(*) from aftercommit.attempt where attempts > 0 group by 1),
         redrive as (select subscriber, count(*) from aftercommit.redrive group by 1),
         letters as (select subscriber, count(*) from aftercommit.dead_letter group by 1),
         lease as (
            select substr(name, length('subscriber:') + 1) as subscriber,
                   case when expires_at > clock_timestamp() then holder end as holder
              from aftercommit.lease where name like 'subscriber:%'),
         off as (
            select substr(name, length('subscriber:') + 1) as subscriber
              from aftercommit.pause where name like 'subscriber:%')
         select subscriber, lease.holder,
                exists (select from off where off.subscriber in (all_names.subscriber, '*')) as paused,
                coalesce(failing.count, 0) as failing, coalesce(redrive.count, 0) as redrive,
                coalesce(letters.count, 0) as dead_letters,
                last.event_id, last.attempts, last.last_error, last.last_failed_at,
                (select min(f.retry_at) from aftercommit.failure f
                  where f.subscriber = all_names.subscriber and f.retry_at > clock_timestamp()
                    and exists (select from aftercommit.attempt a
                                 where a.subscriber = f.subscriber and a.event_id = f.event_id)) as next_attempt_at,
                letter.reason, letter.dead_at
           from (select subscriber from failing union select subscriber from redrive
                 union select subscriber from letters union select subscriber from lease
                 union select subscriber from aftercommit.worker_status
                 union select subscriber from off where subscriber <> '*') as all_names
           left join failing using (subscriber) left join redrive using (subscriber)
           left join letters using (subscriber) left join lease using (subscriber)
           left join lateral (
                select event_id, attempts, last_error, last_failed_at from aftercommit.attempt a
                 where a.subscriber = all_names.subscriber order by last_failed_at desc limit 1) as last on true
           left join lateral (
                select reason, dead_at from aftercommit.dead_letter d
                 where d.subscriber = all_names.subscriber order by dead_at desc limit 1) as letter on true
          order by subscriber",
    )
    .fetch_all(connection)
    .await
}

/// What waits in a subscriber's tables, each counted up to [`COUNT_LIMIT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Events with failed attempts that are still to be retried.
    pub failing: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// Events that an operator has redriven.
    pub redrive: u64,
}

impl FromRow<'_, PgRow> for Counts {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let count = |column: &str| row.try_get::<i64, _>(column).map(i64::unsigned_abs);
        Ok(Self { failing: count("failing")?, dead_letters: count("dead_letters")?, redrive: count("redrive")? })
    }
}

/// What waits in the tables of these subscribers, in their order.
pub async fn counts(connection: &mut Session, names: &[&str]) -> Result<Vec<Counts>, sqlx::Error> {
    sqlx::query_as(
        "select (select count(*) from (select from aftercommit.attempt
                                        where subscriber = s.name and attempts > 0 limit $2) as t) as failing,
                (select count(*) from (select from aftercommit.dead_letter where subscriber = s.name limit $2) as t)
                    as dead_letters,
                (select count(*) from (select from aftercommit.redrive where subscriber = s.name limit $2) as t) as redrive
           from unnest($1::text[]) with ordinality as s(name, place) order by place",
    )
    .bind(names)
    .bind(COUNT_LIMIT)
    .fetch_all(connection)
    .await
}
