//! What subscribers' reconcilers may ask of the outbox. It only reads.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::postgres::session::Session;
use crate::postgres::snapshot::{Mark, xids};
use crate::postgres::time;

/// An event without its payload.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Head {
    pub id: i64,
    pub event_id: Uuid,
    #[sqlx(rename = "type")]
    pub event_type: String,
    pub key: Option<String>,
    #[sqlx(try_from = "time::Time")]
    pub created_at: DateTime<Utc>,
}

/// Those of these rows that are of some types, or of any when there are none, and that are not parked.
pub async fn heads(connection: &mut Session, ids: &[i64], types: &[String]) -> Result<Vec<Head>, sqlx::Error> {
    sqlx::query_as(
        "select id, event_id, type, key, created_at from aftercommit.outbox o
          where id = any($1) and (cardinality($2::text[]) = 0 or type = any($2))
            and not exists (select from aftercommit.parked p
                             where p.outbox_id = o.id and p.event_id = o.event_id and p.state <> 'published')
          order by id",
    )
    .bind(ids)
    .bind(types)
    .fetch_all(connection)
    .await
}

/// How many of these rows there are, by the same rule, and a digest of their event ids that does not depend on their
/// order: the sum of the first 60 bits of the MD5 of each.
pub async fn digest(connection: &mut Session, ids: &[i64], types: &[String]) -> Result<(u64, u128), sqlx::Error> {
    let (count, sum): (i64, String) = sqlx::query_as(
        "select count(*), coalesce(sum(('x' || left(md5(uuid_send(event_id)), 15))::bit(60)::bigint), 0)::text
           from aftercommit.outbox o
          where id = any($1) and (cardinality($2::text[]) = 0 or type = any($2))
            and not exists (select from aftercommit.parked p
                             where p.outbox_id = o.id and p.event_id = o.event_id and p.state <> 'published')",
    )
    .bind(ids)
    .bind(types)
    .fetch_one(connection)
    .await?;
    Ok((count.unsigned_abs(), sum.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?))
}

/// An event that was missing in the stream.
pub type Repaired = (i64, Uuid, Option<String>, String, Option<i64>, DateTime<Utc>);

/// Whether something was found missing in the stream this second, which [`repaired`] leaves out for now. What is in the
/// future was found before the database's clock went back.
pub(crate) async fn repaired_lately(connection: &mut Session) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from (select queued_at from aftercommit.repair
                                      where queued_at >= now() - interval '1 second' order by queued_at limit 1) as late
                         where queued_at <= clock_timestamp())",
    )
    .fetch_one(connection)
    .await
}

/// The next events that were missing in the stream, in the order in which that was found, behind a time and an id.
/// What was found this second is left for the next query, because transactions may still commit before it.
pub async fn repaired(
    connection: &mut Session,
    after: (DateTime<Utc>, i64),
    limit: i64,
) -> Result<Vec<Repaired>, sqlx::Error> {
    #[derive(sqlx::FromRow)]
    struct Found {
        outbox_id: i64,
        event_id: Uuid,
        key: Option<String>,
        state: String,
        sequence: Option<i64>,
        #[sqlx(try_from = "time::Time")]
        queued_at: DateTime<Utc>,
    }
    let found: Vec<Found> = sqlx::query_as(
        "select outbox_id, event_id, key, state, sequence, queued_at from aftercommit.repair
          where (queued_at, outbox_id) > ($1, $2)
            and queued_at not between clock_timestamp() - interval '1 second' and clock_timestamp()
          order by queued_at, outbox_id limit $3",
    )
    .bind(after.0)
    .bind(after.1)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    let repaired = |Found { outbox_id, event_id, key, state, sequence, queued_at }| {
        (outbox_id, event_id, key, state, sequence, queued_at)
    };
    Ok(found.into_iter().map(repaired).collect())
}

/// The outbox ids of these events.
pub async fn ids(connection: &mut Session, event_ids: &[Uuid]) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar("select id from aftercommit.outbox where event_id = any($1) order by id")
        .bind(event_ids)
        .fetch_all(connection)
        .await
}

/// An id below which a mark holds all rows.
pub(crate) async fn first_behind(connection: &mut Session, mark: &Mark) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select coalesce(min(straggler.id), $3::bigint + 1)
           from unnest($1::text[]::xid8[]) as t(xid)
          cross join lateral (
                select o.id from aftercommit.outbox o
                 where (o.xid, o.id) > (t.xid, $2) and (o.xid, o.id) <= (t.xid, $3)
                 order by o.xid, o.id limit 1) as straggler",
    )
    .bind(xids(mark.running()))
    .bind(mark.floor)
    .bind(mark.last_id)
    .fetch_one(connection)
    .await
}

/// The first events of some keys behind an id that are not parked, as far as one look goes, and the id up to which it went;
/// none when it went to the end.
pub async fn of_keys(
    connection: &mut Session,
    keys: &[String],
    after: i64,
    look: i64,
    limit: i64,
) -> Result<(Vec<i64>, Option<i64>), sqlx::Error> {
    let (mut ids, looked, up_to): (Vec<i64>, i64, Option<i64>) = sqlx::query_as(
        "with looked as materialized (
             select id, event_id, key from aftercommit.outbox where id > $1 order by id limit $2
         )
         select array(select id from looked l
                       where key = any($3)
                         and coalesce((select p.state from aftercommit.parked p where p.outbox_id = l.id and p.event_id = l.event_id), 'published')
                             = 'published'
                       order by id limit $4 + 1),
                (select count(*) from looked), (select max(id) from looked)",
    )
    .bind(after)
    .bind(look)
    .bind(keys)
    .bind(limit)
    .fetch_one(connection)
    .await?;
    let limit = usize::try_from(limit).unwrap_or_default();
    if ids.len() > limit {
        ids.truncate(limit);
        let last = ids.last().copied();
        return Ok((ids, last));
    }
    Ok((ids, up_to.filter(|_| looked == look)))
}
