//! Requests to forget what events hold, and the tombstones that stay. The functions of migration 0023 do the work, with the
//! rights of the schema's owner.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::maybe::Maybe;
use super::session::{Session, Tx};
use super::time;
use crate::envelope::TOMBSTONE;
use aftercommit_outbox::schema::published;

/// Rows of the outbox that one transaction goes through.
const LOOK: i32 = 10_000;

/// Which events are meant; what is set must all fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// By their ids; empty when any.
    pub events: Vec<Uuid>,
    /// With this key.
    pub key: Option<String>,
    /// With a key that begins so.
    pub key_prefix: Option<String>,
    /// Of this type.
    pub event_type: Option<String>,
}

/// A request to forget events, as it is on record.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct Request {
    /// Its number.
    pub id: i64,
    /// Who wanted it.
    pub who: String,
    /// Why.
    pub why: String,
    /// The events that were named; none when they were not.
    pub event_ids: Option<Vec<Uuid>>,
    /// The key that was named.
    pub key: Option<String>,
    /// The beginning of keys that was named.
    pub key_prefix: Option<String>,
    /// The type that was named.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub event_type: Option<String>,
    /// When it was asked for.
    #[sqlx(try_from = "time::Time")]
    pub requested_at: DateTime<Utc>,
    /// Since when the tables of this database have only tombstones; none while they have more.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub tables_at: Option<DateTime<Utc>>,
    /// Later events of the outbox are not meant.
    pub last_id: i64,
    /// The stream has been gone through up to this sequence; none when it has not.
    pub stream_to: Option<i64>,
    /// Since when the tombstones are published, or queued to be.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub published_at: Option<DateTime<Utc>>,
    /// Since when the stream has nothing else either; none while it may.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub ended_at: Option<DateTime<Utc>>,
}

impl Request {
    /// Whether it means an event with this type and key, as the database decides it.
    pub fn means(&self, event_type: &str, key: Option<&str>) -> bool {
        self.event_ids.is_none()
            && self.event_type.as_deref().is_none_or(|wanted| wanted == event_type)
            && self.key.as_deref().is_none_or(|wanted| key == Some(wanted))
            && self.key_prefix.as_deref().is_none_or(|prefix| key.is_some_and(|key| key.starts_with(prefix)))
    }
}

/// What a selection finds in the tables of a database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct Found {
    /// Events of the outbox that are not forgotten yet.
    pub outbox: i64,
    /// Dead letters that are not forgotten yet.
    pub dead_letters: i64,
    /// Events that wait to run again and are not forgotten yet.
    pub redriven: i64,
}

const REQUEST: &str =
    "select id, who, why, event_ids, key, key_prefix, type, requested_at, last_id, stream_to, tables_at, published_at, ended_at
                         from aftercommit.forget_request";

const FIND: &str = "
    with selection (events, key, key_prefix, type) as (select $1::uuid[], $2::text, $3::text, $4::text)
    select (select count(*) from aftercommit.outbox e, selection s where (s.events is null or e.event_id = any(s.events))
               and (s.key is null or e.key = s.key) and (s.key_prefix is null or starts_with(e.key, s.key_prefix))
               and (s.type is null or e.type = s.type) and e.content_type <> $5) as outbox,
           (select count(*) from aftercommit.dead_letter e, selection s where (s.events is null or e.event_id = any(s.events))
               and (s.key is null or e.key = s.key) and (s.key_prefix is null or starts_with(e.key, s.key_prefix))
               and (s.type is null or e.type = s.type) and e.content_type <> $5) as dead_letters,
           (select count(*) from aftercommit.redrive e, selection s where (s.events is null or e.event_id = any(s.events))
               and (s.key is null or e.key = s.key) and (s.key_prefix is null or starts_with(e.key, s.key_prefix))
               and (s.type is null or e.type = s.type) and e.content_type <> $5) as redriven";

/// A statement for the schema of this process.
fn ours(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(published().sql(sql).into_owned())
}

impl Selection {
    /// The ids that were named; none when any event is meant.
    fn ids(&self) -> Option<&[Uuid]> {
        Some(self.events.as_slice()).filter(|events| !events.is_empty())
    }
}

/// Counts what a selection finds, and changes nothing.
pub async fn find(session: &mut Session, selection: &Selection) -> Result<Found, sqlx::Error> {
    sqlx::query_as(FIND)
        .bind(selection.ids())
        .bind(&selection.key)
        .bind(&selection.key_prefix)
        .bind(&selection.event_type)
        .bind(TOMBSTONE)
        .fetch_one(session)
        .await
}

/// The same in a transaction of the caller's, for the schema of this process.
pub async fn find_within(connection: &mut PgConnection, selection: &Selection) -> Result<Found, sqlx::Error> {
    sqlx::query_as(ours(FIND))
        .bind(selection.ids())
        .bind(&selection.key)
        .bind(&selection.key_prefix)
        .bind(&selection.event_type)
        .bind(TOMBSTONE)
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// Begins a request and returns its number.
pub async fn begin(tx: &mut Tx<'_>, who: &str, why: &str, selection: &Selection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select aftercommit.forget_begin($1, $2, $3, $4, $5, $6)")
        .bind(who)
        .bind(why)
        .bind(selection.ids())
        .bind(&selection.key)
        .bind(&selection.key_prefix)
        .bind(&selection.event_type)
        .fetch_one(tx)
        .await
}

/// The same in a transaction of the caller's, for the schema of this process; with `all` it forgets what the tables have, too.
pub async fn begin_within(
    connection: &mut PgConnection,
    who: &str,
    why: &str,
    selection: &Selection,
    all: bool,
) -> Result<i64, sqlx::Error> {
    let sql = match all {
        true => ours("select aftercommit.forget($1, $2, $3, $4, $5, $6)"),
        false => ours("select aftercommit.forget_begin($1, $2, $3, $4, $5, $6)"),
    };
    sqlx::query_scalar(sql)
        .bind(who)
        .bind(why)
        .bind(selection.ids())
        .bind(&selection.key)
        .bind(&selection.key_prefix)
        .bind(&selection.event_type)
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// Goes on in the tables, in a transaction of the caller's. True when they have only tombstones.
pub async fn more_within(connection: &mut PgConnection, request: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(ours("select aftercommit.forget_more($1, $2)"))
        .bind(request)
        .bind(LOOK)
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// How many events a request has forgotten, and how many requests for this reason are not through.
pub async fn forgotten_within(
    connection: &mut PgConnection,
    request: i64,
    why: &str,
) -> Result<(i64, i64), sqlx::Error> {
    sqlx::query_as(ours(
        "select (select count(*) from aftercommit.tombstone where request = $1),
                (select count(*) from aftercommit.forget_request where why = $2 and ended_at is null)",
    ))
    .bind(request)
    .bind(why)
    .persistent(false)
    .fetch_one(connection)
    .await
}

/// Goes on in the tables, one bounded transaction. True when they have only tombstones.
pub async fn more(session: &mut Session, request: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select aftercommit.forget_more($1, $2)").bind(request).bind(LOOK).fetch_one(session).await
}

/// What is to be done about transactions that ran when the tables were gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Late {
    /// One of them still runs.
    Waits,
    /// There is more of what they wrote.
    More,
    /// It is gone.
    Done,
}

/// Goes on with what transactions have written that ran when the tables were gone through, one bounded transaction.
pub async fn late(session: &mut Session, request: i64) -> Result<Late, sqlx::Error> {
    let state: String = sqlx::query_scalar("select aftercommit.forget_late($1, $2)")
        .bind(request)
        .bind(LOOK)
        .fetch_one(session)
        .await?;
    Ok(match state.as_str() {
        "waits" => Late::Waits,
        "more" => Late::More,
        _ => Late::Done,
    })
}

/// Queues the tombstones for the relay. Returns how many events it has not come to; then nothing is queued.
pub async fn publish(session: &mut Session, request: i64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select aftercommit.forget_publish($1)").bind(request).fetch_one(session).await
}

/// How many events the relay has not come to, or has still to publish as tombstones.
pub async fn at_the_relay(session: &mut Session, request: i64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select (select count(*) from aftercommit.forget_unsettled($1))
              + (select count(*) from aftercommit.tombstone t
                   join aftercommit.repair r on r.outbox_id = t.outbox_id and r.event_id = t.event_id
                  where t.request = $1 and r.state = 'queued')
              + (select count(*) from aftercommit.tombstone t
                   join aftercommit.parked p on p.outbox_id = t.outbox_id and p.event_id = t.event_id
                  where t.request = $1 and p.state = 'released')",
    )
    .bind(request)
    .fetch_one(session)
    .await
}

/// The request of this number; none when there is none.
pub async fn request(session: &mut Session, id: i64) -> Result<Option<Request>, sqlx::Error> {
    sqlx::query_as(AssertSqlSafe(format!("{REQUEST} where id = $1"))).bind(id).fetch_optional(session).await
}

/// The requests that are not ended, the oldest first.
pub async fn open(session: &mut Session) -> Result<Vec<Request>, sqlx::Error> {
    sqlx::query_as(AssertSqlSafe(format!("{REQUEST} where ended_at is null order by id"))).fetch_all(session).await
}

/// The events of a request behind one of them, by id, `limit` at most; each with whether the outbox has it.
pub async fn events(
    session: &mut Session,
    request: i64,
    after: Uuid,
    limit: i64,
) -> Result<Vec<(Uuid, bool)>, sqlx::Error> {
    sqlx::query_as(
        "select event_id, outbox_id is not null from aftercommit.tombstone
          where request = $1 and event_id > $2 order by event_id limit $3",
    )
    .bind(request)
    .bind(after)
    .bind(limit)
    .fetch_all(session)
    .await
}

/// Of the events that a request names, those of which this database knows nothing.
pub async fn unknown(session: &mut Session, request: i64) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("select aftercommit.forget_unknown($1)").bind(request).fetch_all(session).await
}

/// Those of these events that the outbox has.
pub async fn in_outbox(session: &mut Session, events: &[Uuid]) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("select event_id from aftercommit.outbox where event_id = any($1)")
        .bind(events)
        .fetch_all(session)
        .await
}

/// Before which time none of the events was written that a request names; none when the outbox does not have all of them, or the
/// request names none.
pub async fn not_before(session: &mut Session, request: i64) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    let time: Option<Option<time::Time>> = sqlx::query_scalar(
        "select case when count(*) = count(o.id) then min(o.created_at) end
           from aftercommit.forget_request f
           join aftercommit.tombstone t on t.request = f.id
           left join aftercommit.outbox o on o.event_id = t.event_id
          where f.id = $1 and f.event_ids is not null",
    )
    .bind(request)
    .fetch_optional(session)
    .await?;
    Ok(time.flatten().map(DateTime::from))
}

/// Keeps up to where the stream has been gone through.
pub async fn keep_place(session: &mut Session, request: i64, sequence: u64) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.forget_at($1, $2)")
        .bind(request)
        .bind(sequence.cast_signed())
        .execute(session)
        .await
        .map(drop)
}

/// Writes down events that only the stream had.
pub async fn found(session: &mut Session, request: i64, events: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.forget_found($1, $2)").bind(request).bind(events).execute(session).await.map(drop)
}

/// Ends a request; so many messages were erased.
pub async fn end(session: &mut Session, request: i64, messages: u64) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.forget_end($1, $2)")
        .bind(request)
        .bind(i64::try_from(messages).unwrap_or(i64::MAX))
        .execute(session)
        .await
        .map(drop)
}

/// The stream that the relay of this database publishes to; none when no relay has published anything.
pub async fn stream(session: &mut Session) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar("select stream from aftercommit.relay_log order by seq desc limit 1").fetch_one(session).await
}

/// What is known of a forgotten event.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Tombstone {
    /// When it was forgotten here.
    #[sqlx(try_from = "time::Time")]
    pub erased_at: DateTime<Utc>,
    /// Who wanted it; none when another database's outbox said so.
    pub who: Option<String>,
    /// Why.
    pub why: Option<String>,
    /// Whether copies may still be in the stream.
    pub open: bool,
}

/// What is known of an event that was forgotten; none when it was not.
pub async fn tombstone(session: &mut Session, event: Uuid) -> Result<Option<Tombstone>, sqlx::Error> {
    sqlx::query_as(
        "select t.erased_at, f.who, f.why, coalesce(f.ended_at is null and f.id is not null, false) as open
           from aftercommit.tombstone t left join aftercommit.forget_request f on f.id = t.request
          where t.event_id = $1",
    )
    .bind(event)
    .fetch_optional(session)
    .await
}

/// How much was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, sqlx::FromRow)]
pub struct Totals {
    /// Tombstones.
    pub events: i64,
    /// Requests that are not ended.
    pub open: i64,
    /// For how many seconds the oldest of them has been there.
    pub oldest_seconds: Option<f64>,
}

/// Counts tombstones and open requests.
pub async fn totals(session: &mut Session) -> Result<Totals, sqlx::Error> {
    sqlx::query_as(
        "select (select count(*) from aftercommit.tombstone) as events, count(*) as open,
                (extract(epoch from clock_timestamp()) - extract(epoch from min(requested_at)))::float8 as oldest_seconds
           from aftercommit.forget_request where ended_at is null",
    )
    .fetch_one(session)
    .await
}

/// What a worker does with tombstones, in the transaction in which they are done; `fresh` are those that were not handled.
pub async fn take_tombstones(
    tx: &mut Tx<'_>,
    subscriber: &str,
    events: &[Uuid],
    fresh: &[Uuid],
) -> Result<(), sqlx::Error> {
    sqlx::query("select aftercommit.take_tombstones($1, $2, $3)")
        .bind(subscriber)
        .bind(events)
        .bind(fresh)
        .execute(tx)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PostgresConfig;
    use crate::digest::Digest;
    use crate::postgres::{self, window};
    use aftercommit_testing::servers::Postgres;

    /// The database tells a message of an event that was forgotten by a digest that the programs compute of the message.
    #[tokio::test]
    async fn the_database_computes_the_digest_of_the_programs() {
        let config = PostgresConfig::new(Postgres::shared().await.unwrap().create_database().await.unwrap());
        let mut session = postgres::connect(&config, "aftercommit-test").await.unwrap();
        postgres::migrate::run(&mut session).await.unwrap();
        // Headers that were written before their names were reserved, and names whose order depends on the collation.
        for statement in [
            "alter table aftercommit.outbox drop constraint outbox_header_names_are_not_reserved,
                                            drop constraint outbox_header_values_are_legal",
            "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type, created_at) values
             (gen_random_uuid(), 'a', 1, null, '{}', '', 'x', '1970-01-01'),
             (gen_random_uuid(), 'a.b', 2147483647, U&'Stra\\00dfe \\+01F600',
              '{\"b\": \"1\", \"B\": \"2\", \"a-b\": \"\", \"a_b\": \"x y\"}', '{}', 'application/json', '2026-02-28 23:59:59.999999+00'),
             (gen_random_uuid(), 'a', 1, 'k', '{\"Aftercommit-Repair\": \"x\", \"NATS-a\": \"y\", \"ce-id\": \"z\", \"own\": \"  both  \"}',
              convert_to(repeat('long', 5000), 'UTF8'), 'text/plain; charset=utf-8', '0001-01-01 00:00:00+00'),
             (gen_random_uuid(), 'a', 1, 'k', '{}', '\\x00ff', 'a', '9999-12-31 23:59:59.999999+00')",
        ] {
            sqlx::query(statement).execute(&mut session).await.unwrap();
        }
        let rows: Vec<(Uuid, i64, Vec<u8>)> =
            sqlx::query_as("select event_id, id, aftercommit.event_digest(o) from aftercommit.outbox o order by id")
                .fetch_all(&mut session)
                .await
                .unwrap();
        assert_eq!(rows.len(), 4);
        for (event_id, id, digest) in rows {
            let known = window::known(&mut session, &[event_id], &[id]).await.unwrap();
            assert!(known[&(event_id, id)].is(Digest::read(&digest).unwrap()), "event {id}");
        }
    }
}
