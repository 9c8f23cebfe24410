//! The rows of a window, ordered by id, page by page.
//!
//! A window holds what its target mark holds and its settled mark does not. First come the stragglers: rows with ids
//! that `settled` had already passed, of transactions that have ended since. Then the new rows by primary key. Each
//! statement is written so that just one index can serve it, whatever the statistics say: the row comparison fits only
//! the index on (xid, id).

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};

use super::outbox_event::OutboxEvent;
use super::session::Session;
use super::snapshot::{Mark, xids};
use crate::fault;

/// Rows of new transactions that are looked through for late ones at a time: so few that no plan reads the whole table.
const ENTRIES: i64 = 1000;
/// So many times without a late row.
const HONEST: u32 = 2000;

/// What is read of a row.
pub trait Item: Sized {
    /// The next rows of some transactions: `$1` their ids, `$2` behind which id for each, `$3` up to which id, `$4` how
    /// many of each, `$5` the snapshot that must be seen. The column `n` is the transaction's number in `$1`.
    const STRAGGLERS: &str;
    /// Rows by primary key: behind `$1`, up to `$2`, that the snapshot `$3` sees or the floor `$5` covers, `$4` at most.
    const NEW: &str;
    /// Whether a statement that sees less than the target is refused, and not only one that was sent to a standby.
    const TO_TARGET: bool;

    /// Reads an item from a row of one of these statements.
    fn read(row: &PgRow) -> Result<Self, sqlx::Error>;
    /// The item's id in the outbox.
    fn id(&self) -> i64;
}

impl Item for OutboxEvent {
    const STRAGGLERS: &str = "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end,
                t.n
           from unnest($1::text[]::xid8[], $2::bigint[]) with ordinality as t(xid, behind, n)
          cross join lateral (
                select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                  from aftercommit.outbox o
                 where (o.xid, o.id) > (t.xid, t.behind) and (o.xid, o.id) <= (t.xid, $3)
                 order by o.xid, o.id limit $4) as page
          where aftercommit.reads_up_to(coalesce($5::text::pg_snapshot, pg_current_snapshot()))
          order by t.n, id";
    const NEW: &str = "select id, event_id, type, version, key, content_type, created_at,
                case when not large and headers <> '{}' then headers::text end, case when not large then payload end
           from (select *, octet_length(payload) + pg_column_size(headers) > 4096 as large
                   from aftercommit.outbox
                  where id > $1 and id <= $2
                    and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
                    and aftercommit.reads_up_to($3::text::pg_snapshot)
                  order by id limit $4) as page
          order by id";
    const TO_TARGET: bool = true;

    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        Self::from_row(row)
    }

    fn id(&self) -> i64 {
        self.id
    }
}

impl Item for i64 {
    const STRAGGLERS: &str = "select page.id, t.n
           from unnest($1::text[]::xid8[], $2::bigint[]) with ordinality as t(xid, behind, n)
          cross join lateral (
                select o.id from aftercommit.outbox o
                 where (o.xid, o.id) > (t.xid, t.behind) and (o.xid, o.id) <= (t.xid, $3)
                 order by o.xid, o.id limit $4) as page
          where aftercommit.reads_up_to(coalesce($5::text::pg_snapshot, pg_current_snapshot()))
          order by t.n, page.id";
    const NEW: &str = "select id from aftercommit.outbox
          where id > $1 and id <= $2 and (id <= $5 or pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)))
            and aftercommit.reads_up_to(pg_current_snapshot())
          order by id limit $4";
    // A reconciler may ask with a mark of another cluster.
    const TO_TARGET: bool = false;

    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        row.try_get("id")
    }

    fn id(&self) -> i64 {
        *self
    }
}

/// A way through a window: [`OutboxEvent`]s, or ids alone.
#[derive(Debug)]
pub struct Walk<T> {
    settled: Mark,
    target: Mark,
    /// Everything up to here was returned.
    after: i64,
    stragglers: Stragglers<T>,
}

#[derive(Debug)]
enum Stragglers<T> {
    NotLooked,
    Found(Merge<T>),
    Done,
}

impl<T: Item> Walk<T> {
    /// Through what `target` holds and `settled` does not, behind the id `after`.
    pub fn new(settled: Mark, target: Mark, after: i64) -> Self {
        Self { settled, target, after, stragglers: Stragglers::NotLooked }
    }

    /// The next rows in the order of their ids, `limit` at most; none at the end.
    pub async fn next(&mut self, connection: &mut Session, limit: usize) -> Result<Vec<T>, sqlx::Error> {
        let mut rows = Vec::new();
        if let Some(merge) = self.stragglers(connection).await? {
            rows = merge.next(connection, limit).await?;
        }
        if rows.is_empty() {
            self.stragglers = Stragglers::Done;
            rows = self.new_rows(connection, limit).await?;
        }
        if let Some(last) = rows.last() {
            self.after = last.id();
        }
        Ok(rows)
    }

    /// What the statements of this walk must see at least; none for whatever a primary sees.
    fn must_see(&self) -> Option<String> {
        T::TO_TARGET.then(|| self.target.snapshot.to_string())
    }

    async fn stragglers(&mut self, connection: &mut Session) -> Result<Option<&mut Merge<T>>, sqlx::Error> {
        if matches!(self.stragglers, Stragglers::NotLooked) {
            self.stragglers = if self.after < self.settled.last_id && !fault::broken("stragglers") {
                let mut ended: BTreeSet<u64> = self.settled.ended_by(&self.target).into_iter().collect();
                ended.extend(self.late(connection).await?);
                let after = self.after.max(self.settled.floor);
                Stragglers::Found(Merge::new(ended, after, self.settled.last_id, self.must_see()))
            } else {
                Stragglers::Done
            };
        }
        Ok(match &mut self.stragglers {
            Stragglers::Found(merge) => Some(merge),
            _ => None,
        })
    }

    /// Transactions that began after `settled`, have ended at `target`, and yet wrote ids that `settled` had passed. There
    /// are none while ids come from a sequence that only grows, so after so many rows without one it looks no further.
    async fn late(&self, connection: &mut Session) -> Result<Vec<u64>, sqlx::Error> {
        let mut late = BTreeSet::new();
        let (mut xid, mut id, mut honest) = (self.settled.next_xid.to_string(), self.settled.floor, 0);
        while honest < HONEST {
            let (count, last_xid, last_id, found): (i64, Option<String>, Option<i64>, Vec<String>) = sqlx::query_as(
                "with entry as materialized (
                     select xid, id from aftercommit.outbox o where (o.xid, o.id) > ($1::text::xid8, $2)
                      order by o.xid, o.id limit $5
                 )
                 select (select count(*) from entry), last.xid::text, last.id,
                        array(select distinct xid::text from entry where id > $3 and id <= $4)
                   from (values (1)) as one(row)
                   left join (select xid, id from entry order by xid desc, id desc limit 1) as last on true
                  where aftercommit.reads_up_to(coalesce($6::text::pg_snapshot, pg_current_snapshot()))",
            )
            .bind(&xid)
            .bind(id)
            .bind(self.settled.floor)
            .bind(self.settled.last_id)
            .bind(ENTRIES)
            .bind(self.must_see())
            .fetch_one(&mut *connection)
            .await?;
            honest = if found.is_empty() { honest + 1 } else { 0 };
            for xid in &found {
                late.insert(xid.parse::<u64>().map_err(|error| sqlx::Error::Decode(Box::new(error)))?);
            }
            let (Some(last_xid), Some(last_id), true) = (last_xid, last_id, count == ENTRIES) else { break };
            (xid, id) = (last_xid, last_id);
        }
        Ok(late.into_iter().filter(|xid| self.settled.has_ended_by(&self.target, *xid)).collect())
    }

    async fn new_rows(&self, connection: &mut Session, limit: usize) -> Result<Vec<T>, sqlx::Error> {
        let rows = sqlx::query(T::NEW)
            .bind(self.after.max(self.settled.last_id))
            .bind(self.target.last_id)
            .bind(self.target.snapshot.to_string())
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .bind(self.target.floor)
            .fetch_all(connection)
            .await?;
        rows.iter().map(T::read).collect()
    }
}

/// The rows of some transactions in the order of their ids. Each is read once; about a page of them waits in memory, or
/// one of each transaction.
#[derive(Debug)]
struct Merge<T> {
    sources: Vec<Source<T>>,
    up_to: i64,
    must_see: Option<String>,
    /// The first waiting id of each transaction that has one.
    first: BinaryHeap<Reverse<(i64, usize)>>,
}

#[derive(Debug)]
struct Source<T> {
    xid: u64,
    /// Up to here it was read.
    read_to: i64,
    waiting: VecDeque<T>,
    more: bool,
}

impl<T: Item> Merge<T> {
    fn new(xids: impl IntoIterator<Item = u64>, after: i64, up_to: i64, must_see: Option<String>) -> Self {
        let source = |xid| Source { xid, read_to: after, waiting: VecDeque::new(), more: true };
        Self { sources: xids.into_iter().map(source).collect(), up_to, must_see, first: BinaryHeap::new() }
    }

    async fn next(&mut self, connection: &mut Session, limit: usize) -> Result<Vec<T>, sqlx::Error> {
        let mut rows = Vec::new();
        let mut dry = self.sources.iter().any(Source::is_dry);
        while rows.len() < limit {
            if dry {
                self.fill(connection, limit).await?;
            }
            let Some(Reverse((_, at))) = self.first.pop() else { break };
            let Some(source) = self.sources.get_mut(at) else { break };
            rows.extend(source.waiting.pop_front());
            self.first.extend(source.waiting.front().map(|row| Reverse((row.id(), at))));
            dry = source.is_dry();
        }
        Ok(rows)
    }

    /// Reads on in each transaction of which little waits.
    async fn fill(&mut self, connection: &mut Session, limit: usize) -> Result<(), sqlx::Error> {
        let live = self.sources.iter().filter(|source| source.more).count();
        let each = (limit / live.max(1)).max(1);
        let low = |source: &Source<T>| source.more && source.waiting.len() <= each / 2;
        let places: Vec<usize> =
            self.sources.iter().enumerate().filter(|(_, source)| low(source)).map(|(at, _)| at).collect();
        let chosen = || places.iter().filter_map(|at| self.sources.get(*at));
        let rows = sqlx::query(T::STRAGGLERS)
            .bind(xids(chosen().map(|source| source.xid)))
            .bind(chosen().map(|source| source.read_to).collect::<Vec<_>>())
            .bind(self.up_to)
            .bind(i64::try_from(each).unwrap_or(i64::MAX))
            .bind(&self.must_see)
            .fetch_all(connection)
            .await?;
        let mut counts = vec![0; places.len()];
        for row in &rows {
            let n: i64 = row.try_get("n")?;
            let n = usize::try_from(n - 1).unwrap_or(usize::MAX);
            let (Some(at), Some(count)) = (places.get(n), counts.get_mut(n)) else { continue };
            let Some(source) = self.sources.get_mut(*at) else { continue };
            let item = T::read(row)?;
            if source.waiting.is_empty() {
                self.first.push(Reverse((item.id(), *at)));
            }
            source.read_to = item.id();
            source.waiting.push_back(item);
            *count += 1;
        }
        for (at, count) in places.iter().zip(counts) {
            if let Some(source) = self.sources.get_mut(*at) {
                source.more = count == each;
            }
        }
        Ok(())
    }
}

impl<T> Source<T> {
    fn is_dry(&self) -> bool {
        self.more && self.waiting.is_empty()
    }
}
